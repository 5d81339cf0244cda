"""Many texts at once, on a decoder in numpy: each text is the one that it is alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from fake_decoder import BLOCKS, LONGEST, MANIFEST, VOCABULARY, FakeEngine
from fake_slots import SlotEngine

from offramp.runtime import batching, decoding
from offramp.runtime.batching import DecodingLoop
from offramp.runtime.decoding import Token, decode
from offramp.runtime.errors import BadInput, BadSetting
from offramp.runtime.rules import RuleSpec, bind
from offramp.runtime.rules.base import full_plan, never_exits
from offramp.runtime.sampling import Sampling

SEGMENTS = len(BLOCKS)
NEVER: tuple[str, dict[str, float]] = ("never", {})
RULES: list[tuple[str, dict[str, float]]] = [
    NEVER,
    ("fixed", {"exit": 2}),
    ("gate", {"threshold": 0.6}),
    ("patience", {"patience": 1}),
    ("margin", {"threshold": 0.2}),
    ("skip", {"segments": 2}),
    ("speculative", {}),
]
Request = tuple[list[int], int]  # a prompt, and the limit of tokens of its answer


def rule_of(rule: tuple[str, Mapping[str, float]]) -> Any:
    return bind(RuleSpec(*rule), SEGMENTS)


def requests(count: int, seed: int = 0, longest: int = 40) -> list[Request]:
    """Random prompts of mixed lengths, and limits of their answers."""
    random = np.random.default_rng(seed)
    return [
        (
            random.integers(0, VOCABULARY, random.integers(1, longest)).tolist(),
            int(random.integers(1, 25)),
        )
        for _ in range(count)
    ]


def alone(
    request: Request, rule: Any, *, propagate: bool = False, stop_ids: Any = (), sampling: Any = None
) -> list[Token]:
    """The tokens that decode() generates."""
    sampler = None if sampling is None else sampling.sampler(request[0])
    engine = FakeEngine(propagate=propagate)
    return list(decode(engine, rule_of(rule), MANIFEST, 0, request[0], request[1], stop_ids, sampler))


def open_loop(engine: Any, *rules: Any, **options: Any) -> DecodingLoop:
    return DecodingLoop(engine, [rule_of(rule) for rule in rules or (NEVER,)], MANIFEST, 0, **options)


def finish(loop: DecodingLoop, results: dict[int, list[Any]] | None = None) -> dict[int, list[Any]]:
    """What comes of every text, by its number, until none is left."""
    results = {} if results is None else results
    while loop.unfinished:
        for number, result in loop.advance():
            results.setdefault(number, []).append(result)
    return results


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]


def same(tokens: Sequence[Token], expected: Sequence[Token]) -> bool:
    """Whether tokens, depths and ends are equal."""
    return [(t.id, t.depth, t.ended) for t in tokens] == [(t.id, t.depth, t.ended) for t in expected]


@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule[0])
@pytest.mark.parametrize("engine", [FakeEngine, SlotEngine])
def test_texts_are_those_of_decode(engine: Any, rule: Any, propagate: bool) -> None:
    wanted = requests(8)
    loop = open_loop(engine(propagate=propagate), rule, limit=4)
    numbers = [loop.add(prompt, limit, ()) for prompt, limit in wanted]
    results = finish(loop)
    for number, request in zip(numbers, wanted, strict=True):
        assert same(results[number], alone(request, rule, propagate=propagate))


@pytest.mark.parametrize("rule", [NEVER, ("gate", {"threshold": 0.6})], ids=lambda rule: rule[0])
def test_prompts_in_parts_give_the_same_texts(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "CHUNK", 7)
    wanted, loop = requests(9, seed=1, longest=60), open_loop(SlotEngine(), rule, limit=4)
    numbers = [loop.add(prompt, limit, ()) for prompt, limit in wanted]
    results = finish(loop)
    for number, request in zip(numbers, wanted, strict=True):
        assert same(results[number], alone(request, rule))


def test_texts_with_different_rules() -> None:
    wanted, loop = requests(12, seed=2), open_loop(SlotEngine(), *RULES, limit=6)
    numbers = [
        loop.add(prompt, limit, (), rule=number % len(RULES)) for number, (prompt, limit) in enumerate(wanted)
    ]
    results = finish(loop)
    for place, number in enumerate(numbers):
        assert same(results[number], alone(wanted[place], RULES[place % len(RULES)]))


class ByPrompt:
    """A rule whose texts skip the second or the third segment, by the hidden state of their prompts."""

    spec, width, exit_test = RuleSpec("by_prompt", {}), 0, staticmethod(never_exits)

    def first_plan(self, segments: int, variant: int, hidden: Any = None) -> Any:
        plan = full_plan(segments, variant)
        plan[0, 1 + int(hidden[0] > 0)] = -1
        return plan

    def __call__(self, signals: Any, memory: Any, plan: Any, segment: int) -> Any:
        return plan, memory


def test_texts_whose_plan_is_chosen_by_their_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "CHUNK", 12)
    rule: Any = ByPrompt()
    wanted, loop = requests(8, seed=17), DecodingLoop(SlotEngine(), [rule], MANIFEST, 0, limit=4)
    numbers = [loop.add(prompt, 10, ()) for prompt, _ in wanted]
    results, plans = finish(loop), set()
    for number, (prompt, _) in zip(numbers, wanted, strict=True):
        assert same(results[number], list(decode(FakeEngine(), rule, MANIFEST, 0, prompt, 10, ())))
        plans.add(results[number][-1].depth)
    assert len(plans) == 2, "both plans should be used"


@pytest.mark.parametrize("seed", range(6))
def test_random_texts_that_come_and_go(seed: int) -> None:
    """Texts of all rules join and are dropped at random moments."""
    random, engine = np.random.default_rng(seed), SlotEngine(propagate=seed % 2 == 1)
    loop, texts = open_loop(engine, *RULES, limit=4), dict[int, tuple[Request, Any]]()
    results: dict[int, list[Any]] = {}
    for request in requests(14, seed=20 + seed):
        rule = int(random.integers(len(RULES)))
        texts[loop.add(*request, (), rule=rule)] = request, RULES[rule]
        for _ in range(random.integers(25)):
            for number, result in loop.advance():
                results.setdefault(number, []).append(result)
        if random.random() < 0.3:
            number = int(random.choice(list(texts)))
            loop.drop(number)
            del texts[number]
    finish(loop, results)
    for number, (request, name) in texts.items():
        assert same(results[number], alone(request, name, propagate=engine.propagate))
    loop.close()
    assert not engine.slots.runners


def test_tokens_of_all_texts_run_in_one_step() -> None:
    engine = SlotEngine()
    loop = open_loop(engine, limit=4)
    for prompt, _ in requests(4):
        loop.add(prompt, 10, ())
    finish(loop)
    # The first token of each text comes with its prompt.
    assert engine.slots.steps == [(segment, (0, 1, 2, 3)) for _ in range(9) for segment in range(SEGMENTS)]


def test_texts_that_exit_early_meet_others_at_the_first_segment() -> None:
    engine = SlotEngine()
    loop = open_loop(engine, ("gate", {"threshold": 0.6}), limit=4)
    for prompt, _ in requests(4):
        loop.add(prompt, 24, ())
    finish(loop)
    rows = {segment: [len(slots) for at, slots in engine.slots.steps if at == segment] for segment in (0, 1)}
    assert np.mean(rows[0]) > 2.5, "texts do not wait for each other"


@pytest.mark.parametrize("rule", [NEVER, ("gate", {"threshold": 0.6})], ids=lambda rule: rule[0])
def test_a_late_text_changes_nothing_for_others(rule: Any) -> None:
    first, late = requests(3, seed=3), requests(3, seed=4)
    loop = open_loop(SlotEngine(), rule, limit=8)
    numbers = [loop.add(prompt, 20, ()) for prompt, _ in first]
    results: dict[int, list[Any]] = {}
    for prompt, _ in late:
        for _ in range(9):
            for number, result in loop.advance():
                results.setdefault(number, []).append(result)
        numbers.append(loop.add(prompt, 20, ()))
    finish(loop, results)
    for number, (prompt, _) in zip(numbers, [*first, *late], strict=True):
        assert same(results[number], alone((prompt, 20), rule))


@pytest.mark.parametrize("pieces", range(1, 30, 3))
def test_dropping_a_text_changes_nothing_for_others(pieces: int) -> None:
    rule, wanted = ("gate", {"threshold": 0.6}), requests(4, seed=5)
    loop = open_loop(SlotEngine(), rule, limit=3)
    numbers = [loop.add(prompt, 20, ()) for prompt, _ in wanted]
    results: dict[int, list[Any]] = {}
    for _ in range(pieces):
        for number, result in loop.advance():
            results.setdefault(number, []).append(result)
    loop.drop(numbers[1])
    loop.drop(numbers[1])
    before = len(results.get(numbers[1], []))
    finish(loop, results)
    assert len(results.get(numbers[1], [])) == before
    for place in (0, 2, 3):
        assert same(results[numbers[place]], alone((wanted[place][0], 20), rule))


def test_no_more_texts_than_the_limit_and_the_first_come_first() -> None:
    engine = SlotEngine()
    loop, begun = open_loop(engine, limit=3, prefix_cache=False), list[int]()
    numbers = [loop.add(prompt, limit, ()) for prompt, limit in requests(10)]
    while loop.unfinished:
        for number, _ in loop.advance():
            if number not in begun:
                begun.append(number)
        assert loop.under_way <= 3 and len(engine.slots.runners) <= 3
    assert begun == numbers


def test_a_long_prompt_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "CHUNK", 10)
    engine = SlotEngine()
    loop = open_loop(engine)
    short = [loop.add(prompt, 60, ()) for prompt, _ in requests(2, longest=9)]
    given = list[int]()
    while len(set(given)) < 2:
        given += [number for number, _ in loop.advance()]
    long = loop.add([1, 2, 3, 4, 5] * 12, 5, ())
    given.clear()
    while long not in given:
        given += [number for number, _ in loop.advance()]
    parts = [call for call in engine.runners[-1].calls if call[:2] == ("run", 0)]
    assert [count for *_, count in parts] == [10] * 6
    assert all(given.count(number) >= 5 for number in short), "each got a token between two parts"


def test_ends_of_texts_are_those_of_decode() -> None:
    prompt = requests(1, seed=6)[0][0]
    plain = ids(alone((prompt, 20), NEVER))
    loop = open_loop(SlotEngine())
    stopped = loop.add(prompt, 20, (plain[7],))
    limited = loop.add(prompt, 4, ())
    full = loop.add((prompt * LONGEST)[: LONGEST - 3], 50, ())
    exact = loop.add((prompt * LONGEST)[:LONGEST], 50, ())
    results = finish(loop)
    assert ids(results[stopped]) == plain[: plain.index(plain[7]) + 1]
    ended = [results[number][-1].ended for number in (stopped, limited, full, exact)]
    assert ended == ["stop", "length", "context", "context"]
    assert [len(results[number]) for number in (limited, full, exact)] == [4, 4, 1]
    assert all(token.ended is None for tokens in results.values() for token in tokens[:-1])


@pytest.mark.parametrize("engine", [FakeEngine, SlotEngine])
def test_drawn_texts_are_those_of_decode(engine: Any) -> None:
    wanted, samplings = requests(6, seed=7), [Sampling(temperature=1.2, seed=seed) for seed in range(6)]
    loop = open_loop(engine(), limit=4)
    numbers = [
        loop.add(prompt, limit, (), sampler=sampling.sampler(prompt))
        for (prompt, limit), sampling in zip(wanted, samplings, strict=True)
    ]
    results = finish(loop)
    for number, request, sampling in zip(numbers, wanted, samplings, strict=True):
        assert same(results[number], alone(request, NEVER, sampling=sampling))
    assert ids(results[numbers[0]]) != ids(alone(wanted[0], NEVER)), "nothing was drawn"


@pytest.mark.parametrize("rule", [NEVER, ("fixed", {"exit": 2})], ids=lambda rule: rule[0])
def test_close_logits_are_run_again_alone(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "CLOSE_LOGITS", 1e9)
    wanted, loop = requests(5, seed=8), open_loop(SlotEngine(noise=0.3), rule)
    numbers = [loop.add(prompt, limit, ()) for prompt, limit in wanted]
    results = finish(loop)
    for number, request in zip(numbers, wanted, strict=True):
        assert same(results[number], alone(request, rule))


def test_other_logits_are_not_run_again() -> None:
    engine = SlotEngine()
    loop = open_loop(engine)
    for prompt, _ in requests(3):
        loop.add(prompt, 12, ())
    finish(loop)
    for runner in engine.runners:
        prompts = [call for call in runner.calls if call[0] == "run" and call[2] == 0]
        assert len(prompts) == SEGMENTS == len([call for call in runner.calls if call[0] == "run"])


def test_blocks_run_are_counted_for_each_text() -> None:
    rule, wanted = ("gate", {"threshold": 0.6}), requests(5, seed=9)
    loop = open_loop(SlotEngine(), rule)
    numbers = [loop.add(prompt, limit, ()) for prompt, limit in wanted]
    results = finish(loop)
    for number, request in zip(numbers, wanted, strict=True):
        expected = [token.blocks_run for token in alone(request, rule)]
        assert [token.blocks_run for token in results[number]] == expected


def test_one_text_alone_is_drafted() -> None:
    engine = SlotEngine()
    rule = rule_of(("speculative", {"exit": 1, "drafts": 3}))
    loop = DecodingLoop(engine, [rule], MANIFEST, 0)
    request = requests(1, seed=10)[0][0], 20
    number = loop.add(*request, ())
    results = finish(loop)
    assert ids(results[number]) == ids(alone(request, NEVER))
    assert rule.rounds[1] > 0 and not engine.slots.steps


# Prefixes

SYSTEM = np.random.default_rng(11).integers(0, VOCABULARY, 50).tolist()


def prompt_tokens(runner: Any) -> int:
    """Tokens that ran the first segment in steps of the sequence's own."""
    return sum(count for name, segment, _, count in runner.calls if (name, segment) == ("run", 0))


