"""RunStats: histograms and percentiles without keeping the answers."""

import math

import numpy as np

from offramp.runtime.run_stats import RunStats


def test_percentiles_are_right_to_one_per_cent() -> None:
    seconds = np.random.default_rng(0).lognormal(-5, 1, 5000)
    stats = RunStats()
    for value in seconds:
        stats.add(1, 1, value)
    for share in (0.5, 0.95):
        assert abs(stats.percentile(share) / np.quantile(seconds, share) - 1) < 0.02


def test_nothing_counted() -> None:
    assert math.isnan(RunStats().percentile(0.5))
    assert "answers    0" in RunStats().report(2, 4, {})


def test_the_report_has_every_exit_and_fact() -> None:
    stats = RunStats(failed=2)
    for exit in (1, 3, 3, 3):
        stats.add(exit, exit, 0.002)
    lines = stats.report(3, 3, {"engine": "ort", "device": "cpu"}).splitlines()
    assert lines[0].split()[:4] == ["exit", "1", "1", "25.0%"]
    assert lines[1].split()[:4] == ["exit", "2", "0", "0.0%"]
    assert "4 (" in lines[3] and "2 with errors" in lines[3]
    assert lines[4] == "mean depth 2.50 of 3 blocks"
    assert lines[-2:] == ["engine     ort", "device     cpu"]


def test_memory_does_not_grow_with_answers() -> None:
    stats = RunStats()
    for count in range(20_000):
        stats.add(1 + count % 12, 1, 0.001 * (1 + count % 100))
    assert len(stats.time_bins) < 300
