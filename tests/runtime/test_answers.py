"""Answers beside labels, in every engine on the CPU and on doubles of a GPU: they stay with their rows when
rows exit, are taken and are joined, and the trace keeps copies of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import gpu
from plain_sessions import inputs, outputs
from tiny_bundles import EMBEDDING, MULTI_LABEL, REGRESSION, TOKENS

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.rules import RowSignals, bind, simulate, softmax
from offramp.runtime.rules.exits import answer_change
from offramp.runtime.walker import Trace, walk

ROWS, LENGTH, SEGMENTS = 40, 12, 3
NEAR = 1e-4
RULES = {
    MULTI_LABEL: ("max_probability",),
    TOKENS: ("max_probability",),
    REGRESSION: ("settled", "gate"),
    EMBEDDING: ("settled",),
}
ENGINES = ("ort", "ort-cuda", "trt-10.3.0", "trt-graphs", pytest.param("trt-8.6.1", marks=pytest.mark.slow))


@dataclass(frozen=True)
class Truth:
    """What plain sessions give for ROWS rows at every exit; answers: one array [rows, ...] a segment.

    logits [rows, segments, classes]; gates [rows, segments] or None.
    """

    feeds: dict[str, np.ndarray]
    answers: tuple[np.ndarray, ...]
    logits: np.ndarray
    gates: np.ndarray | None

    @property
    def stacked(self) -> np.ndarray | None:
        """Answers [rows, segments, numbers]; None for those of tokens."""
        return np.stack(self.answers, axis=1) if self.answers[0].ndim == 2 else None

    def shown(self, row: int, answer: np.ndarray) -> np.ndarray:
        """An answer of a row without that of its padding, which means nothing."""
        return answer[: self.feeds["attention_mask"][row].sum()] if answer.ndim == 2 else answer


@lru_cache
def truth(bundle: Path) -> Truth:
    feeds = inputs(ROWS, LENGTH, seed=3)
    if bundle == TOKENS:
        random = np.random.default_rng(5).random((ROWS, LENGTH)) < 0.7
        feeds["word_starts"] = random * feeds["attention_mask"]
    segments = outputs(feeds, bundle=bundle)
    none = np.zeros((ROWS, 0), np.float32)
    gates = [segment.get("gate", np.zeros(ROWS, np.float32)) for segment in segments]
    return Truth(
        feeds,
        tuple(segment["answer"] for segment in segments),
        np.stack([segment.get("logits", none) for segment in segments], axis=1),
        np.stack(gates, axis=1) if "gate" in segments[0] else None,
    )


def rule_of(bundle: Path, name: str) -> Any:
    """A rule at a threshold far from every value, with which rows leave at all exits."""
    right = truth(bundle)
    if name == "settled":
        answers = right.stacked
        assert answers is not None
        values = answer_change(answers[:, 1], answers[:, 0])
    elif name == "gate":
        assert right.gates is not None
        values = right.gates[:, :-1]
    else:
        values = softmax(right.logits[:, :-1]).max(-1)
    ordered = np.sort(values.ravel())
    middle = slice(len(ordered) // 3, 2 * len(ordered) // 3)
    at = middle.start + int(np.diff(ordered[middle]).argmax())  # the widest gap about the middle
    assert ordered[at + 1] - ordered[at] > 10 * NEAR
    spec = RuleSpec(name, {"threshold": float(ordered[at : at + 2].mean())})
    return bind(spec, SEGMENTS, answer_size=open_bundle(bundle).manifest.answer_size)


@pytest.fixture(scope="module", params=ENGINES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=RULES, ids=lambda bundle: bundle.name)
def opened(
    request: pytest.FixtureRequest, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Any]]:
    """A bundle and its engine."""
    with gpu.opened(kind, request.param, tmp_path_factory.mktemp("cache")) as engine:
        yield request.param, engine


def walked(bundle: Path, engine: Any, rule: Any, size: int) -> Trace:
    feeds = truth(bundle).feeds
    starts = range(0, ROWS, size)
    batches = [
        (ids, {name: array[ids] for name, array in feeds.items()})
        for ids in (np.arange(start, min(start + size, ROWS)) for start in starts)
    ]
    classes = open_bundle(bundle).manifest.classes
    return walk(engine, rule, batches, rows=ROWS, segments=SEGMENTS, classes=classes, limit=size)


@pytest.mark.parametrize("size", [1, 7])
def test_every_row_has_its_answers_where_it_ran_and_none_elsewhere(
    opened: tuple[Path, Any], size: int
) -> None:
    bundle, engine = opened
    right = truth(bundle)
    for name in RULES[bundle]:
        rule = rule_of(bundle, name)
        trace = walked(bundle, engine, rule, size)
        ran = trace.variants >= 0
        exits = simulate(rule, right.logits, right.gates, right.stacked)
        assert np.array_equal(ran.sum(axis=1) - 1, exits) and len(np.unique(exits)) > 1
        assert trace.answers is not None and trace.answers.shape == (ROWS, SEGMENTS)
        for row in range(ROWS):
            for segment in range(SEGMENTS):
                answer = trace.answers[row, segment]
                assert (answer is not None) == ran[row, segment]
                if answer is not None:
                    expected = right.shown(row, right.answers[segment][row])
                    np.testing.assert_allclose(right.shown(row, answer), expected, atol=NEAR)
        np.testing.assert_allclose(trace.logits[ran], right.logits[ran], atol=NEAR)


def test_answers_of_rows_that_are_taken_and_joined(opened: tuple[Path, Any]) -> None:
    bundle, engine = opened
    right = truth(bundle)
    state = engine.begin({name: array[:12] for name, array in right.feeds.items()})
    engine.step(0, 0, state)
    choices = [np.arange(0, 12, 2), np.array([11]), np.array([7, 1, 2])]
    parts = [engine.take(state, rows) for rows in choices]
    engine.drop(state)
    for part in parts:
        engine.step(1, 0, part)
    joined = engine.join(parts)
    for part in parts:
        engine.drop(part)
    answers = engine.step(2, 0, joined).answer
    for row, answer in zip(np.concatenate(choices).tolist(), answers, strict=True):
        expected = right.shown(row, right.answers[2][row])
        np.testing.assert_allclose(right.shown(row, answer), expected, atol=NEAR)
    engine.drop(joined)


def test_trace_keeps_its_answers_when_the_engine_walks_again(opened: tuple[Path, Any]) -> None:
    bundle, engine = opened
    never = bind(RuleSpec("never", {}), SEGMENTS)
    for size in (1, 7):
        trace = walked(bundle, engine, never, size)
        assert trace.answers is not None
        before = [answer.copy() for answer in trace.answers.ravel()]
        walked(bundle, engine, rule_of(bundle, RULES[bundle][0]), size)
        state = engine.begin({name: array[:1] * 0 + 1 for name, array in truth(bundle).feeds.items()})
        for segment in range(SEGMENTS):
            engine.step(segment, 0, state)
        engine.drop(state)
        assert all(np.array_equal(*pair) for pair in zip(before, trace.answers.ravel(), strict=True))


def test_signals_without_labels_have_logits_of_no_class(kind: str, tmp_path: Path) -> None:
    for bundle in (REGRESSION, EMBEDDING):
        with gpu.opened(kind, bundle, tmp_path / bundle.name) as engine:
            state = engine.begin({name: array[:3] for name, array in truth(bundle).feeds.items()})
            signals: RowSignals = engine.step(0, 0, state)
            assert signals.logits.shape == (3, 0) and signals.logits.dtype == np.float32
            assert signals.answer is not None and signals.answer.shape == truth(bundle).answers[0][:3].shape
            assert (signals.gate is None) == (bundle == EMBEDDING)
            engine.drop(state)


def test_buffers_count_the_bytes_of_answers() -> None:
    """Answers of tokens can be larger than the hidden state, and idle buffers keep them."""
    with gpu.opened("ort", TOKENS, Path()) as engine:
        state = engine.begin(truth(TOKENS).feeds)
        before = state.buffers.bytes
        answer = engine.step(0, 0, state).answer
        assert state.buffers.bytes - before >= answer.nbytes == ROWS * LENGTH * 5 * 4
        engine.drop(state)
