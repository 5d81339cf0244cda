"""Turns: who runs when, what a walk contender answers, and how turns come to figures."""

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offramp.runtime import load
from offramp.runtime.tuning.timing import (
    TOGETHER,
    Batches,
    Contender,
    Turns,
    accuracy,
    by_segment,
    in_bulk,
    one_by_one,
    summary,
    walking,
)

TINY = Path(__file__).parents[1] / "data" / "tiny_bundle"
TEXTS = ["good film", "the plot was very bad", "a", "not at all warm and not good", "cold cold scene"]


def scripted(name: str, log: list[str], exit: int = 1) -> Contender:
    def run(batches: Batches, rows: int, limit: int) -> int:
        log.append(name)
        return rows

    def read(rows: int) -> Any:
        return np.zeros(rows, np.int64), np.full(rows, exit, np.int64)

    return Contender(name, "walk", "fp32", 1, run, read)


def turns(seconds: list[list[float]], exits: list[list[int]]) -> Turns:
    return Turns(np.array(seconds), np.zeros((len(exits), len(exits[0])), np.int64), np.array(exits))


def test_everybody_answers_the_same_rows_in_turns_of_a_few() -> None:
    log: list[str] = []
    found = one_by_one([scripted(name, log) for name in "abc"], [[]] * (TOGETHER + 2), turns=2)
    runs = [(name, len(list(group))) for name, group in groupby(log)]
    # One run untimed, then the rows; two that meet at the end of a turn look like one.
    assert sum(length for _, length in runs) == 3 * 2 * (TOGETHER + 2 + 2)
    assert {name: log.count(name) for name in "abc"} == dict.fromkeys("abc", 2 * (TOGETHER + 2 + 2))
    assert runs[0][1] == TOGETHER + 1
    assert found["b"].seconds.shape == (2, TOGETHER + 2) and (found["b"].seconds > 0).all()


def test_the_order_of_turns_is_drawn_anew() -> None:
    log: list[str] = []
    one_by_one([scripted(name, log) for name in "abcd"], [[]] * (12 * TOGETHER), turns=1)
    each = len(log) // 12
    orders = {tuple(dict.fromkeys(log[at : at + each])) for at in range(0, len(log), each)}
    assert len(orders) > 6 and {order[0] for order in orders} == set("abcd")


def test_bulk_counts_all_rows_and_not_the_first_round() -> None:
    log: list[str] = []
    rates = in_bulk([scripted(name, log) for name in "ab"], [([], 7), ([], 2)], 4, turns=3)
    assert set(rates) == {"a", "b"} and all(rate > 0 for rate in rates.values())
    assert log.count("a") == log.count("b") == 2 * (3 + 1)


@pytest.mark.parametrize("point", ["default", "fast"])
def test_a_walk_answers_what_its_session_answers(point: str) -> None:
    with load(TINY, point=point) as session:
        contender = walking(session, point, "walk")
        answers = [session(text) for text in TEXTS]
        rows = session._encode(TEXTS)
        batches = list(session._batches(rows, 2))
        labels, exits = contender.read(contender.run(batches, len(rows), 2))
        for text, answer in zip(TEXTS, answers, strict=True):
            single = [(np.zeros(1, np.int64), session.encode(text))]
            label, exit = contender.read(contender.run(single, 1, 1))
            assert (session.labels[label[0]], exit[0]) == (answer.label, answer.exit)
    assert exits.tolist() == [answer.exit for answer in answers]
    assert [session.labels[label] for label in labels] == [answer.label for answer in answers]


def test_bytes_are_those_of_the_variant() -> None:
    with load(TINY, rule="never") as whole, load(TINY, rule="never", variant="int8") as small:
        sizes = [walking(session, "x", "full").bytes for session in (whole, small)]
    names = ["stem.onnx", *(f"segment_{k:02d}.onnx" for k in range(3))]
    assert sizes[0] == sum((TINY / name).stat().st_size for name in names) > sizes[1]


def test_stages_are_timed_one_by_one() -> None:
    with load(TINY, rule="never") as session:
        found = by_segment(session, [[(np.zeros(1, np.int64), session.encode(text))] for text in TEXTS])
    assert [stage["name"] for stage in found] == ["stem", "segment_00", "segment_01", "segment_02"]
    assert all(stage["ms"] > 0 for stage in found)


def test_a_summary_by_hand() -> None:
    macs = np.array([[10.0, 20.0], [30.0, 60.0]])
    reference = turns([[2.0, 4.0], [2.0, 4.0]], [[2, 2], [2, 2]])
    mine = turns([[1.0, 4.0], [1.0, 4.0]], [[1, 2], [1, 2]])
    found = summary(mine, reference, macs, budget=3.0)
    assert (found["ratio"], found["mean_exit"], found["exits"]) == (0.75, 1.5, [1.0, 1.0])
    assert found["p50_ms"] == 2500 and found["goodput"] == 0.5
    assert found["time_share"] == pytest.approx(10 / 12, abs=1e-5)
    assert found["macs_share"] == pytest.approx(140 / 160)
    assert found["realised"] == pytest.approx((2 / 12) / (20 / 160), abs=1e-4)
    assert len(found["percentiles_ms"]) == 101


def test_nothing_saved_has_nothing_to_realise() -> None:
    full = turns([[2.0]], [[2]])
    assert summary(full, full, np.array([[1.0, 2.0]]), 1.0)["realised"] is None
    assert summary(turns([[1.0]], [[1]]), full, np.zeros((1, 2)), 1.0)["realised"] is None  # no MACs known


def test_accuracy_needs_labels() -> None:
    mine = Turns(np.ones((2, 2)), np.array([[0, 1], [1, 1]]), np.ones((2, 2), np.int64))
    assert accuracy(mine, None) is None
    assert accuracy(mine, np.array([0, 1])) == 75
