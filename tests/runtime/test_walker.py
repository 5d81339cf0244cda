"""The walker, against an engine that says what the script says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from offramp.runtime.bundle.manifest import RuleSpec, StepCosts
from offramp.runtime.rules import Signals, bind, simulate
from offramp.runtime.walker import Trace, walk

ROWS, SEGMENTS, CLASSES, VARIANTS = 53, 5, 3, 3


@dataclass
class Script:
    """Row numbers travel as states; signals come from tables [rows, segments, variants ...]."""

    logits: np.ndarray
    gates: np.ndarray
    name = device = "script"
    facts: Mapping[str, str]
    largest: int = 0
    open: int = 0  # states that were made and not dropped
    steps: int = 0

    def begin(self, inputs: Mapping[str, np.ndarray]) -> Any:
        return self._state(inputs["rows"], inputs["length"])

    def step(self, segment: int, variant: int, state: Any) -> Signals:
        self.largest, self.steps = max(self.largest, state.rows), self.steps + 1
        assert state.at < segment, "a segment was run twice or backwards"
        state.at = segment
        said = self.logits[state.ids, segment, variant], self.gates[state.ids, segment, variant]
        if segment + 1 == SEGMENTS:
            return Signals(*said)
        width = VARIANTS * (1 + VARIANTS * (SEGMENTS - 1 - segment))
        foreseen = np.random.default_rng(segment).random((ROWS, VARIANTS, width)).astype("f4")
        return Signals(*said, foreseen[state.ids, variant])

    def take(self, state: Any, rows: np.ndarray) -> Any:
        return self._state(state.ids[rows], state.length, state.at)

    def join(self, states: Sequence[Any]) -> Any:
        assert len({state.length for state in states}) == 1
        return self._state(
            np.concatenate([s.ids for s in states]), states[0].length, max(s.at for s in states)
        )

    def drop(self, state: Any) -> None:
        assert not state.dropped
        state.dropped, self.open = True, self.open - 1

    def close(self) -> None: ...

    def _state(self, ids: np.ndarray, length: int, at: int = -1) -> Any:
        self.open += 1
        return State(ids, len(ids), length, at)


@dataclass
class State:
    ids: np.ndarray
    rows: int
    length: int
    at: int
    dropped: bool = False


def script(seed: int) -> Script:
    random = np.random.default_rng(seed)
    shape = (ROWS, SEGMENTS, VARIANTS)
    return Script(random.normal(0, 2, (*shape, CLASSES)).astype("f4"), random.random(shape).astype("f4"), {})


def run(
    engine: Script, rule: Any, ids: np.ndarray, size: int, lengths: np.ndarray, variant: int = 0
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
    assert engine.open == 0, "states were lost"
    return trace


@dataclass(frozen=True)
class Wild:
    """A rule that leaves, skips and changes precision, by nothing but the row's own signals and memory."""

    width: int = 1

    def __call__(self, signals: Signals, memory: np.ndarray, plan: np.ndarray, segment: int) -> Any:
        plan, memory = plan.copy(), memory + signals.logits[:, :1]
        assert signals.gate is not None
        for row, (gate, mood) in enumerate(zip(signals.gate, memory[:, 0], strict=True)):
            rest = plan[row, segment + 1 :]
            if gate > 0.85:
                rest[:] = -1
            elif gate > 0.6:
                rest[:1] = -1
            rest[rest >= 0] = 1 if mood > 1 else 2 if mood < -1 else 0
        return plan, memory


RULES = [
    Wild(),
    *(
        bind(RuleSpec(name, parameters), SEGMENTS)
        for name, parameters in [
            ("gate", {"threshold": 0.7}),
            ("max_probability", {"threshold": 0.8}),
            ("patience", {"patience": 1.0}),
            ("fixed", {"exit": 2.0}),
            ("never", {}),
        ]
    ),
]


COSTS = StepCosts(8, {f"v{variant}": tuple(np.linspace(1, 2, SEGMENTS)) for variant in range(VARIANTS)})
QUEE = bind(RuleSpec("quee", {"price": 0.3}), SEGMENTS, {"bops": COSTS})


