"""Caches that grow in place: slots of several sequences, steps on several of them, and their memory."""

from __future__ import annotations

import gc
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tiny_bundles import GENERATOR, GENERATOR_NATIVE

from offramp.runtime import load_generator
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import FILE_NAME
from offramp.runtime.engines import ort_decoder, ort_slots
from offramp.runtime.engines.base import EngineOptions, open_engine
from offramp.runtime.errors import BadInput, EngineUnavailable, OutOfMemory
from offramp.runtime.sequence import KEPT_TOKENS, TokenSequence

SEGMENTS = 3


@pytest.fixture
def engine() -> Iterator[Any]:
    engine = open_engine(open_bundle(GENERATOR_NATIVE), "fp32", EngineOptions())
    yield engine
    engine.close()


def random_ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 60, count).tolist()


def prompted(engine: Any, ids: list[int]) -> TokenSequence:
    """A sequence whose prompt has run all segments."""
    sequence: TokenSequence = engine.begin({"input_ids": np.array([ids], np.int64)})
    for segment in range(SEGMENTS):
        sequence.advance(segment)
    return sequence


def logits_after(engine: Any, ids: list[int]) -> Any:
    """Logits of the last token of ids, from a sequence of its own."""
    sequence = prompted(engine, ids[:-1])
    sequence.feed(ids[-1:])
    for segment in range(SEGMENTS):
        output = sequence.advance(segment)
    logits = sequence.runner.logits(output.exit_hidden)[0].copy()
    engine.drop(sequence)
    return logits


def step_together(engine: Any, sequences: list[Any], ids: list[int], starts: list[int]) -> Any:
    """Logits [n, vocabulary] of a further token of each sequence, all of which run together."""
    slots = engine.slots()
    numbers = [sequence.runner.slot for sequence in sequences]
    hidden = slots.embed_together(ids, starts)
    for segment in range(SEGMENTS):
        output = slots.run_together(segment, numbers, starts, hidden)
        hidden = output.hidden
    return slots.logits(output.exit_hidden).copy()


@pytest.mark.parametrize("chosen", [(0, 1, 2, 3), (1, 2), (0, 3), (2,), (0, 1, 3)])
def test_tokens_of_several_sequences_compute_what_each_does_alone(
    engine: Any, chosen: tuple[int, ...]
) -> None:
    """Lengths differ; sequences between them, which do not take part, are not changed."""
    texts = [random_ids(length, seed=length) for length in (9, 4, 30, 17)]
    expected = [logits_after(engine, text) for text in texts]
    sequences = [prompted(engine, text[:-1]) for text in texts]
    starts = [len(texts[number]) - 1 for number in chosen]
    together = [sequences[number] for number in chosen]
    logits = step_together(engine, together, [texts[number][-1] for number in chosen], starts)
    for row, number in enumerate(chosen):
        np.testing.assert_allclose(logits[row], expected[number], atol=1e-4)
    for number in set(range(4)) - set(chosen):
        sequences[number].feed(texts[number][-1:])
        for segment in range(SEGMENTS):
            output = sequences[number].advance(segment)
        alone = sequences[number].runner.logits(output.exit_hidden)[0]
        np.testing.assert_allclose(alone, expected[number], atol=1e-4)


def test_signals_of_several_sequences_are_in_their_order(engine: Any) -> None:
    texts = [random_ids(6, seed=seed) for seed in range(3)]
    sequences, slots = [prompted(engine, text[:-1]) for text in texts], engine.slots()
    hidden = slots.embed_together([text[-1] for text in texts], [5] * 3).copy()
    alone = [slots.run_together(0, [n], [5], hidden[n : n + 1]) for n in range(3)]
    alone = [tuple(np.copy(part) for part in output if part is not None) for output in alone]
    ends = slots.run_together(0, [0, 2], [5] * 2, hidden[[0, 2]])
    for row, number in enumerate((0, 2)):
        parts = [part for part in ends if part is not None]
        assert len(parts) == 3, "hidden, exit_hidden and gate"
        for part, right in zip(parts, alone[number], strict=True):
            np.testing.assert_allclose(part[row], right[0], atol=1e-5)
    assert all(sequence.runner.slot == number for number, sequence in enumerate(sequences))


def test_the_lowest_free_slot_is_taken(engine: Any) -> None:
    sequences = [prompted(engine, [5, 6]) for _ in range(3)]
    assert [sequence.runner.slot for sequence in sequences] == [0, 1, 2]
    assert engine.slots().slots == 4
    engine.drop(sequences[1])
    engine.drop(sequences[1])
    assert prompted(engine, [5, 6]).runner.slot == 1  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_sequence_that_is_garbage_gives_its_slot_back(engine: Any) -> None:
    prompted(engine, [5, 6])
    gc.collect()
    assert prompted(engine, [5, 6]).runner.slot == 0  # type: ignore[attr-defined]


