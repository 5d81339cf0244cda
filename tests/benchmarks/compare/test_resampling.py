"""Tests of benchmarks.compare.resampling: coverage over seeds and rows, Holm, means over data sets."""

from __future__ import annotations

import numpy as np
import pytest

from offramp.benchmarks.compare.resampling import (
    bootstrap_weights,
    holm,
    interval,
    mean_interval,
    t_quantile,
    two_sided,
)


def covered(entries: list[dict[str, float]]) -> float:
    """The share of intervals that contain 0."""
    return float(np.mean([entry["low"] <= 0 <= entry["high"] for entry in entries]))


def test_a_method_does_not_differ_from_itself() -> None:
    same = interval(np.zeros((3, 101)))
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0.0, 0.0, 0.0, 1.0)


def test_the_interval_over_three_seeds_covers_their_mean() -> None:
    # The difference of a seed is N(0, 1) and rows do not matter: a bootstrap of seeds would cover about 80 %.
    draw = np.random.default_rng(5)
    entries = [interval(np.repeat(draw.normal(size=(3, 1)), 1001, axis=1)) for _ in range(400)]
    assert covered(entries) == pytest.approx(0.95, abs=0.03)
    assert np.mean([entry["p"] < 0.05 for entry in entries]) == pytest.approx(0.05, abs=0.03)


def test_the_interval_over_rows_covers_their_mean() -> None:
    draw, weights = np.random.default_rng(6), bootstrap_weights(200, 400)
    entries = []
    for _ in range(200):
        rows = draw.normal(size=200)
        entries.append(interval(np.concatenate([[rows.mean()], rows @ weights / 200])[None]))
    assert covered(entries) == pytest.approx(0.95, abs=0.04)


def test_one_seed_is_rows_alone_and_seeds_that_differ_widen_the_interval() -> None:
    resamples = np.random.default_rng(7).normal(1.0, 0.1, 1000)
    one = np.concatenate([[1.0], resamples])[None]
    alone, agreeing = interval(one), interval(np.repeat(one, 3, axis=0))
    assert alone["seed_error"] == 0 and agreeing["low"] == pytest.approx(alone["low"])
    differing = interval(np.concatenate([one - 0.5, one, one + 0.5]))
    assert differing["difference"] == pytest.approx(1.0) and differing["low"] < 0 < alone["low"]
    assert differing["seed_error"] == pytest.approx(0.5 / np.sqrt(3))


def test_a_small_p_value_means_that_all_draws_are_on_one_side() -> None:
    resamples = np.concatenate([[1.0], np.linspace(0.5, 1.5, 999)])[None]
    assert interval(resamples)["p"] == pytest.approx(2 / 1000)
    assert interval(-resamples)["p"] == pytest.approx(2 / 1000)


def test_holm_multiplies_the_smallest_by_all_and_never_falls() -> None:
    # 3 * 0.01, 2 * 0.03, and 1 * 0.04, which may not be below the one before.
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (2, 4.303), (10, 2.228), (120, 1.980), (1e6, 1.960)])
def test_quantiles_of_students_distribution_are_those_of_tables(freedom: float, t: float) -> None:
    assert t_quantile(freedom) == pytest.approx(t, abs=0.002)
    assert two_sided(t, freedom) == pytest.approx(0.05, abs=2e-4)


def test_errors_of_data_sets_add_as_squares() -> None:
    parts = [
        {"difference": 1.0, "row_error": 0.3, "seed_error": 0.0},
        {"difference": 2.0, "row_error": 0.4, "seed_error": 0.0},
    ]
    mean = mean_interval(parts, [3, 3])
    assert mean["difference"] == pytest.approx(1.5)
    assert mean["high"] - 1.5 == pytest.approx(1.96 * 0.5 / 2, rel=1e-3)
    by_seed = [part | {"row_error": 0.0, "seed_error": 0.5} for part in parts]
    # Two equal errors with 2 degrees of freedom each have 4 together: t is 2.776.
    assert mean_interval(by_seed, [3, 3])["high"] - 1.5 == pytest.approx(2.776 * 0.5 / np.sqrt(2), rel=1e-3)
