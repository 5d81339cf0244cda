"""The walker, against engines whose signals are scripted."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from failing import failing

from offramp.runtime.bundle.manifest import RuleSpec, StepCosts
from offramp.runtime.rules import RowSignals, Signals, bind, simulate
from offramp.runtime.rules.base import full_plan
from offramp.runtime.walker import LATE_AFTER, Trace, Walk, empty_trace, walk, walk_one

ROWS, SEGMENTS, CLASSES, VARIANTS = 53, 5, 3, 3


class Script:
    """An engine for walk_one: its gates are scripted, and it records what it was called with."""

    def __init__(self, *gates: float) -> None:
        self.gates, self.calls = np.array(gates, np.float32), list[Any]()

    def step(self, segment: int, variant: int, state: Any) -> RowSignals:
        self.calls.append((segment, variant))
        return RowSignals(
            np.eye(CLASSES, dtype="f4")[segment % CLASSES][None], self.gates[segment : segment + 1]
        )

    def skip(self, segment: int, state: Any) -> None:
        self.calls.append(f"skip {segment}")


GATE, NEVER = (
    bind(RuleSpec("gate", {"threshold": 0.5}), SEGMENTS),
    bind(RuleSpec("never", {}), SEGMENTS),
)


@dataclass
class Rewriting:
    """A rule that gives the plan new ends; plans: by segment (0-based) after which the plan changes."""

    plans: Mapping[int, list[int]]
    spec: RuleSpec = field(default_factory=lambda: RuleSpec("rewriting", {}))
    width: int = 1
    exit_test: None = None
    memories: list[float] = field(default_factory=list)

    def first_plan(self, segments: int, variant: int, hidden: Any = None) -> np.ndarray:
        return full_plan(segments, variant)

    def __call__(self, signals: Signals, memory: np.ndarray, plan: np.ndarray, segment: int) -> Any:
        self.memories.append(float(memory[0, 0]))
        if segment in self.plans:
            plan = plan.copy()
            plan[:, segment + 1 :] = self.plans[segment]
        return plan, memory + 1


def walk_script(
    rule: Any, plan: Sequence[int], gates: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5)
) -> tuple[list[Any], list[Any]]:
    """Calls of the engine, and the steps."""
    engine = Script(*gates)
    return engine.calls, walk_one(engine, rule, object(), plan)  # type: ignore[type-var]


def test_walk_one_runs_a_full_plan() -> None:
    calls, steps = walk_script(NEVER, [0] * SEGMENTS)
    assert calls == [(segment, 0) for segment in range(SEGMENTS)]
    assert [(step.segment, step.variant) for step in steps] == calls
    assert [int(step.signals.logits.argmax()) for step in steps] == [0, 1, 2, 0, 1]
    ended = [step.ended for step in steps]
    assert ended == sorted(ended) and ended[0] > 0


@pytest.mark.parametrize("exit", [1, 2, 4, 5])
def test_walk_one_stops_at_the_exit(exit: int) -> None:
    gates = [0.5] * SEGMENTS
    gates[exit - 1] = 0.6
    calls, steps = walk_script(GATE, [2] * SEGMENTS, gates)
    assert calls == [(segment, 2) for segment in range(exit)] and len(steps) == exit


def test_walk_one_stops_at_the_exit_of_a_rule_with_memory() -> None:
    rule = bind(RuleSpec("patience_confident", {"threshold": 0.99, "patience": 3}), SEGMENTS)
    assert walk_script(rule, [0] * SEGMENTS)[0] == [(0, 0), (1, 0), (2, 0)]


def test_walk_one_skips_segments_inside_the_plan_and_none_after_it() -> None:
    assert walk_script(NEVER, [0, -1, -1, 1, -1])[0] == [(0, 0), "skip 1", "skip 2", (3, 1)]
    assert walk_script(NEVER, [-1, -1, 0, 0, 0])[0] == ["skip 0", "skip 1", (2, 0), (3, 0), (4, 0)]
    assert walk_script(GATE, [0, -1, 0, 0, 0], [0.9] * SEGMENTS)[0] == [(0, 0)]


def test_walk_one_runs_nothing_of_an_empty_plan() -> None:
    assert walk_script(NEVER, [-1] * SEGMENTS) == ([], []) == walk_script(NEVER, [])


def test_walk_one_follows_a_rewritten_plan() -> None:
    rule = Rewriting({0: [-1, 2, 2, 2], 2: [1, -1]})
    assert walk_script(rule, [0] * SEGMENTS)[0] == [(0, 0), "skip 1", (2, 2), (3, 1)]
    assert rule.memories == [0, 1, 2], "the memory of a step is passed to the next"


def test_walk_one_follows_a_plan_that_a_rule_completes() -> None:
    rule = Rewriting({1: [0, -1, 0]})
    calls, steps = walk_script(rule, [0, 0, -1, -1, -1])
    assert calls == [(0, 0), (1, 0), (2, 0), "skip 3", (4, 0)] and len(steps) == 4


def test_walk_one_asks_no_rule_after_the_last_segment() -> None:
    rule = Rewriting({})
    walk_script(rule, [0] * SEGMENTS)
    assert len(rule.memories) == SEGMENTS - 1


def test_walk_one_keeps_the_callers_plan() -> None:
    plan = [0] * SEGMENTS
    walk_script(Rewriting({0: [-1] * 4}), plan)
    assert plan == [0] * SEGMENTS


@dataclass
class State:
    """Row numbers; segment: the last one that was run or skipped."""

    ids: np.ndarray
    rows: int
    length: int
    segment: int
    dropped: bool = False


class Tables:
    """An engine whose signals are in tables [rows, segments, variants ...]; a state holds row numbers."""

    name = device = "tables"
    facts: Mapping[str, str] = {}
    max_rows = 1000

    def __init__(self, seed: int, has_answers: bool = False) -> None:
        random, shape = np.random.default_rng(seed), (ROWS, SEGMENTS, VARIANTS)
        self.logits = random.normal(0, 2, (*shape, CLASSES)).astype("f4")
        self.gates = random.random(shape).astype("f4")
        self.answers = random.normal(0, 2, (*shape, 2)).astype("f4") if has_answers else None
        self.answer_memory = np.zeros((SEGMENTS, ROWS, 2), "f4")  # used again by each state, as engines do
        self.largest = self.steps = self.skips = 0
        self.open = 0  # states that are not dropped

    def begin(self, inputs: Mapping[str, Any]) -> State:
        return self._state(inputs["rows"], inputs["length"], -1)

    def step(self, segment: int, variant: int, state: State) -> RowSignals:
        self.largest, self.steps = max(self.largest, state.rows), self.steps + 1
        assert state.segment + 1 == segment, "a segment was run twice, backwards or without a skip"
        state.segment = segment
        signals = self.logits[state.ids, segment, variant], self.gates[state.ids, segment, variant]
        answer = None
        if self.answers is not None:
            answer = self.answer_memory[segment, : state.rows]
            answer[...] = self.answers[state.ids, segment, variant]
        if segment + 1 == SEGMENTS:
            return RowSignals(*signals, answer=answer)
        width = VARIANTS * (1 + VARIANTS * (SEGMENTS - 1 - segment))
        forecast = np.random.default_rng(segment).random((ROWS, VARIANTS, width)).astype("f4")
        return RowSignals(*signals, forecast[state.ids, variant], answer=answer)

    def skip(self, segment: int, state: State) -> None:
        assert state.segment + 1 == segment
        state.segment, self.skips = segment, self.skips + 1

    def take(self, state: State, rows: np.ndarray) -> State:
        return self._state(state.ids[rows], state.length, state.segment)

    def join(self, states: Sequence[State]) -> State:
        assert len({(state.length, state.segment) for state in states}) == 1
        return self._state(np.concatenate([s.ids for s in states]), states[0].length, states[0].segment)

    def drop(self, state: State) -> None:
        assert not state.dropped
        state.dropped, self.open = True, self.open - 1

    def prepare(self, variant: int, segments: Sequence[int]) -> None: ...

    def close(self) -> None: ...

    def _state(self, ids: np.ndarray, length: int, segment: int) -> State:
        self.open += 1
        return State(ids, len(ids), length, segment)


def walk_rows(
    engine: Tables, rule: Any, ids: np.ndarray, size: int, lengths: np.ndarray, variant: int = 0
) -> Trace:
    """Walk those rows in batches of at most `size` of equal length."""
    batches = []
    for length in np.unique(lengths[ids]):
        same = np.flatnonzero(lengths[ids] == length)
        batches += [same[i : i + size] for i in range(0, len(same), size)]
    pairs = [(at, {"rows": ids[at], "length": int(lengths[ids[at[0]]])}) for at in batches]
    trace = walk(
        engine, rule, pairs, rows=len(ids), segments=SEGMENTS, classes=CLASSES, variant=variant, limit=size
    )
    assert engine.open == 0, "a state was not dropped"
    return trace


class Mixed:
    """A rule that exits, skips and changes the variant, by nothing but the row's own signals and memory."""

    spec = RuleSpec("mixed", {})
    width = 1
    exit_test = None

    def first_plan(self, segments: int, variant: int, hidden: Any = None) -> np.ndarray:
        return full_plan(segments, variant)

    def __call__(self, signals: Signals, memory: np.ndarray, plan: np.ndarray, segment: int) -> Any:
        plan, memory = plan.copy(), memory + signals.logits[:, :1]
        assert signals.gate is not None
        for row, (gate, total) in enumerate(zip(signals.gate, memory[:, 0], strict=True)):
            rest = plan[row, segment + 1 :]
            if gate > 0.85:
                rest[:] = -1
            elif gate > 0.6:
                rest[:1] = -1
            rest[rest >= 0] = 1 if total > 1 else 2 if total < -1 else 0
        return plan, memory


