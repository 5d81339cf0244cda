"""Tokenizers of hostile bundles: what would grow a text, search it for ever, panic, or give unknown ids."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_bundles import CLASSIFIER, GENERATOR

from offramp.runtime.bundle.files import Bundle, open_bundle
from offramp.runtime.bundle.manifest import FileFact, TextInput
from offramp.runtime.errors import BadBundle, BadInput, ItemError
from offramp.runtime.inputs import tokenizer_checks
from offramp.runtime.inputs.text import TextReader, encode_prompt, open_tokenizer
from offramp.runtime.inputs.tokenizer_checks import check_pattern

Json = dict[str, Any]
Change = Callable[[Json], object]


def bundle_with(folder: Path, change: Change | bytes, source: Path = CLASSIFIER) -> Bundle:
    """A tiny bundle with a changed tokenizer.json, whose size and hash are right."""
    data = change
    if not isinstance(data, bytes):
        value = json.loads((source / "tokenizer.json").read_text("utf-8"))
        change(value)  # type: ignore[operator]
        data = json.dumps(value).encode()
    (folder / "tokenizer.json").write_bytes(data)
    manifest = open_bundle(source).manifest
    files = {**manifest.files, "tokenizer.json": FileFact(hashlib.sha256(data).hexdigest(), len(data))}
    return Bundle(folder, dataclasses.replace(manifest, files=files))


def text_input(bundle: Bundle) -> TextInput:
    facts = bundle.manifest.input
    assert isinstance(facts, TextInput)
    return facts


def replace(pattern: Json, content: str) -> Json:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*parts: Json) -> Json:
    return {"type": "Sequence", "normalizers": list(parts)}


def charsmap(text: bytes) -> str:
    return base64.b64encode((4).to_bytes(4, "little") + bytes(4) + text).decode()


def nested(depth: int) -> Json:
    part: Json = {"type": "Lowercase"}
    for _ in range(depth):
        part = sequence(part)
    return part


def normalizer(part: Json) -> Change:
    return lambda value: value.update(normalizer=part)


def model(**facts: Any) -> Change:
    return lambda value: value["model"].update(facts)


def word(**ids: Any) -> Change:
    return lambda value: value["model"]["vocab"].update(ids)


def template(**facts: Any) -> Change:
    return lambda value: value["post_processor"].update(facts)


A, TENFOLD = {"String": "a"}, "a" * 10
REFUSED: dict[str, tuple[Change | bytes, str]] = {
    "tenfold nine times": (
        normalizer(sequence(*[replace(A, TENFOLD)] * 9)),
        "up to 1000000000 times as long",
    ),
    "tenfold in nested parts": (
        normalizer(sequence(*[sequence(*[replace(A, TENFOLD)] * 3)] * 3)),
        "up to 1000000000 times as long",
    ),
    "one long content": (normalizer(replace(A, "a" * 10**6)), "up to 1000000 times as long"),
    "long content for an empty match": (normalizer(replace({"Regex": "b*"}, "a" * 1000)), "1000 times"),
    "long prefix": (normalizer({"type": "Prepend", "prepend": "a" * 10**6}), "times as long"),
    "long text in a map": (
        normalizer({"type": "Precompiled", "precompiled_charsmap": charsmap(b"a" * 10**5 + b"\0")}),
        "100000 times as long",
    ),
    "map that is cut": (
        normalizer({"type": "Precompiled", "precompiled_charsmap": "BAAAAA=="}),
        "precompiled_charsmap",
    ),
    "map that is no base64": (
        normalizer({"type": "Precompiled", "precompiled_charsmap": "?"}),
        r"normalizer\.precompiled_charsmap: not base64",
    ),
    "decoder that grows": (
        lambda value: value.update(
            decoder={"type": "Sequence", "decoders": [replace(A, TENFOLD)] * 9},
        ),
        "decoder: they make a text up to 1000000000 times",
    ),
    "parts 1000 deep": (normalizer(nested(100)), "more than 100 parts, or nested more than 20 deep"),
    "parts without a number": (normalizer(sequence(*[{"type": "Lowercase"}] * 101)), "more than 100 parts"),
    "part that is not known": (normalizer({"type": "Shell"}), r"normalizer\.type: 'Shell' is not known"),
    "repeats of a repeat": (normalizer(replace({"Regex": "(a+)+$"}, "x")), "several ways"),
    "repeats of alternatives": (
        lambda value: value.update(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(?:a|a)*b"},
                "behavior": "Isolated",
                "invert": False,
            }
        ),
        r"pre_tokenizer\.pattern: it repeats a group",
    ),
    "model type that is not known": (model(type="Shell"), "not a tokenizer"),
    "dropout": (model(dropout=0.5), r"model\.dropout: answers would depend on chance"),
    "words of any length": (model(max_input_chars_per_word=10**9), "max_input_chars_per_word: at most 1000"),
    "id of 2^32 - 1": (word(zzz=2**32 - 1), "id 4294967295 is beyond the network's"),
    "id of 10^30": (word(zzz=10**30), "is beyond the network's"),
    "negative id": (word(zzz=-1), "id -1 is beyond"),
    "id that is a text": (word(zzz="5"), "id 5 is beyond"),
    "added id beyond": (
        lambda value: value["added_tokens"].append({"id": 10**6, "content": "x"}),
        r"added_tokens\[0\]\.id: id 1000000",
    ),
    "special id beyond": (
        template(special_tokens={"[CLS]": {"id": "[CLS]", "ids": [10**6], "tokens": ["[CLS]"]}}),
        r"special_tokens\['\[CLS\]'\]\.ids: id 1000000",
    ),
    "template of 10^5 tokens": (
        template(single=[{"SpecialToken": {"id": "[CLS]", "type_id": 0}}] * 10**5),
        "post_processor.single: expected a list of at most 100",
    ),
    "vocabulary twice": (b'{"model": {"vocab": {"a": 0, "a": 1}}}', "the same key twice"),
    "no vocabulary": (b'{"model": {}}', r"model\.vocab: expected an object or a list"),
    "list": (b"[1]", "expected an object"),
    "JSON 10^5 deep": (b"[" * 10**5 + b"]" * 10**5, "nested too deeply"),
    "no JSON": (b"{", "not a tokenizer"),
    "bytes that are not UTF-8": (b"\xff\xfe", "not a tokenizer"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_hostile_tokenizer_is_refused(name: str, tmp_path: Path) -> None:
    change, refusal = REFUSED[name]
    bundle = bundle_with(tmp_path, change)
    with pytest.raises(BadBundle, match=refusal) as caught:
        open_tokenizer(bundle, text_input(bundle))
    message = str(caught.value)
    assert "tokenizer.json: " in message and message.isprintable() and len(message) < 600


def test_tokenizer_larger_than_any_is_not_read(tmp_path: Path) -> None:
    bundle = open_bundle(CLASSIFIER)
    files = {**bundle.manifest.files, "tokenizer.json": FileFact("", tokenizer_checks.LARGEST_FILE + 1)}
    large = Bundle(tmp_path, dataclasses.replace(bundle.manifest, files=files))
    with pytest.raises(BadBundle, match="a tokenizer has at most"):
        open_tokenizer(large, text_input(large))


def panics_at_every_text() -> Change:
    """A template with a token that it does not define: the library's Rust code panics."""
    return template(single=[{"SpecialToken": {"id": "[X]", "type_id": 0}}])


