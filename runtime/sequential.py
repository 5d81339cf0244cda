"""Statistics that hold at every moment of a stream: a confidence sequence, and a test of the exits of rows.

Both bet against a hypothesis with money that can only grow if the hypothesis is false: if it holds, the money
ever reaches 1 / a with probability a at most (Ville's inequality), so they may be looked at after every row.
Money is put in little by little, 1 / (t * (t + 1)) of it before observation t, so that what went well before
a change hardly delays its detection (as in e-detectors, arXiv 2203.03532).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Shares of the largest bet that cannot lose everything. Small ones suit long streams and small differences.
BETS = (0.9, 0.7, 0.5, 0.25, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8, 2**-9)
TILTS = (-0.9, -0.4, 0.4, 0.9)  # slopes of the bets on positions of exits
GRID = 400  # means that a confidence sequence tells apart; closer to each other near zero
_MOST_MONEY = 1e200  # more is not counted, so that no product overflows


class ConfidenceSequence:
    """An interval for the mean of numbers in 0..1 that holds after every number with one probability.

    confidence: the probability that both ends hold at all times, if the expectation of each number, given
    those before it, is the same. If it may vary, the lower end still stays below the largest of them, and the
    upper end above the smallest, each with probability (1 + confidence) / 2. marks: means that are among
    those told apart.

    Source: the capital process of Waudby-Smith and Ramdas (arXiv 2010.09686) with constant bets on a grid,
    one process for each end.
    """

    def __init__(self, confidence: float, marks: Sequence[float] = ()) -> None:
        grid = ((np.arange(GRID) + 0.5) / GRID) ** 2
        self.means: NDArray[np.float64] = np.unique(np.concatenate([grid, np.asarray(marks, float)]))
        self.count = 0
        self.total = 0.0
        self._needed = 2 / (1 - confidence)
        self._bets = np.array(BETS)[:, None]
        self._above = np.zeros((len(BETS), len(self.means)))  # money on a mean above each of the grid
        self._below = np.zeros_like(self._above)

    def add(self, value: float) -> None:
        """Count one number in 0..1."""
        self.count += 1
        self.total += value
        invested = 1 / (self.count * (self.count + 1) * len(BETS))
        above = 1 + self._bets * (value / self.means - 1)
        below = 1 + self._bets * ((1 - value) / (1 - self.means) - 1)
        self._above = np.minimum((self._above + invested) * above, _MOST_MONEY)
        self._below = np.minimum((self._below + invested) * below, _MOST_MONEY)

    @property
    def mean(self) -> float:
        """The mean of the numbers so far; 0 without any."""
        return self.total / max(self.count, 1)

    @property
    def low(self) -> float:
        """The lower end: the largest mean of the grid that is too small; 0 if there is none."""
        too_small = self._above.sum(0) + self._reserve >= self._needed
        return float(self.means[too_small][-1]) if too_small.any() else 0.0

    @property
    def high(self) -> float:
        """The upper end: the smallest mean of the grid that is too large; 1 if there is none."""
        too_large = self._below.sum(0) + self._reserve >= self._needed
        return float(self.means[too_large][0]) if too_large.any() else 1.0

    @property
    def _reserve(self) -> float:
        """Money that is not bet yet."""
        return 1 / (self.count + 1)


class ExitTest:
    """A test whether rows of a stream leave at the exits at which calibration rows left.

    It takes the position of each row's exit among those of the calibration rows and of all rows before it,
    ties at random: if all these rows are exchangeable, positions are independent and uniform in 0..1, for any
    number of calibration rows (smoothed conformal p-values). Money is bet on positions that lean to deeper or
    to shallower exits.

    calibration: number of calibration rows by exit. false_alarm: the probability that it ever reports a
    change if there is none. Source: conformal test martingales (Vovk and others, arXiv 2102.10439).
    """

    def __init__(self, calibration: Sequence[int], false_alarm: float, seed: int = 0) -> None:
        self.counts = [0] * len(calibration)  # rows of the stream by exit
        self.false_alarm = false_alarm
        self.changed = False  # whether a change was reported
        self._seen = list(calibration)
        self._total = sum(calibration)
        self._rows = 0
        self._money = [0.0] * len(TILTS)
        from random import Random  # here: it takes a millisecond

        self._random = Random(seed).random

    def add(self, exit: int) -> None:
        """Count the exit (0-based) of one row."""
        self.counts[exit] += 1
        self._seen[exit] += 1
        self._total += 1
        self._rows += 1
        position = (sum(self._seen[exit + 1 :]) + self._random() * self._seen[exit]) / self._total
        invested = 1 / (self._rows * (self._rows + 1) * len(TILTS))
        money = 0.0
        for number, tilt in enumerate(TILTS):
            amount = min((self._money[number] + invested) * (1 + tilt * (2 * position - 1)), _MOST_MONEY)
            self._money[number] = amount
            money += amount
        if money + 1 / (self._rows + 1) >= 1 / self.false_alarm:
            self.changed = True
