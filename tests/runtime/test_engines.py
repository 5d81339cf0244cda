"""What every engine has to do, in one body: a fake, ONNX Runtime, ONNX Runtime on CUDA, and TensorRT of every
version, the last two on doubles of CUDA and TensorRT. The same texts exit at the same depth everywhere.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from doubles import gpu

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import NEXT, RuleSpec
from offramp.runtime.engines import threads
from offramp.runtime.engines.base import EngineOptions, open_engine
from offramp.runtime.errors import BadBundle
from offramp.runtime.rules import RowSignals, bind, simulate
from offramp.runtime.walker import Trace, walk

TINY = Path(__file__).parents[1] / "data" / "tiny_bundle"
ROWS, LONGEST, CLASSES, SEGMENTS = 500, 48, 2, 3
NEAR = 1e-4
RULES = [
    RuleSpec("gate", {"threshold": 0.5}),
    RuleSpec("max_probability", {"threshold": 0.999}),
    RuleSpec("entropy", {"threshold": 0.02}),
    RuleSpec("patience", {"patience": 1.0}),
    RuleSpec("fixed", {"exit": 2.0}),
    RuleSpec("never", {}),
]
# One more version is one more of a kind; each is built and walked in test_trt_life.
ENGINES = [
    *("fake", "ort", "ort-cuda", "trt-10.3.0", "trt-graphs"),
    *(pytest.param(f"trt-{v}", marks=pytest.mark.slow) for v in gpu.VERSIONS if v != "10.3.0"),
]


@lru_cache
def texts() -> tuple[dict[str, np.ndarray], ...]:
    """500 rows of 1 to 48 tokens, one of each its own arrays [1, seq]."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(ROWS):
        ids = random.integers(4, 26, (1, random.integers(1, LONGEST + 1)))
        kinds = (np.arange(ids.shape[1]) > random.integers(0, LONGEST))[None].astype(np.int64)
        rows.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": kinds})
    return tuple(rows)


@lru_cache
def truth() -> tuple[np.ndarray, np.ndarray]:
    """Logits [rows, segments, classes] and gates [rows, segments] of the graphs, run one after another."""
    options = onnxruntime.SessionOptions()
    threads.share_global_pool(options)
    sessions = [
        onnxruntime.InferenceSession(str(TINY / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])
        for name in ("stem", *(f"segment_{number:02}" for number in range(SEGMENTS)))
    ]
    logits, gates = np.zeros((ROWS, SEGMENTS, CLASSES), "f4"), np.zeros((ROWS, SEGMENTS), "f4")
    for row, feeds in enumerate(texts()):
        tensors = dict(feeds)
        for at, session in enumerate(sessions):
            names = [node.name for node in session.get_outputs()]
            out = dict(
                zip(
                    names,
                    session.run(None, {n.name: tensors[n.name] for n in session.get_inputs()}),
                    strict=True,
                )
            )
            tensors |= {name.removeprefix(NEXT): value for name, value in out.items()}
            if at:
                logits[row, at - 1], gates[row, at - 1] = out["logits"][0], out.get("gate", [0])[0]
    return logits, gates


@dataclass
class Rows:
    """Rows by their numbers in truth()."""

    ids: np.ndarray
    length: int

    @property
    def rows(self) -> int:
        return len(self.ids)


class Fake:
    """An engine that returns the signals of truth()."""

    name = device = "fake"
    max_rows = 64
    facts: Mapping[str, str] = {}

    def prepare(self, variant: int, segments: Sequence[int]) -> None: ...

    def begin(self, inputs: Mapping[str, np.ndarray]) -> Rows:
        known = {row["input_ids"].tobytes(): number for number, row in enumerate(texts())}
        reals = inputs["attention_mask"].sum(axis=1)
        numbers = [known[ids[:n].tobytes()] for ids, n in zip(inputs["input_ids"], reals, strict=True)]
        return Rows(np.array(numbers), inputs["input_ids"].shape[1])

    def skip(self, segment: int, state: Rows) -> None: ...

    def step(self, segment: int, variant: int, state: Rows) -> RowSignals:
        logits, gates = truth()
        gate = None if segment + 1 == SEGMENTS else gates[state.ids, segment]
        return RowSignals(logits[state.ids, segment], gate)

    def take(self, state: Rows, rows: np.ndarray) -> Rows:
        return Rows(state.ids[rows], state.length)

    def join(self, states: Sequence[Rows]) -> Rows:
        return Rows(np.concatenate([state.ids for state in states]), states[0].length)

    def drop(self, state: Rows) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if request.param == "fake":
        yield Fake()
        return
    with gpu.opened(request.param, TINY, tmp_path_factory.mktemp("cache")) as engine:
        yield engine