EXIT_RULES = [
    bind(RuleSpec(name, parameters), SEGMENTS)
    for name, parameters in [
        ("gate", {"threshold": 0.7}),
        ("max_probability", {"threshold": 0.8}),
        ("patience", {"patience": 1.0}),
        ("fixed", {"exit": 2.0}),
        ("never", {}),
    ]
]
COSTS = StepCosts(8, {f"v{variant}": tuple(np.linspace(1, 2, SEGMENTS)) for variant in range(VARIANTS)})
QUEE = bind(RuleSpec("quee", {"price": 0.3}), SEGMENTS, {"bops": COSTS})


@pytest.mark.parametrize("rule", [Mixed(), *EXIT_RULES, QUEE], ids=lambda rule: rule.spec.name)
@pytest.mark.parametrize("size", [2, 7, 64])
def test_walk_of_many_rows_equals_that_of_each_row(rule: Any, size: int) -> None:
    for seed in range(2):
        engine, lengths = Tables(seed), np.random.default_rng(seed).choice([8, 16, 24], ROWS)
        trace = walk_rows(engine, rule, np.arange(ROWS), size, lengths)
        assert engine.largest <= size
        for row in range(ROWS):
            single = walk_rows(engine, rule, np.array([row]), 1, lengths)
            assert np.array_equal(trace.variants[row], single.variants[0])
            assert np.array_equal(trace.logits[row], single.logits[0])
            assert np.array_equal(trace.gates[row], single.gates[0], equal_nan=True)


