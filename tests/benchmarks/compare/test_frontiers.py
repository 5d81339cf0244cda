"""Tests of benchmarks.compare.frontiers against cases computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from offramp.benchmarks.compare.frontiers import (
    BANDS,
    Curves,
    SettingResults,
    elue_score,
    largest_saving,
    read_curves,
    sorted_frontier,
)


def line(*points: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    return sorted_frontier(np.array([x for x, _ in points], float), np.array([y for _, y in points], float))


def curves(*points: tuple[float, float]) -> Curves:
    """The curves of settings with these savings and accuracies: 100 rows that all count once."""
    rows = np.arange(100)
    right = np.stack([rows < accuracy for _, accuracy in points])
    spent = np.stack([np.full(100, 1 - saved / 100) for saved, _ in points])
    return read_curves(SettingResults(right, {"macs": spent}, {"macs": np.ones(100)}), np.ones((100, 1)))


def test_settings_that_save_the_same_are_one_corner() -> None:
    assert [axis.tolist() for axis in line((10, 90), (10, 92), (5, 95))] == [[5.0, 10.0], [95.0, 91.0]]


def test_the_mean_in_a_band_is_that_of_the_polyline() -> None:
    slope = curves((0, 90), (100, 40))  # half a point a percent
    assert slope.band_mean(*BANDS["40-80"]) == pytest.approx([60.0])
    assert slope.band_mean(*BANDS["10-40"]) == pytest.approx([77.5])
    peak = curves((40, 90), (60, 80), (80, 90))
    assert peak.band_mean(*BANDS["40-80"]) == pytest.approx([85.0])


def test_beyond_its_ends_a_frontier_has_the_accuracy_of_its_last_setting() -> None:
    short = curves((30, 90), (60, 80))
    assert short.band_mean(*BANDS["80-90"]) == pytest.approx([80.0])
    # 90 up to 30 % saved, then down to 86.67 at 40 %: (20 * 90 + 10 * 88.33) / 30.
    assert short.band_mean(*BANDS["10-40"]) == pytest.approx([(20 * 90 + 10 * (90 - 5 / 3)) / 30], abs=0.01)


def test_the_mean_saving_at_a_loss_of_up_to_five_points() -> None:
    # Two points lost for each 20 % saved: at a loss of d the saving is 10 d, on average 25.
    assert curves((0, 90), (100, 80)).mean_saving(np.array([90.0])) == pytest.approx([25.0])
    # A reference two points higher: nothing for d below 2, then up to 30; (3 / 5) * 15.
    assert curves((0, 90), (100, 80)).mean_saving(np.array([92.0])) == pytest.approx([9.0])


def test_a_frontier_that_never_loses_five_points_saves_what_its_cheapest_setting_saves() -> None:
    assert curves((0, 90), (70.25, 90)).mean_saving(np.array([90.0])) == pytest.approx([70.25])
    assert curves((0, 80), (70, 80)).mean_saving(np.array([90.0])) == pytest.approx([0.0])
    assert curves((-3, 90)).mean_saving(np.array([90.0])) == pytest.approx([0.0]), "full depth saves nothing"


def test_the_largest_saving_counts_where_accuracy_falls_and_rises_again() -> None:
    dip = curves((0, 90), (30, 70), (60, 90), (80, 50))
    # Up to 60 the accuracy beyond is 90; then 2 points a percent: at a loss of d the saving is 60 + d / 2.
    assert dip.mean_saving(np.array([90.0])) == pytest.approx([61.25])


def test_the_largest_saving_at_one_accuracy() -> None:
    frontier = line((0, 90), (40, 88), (80, 80))
    assert largest_saving(frontier, 89) == pytest.approx(20)
    assert largest_saving(frontier, 84) == pytest.approx(60)
    assert largest_saving(frontier, 79) == pytest.approx(80)
    assert largest_saving(frontier, 91) == 0.0


def test_score_is_the_mean_over_a_static_network_of_the_same_cost() -> None:
    static = line((0, 90), (50, 80), (100, 50))
    assert elue_score(line((25, 88), (75, 70)), static) == pytest.approx(((88 - 85) + (70 - 65)) / 2)


def test_macs_are_summed_over_rows_and_not_averaged_by_row() -> None:
    # A long row of 9 at full depth and a short one of 1 that costs nothing: a tenth is saved.
    macs, full = {"macs": np.array([[9.0, 0.0]])}, {"macs": np.array([9.0, 1.0])}
    assert SettingResults(np.ones((1, 2), bool), macs, full).frontier()[0] == pytest.approx([10.0])


def test_rows_that_are_drawn_more_often_count_more() -> None:
    right, macs = np.array([[True, False]]), {"macs": np.array([[1.0, 3.0]])}
    method = SettingResults(right, macs, {"macs": np.array([4.0, 4.0])})
    (saved, accuracy), _ = method.frontiers(np.array([[3.0, 1.0], [1.0, 1.0]]))
    assert saved == pytest.approx([100 * (1 - 6 / 16)]) and accuracy == pytest.approx([75.0])