def test_a_prompt_that_is_too_long_gives_its_slot_back_while_its_error_is_kept(engine: Any) -> None:
    with pytest.raises(BadInput) as kept:
        engine.begin({"input_ids": np.array([random_ids(65)], np.int64)})
    assert prompted(engine, [5, 6]).runner.slot == 0  # type: ignore[attr-defined]
    assert kept.value.__traceback__ is not None


def test_an_answer_gives_its_slot_back() -> None:
    with load_generator(GENERATOR_NATIVE) as session:
        answer = session.generate("the film", 9)
        next(answer)
        for _ in range(3):
            list(session.generate("the plot was", 3))
        assert session.engine.slots().slots == 2  # type: ignore[attr-defined]


def test_caches_that_grow_in_the_middle_of_a_walk_keep_what_they_hold(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_ids(7)
    expected = logits_after(engine, ids)
    monkeypatch.setattr(ort_slots, "PLACES", 8)
    grown = open_engine(open_bundle(GENERATOR_NATIVE), "fp32", EngineOptions())
    sequence: Any = prompted(grown, ids[:-1])
    sequence.feed(ids[-1:])
    sequence.advance(0)
    assert (grown.slots().slots, grown.slots().places) == (1, 8)  # type: ignore[attr-defined]
    other = prompted(grown, random_ids(40, seed=2))
    assert (grown.slots().slots, grown.slots().places) == (2, 64)  # type: ignore[attr-defined]
    for segment in (1, 2):
        output = sequence.advance(segment)
    np.testing.assert_allclose(sequence.runner.logits(output.exit_hidden)[0], expected, atol=1e-4)
    grown.drop(other)
    grown.close()


def test_a_cache_that_cannot_grow_keeps_what_it_holds(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(7)
    expected, other_expected = logits_after(engine, ids), logits_after(engine, random_ids(30, seed=2))
    monkeypatch.setattr(ort_slots, "PLACES", 8)
    small: Any = open_engine(open_bundle(GENERATOR_NATIVE), "fp32", EngineOptions())
    sequence, slots, make = prompted(small, ids[:-1]), small.slots(), ort_slots._zeros
    sequence.feed(ids[-1:])
    sequence.advance(0)
    tables, shapes = slots.tables, []

    def make_one(shape: tuple[int, ...]) -> Any:
        shapes.append(shape)
        if len(shapes) > 1:
            raise MemoryError
        return make(shape)

    for grow in (lambda: slots.make_room(40), lambda: slots.reserve(40), lambda: prompted(small, [5])):
        shapes.clear()
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(ort_slots, "_zeros", make_one)
            grow()
        assert {array.shape[::2] for array in slots.arrays.values()} == {(1, 8)}
        assert (slots.slots, slots.places) == (1, 8)
        assert slots.tables is tables
    other: Any = prompted(small, random_ids(30, seed=2)[:-1])
    assert other.runner.slot == 1
    for segment in (1, 2):
        output = sequence.advance(segment)
    np.testing.assert_allclose(sequence.runner.logits(output.exit_hidden)[0], expected, atol=1e-4)
    last = random_ids(30, seed=2)[-1]
    np.testing.assert_allclose(step_together(small, [other], [last], [29])[0], other_expected, atol=1e-4)
    small.close()


def test_memory_that_cannot_be_had_is_an_error_of_its_own() -> None:
    with pytest.raises(OutOfMemory, match="generate fewer or shorter texts at once"):
        ort_slots._zeros((1 << 28, 1 << 28))


def test_a_text_makes_room_for_all_its_tokens_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_slots, "PLACES", 8)
    with load_generator(GENERATOR_NATIVE) as session:
        tokens = session.tokens(random_ids(5), 40, ())
        next(tokens)
        slots = session.engine.slots()  # type: ignore[attr-defined]
        version = slots.version
        assert len(list(tokens)) == 39
        assert (slots.places, slots.version) == (46, version)


def test_a_text_for_which_there_is_no_memory_gives_its_slot_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_slots, "PLACES", 8)
    with load_generator(GENERATOR_NATIVE) as session:
        slots = session.engine.slots()  # type: ignore[attr-defined]
        list(session.tokens([5], 1, ()))

        def no_memory(slots: int, places: int) -> None:
            raise MemoryError

        with monkeypatch.context() as patch, pytest.raises(MemoryError) as kept:
            patch.setattr(slots, "_grow", no_memory)
            list(session.tokens([5], 20, ()))
        assert not slots._held
        assert kept.value.__traceback__ is not None


def test_room_is_made_ahead_for_a_limited_number_of_tokens(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_slots, "PLACES", 8)
    monkeypatch.setattr(ort_slots, "RESERVED", 30)
    prompted(engine, random_ids(5)).runner.reserve(50)
    assert engine.slots().places == 31


def test_memory_is_freed_after_a_long_prompt_and_the_text_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def text() -> list[int]:
        with load_generator(GENERATOR_NATIVE, rule="never") as session:
            return [token.id for token in session.tokens(random_ids(20), 12, ())]

    expected, freed = text(), []
    monkeypatch.setattr(ort_decoder, "LONG_PROMPT", 20)
    monkeypatch.setattr(ort_decoder, "free_unused_memory", lambda: freed.append(1))
    with load_generator(GENERATOR_NATIVE, rule="never"):
        when_opened = len(freed)
    freed.clear()
    assert text() == expected
    assert len(freed) == when_opened + 1