def test_walk_skips_segments_with_the_engine() -> None:
    engine = Tables(0)
    trace = walk_rows(engine, Mixed(), np.arange(ROWS), 7, np.full(ROWS, 8))
    ran = trace.variants >= 0
    last = SEGMENTS - 1 - ran[:, ::-1].argmax(axis=1)
    assert any(not ran[row, : last[row]].all() for row in range(ROWS)) and engine.skips


@pytest.mark.parametrize("rule", EXIT_RULES, ids=lambda rule: rule.spec.name)
def test_walk_exits_as_simulated(rule: Any) -> None:
    engine = Tables(9)
    trace = walk_rows(engine, rule, np.arange(ROWS), 8, np.full(ROWS, 8))
    exits = simulate(rule, engine.logits[:, :, 0], engine.gates[:, :, 0])
    assert ((trace.variants >= 0).sum(axis=1) - 1).tolist() == exits.tolist()


def test_walk_writes_signals_of_what_was_run_alone() -> None:
    engine = Tables(9)
    trace = walk_rows(engine, EXIT_RULES[0], np.arange(ROWS), 8, np.full(ROWS, 8))
    ran = trace.variants >= 0
    np.testing.assert_array_equal(trace.gates[ran], engine.gates[:, :, 0][ran])
    assert np.isnan(trace.gates[~ran]).all() and not trace.logits[~ran].any()


