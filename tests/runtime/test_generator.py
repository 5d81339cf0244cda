"""TextGenerator on the tiny bundle: every rule, chunks of text, stop words; test_decoding has the tokens."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundles import GENERATOR
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from offramp.runtime import BadInput, BadSetting, TextChunk, TextGenerator, load_generator
from offramp.runtime.rules.speculative import SpeculativeRule
from offramp.runtime.text_chunks import _DecodedText, repeated_tokens

PROMPT = "the film was good and"


@cache
def chunks_of(count: int = 20, **options: Any) -> list[TextChunk]:
    """The chunks of an answer of a session with these options."""
    with load_generator(GENERATOR, **options) as session:
        return list(session.generate(PROMPT, count))


def generate(count: int = 20, **options: Any) -> list[tuple[int, int]]:
    """Token and depth of each token of an answer."""
    return [(chunk.token, chunk.depth) for chunk in chunks_of(count, **options)]


@pytest.fixture(scope="module")
def session():
    with load_generator(GENERATOR, rule="never") as session:
        yield session


@pytest.mark.slow
def test_bundles_own_rule_is_its_gate() -> None:
    tokens = generate()
    assert tokens == generate(rule="gate") == generate(rule="gate", threshold=0.5)
    assert len({depth for _, depth in tokens}) > 1, "the tiny bundle should use more than one exit"
    assert {depth for _, depth in generate(rule="gate", threshold=1.0)} == {3}
    assert {depth for _, depth in generate(rule="gate", threshold=0.0)[1:]} == {1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "pair"), [("fp32", None), ("int8", None), ("fp32", (1, 3)), ("int8", (2, 8))]
)
def test_speculative_gives_the_tokens_of_full_depth(variant: str, pair: tuple[int, int] | None) -> None:
    full = generate(30, rule="never", variant=variant)
    with load_generator(GENERATOR, rule="speculative", variant=variant) as session:
        assert isinstance(session.bound_rule, SpeculativeRule)
        session.bound_rule.fixed = pair
        chunks = list(session.generate(PROMPT, 30))
        assert [(chunk.token, chunk.depth) for chunk in chunks] == full
        stats = session.draft_stats
    assert stats is not None and {depth for _, depth in full} == {3} and len(full) == 30
    assert sum(chunk.drafted for chunk in chunks) == sum(stats.accepted.values())
    assert pair is None or stats.rounds[pair[0]] > 0


@pytest.mark.slow
def test_exit_kv_deferred_and_propagate_differ_after_an_exit() -> None:
    options: dict[str, Any] = {"rule": "gate", "threshold": 0.6}
    deferred, propagated = chunks_of(30, **options), chunks_of(30, **options, exit_kv="propagate")
    assert deferred[0].token == propagated[0].token and len(deferred) == len(propagated) == 30
    assert [chunk.token for chunk in deferred] != [chunk.token for chunk in propagated]
    assert sum(chunk.blocks_run for chunk in deferred) > sum(chunk.depth for chunk in deferred)
    assert all(chunk.blocks_run == chunk.depth for chunk in propagated)


def test_deferred_tokens_have_the_logits_of_full_depth() -> None:
    """Tokens that exit at any depth, then one of full depth: its logits are those of a prompt of them all."""
    with load_generator(GENERATOR, rule="never") as session:
        ids = np.random.default_rng(3).integers(3, 60, 25).tolist()
        engine, sequences = session.engine, []
        for prompt in (ids[:6], ids):
            sequences.append(engine.begin({"input_ids": np.array([prompt], np.int64)}))
            for segment in range(3):
                output = sequences[-1].advance(segment)
        expected = output.hidden.copy()
        exiting = sequences[0]
        for position in range(6, 25):
            exiting.feed(ids[position : position + 1])
            for segment in range(1 + position % 3):
                output = exiting.advance(segment)
                assert segment < 2 or np.allclose(output.hidden[-1], expected[position], atol=1e-4)
        assert exiting.blocks_run < sequences[1].blocks_run
        assert [exiting.waiting(segment) for segment in range(3)] == [0, 1, 0]


def test_cache_grows_while_an_answer_is_generated(session: TextGenerator) -> None:
    sequence = session.engine.begin({"input_ids": np.array([[5] * 40], np.int64)})
    places = sequence.runner.places
    assert 40 <= places <= session.longest == 64
    tokens = list(session.tokens([5] * 40, 1000, ()))
    assert len(tokens) == session.longest - 40 + 1
    with pytest.raises(BadInput, match="65 tokens: this network reads 64, prompt and answer together"):
        list(session.tokens([5] * 65, 1))


@pytest.mark.slow
def test_skip_and_fixed_set_the_depth() -> None:
    assert {depth for _, depth in generate(rule="skip", threshold=2)[1:]} == {2}
    assert {depth for _, depth in generate(rule="fixed", threshold=1)[1:]} == {1}
    assert {depth for _, depth in generate(rule="patience", threshold=1)[1:]} <= {2, 3}
    assert generate(1, rule="skip", threshold=2) == generate(1, rule="never")


def test_chunks_are_the_tokens_and_their_text(session: TextGenerator) -> None:
    chunks = list(session.generate(PROMPT, 12))
    ids = session.encode_prompt(PROMPT)
    assert [chunk.token for chunk in chunks] == [token.id for token in session.tokens(ids, 12)]
    seconds = [chunk.seconds for chunk in chunks]
    assert seconds == sorted(seconds) and seconds[0] > 0
    expected = session._tokenizer.decode([chunk.token for chunk in chunks], skip_special_tokens=True)
    assert "".join(chunk.text for chunk in chunks) == expected


def test_stop_word_ends_the_text_before_it(session: TextGenerator) -> None:
    text = "".join(chunk.text for chunk in session.generate(PROMPT, 30))
    word = text.split()[5]
    expected = text[: text.index(word)]
    for stop in ([word], ["unheard of", word], ["", word]):
        chunks = list(session.generate(PROMPT, 30, stop))
        assert "".join(chunk.text for chunk in chunks) == expected
        assert all(chunk.token >= 0 for chunk in chunks) and len(chunks) < 30


def test_text_that_may_begin_a_stop_word_is_held_back_to_the_end(session: TextGenerator) -> None:
    plain = list(session.generate(PROMPT, 8))
    held = list(session.generate(PROMPT, 8, ["x" * 1000]))
    assert [chunk.text for chunk in held[:-1]] == [""] * 7 and len(held) == 8
    assert held[-1].text == "".join(chunk.text for chunk in plain)


def test_stop_id_of_the_bundle_ends_the_answer_with_an_empty_chunk(session: TextGenerator) -> None:
    plain = list(session.generate(PROMPT, 8))
    stop = plain[4].token
    end = [chunk.token for chunk in plain].index(stop)
    with load_generator(GENERATOR, rule="never") as other:
        other._stop_ids = frozenset({stop})
        chunks = list(other.generate(PROMPT, 8))
    assert [chunk.token for chunk in chunks] == [chunk.token for chunk in plain[: end + 1]]
    assert chunks[-1].text == "" and [chunk.text for chunk in chunks[:-1]] == [c.text for c in plain[:end]]


def ends(chunks: list[TextChunk]) -> str | None:
    """Why an answer ended; no chunk but the last may say it."""
    assert [chunk.ended for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    return chunks[-1].ended


@pytest.mark.parametrize("rule", ["never", "speculative", "fixed"])
def test_the_last_chunk_says_why_the_answer_ended(rule: str) -> None:
    with load_generator(GENERATOR, rule=rule, threshold=1 if rule == "fixed" else None) as session:
        plain = list(session.generate(PROMPT, 8))
        assert ends(plain) == "length" and len(plain) == 8
        word = "".join(chunk.text for chunk in plain).split()[2]
        assert ends(list(session.generate(PROMPT, 8, [word]))) == "stop"
        assert ends(list(session.generate(PROMPT, 1))) == "length"
        long = list(session.generate(PROMPT, 1000))
        assert ends(long) == "context"
        assert len(session.encode_prompt(PROMPT)) + len(long) == session.longest + 1
        session._stop_ids = frozenset({plain[-1].token})
        assert ends(list(session.generate(PROMPT, 1000))) == "stop"


def test_prompt_that_fills_the_network_ends_by_context(session: TextGenerator) -> None:
    (token,) = session.tokens([5] * session.longest, 9, ())
    assert token.ended == "context"


@pytest.mark.parametrize(
    ("ids", "repeated"),
    [
        ([7] * 24, 23),
        ([7] * 23, 0),
        ([1, 2, 3] + [4, 5] * 12, 22),
        ([1, 2, 3] + [4, 5] * 12 + [4], 23),
        ([*range(10)] * 3, 20),
        ([*range(10)] * 2 + [*range(9)], 0),
        ([4, 5] * 20 + [6], 0),
        ([*range(100)], 0),
        ([], 0),
        ([3], 0),
    ],
    ids=[
        "one token",
        "too short",
        "two",
        "cut off",
        "ten",
        "two copies",
        "left again",
        "none",
        "empty",
        "single",
    ],
)
def test_tokens_that_only_repeat_are_counted(ids: list[int], repeated: int) -> None:
    assert repeated_tokens(ids) == repeated


def test_repeated_tokens_agree_with_the_definition() -> None:
    random = np.random.default_rng(1)
    for _ in range(300):
        size = int(random.integers(1, 12))
        ids = [
            *random.integers(0, 3, 10),
            *np.tile(random.integers(0, 3, size), 8)[: random.integers(20, 60)],
        ]
        best = 0
        for period in range(1, len(ids)):
            same = next(
                (n for n in range(len(ids) - period) if ids[-1 - n] != ids[-1 - n - period]),
                len(ids) - period,
            )
            if same + period >= max(3 * period, 24):
                best = max(best, same)
        assert repeated_tokens(ids) == best


def test_template_and_arguments_are_for_messages(session: TextGenerator) -> None:
    messages = [{"role": "user", "content": "the film"}]
    arguments = {"enable_thinking": False}
    assert session.templates == ("default",)
    ids = session.encode_prompt(messages, template="default", template_arguments=arguments)
    assert ids == session.encode_prompt(messages)
    chunks = list(session.generate(messages, 6, template_arguments=arguments))
    assert [chunk.token for chunk in chunks] == [token.id for token in session.tokens(ids, 6)]
    for options in ({"template": "default"}, {"template_arguments": arguments}):
        with pytest.raises(BadInput, match="are for messages, and the prompt is a text"):
            session.generate(PROMPT, **options)  # type: ignore[arg-type]


def test_prompt_may_be_messages(session: TextGenerator) -> None:
    messages = [{"role": "user", "content": "the film"}, {"role": "user", "content": "was good"}]
    ids = session.encode_prompt(messages)
    assert ids == session.encode_continuation("the film was good the") != session.encode_prompt("the film")
    assert [chunk.token for chunk in session.generate(messages, 6)] == [t.id for t in session.tokens(ids, 6)]


def test_bad_prompts_and_sizes_are_refused(session: TextGenerator) -> None:
    with pytest.raises(BadSetting, match="max_new_tokens 0: expected a whole number, 1 or more"):
        session.generate(PROMPT, 0)
    with pytest.raises(BadSetting, match="length 0: expected 1 or more"):
        session.warm_up([4, 0])
    with pytest.raises(BadInput, match="expected a string or messages, found 7"):
        session.generate(7)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="the prompt has no token"):
        list(session.tokens([], 3))


def test_warm_up_cuts_lengths_to_the_longest_input() -> None:
    with load_generator(GENERATOR, rule="speculative", lazy=True) as session:
        session.warm_up([3, 500])
        assert session.draft_stats is session.bound_rule
    with load_generator(GENERATOR, rule="never") as session:
        assert session.draft_stats is None and session.longest == 64


def test_sessions_of_one_bundle_are_used_in_turns(session: TextGenerator) -> None:
    texts = [PROMPT, "a bad plot"]
    expected = [[chunk.token for chunk in session.generate(text, 10)] for text in texts]
    generators = [session.generate(text, 10) for text in texts]
    tokens: list[list[int]] = [[], []]
    for _ in range(10):
        for answer, generator in zip(tokens, generators, strict=True):
            answer.append(next(generator).token)
    assert tokens == expected


def byte_tokenizer() -> Tokenizer:
    """A tokenizer of single bytes, so that most characters of a text are several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def spaced_tokenizer() -> Tokenizer:
    """A tokenizer whose first word of a text loses its space, and a token of nothing but a space."""
    words = ["▁the", "▁film", "s", "▁", "▁good", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def streamed(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[str], str]:
    """The complete text after each token, and all of the text."""
    text, complete = _DecodedText(tokenizer), []
    for id in ids:
        text.add(id)
        complete.append(text.complete())
    return complete, text.all()


def decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize(
    "tokenizer",
    [Tokenizer.from_file(str(GENERATOR / "tokenizer.json")), byte_tokenizer(), spaced_tokenizer()],
    ids=["tiny bundle", "bytes", "spaces"],
)
def test_incremental_text_of_random_tokens_equals_the_decoder(tokenizer: Tokenizer) -> None:
    random = np.random.default_rng(0)
    for _ in range(40):
        ids = random.integers(0, tokenizer.get_vocab_size(), random.integers(1, 60)).tolist()
        complete, text = streamed(tokenizer, ids)
        assert text == decoded(tokenizer, ids)
        for before, after in zip(complete, [*complete[1:], text], strict=True):
            assert after.startswith(before), "text that was given out changed"


def test_incremental_text_waits_for_all_bytes_of_a_character() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("aé😀b").ids
    assert len(ids) == 8
    complete, text = streamed(tokenizer, ids)
    assert complete == ["a", "a", "aé", "aé", "aé", "aé", "aé😀", "aé😀b"] and text == "aé😀b"
    complete, text = streamed(tokenizer, ids[:5])
    assert complete[-1] == "aé" and text == decoded(tokenizer, ids[:5]) != "aé", (
        "the end has all that is left"
    )


def test_incremental_text_of_byte_fallback_tokens() -> None:
    """A tokenizer that spells what it does not know in bytes, as those of Llama."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁film": 256, "s": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    ids = [256, *"é😀".encode(), 257, *"ï".encode(), 256]
    complete, text = streamed(tokenizer, ids)
    assert text == decoded(tokenizer, ids) == "filmé😀sï film"
    expected = ["film", "film", "filmé", *["filmé"] * 3, "filmé😀", "filmé😀s", "filmé😀s", "filmé😀sï"]
    assert complete == [*expected, "filmé😀sï film"]


def test_incremental_text_passes_tokens_without_text() -> None:
    tokenizer = byte_tokenizer()
    end = tokenizer.token_to_id("<end>")
    first, second = tokenizer.encode("é").ids
    assert streamed(tokenizer, [end, first, end, second, end, *tokenizer.encode("x").ids]) == (
        ["", "", "", "é", "é", "éx"],
        "éx",
    )
    assert streamed(tokenizer, [end, end]) == (["", ""], "")
    assert streamed(tokenizer, []) == ([], "")


def test_incremental_text_keeps_spaces_between_words() -> None:
    tokenizer = spaced_tokenizer()
    ids = [tokenizer.token_to_id(word) for word in ("▁the", "▁film", "s", "▁", "▁good")]
    complete, text = streamed(tokenizer, ids)
    assert text == decoded(tokenizer, ids) and text.startswith("the films")
    assert complete[:3] == ["the", "the film", "the films"]


def test_incremental_text_decodes_a_few_tokens_at_a_time() -> None:
    tokenizer, lengths = byte_tokenizer(), []

    class Counting:
        def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
            lengths.append(len(ids))
            return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    text = "naïve 😀 films " * 20
    assert streamed(Counting(), tokenizer.encode(text).ids)[1] == text  # type: ignore[arg-type]
    assert max(lengths) <= 8


def test_manifest_of_the_tiny_generator_has_what_these_tests_need() -> None:
    manifest = json.loads(Path(GENERATOR, "manifest.json").read_text(encoding="utf-8"))
    assert manifest["decoder"]["cache_fills"] and manifest["decoder"]["draft"]
    assert [segment["blocks"] for segment in manifest["segments"]] == [[1], [2], [3]]