def panics_at_pairs() -> Change:
    return template(pair=[{"SpecialToken": {"id": "[X]", "type_id": 0}}])


def test_panic_of_the_library_is_an_error_of_the_item(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reader = TextReader(bundle_with(tmp_path, panics_at_every_text()))
    for items in (["good"], ["good", "bad"]):
        rows = reader.read(items)
        assert [isinstance(row, ItemError) for row in rows] == [True] * len(items)
        assert "the tokenizer fails at 'good'" in rows[0].message  # type: ignore[union-attr]
    capfd.readouterr()  # the library prints where it panicked


def test_panic_at_one_item_does_not_cost_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reader = TextReader(bundle_with(tmp_path, panics_at_pairs()))
    rows = reader.read(["good", ("good", "bad"), "bad"])
    assert [isinstance(row, ItemError) for row in rows] == [False, True, False]
    capfd.readouterr()


def test_panic_at_a_prompt_is_bad_input(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle = bundle_with(tmp_path, panics_at_every_text(), GENERATOR)
    tokenizer = open_tokenizer(bundle, text_input(bundle))
    try:
        with pytest.raises(BadInput, match="the tokenizer fails at 'film'"):
            encode_prompt(tokenizer, "film")
    finally:
        capfd.readouterr()


def test_panic_at_reading_is_a_bad_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("offramp.runtime.inputs.text.check_tokenizer", lambda text, size: None)
    part = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    bundle = bundle_with(tmp_path, normalizer(part))
    with pytest.raises(BadBundle, match=r"tokenizer\.json: not a tokenizer that `tokenizers` reads"):
        open_tokenizer(bundle, text_input(bundle))
    capfd.readouterr()


def test_half_of_a_surrogate_pair_in_a_prompt_is_bad_input() -> None:
    bundle = open_bundle(GENERATOR)
    with pytest.raises(BadInput, match="half of a surrogate pair"):
        encode_prompt(open_tokenizer(bundle, text_input(bundle)), "film \ud800")


# Those of GPT-2, of the tokenizers with 100,000 and with 200,000 tokens, of BLOOM, and of numbers in threes.
USUAL = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",  # noqa: RUF001
    r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
    r" {2,}",
    r"[0-9][0-9][0-9]",
    r"[]a]+|[^]]",
]
ENDLESS = [
    "(a+)+$",
    "(?:a|a)*b",
    "(?:.?){25}x",
    "(?:a{2,3})+b",
    ".*.*.*x",
    "(?:.*a|b).*.*x",
    r"(a)\1",
    r"(?<n>a)\g<n>",
    r"(?<n>a)\k<n>",
    "(?~ab)",
    "(?(1)a|b)",
    "a{1000000}",
    "(a+)**",
    "(a{3}){3}{3}",
    "[a",
    "(a",
    "a)",
    "\\",
    "(" * 30 + ")" * 30,
    "a" * 20_000,
]


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_pattern_is_taken(pattern: str) -> None:
    check_pattern(pattern)


@pytest.mark.parametrize("pattern", ENDLESS, ids=lambda pattern: pattern[:20])
def test_pattern_without_a_bound_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        check_pattern(pattern)