@pytest.mark.parametrize("rule", [*RULES[:3], RULES[5]], ids=lambda rule: rule[0])
@pytest.mark.parametrize("engine", [FakeEngine, SlotEngine])
@pytest.mark.parametrize("propagate", [False, True])
def test_a_prompt_reads_the_cache_of_a_text_that_ended(engine: Any, rule: Any, propagate: bool) -> None:
    opened = engine(propagate=propagate)
    loop = open_loop(opened, rule)
    first = finish_one(loop, ([*SYSTEM, 3, 4], 10))
    assert same(first, alone(([*SYSTEM, 3, 4], 10), rule, propagate=propagate))
    before = prompt_tokens(opened.sequence.runner)
    follow = [*SYSTEM, 3, 4, *ids(first), 7, 1], 10  # the next turn of a chat
    assert same(finish_one(loop, follow), alone(follow, rule, propagate=propagate))
    ran = prompt_tokens(opened.sequence.runner) - before
    is_exact = rule[0] in ("never", "speculative")
    assert ran <= (len(follow[0]) - len(SYSTEM) - 2 + 9) and (not is_exact or ran <= 2 + 1 + 9)


def finish_one(loop: DecodingLoop, request: Request) -> list[Any]:
    number = loop.add(*request, ())
    return finish(loop)[number]


