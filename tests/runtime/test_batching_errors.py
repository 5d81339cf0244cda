"""Errors in the middle of many texts: the texts of the step that fails end with it, the others go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from failing import failing, failing_once
from fake_decoder import MANIFEST, VOCABULARY, FakeEngine
from fake_slots import SlotEngine
from tiny_bundles import GENERATOR

from offramp.runtime import load_generator
from offramp.runtime.batching import DecodingLoop
from offramp.runtime.decoding import decode
from offramp.runtime.errors import DeviceFailed
from offramp.runtime.rules import RuleSpec, bind
from offramp.runtime.text_chunks import AnswerText

NEVER: Any = bind(RuleSpec("never", {}), len(MANIFEST.segments))
PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11]]
TOKENS = 12
PROBLEMS = [RuntimeError("the engine failed"), MemoryError(), OSError("the file is gone"), KeyError("x")]
of_each_kind = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: type(problem).__name__)


def open_loop(engine: Any, **options: Any) -> DecodingLoop:
    return DecodingLoop(engine, [NEVER], MANIFEST, 0, **{"prefix_cache": False, **options})


def alone(prompt: Sequence[int]) -> list[int]:
    return [token.id for token in decode(FakeEngine(), NEVER, MANIFEST, 0, prompt, TOKENS, ())]


def until(loop: DecodingLoop, count: int) -> dict[int, list[Any]]:
    """What comes until so many texts have a token."""
    results: dict[int, list[Any]] = {}
    while len(results) < count:
        collect(loop, results)
    return results


def collect(loop: DecodingLoop, results: dict[int, list[Any]]) -> None:
    for number, result in loop.advance():
        results.setdefault(number, []).append(result)


def finish(loop: DecodingLoop, results: dict[int, list[Any]]) -> None:
    for _ in range(1000):
        if not loop.unfinished:
            return
        collect(loop, results)
    raise AssertionError("texts never end")


def text_of(loop: DecodingLoop, prompt: Sequence[int]) -> list[int]:
    """The tokens of a further text."""
    number, results = loop.add(prompt, TOKENS, ()), dict[int, list[Any]]()
    finish(loop, results)
    return [token.id for token in results[number]]


@of_each_kind
def test_texts_of_a_step_end_with_its_error_and_the_one_that_waits_goes_on(problem: Exception) -> None:
    engine = SlotEngine()
    loop = open_loop(engine, limit=3)
    numbers = [loop.add(prompt, TOKENS, ()) for prompt in PROMPTS]
    results = until(loop, 3)
    engine.slots.run_together = failing_once(engine.slots.run_together, problem)  # type: ignore[method-assign]
    finish(loop, results)
    assert [results[number][-1] for number in numbers[:3]] == [problem] * 3
    assert [token.id for token in results[numbers[3]]] == alone(PROMPTS[3])


def test_slots_of_a_step_that_failed_are_free() -> None:
    engine = SlotEngine()
    loop = open_loop(engine, limit=2)
    for prompt in PROMPTS[:2]:
        loop.add(prompt, TOKENS, ())
    results, problem = until(loop, 2), RuntimeError("the engine failed")
    engine.slots.run_together = failing_once(engine.slots.run_together, problem)  # type: ignore[method-assign]
    finish(loop, results)
    assert not engine.slots.runners
    assert [text_of(loop, prompt) for prompt in PROMPTS[:3]] == [alone(prompt) for prompt in PROMPTS[:3]]


def test_texts_that_wait_for_another_segment_go_on_after_a_step_that_failed() -> None:
    engine, problem = SlotEngine(), RuntimeError("the engine failed")
    loop = open_loop(engine)
    numbers = [loop.add(prompt, TOKENS, ()) for prompt in PROMPTS[:2]]
    results = until(loop, 2)
    while not (loop._walking and not loop._ready):  # both wait for a segment behind the first
        collect(loop, results)
    numbers += [loop.add(prompt, TOKENS, ()) for prompt in PROMPTS[2:]]
    while len(loop._ready) < 2:  # the prompts of the others are run
        collect(loop, results)
    loop._enter()
    assert loop._walk is not None and len({segment for segment, *_ in loop._walk._queues}) == 2
    engine.slots.run_together = failing_once(engine.slots.run_together, problem)  # type: ignore[method-assign]
    finish(loop, results)
    assert [number for number in numbers if results[number][-1] is problem] == numbers[2:]
    for number, prompt in zip(numbers[:2], PROMPTS[:2], strict=True):
        assert [token.id for token in results[number]] == alone(prompt)


@of_each_kind
def test_a_prompt_that_fails_ends_alone(problem: Exception) -> None:
    engine = SlotEngine()
    loop = open_loop(engine)
    numbers = [loop.add(prompt, TOKENS, ()) for prompt in PROMPTS[:2]]
    results = until(loop, 2)
    begin, engine.begin = engine.begin, failing_once(engine.begin, problem)  # type: ignore[method-assign]
    bad = loop.add(PROMPTS[2], TOKENS, ())
    finish(loop, results)
    engine.begin = begin  # type: ignore[method-assign]
    assert results[bad] == [problem]
    assert [[token.id for token in results[number]] for number in numbers] == [*map(alone, PROMPTS[:2])]


@of_each_kind
def test_a_text_that_is_run_by_itself_fails_alone(problem: Exception) -> None:
    engine = FakeEngine()  # its sequences share no cache
    loop = open_loop(engine)
    numbers = [loop.add(prompt, TOKENS, ()) for prompt in PROMPTS[:3]]
    results = until(loop, 3)
    step, engine.step = engine.step, failing_once(engine.step, problem)  # type: ignore[method-assign]
    finish(loop, results)
    engine.step = step  # type: ignore[method-assign]
    assert [number for number in numbers if results[number][-1] is problem] == numbers[:1]
    assert [token.id for token in results[numbers[2]]] == alone(PROMPTS[2])


def test_a_choice_that_fails_ends_its_text_alone() -> None:
    loop, problem = open_loop(SlotEngine()), RuntimeError("the sampler failed")
    numbers = [loop.add(prompt, TOKENS, ()) for prompt in PROMPTS[:3]]
    results = until(loop, 3)
    loop._choose = failing_once(loop._choose, problem)  # type: ignore[method-assign]
    finish(loop, results)
    assert [number for number in numbers if results[number][-1] is problem] == numbers[:1]
    assert [token.id for token in results[numbers[1]]] == alone(PROMPTS[1])


def test_texts_that_cannot_join_a_step_end() -> None:
    engine = SlotEngine()
    loop, problem = open_loop(engine), RuntimeError("no such token")
    numbers = [loop.add(prompt, TOKENS, ()) for prompt in PROMPTS[:2]]
    results = until(loop, 2)
    sequence: Any = loop._texts[numbers[1]].sequence
    sequence.feed = failing_once(sequence.feed, problem)
    finish(loop, results)
    assert [results[number][-1] for number in numbers] == [problem] * 2
    assert not engine.slots.runners and text_of(loop, PROMPTS[0]) == alone(PROMPTS[0])


def test_a_walk_that_cannot_choose_a_step_ends_all_its_texts() -> None:
    engine = SlotEngine()
    loop, problem = open_loop(engine), RuntimeError("the walk failed")
    numbers = [loop.add(prompt, TOKENS, ()) for prompt in PROMPTS[:2]]
    results = until(loop, 2)
    walk: Any = loop._walk
    choose, walk.largest_queue = walk.largest_queue, failing(problem)
    finish(loop, results)
    walk.largest_queue = choose
    assert [results[number][-1] for number in numbers] == [problem] * 2
    assert not engine.slots.runners and text_of(loop, PROMPTS[0]) == alone(PROMPTS[0])


def test_a_prefix_that_cannot_be_copied_leaves_its_slot_free() -> None:
    engine, system = SlotEngine(), np.random.default_rng(1).integers(0, VOCABULARY, 50).tolist()
    loop = open_loop(engine, prefix_cache=True)
    loop.add([*system, 1], TOKENS, ())
    results, problem = until(loop, 1), MemoryError()
    engine.slots.copy_prefix = failing_once(engine.slots.copy_prefix, problem)  # type: ignore[method-assign]
    bad = loop.add([*system, 2], TOKENS, ())
    finish(loop, results)
    loop.close()
    assert results[bad] == [problem] and not engine.slots.runners


def test_an_error_that_comes_after_the_end_of_a_text_is_raised() -> None:
    engine = FakeEngine()
    loop, problem = open_loop(engine), DeviceFailed("the cache cannot be freed")
    loop.add(PROMPTS[0], 1, ())
    engine.drop = failing(problem)  # type: ignore[method-assign]
    with pytest.raises(DeviceFailed, match="the cache cannot be freed"):
        loop.advance()


def test_a_token_that_has_no_text_ends_its_answer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = RuntimeError("the tokenizer failed")
    with load_generator(GENERATOR) as session:
        prompts = [session.encode_prompt(prompt) for prompt in ("the film was", "a plot")]
        batch = session.open_batch(2)
        numbers = [batch.add(ids, 6) for ids in prompts]
        monkeypatch.setattr(AnswerText, "chunk", failing_once(AnswerText.chunk, problem))
        results: dict[int, list[Any]] = {}
        while batch.unfinished:
            for number, result in batch.advance():
                results.setdefault(number, []).append(result)
        batch.close()
        expected = [chunk.text for chunk in session.generate("a plot", 6)]
    assert results[numbers[0]] == [problem]
    assert [chunk.text for chunk in results[numbers[1]]] == expected