def batches(ids: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Rows of like length together, padded to the longest of the batch."""
    lengths = np.array([texts()[row]["input_ids"].shape[1] for row in ids])
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(ids), size):
        some = order[start : start + size]
        arrays = {name: np.zeros((len(some), lengths[some].max()), np.int64) for name in texts()[0]}
        for place, at in enumerate(some):
            for name, row in texts()[ids[at]].items():
                arrays[name][place, : row.shape[1]] = row[0]
        yield some, arrays


def walked(engine: Any, spec: RuleSpec, ids: np.ndarray, size: int) -> Trace:
    rule = bind(spec, SEGMENTS)
    return walk(
        engine, rule, batches(ids, size), rows=len(ids), segments=SEGMENTS, classes=CLASSES, limit=size
    )


# By default every rule in batches, and rows alone in one; CI runs the others.
CASES = [
    pytest.param(size, spec, id=f"{size}-{spec.name}", marks=() if default else pytest.mark.slow)
    for size in (1, 7, 32)
    for spec in RULES
    for default in [size == 32 or (size == 1 and spec.name == "gate")]
]


@pytest.mark.parametrize(("size", "spec"), CASES)
def test_exits_and_labels_are_those_of_the_graphs(engine: Any, size: int, spec: RuleSpec) -> None:
    logits, gates = truth()
    trace = walked(engine, spec, np.arange(ROWS), size)
    exits = simulate(bind(spec, SEGMENTS), logits, gates)
    depth = (trace.variants >= 0).sum(axis=1) - 1
    assert np.array_equal(depth, exits)
    every = np.arange(ROWS)
    assert np.array_equal(trace.logits[every, depth].argmax(-1), logits[every, exits].argmax(-1))
    ran = trace.variants >= 0
    np.testing.assert_allclose(trace.logits[ran], logits[ran], atol=NEAR)
    np.testing.assert_allclose(trace.gates[:, :-1][ran[:, :-1]], gates[:, :-1][ran[:, :-1]], atol=NEAR)


def test_rows_exit_at_every_depth() -> None:
    """Otherwise the test above would show little."""
    counts = [np.bincount(simulate(bind(spec, SEGMENTS), *truth()), minlength=SEGMENTS) for spec in RULES[:4]]
    assert (np.sum(counts, axis=0) >= 50).all() and all((of >= 38).sum() >= 2 for of in counts)


def test_what_is_taken_and_joined_goes_on_as_it_was(engine: Any) -> None:
    """Every other row, one that is alone, neighbours, and rows in another order."""
    logits, _ = truth()
    many = [row for row in range(ROWS) if 17 <= texts()[row]["input_ids"].shape[1] <= 32][:12]
    ((order, arrays),) = batches(np.array(many), 32)
    ids = np.array(many)[order]
    state = engine.begin(arrays)
    engine.step(0, 0, state)
    choices = [np.arange(0, 12, 2), np.array([11]), np.array([3, 4, 5, 9]), np.array([7, 1, 2])]
    parts = [engine.take(state, rows) for rows in choices]
    engine.drop(state)
    for part in parts:
        engine.step(1, 0, part)
    joined = engine.join(parts)
    for part in parts:
        engine.drop(part)
    signals = engine.step(2, 0, joined)
    np.testing.assert_allclose(signals.logits, logits[ids[np.concatenate(choices)], 2], atol=NEAR)
    engine.drop(joined)


def test_segments_can_be_skipped(engine: Any) -> None:
    if engine.name == "fake":
        pytest.skip("it has no hidden state")
    reference = open_engine(open_bundle(TINY), "fp32", EngineOptions())
    ((_, arrays),) = batches(np.arange(5), 8)
    logits = []
    for each in (reference, engine):
        state = each.begin(arrays)
        each.step(0, 0, state)
        each.skip(1, state)
        logits.append(each.step(2, 0, state).logits.copy())
        each.drop(state)
    reference.close()
    np.testing.assert_allclose(*logits, atol=NEAR)


def test_states_do_not_share_memory(engine: Any) -> None:
    """Two states of one shape, their steps in turn; one is dropped and its memory used again."""
    logits, _ = truth()
    rows = [row for row in range(ROWS) if texts()[row]["input_ids"].shape[1] in (5, 6)][:3]
    feeds = [next(batches(np.array([row]), 1))[1] for row in rows]
    one, two = engine.begin(feeds[0]), engine.begin(feeds[1])
    first = [engine.step(0, 0, state).logits[0].copy() for state in (one, two)]
    engine.drop(one)
    three = engine.begin(feeds[2])
    third = engine.step(0, 0, three).logits[0].copy()
    second = engine.step(1, 0, two).logits[0].copy()
    expected = [logits[rows[0], 0], logits[rows[1], 0], logits[rows[2], 0], logits[rows[1], 1]]
    np.testing.assert_allclose([*first, third, second], expected, atol=NEAR)
    engine.drop(two)
    engine.drop(three)


def test_a_begin_that_is_dropped_at_once_does_no_harm(engine: Any) -> None:
    """The device may still read its inputs when the next text is written into the same memory."""
    logits, _ = truth()
    feeds = [next(batches(np.array([row]), 1))[1] for row in range(ROWS)]
    same = [row for row, feed in enumerate(feeds) if feed["input_ids"].shape[1] == 9][:2]
    engine.drop(engine.begin(feeds[same[0]]))
    state = engine.begin(feeds[same[1]])
    np.testing.assert_allclose(engine.step(0, 0, state).logits[0], logits[same[1], 0], atol=NEAR)
    engine.drop(state)


def test_a_graph_that_is_not_there_is_named(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine.name == "fake":
        pytest.skip("it has no graphs")
    shutil.copytree(TINY, tmp_path / "bundle")
    (tmp_path / "bundle" / "segment_01.onnx").write_bytes(b"something else")
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path / "empty"))  # an engine built before needs no graph
    options = EngineOptions(engine.name, device=engine.device, share=False)
    with pytest.raises(BadBundle, match=r"segment_01\.onnx"):
        open_engine(open_bundle(tmp_path / "bundle"), "fp32", options)
