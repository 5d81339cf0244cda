"""Tests of benchmarks.compare.frontiers against cases computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from offramp.benchmarks.compare.frontiers import (
    SettingResults,
    accuracy_differences,
    areas_between,
    bootstrap_weights,
    difference_interval,
    elue_score,
    sorted_frontier,
)


def line(*points: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    return sorted_frontier(np.array([x for x, _ in points], float), np.array([y for _, y in points], float))


def test_a_line_that_is_above_everywhere() -> None:
    above, below = areas_between(line((0, 90), (100, 80)), line((0, 88), (100, 78)), 0, 100)
    assert above == pytest.approx(2.0) and below == 0.0


def test_lines_that_cross_are_counted_on_both_sides() -> None:
    # The gap goes from +2 to -2 and is zero halfway: two triangles of 50 x 2 / 2 over a width of 100.
    above, below = areas_between(line((0, 92), (100, 88)), line((0, 90), (100, 90)), 0, 100)
    assert above == pytest.approx(0.5) and below == pytest.approx(0.5)


def test_corners_of_either_line_count() -> None:
    peak = line((0, 90), (50, 94), (100, 90))
    assert areas_between(peak, line((0, 90), (100, 90)), 0, 100) == pytest.approx((2.0, 0.0))
    assert areas_between(line((0, 90), (100, 90)), peak, 0, 100) == pytest.approx((0.0, 2.0))


def test_only_the_range_where_both_exist_counts() -> None:
    method, reference = line((20, 91), (60, 91)), line((40, 90), (90, 90))
    assert areas_between(method, reference, 30, 80) == pytest.approx((1.0, 0.0))
    assert np.isnan(areas_between(method, reference, 65, 80)).all()


def test_settings_that_save_the_same_are_one_corner() -> None:
    assert [axis.tolist() for axis in line((10, 90), (10, 92), (5, 95))] == [[5.0, 10.0], [95.0, 91.0]]


def test_score_is_the_mean_over_a_static_network_of_the_same_cost() -> None:
    static = line((0, 90), (50, 80), (100, 50))
    assert elue_score(line((25, 88), (75, 70)), static) == pytest.approx(((88 - 85) + (70 - 65)) / 2)


def settings(accuracy: float, rows: int, seed: int) -> SettingResults:
    """Two settings that save 0 and 80 %, right on that share of the rows."""
    right = np.random.default_rng(seed).random((2, rows)) < accuracy
    spent = np.array([[1.0], [0.2]]) * np.ones((2, rows))
    return SettingResults(right, {"macs": spent}, {"macs": np.ones(rows)})


def compared(method: SettingResults, reference: SettingResults) -> dict[str, float]:
    return difference_interval(
        [accuracy_differences(method, reference, 30, 60, bootstrap_weights(method.right.shape[1], 200))]
    )


def test_a_method_does_not_differ_from_itself() -> None:
    method = settings(0.8, 300, 1)
    assert compared(method, method) == {"difference": 0.0, "low": 0.0, "high": 0.0}


def test_the_interval_holds_zero_for_equals_and_not_for_a_clear_difference() -> None:
    same = compared(settings(0.8, 400, 1), settings(0.8, 400, 2))
    assert same["low"] < 0 < same["high"]
    better = compared(settings(0.9, 400, 1), settings(0.7, 400, 2))
    assert better["low"] > 0 and better["difference"] == pytest.approx(20, abs=4)


def test_more_seeds_narrow_the_interval_unless_they_agree_on_the_rows() -> None:
    weights = bootstrap_weights(400, 200)
    first = accuracy_differences(settings(0.9, 400, 1), settings(0.7, 400, 2), 30, 60, weights)
    second = accuracy_differences(settings(0.9, 400, 3), settings(0.7, 400, 4), 30, 60, weights)
    assert difference_interval([first, first]) == difference_interval([first])
    both = difference_interval([first, second])
    assert both["high"] - both["low"] < 0.85 * (
        difference_interval([first])["high"] - difference_interval([first])["low"]
    )


def test_macs_are_summed_over_rows_and_not_averaged_by_row() -> None:
    # A long row of 9 at full depth and a short one of 1 that costs nothing: a tenth is saved.
    macs, full = {"macs": np.array([[9.0, 0.0]])}, {"macs": np.array([9.0, 1.0])}
    assert SettingResults(np.ones((1, 2), bool), macs, full).frontier()[0] == pytest.approx([10.0])


def test_rows_that_are_drawn_more_often_count_more() -> None:
    right, macs = np.array([[True, False]]), {"macs": np.array([[1.0, 3.0]])}
    method = SettingResults(right, macs, {"macs": np.array([4.0, 4.0])})
    (saved, accuracy), _ = method.frontiers(np.array([[3.0, 1.0], [1.0, 1.0]]))
    assert saved == pytest.approx([100 * (1 - 6 / 16)]) and accuracy == pytest.approx([75.0])
