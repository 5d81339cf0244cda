"""Prompts of chats have the ids that transformers makes, with templates of every form and place."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
from chat_folders import BARE, CHATML, FORMS, TOKENS, TOOLS, chat_folder, edit_json
from tiny_bundles import GENERATOR
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from offramp.export.chat import ChatFacts, read_chat
from offramp.runtime.bundle.files import Bundle, open_bundle
from offramp.runtime.bundle.manifest import FileFact
from offramp.runtime.errors import BadInput
from offramp.runtime.inputs.chat import ChatTemplate
from offramp.runtime.inputs.text import encode_prompt

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Das Wetter für <b>heute</b> & 'morgen'",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
QUESTION = [{"role": "user", "content": "  What is the weather in Köln? <3 "}]
TURNS = [*QUESTION, {"role": "assistant", "content": " good "}, {"role": "user", "content": "And\ntoday?"}]
SYSTEM = [{"role": "system", "content": "You are a critic."}, *TURNS]
PARTS = [{"role": "user", "content": [{"type": "text", "text": " one"}, {"type": "text", "text": "two "}]}]
CALLS = [
    *QUESTION,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}],
    },
    {"role": "tool", "content": "rain"},
]
THOUGHTS = [*QUESTION, {"role": "assistant", "content": "good", "reasoning": "It is warm."}]
DOCUMENTS = [{"title": "A", "text": "warm"}, {"title": "B", "text": "cold"}]
CASES: list[tuple[str, Any, dict[str, Any]]] = [
    *((form, TURNS, {}) for form in FORMS),
    *((form, SYSTEM, {}) for form in FORMS if form != "gemma"),
    ("chatml", TURNS, {"add_generation_prompt": False}),
    ("phi3", QUESTION, {"add_generation_prompt": False}),
    ("llama3", QUESTION, {"bos_token": "<s>"}),
    ("gemma", PARTS, {}),
    ("bare", PARTS[:0] + QUESTION, {"unknown": [1, {"a": None}]}),
    ("qwen3", TURNS, {"enable_thinking": False}),
    ("qwen3", TURNS, {"enable_thinking": True}),
    ("qwen3", TURNS, {"tools": [WEATHER, WEATHER]}),
    ("qwen3", THOUGHTS, {"add_generation_prompt": False}),
    ("tools", QUESTION, {"tools": [WEATHER], "documents": DOCUMENTS}),
    ("tools", CALLS, {"tools": [WEATHER]}),
]


def read(folder: Path) -> ChatFacts:
    return read_chat(folder, Tokenizer.from_file(str(folder / "tokenizer.json")))


def bundle_of(model: Path, folder: Path) -> Bundle:
    """A bundle without graphs, with the chat templates and special tokens of a model's folder."""
    facts, manifest = read(model), open_bundle(GENERATOR).manifest
    files = {name: fact for name, fact in manifest.files.items() if not name.endswith(".jinja")}
    folder.mkdir()
    for name, data in facts.files.items():
        (folder / name).write_bytes(data)
        files[name] = FileFact(hashlib.sha256(data).hexdigest(), len(data))
    provenance = {"special_tokens": dict(facts.special_tokens)}
    return Bundle(folder, dataclasses.replace(manifest, files=files, provenance=provenance))


def our_ids(model: Path, messages: Any, folder: Path, **options: Any) -> list[int]:
    template = ChatTemplate(bundle_of(model, folder))
    try:
        prompt = template(messages, **options)
    finally:
        template.close()
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return encode_prompt(tokenizer, prompt, special_tokens=False)


def right_ids(model: Path, messages: Any, **options: Any) -> list[int]:
    """The ids that transformers makes."""
    options = {"add_generation_prompt": True, "return_dict": False, **options}
    ids: list[int] = AutoTokenizer.from_pretrained(model).apply_chat_template(
        messages, tokenize=True, **options
    )
    return ids


@pytest.mark.parametrize(
    ("form", "messages", "arguments"), CASES, ids=[f"{n} {case[0]}" for n, case in enumerate(CASES)]
)
def test_ids_of_a_chat_are_those_of_transformers(
    form: str, messages: Any, arguments: dict[str, Any], tmp_path: Path
) -> None:
    model = chat_folder(tmp_path / "model", *FORMS[form])
    right = right_ids(model, messages, **arguments)
    assert our_ids(model, messages, tmp_path / "bundle", arguments=arguments) == right
    assert len(right) > 10 and (form == "bare" or any(id < len(TOKENS) for id in right))


@pytest.mark.parametrize(
    ("form", "messages", "reason"),
    [("gemma", SYSTEM, "no system role here"), ("mistral", TURNS[1:], "roles must alternate")],
)
def test_what_a_template_refuses_is_refused_as_in_transformers(
    form: str, messages: Any, reason: str, tmp_path: Path
) -> None:
    model = chat_folder(tmp_path / "model", *FORMS[form])
    with pytest.raises(Exception, match=reason):
        right_ids(model, messages)
    with pytest.raises(BadInput, match=reason):
        our_ids(model, messages, tmp_path / "bundle")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["jinja", "config", "config list", "chat_template.json", "additional"])