def test_a_large_cache_is_a_mapping_of_zeros_that_can_be_written() -> None:
    small, large = ort_slots._zeros((4, 8)), ort_slots._zeros((2**17, 2))
    assert small.base is None
    assert large.base is not None
    assert large.shape == (2**17, 2)
    assert large.dtype == np.float32
    assert not large.any()
    large[-1] = 1
    assert large.sum() == 2


def test_a_prefix_is_copied_to_another_slot(engine: Any) -> None:
    ids = random_ids(20)
    expected = logits_after(engine, ids)
    first, second = prompted(engine, ids[:15]), prompted(engine, [5])
    slots = engine.slots()
    slots.copy_prefix(0, 1, 12)
    hidden = None
    for segment in range(SEGMENTS):
        output = second.runner.run(segment, ids[12:], 12, hidden)
        hidden = output.hidden.copy()
    logits = second.runner.logits(output.exit_hidden)[-1]
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert first.length == 15


def test_large_caches_are_freed_when_no_sequence_uses_them(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_ids(5)
    expected = logits_after(engine, ids)
    assert engine.slots().arrays, "small ones are kept for the next answer"
    monkeypatch.setattr(ort_slots, "IDLE_BYTES", 0)
    first, second = prompted(engine, ids), prompted(engine, ids)
    engine.drop(first)
    assert engine.slots().arrays
    engine.drop(second)
    assert not engine.slots().arrays
    np.testing.assert_allclose(logits_after(engine, ids), expected, atol=1e-5)


@pytest.mark.slow
def test_an_answer_that_is_garbage_may_be_freed_while_a_sequence_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = load_generator(GENERATOR_NATIVE, rule="never")
    slots, ids = session.engine.slots(), random_ids(5)  # type: ignore[attr-defined]
    answer, grow, lengths = session.tokens(ids, 9, ()), slots._grow, []
    next(answer)
    cycle: list[Any] = [answer]
    cycle.append(cycle)

    def collect_and_grow(slots: int, places: int) -> None:
        gc.collect()
        grow(slots, places)

    def generate() -> None:
        lengths.append(len(list(session.tokens(ids, 3, ()))))

    monkeypatch.setattr(slots, "_grow", collect_and_grow)
    del answer, cycle
    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    thread.join(20)
    assert lengths == [3], "the thread waits for a lock that it holds"
    session.close()


@pytest.mark.slow
def test_hidden_states_of_prompts_are_freed_while_texts_run_together() -> None:
    with load_generator(GENERATOR_NATIVE, rule="never") as session:
        batch = session.open_batch(4, prefix_cache=False)
        for seed in range(4):
            batch.add(random_ids(2 * KEPT_TOKENS, seed), 20)
        while batch.under_way < 4:
            batch.advance()
        for _ in range(4 * SEGMENTS):
            batch.advance()
        slots = session.engine.slots()  # type: ignore[attr-defined]
        kept = [o for o in gc.get_objects() if isinstance(o, ort_slots.BoundSteps) and o._slots is slots]
        assert sum(steps._tokens > KEPT_TOKENS for steps in kept) <= 1
        batch.close()


def with_windows(folder: Path) -> Path:
    """A copy of the bundle whose manifest says that a block attends to 8 tokens."""
    shutil.copytree(GENERATOR_NATIVE, folder)
    facts = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    facts["decoder"]["windows"] = [8]
    (folder / FILE_NAME).write_text(json.dumps(facts), encoding="utf-8")
    return folder


def with_small_stem(folder: Path) -> Path:
    """The bundle in place as if its stem had a graph for int8."""
    shutil.copytree(GENERATOR_NATIVE, folder)
    facts = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    facts["stem"]["variants"].setdefault("int8", facts["stem"]["variants"]["fp32"])
    (folder / FILE_NAME).write_text(json.dumps(facts), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("version", "make", "variant", "least"),
    [
        ("1.19.2", None, "fp32", "1.20"),
        ("1.22.1", with_small_stem, "int8", "1.23"),
        ("1.23.2", with_windows, "fp32", "1.24"),
    ],
)
def test_an_older_onnxruntime_is_refused_and_the_cure_is_named(
    version: str,
    make: Callable[[Path], Path] | None,
    variant: str,
    least: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = GENERATOR_NATIVE if make is None else make(tmp_path / "bundle")
    monkeypatch.setattr(onnxruntime, "__version__", version)
    with pytest.raises(EngineUnavailable, match=f"needs onnxruntime {least} or newer, this is .*--portable"):
        open_engine(open_bundle(bundle), variant, EngineOptions())
    open_engine(open_bundle(GENERATOR), variant, EngineOptions(lazy=True)).close()
    monkeypatch.setattr(onnxruntime, "__version__", f"{least}.0")
    open_engine(open_bundle(bundle), variant, EngineOptions(lazy=True)).close()