@pytest.mark.parametrize("rule", RULES[:3], ids=lambda rule: rule[0])
def test_a_prompt_copies_the_cache_of_a_text_under_way(rule: Any) -> None:
    engine = SlotEngine()
    loop = open_loop(engine, rule, limit=4)
    wanted = [([*SYSTEM, number, number + 1], 12) for number in range(4)]
    numbers = [loop.add(*request, ()) for request in wanted]
    results = finish(loop)
    for number, request in zip(numbers, wanted, strict=True):
        assert same(results[number], alone(request, rule))
    assert [(target, tokens) for _, target, tokens in engine.slots.copies] == [(1, 50), (2, 50), (3, 50)]
    assert [runner.calls[0] for runner in engine.runners[1:]] == [("run", 0, 50, 2)] * 3


def test_short_prefixes_and_the_last_token_are_not_reused() -> None:
    engine = SlotEngine()
    loop = open_loop(engine)
    for prompt in (SYSTEM[:20], SYSTEM[:20], SYSTEM, SYSTEM):
        assert same(finish_one(loop, (prompt, 3)), alone((prompt, 3), NEVER))
    assert not engine.slots.copies
    assert [prompt_tokens(runner) for runner in engine.runners] == [22, 22, 50 + 2 + 1 + 2]


def test_without_a_prefix_cache_every_prompt_is_run() -> None:
    engine = SlotEngine()
    loop = open_loop(engine, prefix_cache=False)
    for _ in range(2):
        assert same(finish_one(loop, (SYSTEM, 3)), alone((SYSTEM, 3), NEVER))
    assert not engine.slots.runners, "the cache of a text that ended is free"


