"""The confidence sequence covers its mean at all times, and the test of exits raises few false alarms."""

from __future__ import annotations

import numpy as np
import pytest

from offramp.runtime.sequential import ConfidenceSequence, ExitTest

pytestmark = pytest.mark.slow

CALIBRATION = (300, 200, 100, 400)


def intervals(values: list[float], confidence: float = 0.9) -> list[tuple[float, float]]:
    sequence = ConfidenceSequence(confidence)
    ends = []
    for value in values:
        sequence.add(value)
        ends.append((sequence.low, sequence.high))
    return ends


@pytest.mark.parametrize("mean", [0.01, 0.1, 0.5])
def test_the_sequence_covers_the_mean_at_all_times(mean: float) -> None:
    random, missed, runs = np.random.default_rng(0), 0, 100
    for _ in range(runs):
        ends = intervals([float(value) for value in random.random(150) < mean])
        missed += any(low > mean or high < mean for low, high in ends)
    assert missed <= 10 + 3 * 3  # 10 % of the runs, and three standard deviations


def test_the_sequence_covers_the_mean_of_fractions() -> None:
    random, missed, runs = np.random.default_rng(1), 0, 60
    for _ in range(runs):
        ends = intervals(random.beta(1, 4, 150).tolist())
        missed += any(low > 0.2 or high < 0.2 for low, high in ends)
    assert missed <= 6 + 3 * 2.4


def test_the_sequence_closes_in_on_the_mean() -> None:
    random = np.random.default_rng(2)
    (low, high) = intervals([float(value) for value in random.random(3000) < 0.05], 0.99)[-1]
    assert 0.02 < low < 0.05 < high < 0.09


def test_before_any_number_nothing_is_known() -> None:
    sequence = ConfidenceSequence(0.99)
    assert (sequence.low, sequence.mean, sequence.high) == (0.0, 0.0, 1.0)


def test_numbers_at_the_ends_of_their_range_are_counted() -> None:
    assert intervals([0.0] * 2000)[-1][0] == 0 and intervals([0.0] * 2000)[-1][1] < 0.01
    assert intervals([1.0] * 2000)[-1][1] == 1 and intervals([1.0] * 2000)[-1][0] > 0.99


def test_a_long_good_past_hardly_delays_the_lower_end() -> None:
    def rows_to_pass(good: int) -> int:
        sequence, random = ConfidenceSequence(0.99, [0.02]), np.random.default_rng(3)
        for _ in range(good):
            sequence.add(0.0)
        for number in range(1000):
            sequence.add(float(random.random() < 0.2))
            if sequence.low >= 0.02:
                return number
        return 1000

    assert rows_to_pass(0) < 60 and rows_to_pass(5000) < 120


def test_rarely_does_the_test_of_exits_report_a_change_that_is_none() -> None:
    random, alarms, runs = np.random.default_rng(4), 0, 200
    shares = np.array([0.3, 0.2, 0.1, 0.4])
    for run in range(runs):
        test = ExitTest(random.multinomial(100, shares).tolist(), 0.1, seed=run)
        for exit in random.choice(4, 400, p=shares).tolist():
            test.add(exit)
        alarms += test.changed
    assert alarms <= 20 + 3 * 4.3


@pytest.mark.parametrize("shares", [(0.1, 0.1, 0.1, 0.7), (0.7, 0.1, 0.1, 0.1)], ids=["deeper", "shallower"])
def test_rows_that_leave_elsewhere_are_reported(shares: tuple[float, ...]) -> None:
    random, test = np.random.default_rng(5), ExitTest(CALIBRATION, 0.01)
    for exit in random.choice(4, 300, p=shares).tolist():
        test.add(exit)
    assert test.changed and sum(test.counts) == 300


def test_a_long_good_past_hardly_delays_the_test_of_exits() -> None:
    random, test = np.random.default_rng(6), ExitTest(CALIBRATION, 0.01)
    for exit in random.choice(4, 20_000, p=[0.3, 0.2, 0.1, 0.4]).tolist():
        test.add(exit)
    assert not test.changed
    for exit in random.choice(4, 400, p=[0.1, 0.1, 0.1, 0.7]).tolist():
        test.add(exit)
    assert test.changed