@pytest.mark.parametrize("size", [1, 7, 64])
def test_trace_has_copies_of_the_answers_of_what_was_run(size: int) -> None:
    """With a rule that regroups rows; the engine writes the answers of a segment into the same memory."""
    engine = Tables(9, has_answers=True)
    trace = walk_rows(engine, Mixed(), np.arange(ROWS), size, np.full(ROWS, 8))
    assert engine.answers is not None and trace.answers is not None
    for row, segment in np.ndindex(ROWS, SEGMENTS):
        variant, answer = trace.variants[row, segment], trace.answers[row, segment]
        if variant < 0:
            assert answer is None
        else:
            np.testing.assert_array_equal(answer, engine.answers[row, segment, variant])


@pytest.mark.parametrize("size", [1, 7])
def test_trace_has_no_answers_of_an_engine_without_them(size: int) -> None:
    assert walk_rows(Tables(9), NEVER, np.arange(ROWS), size, np.full(ROWS, 8)).answers is None


@pytest.mark.parametrize("size", [1, 7])
def test_walk_of_rule_settled_exits_as_simulated(size: int) -> None:
    engine = Tables(9, has_answers=True)
    assert engine.answers is not None
    rule = bind(RuleSpec("settled", {"threshold": 0.6}), SEGMENTS, answer_size=2)
    trace = walk_rows(engine, rule, np.arange(ROWS), size, np.full(ROWS, 8))
    exits = simulate(rule, engine.logits[:, :, 0], None, engine.answers[:, :, 0])
    assert ((trace.variants >= 0).sum(axis=1) - 1).tolist() == exits.tolist()
    assert set(exits.tolist()) == set(range(1, SEGMENTS)), "no row leaves at its first exit"


def test_rows_that_change_their_variant_are_regrouped() -> None:
    engine = Tables(0)
    trace = walk_rows(engine, QUEE, np.arange(ROWS), ROWS, np.full(ROWS, 8), variant=1)
    kinds = {tuple(sorted({*row.tolist()} - {-1})) for row in trace.variants}
    assert kinds >= {(1,), (0, 1), (1, 2)} and (0, 1, 2) not in kinds
    assert (trace.variants[:, -1] < 0).any()
    assert engine.steps <= 1 + VARIANTS * (SEGMENTS - 1), "rows of one queue were not run together"


def test_remaining_rows_of_several_batches_are_run_together() -> None:
    engine = Tables(0)
    gates = engine.gates  # three of four rows exit after the first segment
    gates[:, 0], gates[:, 1:] = (np.arange(ROWS) % 4 > 0)[:, None], 0
    walk_rows(engine, GATE, np.arange(48), 16, np.full(ROWS, 8))
    # three batches in the first segment; the 12 rows that are left together in the four others
    assert engine.steps == 3 + 4


def test_rows_of_different_lengths_are_not_joined() -> None:
    engine = Tables(0)
    walk_rows(engine, NEVER, np.arange(ROWS), 64, np.arange(ROWS) % 3 * 8 + 8)
    assert engine.steps == 3 * SEGMENTS