def test_idle_caches_make_place_for_texts() -> None:
    engine = SlotEngine()
    loop = open_loop(engine, limit=2)
    for request in requests(6, seed=12, longest=60):
        finish_one(loop, request)
        assert len(engine.slots.runners) <= 2
    loop.close()
    assert not engine.slots.runners


def test_close_first_token_of_a_reused_prompt_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "CLOSE_LOGITS", 1e9)
    engine = SlotEngine()
    loop = open_loop(engine)
    for _ in range(2):
        assert same(finish_one(loop, (SYSTEM, 3)), alone((SYSTEM, 3), NEVER))
    assert prompt_tokens(engine.runners[0]) >= 2 * len(SYSTEM)


# Errors


@pytest.mark.parametrize("bad", [[], [1] * (LONGEST + 1)])
def test_a_prompt_that_cannot_be_run_ends_alone(bad: list[int]) -> None:
    engine = SlotEngine()
    loop = open_loop(engine, prefix_cache=False)
    wanted = requests(3, seed=13)
    numbers = [loop.add(prompt, limit, ()) for prompt, limit in wanted]
    wrong = loop.add(bad, 5, ())
    results = finish(loop)
    (problem,) = results[wrong]
    assert isinstance(problem, BadInput)
    for number, request in zip(numbers, wanted, strict=True):
        assert same(results[number], alone(request, NEVER))
    assert not engine.slots.runners


