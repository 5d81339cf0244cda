"""benchmarks/watching.py: streams whose difficulty doubles, and both measurements on a tiny bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_bundles import bundle_with_points, texts

from offramp.benchmarks.watching import (
    BEFORE,
    doubling_stream,
    hold_budget,
    middle_point,
    replay,
    tilted_shares,
    watch,
    windows_of,
    worst_of,
)
from offramp.runtime.audit import AuditPlan
from offramp.runtime.budget import BudgetPoint
from offramp.runtime.bundle.manifest import RuleSpec


def test_tilted_shares_have_the_mean_that_is_asked_for() -> None:
    values = np.array([0.1, 0.2, 0.9])
    shares = tilted_shares(values, 0.6)
    assert shares.sum() == pytest.approx(1) and shares @ values == pytest.approx(0.6)


def test_the_depth_of_a_stream_doubles_half_way() -> None:
    depths = np.random.default_rng(0).uniform(0.1, 1, 500)
    stream = doubling_stream(depths, 20_000, 0)
    easy, hard = depths[stream[:10_000]].mean(), depths[stream[10_000:]].mean()
    assert hard / easy == pytest.approx(2, rel=0.02)


def test_the_middle_point_is_neither_end() -> None:
    points = [BudgetPoint(str(depth), RuleSpec("never", {}), depth) for depth in (0.1, 0.3, 0.6, 1.0)]
    assert middle_point(points).depth == 0.3


def test_windows_leave_out_the_rest() -> None:
    assert windows_of([1.0, 3.0, 5.0, 7.0, 9.0], 2) == [2.0, 6.0]


def test_a_run_that_is_not_flagged_has_no_number_of_rows() -> None:
    figures = worst_of([{"exits": 3}, {"exits": 9}, {"exits": 6}], [3, None, 6])
    assert figures == {"median": {"exits": 6.0, "either": None}, "largest": {"exits": 9.0, "either": None}}


def test_a_replayed_shift_is_flagged() -> None:
    exits, losses = np.repeat([0, 2], 100), np.repeat([0.0, 1.0], 100)
    report = replay(AuditPlan(1.0, 0.1, "given", "warn", 0, (300, 0, 0)), exits, losses, np.arange(200))
    assert report.exits_changed_at is not None and 100 < report.exits_changed_at < 140
    assert report.exceeded_at is not None and 100 < report.exceeded_at < 140


@pytest.mark.slow
def test_a_tiny_bundle_holds_its_budget_in_depth(tmp_path: Path) -> None:
    path = bundle_with_points(tmp_path)
    result = hold_budget(path, texts(300, seed=3), timed=False, rows=800, window=100, seed=0)
    assert len(result["held"]) == len(result["fixed"]) == 8
    assert np.mean(result["fixed"][4:]) > 1.5 * np.mean(result["fixed"][:4])
    assert abs(np.mean(result["held"]) / result["target"] - 1) < 0.05


@pytest.mark.slow
def test_a_tiny_bundle_is_timed_without_an_error(tmp_path: Path) -> None:
    path = bundle_with_points(tmp_path)
    result = hold_budget(path, texts(300, seed=3), timed=True, rows=500, window=100, seed=0)
    assert result["unit"] == "ms" and result["report"]["rows"] == 500


@pytest.mark.slow
def test_a_tiny_bundle_is_watched(tmp_path: Path) -> None:
    path = bundle_with_points(tmp_path, guaranteed=True)
    usual, shifted = texts(BEFORE + 100, seed=4), ["cold"] * 200
    result = watch(path, usual, shifted, ["gate-3"], 0.5, 2)["points"]["gate-3"]
    assert result["unshifted_flagged"] == 0
    assert set(result["rows_to_flag"]["largest"]) == {"disagreement", "exits", "either"}
    assert result["session"]["unshifted"]["rows"] == 300
