"""Figures from timings, on examples small enough to check by hand."""

import numpy as np
import pytest
from tiny_bundles import CLASSIFIER

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.decoding import Token
from offramp.runtime.tuning.figures import answer_figures, answer_quality, depths_by_position, row_figures
from offramp.runtime.tuning.right_answers import AnswerReader
from offramp.runtime.tuning.timing import AnswerTimings, RowTimings


def timings(seconds: list[list[float]], exits: list[list[int]]) -> RowTimings:
    return RowTimings(np.array(seconds), np.zeros((len(exits), len(exits[0])), np.int64), np.array(exits))


def test_row_figures_by_hand() -> None:
    macs = np.array([[10.0, 20.0], [30.0, 60.0]])
    reference = timings([[2.0, 4.0], [2.0, 4.0]], [[2, 2], [2, 2]])
    own = timings([[1.0, 4.0], [1.0, 4.0]], [[1, 2], [1, 2]])
    figures = row_figures(own, reference, macs, budget=3.0)
    assert (figures["ratio"], figures["mean_exit"], figures["exits"]) == (0.75, 1.5, [1.0, 1.0])
    assert figures["p50_ms"] == 2500 and figures["goodput"] == 0.5
    assert figures["time_share"] == pytest.approx(10 / 12, abs=1e-5)
    assert figures["macs_share"] == pytest.approx(140 / 160)
    assert figures["realised"] == pytest.approx((2 / 12) / (20 / 160), abs=1e-4)
    assert len(figures["percentiles_ms"]) == 101


def test_nothing_saved_has_nothing_to_realise() -> None:
    full = timings([[2.0]], [[2]])
    assert row_figures(full, full, np.array([[1.0, 2.0]]), 1.0)["realised"] is None
    assert (
        row_figures(timings([[1.0]], [[1]]), full, np.zeros((1, 2)), 1.0)["realised"] is None
    )  # no MACs known


def test_accuracy_needs_labels() -> None:
    reader = AnswerReader(open_bundle(CLASSIFIER).manifest)
    own = RowTimings(np.ones((2, 2)), np.array([[0, 1], [1, 1]]), np.ones((2, 2), np.int64))
    assert answer_quality(reader, own, None) is None
    assert answer_quality(reader, own, np.array([0, 1])) == 75


def test_answer_figures_by_hand() -> None:
    full = AnswerTimings([[Token(7, 3, 3), Token(8, 3, 3), Token(9, 3, 3)]], [[1.0, 3.0, 5.0]])
    own = AnswerTimings([[Token(7, 3, 3), Token(8, 1, 1), Token(5, 2, 4)]], [[1.0, 2.0, 3.0]])
    figures = answer_figures(own, full)
    assert (figures["ratio"], figures["tokens_per_s"], figures["first_ms"]) == (0.5, 1.0, 1000)
    assert (figures["depth"], figures["blocks_run"], figures["same"]) == (1.5, 2.5, 0.0)
    assert answer_figures(full, full)["same"] == 1.0


def test_depths_by_position() -> None:
    lines = depths_by_position([[Token(7, 3, 3), Token(7, 1, 1), Token(7, 2, 2)], [Token(7, 3, 3)]])
    assert lines == [
        {"from": 1, "mean": 3.0, "tokens": {3: 2}},
        {"from": 2, "mean": 1.5, "tokens": {1: 1, 2: 1}},
    ]


def test_answers_of_one_token_have_no_rate() -> None:
    one, three = ([Token(7, 3, 3)], [1.0]), ([Token(7, 3, 3)] * 3, [1.0, 2.0, 3.0])
    figures = answer_figures(AnswerTimings([one[0]], [one[1]]), AnswerTimings([one[0]], [one[1]]))
    names = ("tokens_per_s", "ratio", "ratio_p5", "ratio_p95", "p50_ms", "depth", "blocks_run")
    assert [figures[name] for name in names] == [None] * len(names)
    both = AnswerTimings([one[0], three[0]], [one[1], three[1]])
    assert (answer_figures(both, both)["ratio_p5"], answer_figures(both, both)["tokens_per_s"]) == (1.0, 1.0)