def test_a_text_whose_numbers_are_not_finite_ends_alone() -> None:
    engine = SlotEngine()
    loop = open_loop(engine, prefix_cache=False)
    wanted = [(prompt, 20) for prompt, _ in requests(3, seed=14)]
    numbers = [loop.add(*request, ()) for request in wanted]
    results: dict[int, list[Any]] = {}
    while len(results) < 3:
        for number, result in loop.advance():
            results.setdefault(number, []).append(result)
    engine.runners[1].keys[2, 0] = np.nan
    finish(loop, results)
    assert isinstance(results[numbers[1]][-1], BadInput) and len(results[numbers[1]]) < 20
    for place in (0, 2):
        assert same(results[numbers[place]], alone(wanted[place], NEVER))
    assert not engine.slots.runners


def test_texts_of_a_step_that_fails_end_and_others_go_on() -> None:
    engine = SlotEngine()
    loop = open_loop(engine, prefix_cache=False)
    wanted = [(prompt, 20) for prompt, _ in requests(2, seed=15)]
    numbers = [loop.add(*request, ()) for request in wanted]
    results: dict[int, list[Any]] = {}
    while len(results) < 2:
        for number, result in loop.advance():
            results.setdefault(number, []).append(result)
    run, engine.slots.run_together = engine.slots.run_together, fail  # type: ignore[method-assign]
    results.clear()
    while not results:
        for number, result in loop.advance():
            results.setdefault(number, []).append(result)
    assert all(isinstance(results[number][-1], BadSetting) for number in numbers)
    engine.slots.run_together = run  # type: ignore[method-assign]
    assert not engine.slots.runners and not loop.unfinished
    assert same(finish_one(loop, wanted[0]), alone(wanted[0], NEVER))


def fail(*_: object) -> Any:
    raise BadSetting("the step failed")


def test_closing_drops_every_text() -> None:
    engine = SlotEngine()
    loop = open_loop(engine)
    for prompt, _ in requests(5, seed=16):
        loop.add(prompt, 20, ())
    for _ in range(12):
        loop.advance()
    loop.close()
    assert loop.unfinished == 0 == loop.under_way and not engine.slots.runners and loop.advance() == []