@pytest.mark.parametrize(
    "rule", [*RULES, QUEE], ids=lambda rule: getattr(getattr(rule, "spec", None), "name", "wild")
)
@pytest.mark.parametrize("size", [2, 7, 64])
def test_a_row_gets_with_others_what_it_gets_alone(rule: Any, size: int) -> None:
    for seed in range(4):
        engine, lengths = script(seed), np.random.default_rng(seed).choice([8, 16, 24], ROWS)
        together = run(engine, rule, np.arange(ROWS), size, lengths)
        assert engine.largest <= size
        for row in range(ROWS):
            alone = run(engine, rule, np.array([row]), 1, lengths)
            assert np.array_equal(together.variants[row], alone.variants[0])
            assert np.array_equal(together.logits[row], alone.logits[0])
            assert np.array_equal(together.gates[row], alone.gates[0], equal_nan=True)


@pytest.mark.parametrize("rule", RULES[1:], ids=lambda rule: rule.spec.name)
def test_exits_are_those_of_the_simulation(rule: Any) -> None:
    engine = script(9)
    trace = run(engine, rule, np.arange(ROWS), 8, np.full(ROWS, 8))
    exits = simulate(rule, engine.logits[:, :, 0], engine.gates[:, :, 0])
    assert ((trace.variants >= 0).sum(axis=1) - 1).tolist() == exits.tolist()


def test_rows_that_change_their_variant_on_the_way_keep_their_neighbours() -> None:
    """Rule quee: rooms by (segment, variant), rows of several variants taken apart and joined again."""
    engine = script(0)
    trace = run(engine, QUEE, np.arange(ROWS), ROWS, np.full(ROWS, 8), variant=1)
    kinds = {tuple(sorted({*row.tolist()} - {-1})) for row in trace.variants}
    assert kinds >= {(1,), (0, 1), (1, 2)} and (0, 1, 2) not in kinds
    assert (trace.variants[:, -1] < 0).any()
    assert engine.steps <= 1 + VARIANTS * (SEGMENTS - 1), "rows of one room were not run together"


def test_survivors_of_several_batches_are_run_together() -> None:
    engine = script(0)
    half = engine.gates  # three of four rows leave at the first exit
    half[:, 0], half[:, 1:] = (np.arange(ROWS) % 4 > 0)[:, None], 0
    run(engine, bind(RuleSpec("gate", {"threshold": 0.5}), SEGMENTS), np.arange(48), 16, np.full(ROWS, 8))
    # three batches at the first segment; their 12 survivors together at the four others
    assert engine.steps == 3 + 4


def test_lengths_are_never_mixed() -> None:
    engine = script(0)
    run(engine, RULES[-1], np.arange(ROWS), 64, np.arange(ROWS) % 3 * 8 + 8)
    assert engine.steps == 3 * SEGMENTS


def test_batches_are_begun_only_when_rooms_are_not_full() -> None:
    engine = script(0)
    begun = []

    def batches() -> Any:
        for row in range(6):
            begun.append(engine.steps)
            yield np.array([row]), {"rows": np.array([row]), "length": 8}

    walk(engine, RULES[-1], batches(), rows=6, segments=SEGMENTS, classes=CLASSES, limit=1)
    assert begun == [row * SEGMENTS for row in range(6)]


def test_a_batch_over_the_limit_is_run_as_it_is() -> None:
    engine = script(0)
    walk(
        engine,
        RULES[-1],
        [(np.arange(9), {"rows": np.arange(9), "length": 8})],
        rows=9,
        segments=SEGMENTS,
        classes=CLASSES,
        limit=4,
    )
    assert engine.largest == 9 and engine.steps == SEGMENTS


def test_rows_start_in_the_variant_that_is_wished_for() -> None:
    engine = script(0)
    trace = run(engine, RULES[-1], np.arange(5), 4, np.full(ROWS, 8), variant=2)
    assert (trace.variants == 2).all()
    assert np.array_equal(trace.logits, engine.logits[:5, :, 2])


def test_every_row_has_its_time() -> None:
    trace = run(script(0), RULES[0], np.arange(ROWS), 7, np.full(ROWS, 8))
    assert (trace.seconds > 0).all()


def test_nothing_to_walk() -> None:
    trace = walk(script(0), RULES[-1], [], rows=0, segments=SEGMENTS, classes=CLASSES)
    assert trace.variants.shape == (0, SEGMENTS)
