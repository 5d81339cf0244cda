"""Calibration error, temperatures and conformal sets against cases computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from offramp.runtime.rules import softmax
from offramp.runtime.tuning.calibration import (
    answer_logits,
    calibration_error,
    calibration_figures,
    conformal_quantile,
    conformal_sets,
    exit_quantiles,
    fit_temperature,
    fit_temperatures,
    measure_calibration,
    negative_log_likelihood,
    score_figures,
    stable_temperatures,
)


def logits_of(*top: float) -> np.ndarray:
    """Two classes; `top` is P(class 0) of each row."""
    p = np.array(top, np.float32)
    return np.log(np.stack([p, 1 - p], -1))


def test_error_of_two_bins_by_hand() -> None:
    logits = logits_of(0.6, 0.9, 0.7, 0.8)
    labels = np.array([1, 0, 0, 0])
    # sorted: 0.6 wrong, 0.7 right | 0.8 right, 0.9 right: |0.5 - 0.65| / 2 + |1 - 0.85| / 2
    assert calibration_error(logits, labels, bins=2) == pytest.approx(0.15, abs=1e-6)
    assert calibration_error(logits, labels, bins=1) == pytest.approx(0.0, abs=1e-6)  # 0.75 and 3 of 4
    # More bins than rows: every row is its own bin.
    assert calibration_error(logits, labels) == pytest.approx((0.6 + 0.3 + 0.2 + 0.1) / 4, abs=1e-6)


def test_bins_have_equal_numbers_of_rows() -> None:
    logits = logits_of(*[0.51] * 2, *[0.999] * 8)
    labels = np.array([0, 1, *[0] * 8])
    # five bins of two: the first is right by half at 0.51, four are right at 0.999
    assert calibration_error(logits, labels, bins=5) == pytest.approx((0.01 + 4 * 0.001) / 5, abs=1e-5)


def test_the_temperature_brings_confidence_to_accuracy() -> None:
    # Certain of 0.99, right in 3 of 4: at the best temperature P is 0.75, so T = ln 99 / ln 3.
    logits, labels = logits_of(0.99, 0.99, 0.99, 0.99), np.array([0, 0, 0, 1])
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(math.log(99) / math.log(3), rel=1e-3)
    assert calibration_error(logits / temperature, labels, bins=1) == pytest.approx(0, abs=1e-3)
    assert negative_log_likelihood(logits, labels, temperature) < negative_log_likelihood(logits, labels)
    assert fit_temperature(logits / temperature, labels) == pytest.approx(1.0, rel=1e-3)


def test_every_exit_has_its_own_temperature() -> None:
    labels = np.array([0, 0, 0, 1])
    exits = np.stack([logits_of(*[0.75] * 4), logits_of(*[0.99] * 4)], axis=1)
    np.testing.assert_allclose(fit_temperatures(exits, labels), [1.0, 4.1827], rtol=1e-3)


def test_the_temperature_is_finite_where_all_rows_are_right() -> None:
    assert fit_temperature(logits_of(0.9, 0.8), np.array([0, 0])) == pytest.approx(0.01, rel=0.01)


def test_the_quantile_is_the_rank_for_the_coverage() -> None:
    # scores 0.1 to 0.9; nine rows at 80 %: ceil(10 * 0.8) = the eighth
    dev = logits_of(*(0.9 - 0.1 * i for i in range(9)))
    labels = np.zeros(9, np.int64)
    assert conformal_quantile(dev, labels, 0.8) == pytest.approx(0.8, abs=1e-6)
    assert conformal_quantile(dev, labels, 0.9) == pytest.approx(0.9, abs=1e-6)
    assert conformal_quantile(dev, labels, 0.91) == math.inf  # it would take a tenth row


def test_sets_contain_every_label_that_is_likely_enough() -> None:
    sets = conformal_sets(logits_of(0.95, 0.7, 0.45), 0.5)
    assert sets.tolist() == [[True, False], [True, False], [False, True]]
    assert conformal_sets(logits_of(0.95, 0.55), 0.6).tolist() == [[True, False], [True, True]]
    assert conformal_sets(logits_of(0.99), math.inf).tolist() == [[True, True]]


def test_sets_cover_rows_of_the_distribution_of_dev() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (4000, 2, 4)).astype(np.float32)
    p = np.exp(logits[:, 1]) / np.exp(logits[:, 1]).sum(-1, keepdims=True)
    labels = np.array([random.choice(4, p=row / row.sum()) for row in p.astype(float)])
    exits = random.integers(0, 2, 4000)
    known, new = slice(0, 2000), slice(2000, 4000)
    figures = calibration_figures(
        logits[known], exits[known], labels[known], logits[new], exits[new], labels[new]
    )
    assert figures["coverage"] == pytest.approx(95, abs=1.5) and 1 < figures["set_size"] < 4
    assert figures["coverage_per_exit"] == pytest.approx(95, abs=1.5)
    assert figures["ece"] < figures["ece_raw"] / 2  # exit 1 is uninformative; only its temperature shows that


def test_exits_that_few_rows_take_have_the_quantile_of_all_rows() -> None:
    random = np.random.default_rng(1)
    logits = random.normal(0, 2, (100, 3, 4)).astype(np.float32)
    labels = random.integers(0, 4, 100)
    exits = np.repeat([0, 1, 2], [20, 21, 59])
    quantiles = exit_quantiles(logits, exits, labels, 0.9)
    assert quantiles[0] == conformal_quantile(logits[:, 0], labels, 0.9)
    assert quantiles[1] == conformal_quantile(logits[20:41, 1], labels[20:41], 0.9)
    assert quantiles[1] != conformal_quantile(logits[:, 1], labels, 0.9)


def test_sets_may_have_a_quantile_for_each_row() -> None:
    sets = conformal_sets(logits_of(0.8, 0.8), np.array([0.1, 0.9]))
    assert sets.tolist() == [[False, False], [True, True]]


def test_the_calibration_of_a_walk_can_be_stored() -> None:
    logits = np.stack([logits_of(*[0.75] * 4), logits_of(*[0.99] * 4)], axis=1)
    calibration = measure_calibration(logits, np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1]), 0.95)
    assert calibration.temperatures == pytest.approx((1.0, 4.1827), rel=1e-3)
    # Four rows are too few for 95 %: sets hold every label.
    assert calibration.quantile == 1.0 and calibration.quantiles == (1.0, 1.0)


def test_answers_are_the_logits_of_each_rows_exit() -> None:
    logits = np.arange(12.0).reshape(2, 3, 2)
    assert answer_logits(logits, np.array([2, 0])).tolist() == [[4.0, 5.0], [6.0, 7.0]]


def test_an_exit_that_is_always_right_keeps_its_probabilities() -> None:
    labels = np.array([0, 0, 0, 1])
    exits = np.stack([logits_of(0.9, 0.8, 0.9, 0.1), logits_of(*[0.99] * 4)], axis=1)
    assert stable_temperatures(exits, labels) == (1.0, pytest.approx(4.1827, rel=1e-3))


def test_figures_of_scores_are_of_rows_that_did_not_fit_them() -> None:
    random = np.random.default_rng(0)
    truth = random.normal(0, 1, (4000, 1, 3)).astype(np.float32)
    chances = np.exp(truth[:, 0]) / np.exp(truth[:, 0]).sum(-1, keepdims=True)
    drawn = np.array([random.choice(3, p=row / row.sum()) for row in chances.astype(float)])
    figures = score_figures(3 * truth, np.zeros(4000, np.int64), drawn)
    assert figures["ece_raw"] > 15 and figures["ece"] < 4
    assert 1 < figures["set_size"] < 3
    assert score_figures(truth[:1], np.zeros(1, np.int64), drawn[:1]) == {}


def test_rows_that_are_sorted_by_label_have_the_same_figures() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 1000)
    logits = (2.0 * np.eye(2)[labels] + random.normal(0, 1, (1000, 2)))[:, None].astype(np.float32)
    exits, order = np.zeros(1000, np.int64), np.argsort(labels, kind="stable")
    mixed, ordered = score_figures(logits, exits, labels), score_figures(logits[order], exits, labels[order])
    assert ordered["ece"] == pytest.approx(mixed["ece"], abs=3)


def test_sets_of_a_text_that_comes_again_hold_its_label() -> None:
    # All rows are one text, so its score is the quantile: a session, which computes it in other steps, must
    # not find it above.
    random = np.random.default_rng(0)
    for _ in range(200):
        count = int(random.integers(2, 10))
        row = random.normal(0, 3, (2, count)).astype(np.float32)
        label = int(random.integers(count))
        temperatures = np.round(np.exp(random.normal(0, 0.7, 2)), 4)
        rows, exits = np.repeat(row[None], 60, 0), np.zeros(60, np.int64)
        calibration = measure_calibration(rows, exits, np.full(60, label), 0.9, temperatures)
        for quantile in (calibration.quantiles[0], calibration.quantile):
            noise = np.float32(1 + 3e-7)  # of a walk alone and of one with other rows
            scores = 1.0 - softmax(row[0] * noise / np.float32(calibration.temperatures[0]))
            assert scores[label] <= quantile