@pytest.mark.parametrize(("limit", "steps_before"), [(1, [0, 5, 10, 15]), (2, [0, 0, 5, 5])])
def test_batch_is_begun_when_no_queue_is_full(limit: int, steps_before: list[int]) -> None:
    engine, begun_after = Tables(0), list[int]()

    def batches() -> Iterator[Any]:
        for row in range(4):
            begun_after.append(engine.steps)
            yield np.array([row]), {"rows": np.array([row]), "length": 8}

    walk(engine, NEVER, batches(), rows=4, segments=SEGMENTS, classes=CLASSES, limit=limit)
    assert begun_after == steps_before


def test_batch_over_the_limit_is_run_as_it_is() -> None:
    engine, ids = Tables(0), np.arange(9)
    batches = [(ids, {"rows": ids, "length": 8})]
    walk(engine, NEVER, batches, rows=9, segments=SEGMENTS, classes=CLASSES, limit=4)
    assert engine.largest == 9 and engine.steps == SEGMENTS


def test_rows_start_in_the_given_variant() -> None:
    engine = Tables(0)
    for size in (1, 4):
        trace = walk_rows(engine, NEVER, np.arange(5), size, np.full(ROWS, 8), variant=2)
        assert (trace.variants == 2).all()
        np.testing.assert_array_equal(trace.logits, engine.logits[:5, :, 2])


@pytest.mark.parametrize("size", [1, 7])
def test_every_row_has_its_time(size: int) -> None:
    trace = walk_rows(Tables(0), Mixed(), np.arange(ROWS), size, np.full(ROWS, 8))
    assert (trace.seconds > 0).all()


def test_walk_of_no_rows() -> None:
    trace = walk(Tables(0), NEVER, [], rows=0, segments=SEGMENTS, classes=CLASSES)
    assert trace.variants.shape == (0, SEGMENTS)


def joining_walk(engine: Tables, rules: Sequence[Any], limit: int = 4) -> tuple[Walk[Any], Trace]:
    trace = empty_trace(ROWS, SEGMENTS, CLASSES)
    return Walk(engine, rules, trace, limit), trace  # type: ignore[type-var]


def begin(walk: Walk[Any], rows: Sequence[int], rules: Sequence[int] | None = None, length: int = 8) -> None:
    ids = np.array(rows)
    plans = np.zeros((len(rows), SEGMENTS), np.int8)
    numbers = None if rules is None else np.array(rules)
    walk.begin(ids, {"rows": ids, "length": length}, plans=plans, rules=numbers)


@pytest.mark.parametrize("limit", [1, 4, 64])
def test_rows_that_join_at_any_time_are_walked_as_alone(limit: int) -> None:
    engine, rules = Tables(3), [*EXIT_RULES, Mixed()]
    under_way, trace = joining_walk(engine, rules, limit)
    random, order = np.random.default_rng(0), np.random.default_rng(1).permutation(ROWS)
    numbers, done = np.arange(ROWS) % len(rules), list[int]()
    while len(done) < ROWS:
        if len(order) and (random.random() < 0.4 or under_way.oldest_queue() is None):
            rows, order = order[:3], order[3:]
            begin(under_way, rows.tolist(), numbers[rows].tolist())
            continue
        key = under_way.full_queue() or under_way.oldest_queue()
        if key is not None:
            done += under_way.run(key).tolist()
    assert sorted(done) == list(range(ROWS)) and engine.open == 0 and not len(under_way.waiting())
    for row in range(ROWS):
        alone = walk_rows(engine, rules[numbers[row]], np.array([row]), 1, np.full(ROWS, 8))
        assert np.array_equal(trace.variants[row], alone.variants[0])
        assert np.array_equal(trace.gates[row], alone.gates[0], equal_nan=True)


def test_rows_that_wait_are_joined_with_those_of_a_rule_that_came_later() -> None:
    engine, rules = Tables(3), [NEVER]
    under_way, trace = joining_walk(engine, rules)
    begin(under_way, [0, 1], [0, 0])
    rules.append(bind(RuleSpec("patience", {"patience": 2.0}), SEGMENTS))  # its memory is wider
    begin(under_way, [2, 3], [1, 1])
    while (key := under_way.largest_queue()) is not None:
        under_way.run(key)
    for row, number in enumerate([0, 0, 1, 1]):
        alone = walk_rows(engine, rules[number], np.array([row]), 1, np.full(ROWS, 8))
        assert np.array_equal(trace.variants[row], alone.variants[0])