def test_templates_are_read_from_every_place(place: str, tmp_path: Path) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    model = chat_folder(tmp_path / "model", CHATML if place == "jinja" else None, tokens)
    config = model / "tokenizer_config.json"
    assert (model / "chat_template.jinja").exists() == (place == "jinja")
    by_name = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TOOLS}]
    if place == "config":
        edit_json(config, chat_template=CHATML)
    elif place == "config list":
        edit_json(config, chat_template=by_name)
    elif place == "chat_template.json":
        edit_json(model / "chat_template.json", chat_template=CHATML)
    elif place == "additional":
        edit_json(config, chat_template="replaced by the files")
        (model / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
        (model / "additional_chat_templates").mkdir()
        (model / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS, encoding="utf-8")
    has_two = place in ("config list", "additional")
    expected = {"default": CHATML} | ({"tool_use": TOOLS} if has_two else {})
    facts = read(model)
    assert facts.templates == expected and facts.notes == () and facts.special_tokens == tokens
    assert facts.files["chat_template.jinja"] == CHATML.encode()
    assert our_ids(model, QUESTION, tmp_path / "plain") == right_ids(
        model, QUESTION, **({"chat_template": CHATML} if place == "chat_template.json" else {})
    )
    if has_two:
        tools: dict[str, Any] = {"tools": [WEATHER]}
        named = right_ids(model, QUESTION, chat_template="tool_use")
        assert our_ids(model, QUESTION, tmp_path / "named", template="tool_use") == named
        with_tools = right_ids(model, QUESTION, **tools)
        assert our_ids(model, QUESTION, tmp_path / "tools", arguments=tools) == with_tools != named


def test_templates_without_a_default_are_asked_for_by_name(tmp_path: Path) -> None:
    model = chat_folder(tmp_path / "model", {"first": BARE, "second": CHATML})
    assert list(read(model).files) == ["chat_template_first.jinja", "chat_template_second.jinja"]
    with pytest.raises(BadInput, match="no default chat template; name one of first, second"):
        our_ids(model, QUESTION, tmp_path / "plain")
    assert our_ids(model, QUESTION, tmp_path / "named", template="second") == right_ids(
        model, QUESTION, chat_template="second"
    )


def test_a_folder_without_template_or_tokens_has_none(tmp_path: Path) -> None:
    facts = read(chat_folder(tmp_path / "model", None))
    assert (facts.templates, facts.special_tokens, facts.files) == ({}, {}, {})


@pytest.mark.parametrize("name", ["../tool", "a b", "a/b", "", "x" * 80])
def test_a_template_name_that_is_no_file_name_is_refused(name: str, tmp_path: Path) -> None:
    model = chat_folder(tmp_path / "model", None)
    edit_json(model / "tokenizer_config.json", chat_template=[{"name": name, "template": BARE}])
    with pytest.raises(ValueError, match="a name has up to 60 letters, digits"):
        read(model)


def test_a_tokenizer_that_makes_other_ids_than_transformers_is_named(tmp_path: Path) -> None:
    model = chat_folder(tmp_path / "model", None, {"bos_token": "<s>"})
    other = Tokenizer.from_file(str(model / "tokenizer.json"))
    other.post_processor = None  # type: ignore[assignment]
    (note,) = read_chat(model, other).notes
    assert "tokenizer.json makes other ids of" in note and "save_pretrained" in note


def test_a_token_that_only_transformers_adds_is_named(tmp_path: Path) -> None:
    model = chat_folder(tmp_path / "model", None)
    edit_json(model / "tokenizer_config.json", pad_token="<only here>")
    (note,) = read(model).notes
    assert "tokenizer.json makes other ids of 'a <only here> b' than" in note


def test_a_text_that_transformers_writes_otherwise_is_named(tmp_path: Path) -> None:
    model = chat_folder(tmp_path / "model", None)
    cleanup = "clean_up_tokenization_spaces"
    forced = {f"{cleanup}_for_bpe_even_though_it_will_corrupt_output": True}  # the tokenizer is one of pairs
    edit_json(model / "tokenizer_config.json", **{cleanup: True}, **forced)
    (note,) = read(model).notes
    assert 'as "It is n\'t , or is it ?", and' in note and 'as "It isn\'t, or is it?"' in note


class Failing:
    """A tokenizer of the library that raises what its Rust code raises."""

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        return {}

    def encode(self, *arguments: Any, **options: Any) -> Any:
        raise Exception("no such piece")  # as the library does


def test_a_tokenizer_that_fails_at_a_text_is_a_bad_folder(tmp_path: Path) -> None:
    failing: Any = Failing()
    with pytest.raises(ValueError, match="its tokenizer fails at a text: no such piece"):
        read_chat(chat_folder(tmp_path / "model", None), failing)


def test_special_tokens_that_transformers_splits_are_named(tmp_path: Path) -> None:
    model = chat_folder(tmp_path / "model", None, {"eos_token": "</s>"})
    edit_json(model / "tokenizer_config.json", split_special_tokens=True)
    (note,) = read(model).notes
    assert "sets split_special_tokens" in note and note.endswith("Set it to false to have the same ids")