def test_a_plan_ends_a_row_before_its_rule_does() -> None:
    engine = Tables(3)
    under_way, trace = joining_walk(engine, [NEVER])
    ids, plans = np.arange(2), np.zeros((2, SEGMENTS), np.int8)
    plans[0, 2:] = -1
    under_way.begin(ids, {"rows": ids, "length": 8}, plans=plans)
    done = list[list[int]]()
    while (key := under_way.oldest_queue()) is not None:
        done.append(under_way.run(key).tolist())
    assert done == [[], [0], [], [], [1]]
    assert (trace.variants >= 0).sum(axis=1).tolist()[:2] == [2, SEGMENTS]


def test_the_oldest_row_is_first() -> None:
    under_way, _ = joining_walk(Tables(3), [NEVER])
    begin(under_way, [0], length=24)
    begin(under_way, [1], length=8)
    for segment in range(2):
        assert under_way.oldest_queue() == (segment, 0, 24)
        under_way.run((segment, 0, 24))
    assert under_way.first_queue() == (0, 0, 8) and under_way.full_queue() is None


def test_dropped_rows_are_not_run_further() -> None:
    engine = Tables(3)
    under_way, trace = joining_walk(engine, [NEVER])
    begin(under_way, [0, 1, 2])
    begin(under_way, [3], length=16)
    under_way.drop(np.array([1, 3, 50]))
    assert sorted(under_way.waiting().tolist()) == [0, 2] and engine.open == 1
    while (key := under_way.oldest_queue()) is not None:
        under_way.run(key)
    assert (trace.variants >= 0).sum(axis=1).tolist()[:4] == [SEGMENTS, 0, SEGMENTS, 0] and engine.open == 0


def test_rows_of_a_step_that_fails_are_forgotten_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Tables(3)
    under_way, _ = joining_walk(engine, [NEVER])
    begin(under_way, [0, 1])
    begin(under_way, [2], length=16)
    with monkeypatch.context() as patched:
        patched.setattr(Tables, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            under_way.run((0, 0, 8))
    assert under_way.waiting().tolist() == [2] and engine.open == 1
    assert under_way.run((0, 0, 16)).tolist() == [] and under_way.waiting().tolist() == [2]


@pytest.mark.parametrize("part", ["join", "step", "take", "skip"])
def test_no_state_stays_open_after_an_error_of_the_engine(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    engine = Tables(3)
    under_way, _ = joining_walk(engine, [Mixed()])
    for first in range(0, 12, 2):
        begin(under_way, [first, first + 1])
    with monkeypatch.context() as patched:
        patched.setattr(Tables, part, failing(RuntimeError("the engine failed")))
        with pytest.raises(RuntimeError, match="the engine failed"):
            while (key := under_way.first_queue()) is not None:
                under_way.run(key)
    waiting = under_way.waiting().tolist()
    assert len(waiting) < 12 and len(waiting) == len(set(waiting))
    under_way.drop(under_way.waiting())
    assert engine.open == 0 and under_way.first_queue() is None


def test_no_state_stays_open_after_an_error_of_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Tables(3)
    under_way, _ = joining_walk(engine, [Mixed()])
    begin(under_way, [0, 1])
    begin(under_way, [2], length=16)
    monkeypatch.setattr(Mixed, "__call__", failing(RuntimeError("the rule failed")))
    with pytest.raises(RuntimeError, match="the rule failed"):
        under_way.run((0, 0, 8))
    assert under_way.waiting().tolist() == [2] and engine.open == 1


def test_no_state_stays_open_after_an_error_in_the_walk_of_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, batch = Tables(3), (np.arange(1), {"rows": np.arange(1), "length": 8})
    monkeypatch.setattr(Tables, "step", failing(RuntimeError("the engine failed")))
    with pytest.raises(RuntimeError, match="the engine failed"):
        walk(engine, NEVER, [batch], rows=1, segments=SEGMENTS, classes=CLASSES, limit=1)
    assert engine.open == 0


def test_no_state_stays_open_if_rows_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, plans = Tables(3), np.zeros((2, SEGMENTS), np.int8)
    under_way, _ = joining_walk(engine, [NEVER])
    plans[:, 0] = -1
    monkeypatch.setattr(Tables, "skip", failing(RuntimeError("the engine failed")))
    with pytest.raises(RuntimeError, match="the engine failed"):
        under_way.begin(np.arange(2), {"rows": np.arange(2), "length": 8}, plans=plans)
    assert engine.open == 0 and under_way.first_queue() is None


def test_the_largest_queue_is_first_and_of_equal_ones_the_earliest() -> None:
    under_way, _ = joining_walk(Tables(3), [NEVER])
    assert under_way.largest_queue() is None
    begin(under_way, [0, 1])
    under_way.run((0, 0, 8))
    begin(under_way, [2])
    assert under_way.largest_queue() == (1, 0, 8)
    begin(under_way, [3])
    assert under_way.largest_queue() == (0, 0, 8)
    begin(under_way, [4, 5, 6], length=16)
    assert under_way.largest_queue() == (0, 0, 16)


def test_a_row_behind_larger_queues_goes_on_once_it_is_late() -> None:
    engine, first_exit = Tables(3), bind(RuleSpec("fixed", {"exit": 1}), SEGMENTS)
    under_way, trace = joining_walk(engine, [NEVER, first_exit])
    begin(under_way, [50], [0])
    under_way.run((0, 0, 8))
    done: list[int] = []
    for _ in range(LATE_AFTER * SEGMENTS + SEGMENTS):
        if not any(row < 2 for row in under_way.waiting()):
            trace.clear(slice(0, 2))
            begin(under_way, [0, 1], [1, 1])
        key = under_way.largest_queue()
        assert key is not None
        done += under_way.run(key).tolist()
    assert 50 in done and len(done) > LATE_AFTER * SEGMENTS, "larger queues were not first before"


@dataclass
class GatesAlone:
    """Signals whose logits may not be read."""

    gate: Any
    forecast = hidden = answer = controller = None

    @property
    def logits(self) -> Any:
        raise AssertionError("the logits are read")


class WithoutLogits(Tables):
    """An engine that computes logits when they are read."""

    def step(self, segment: int, variant: int, state: State) -> Any:
        return GatesAlone(super().step(segment, variant, state).gate)


def test_logits_are_not_read_unless_a_rule_or_the_trace_needs_them() -> None:
    engine = WithoutLogits(3)
    trace = empty_trace(ROWS, SEGMENTS, 0)
    under_way: Walk[Any] = Walk(engine, [GATE, NEVER], trace, 4)  # type: ignore[type-var]
    begin(under_way, [0, 1, 2], [0, 1, 0])
    while (key := under_way.largest_queue()) is not None:
        under_way.run(key)
    for row, rule in enumerate((GATE, NEVER, GATE)):
        alone = walk_rows(Tables(3), rule, np.array([row]), 1, np.full(ROWS, 8))
        assert np.array_equal(trace.variants[row], alone.variants[0])


def test_rows_of_a_state_enter_as_those_that_begin() -> None:
    engine = Tables(3)
    under_way, trace = joining_walk(engine, [NEVER])
    ids = np.array([4, 7])
    state, plans = engine.begin({"rows": ids, "length": 8}), np.zeros((2, SEGMENTS), np.int8)
    plans[0, 0] = -1
    under_way.enter(ids, state, plans)
    done = []
    while (key := under_way.largest_queue()) is not None:
        done += under_way.run(key).tolist()
    assert sorted(done) == [4, 7] and engine.open == 0
    assert (trace.variants[[4, 7]] >= 0).sum(axis=1).tolist() == [SEGMENTS - 1, SEGMENTS]
