"""Frontiers of accuracy against the share saved, and their scores: mean saving at a loss, accuracy in bands.

A frontier is a polyline through a method's settings, which were chosen on dev and evaluated on test. Both
axes are in percent: the share saved (of layers, multiply-accumulates or bit operations) and accuracy. A point
between two settings is reached by drawing one of the two for each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Frontier = tuple[Floats, Floats]  # saved and accuracy in percent, sorted by saving
STEP = 0.5
GRID: Floats = np.arange(0.0, 100.0 + STEP, STEP)  # savings at which frontiers are read
BANDS = {"10-40": (10.0, 40.0), "40-80": (40.0, 80.0), "80-90": (80.0, 90.0)}  # percent saved
HEADLINE = "40-80"
LOSS = 5.0  # accuracy points below full depth up to which savings count


@dataclass(frozen=True)
class SettingResults:
    """The results of a method's settings for each row.

    right [settings, rows]: whether the answer is right. spent [settings, rows] by cost axis (layers, macs,
    bops); full [rows] by axis: the cost of the network without early exits.
    """

    right: NDArray[np.bool_]
    spent: Mapping[str, Floats]
    full: Mapping[str, Floats]

    def frontier(self, axis: str = "macs") -> Frontier:
        """The method's frontier: percent saved on this cost axis, and accuracy in percent."""
        return self.frontiers(np.ones((len(self.full[axis]), 1)), axis)[0]

    def frontiers(self, weights: Floats, axis: str = "macs") -> list[Frontier]:
        """One frontier for each column of weights [rows, resamples]; a weight is how often a row counts."""
        saved = 100 * (1 - self.spent[axis] @ weights / (self.full[axis] @ weights))
        accuracy = 100 * (self.right.astype(float) @ weights) / weights.sum(0)
        order = np.argsort(saved, axis=0)
        saved, accuracy = (np.take_along_axis(values, order, 0).T for values in (saved, accuracy))
        distinct = (np.diff(saved) > 0).all(1)  # then there is nothing to average
        return [
            (x, y) if plain else sorted_frontier(x, y)
            for x, y, plain in zip(saved, accuracy, distinct, strict=True)
        ]


@dataclass(frozen=True)
class Curves:
    """Frontiers of one method, one for each resample, read at the savings of GRID.

    accuracy [resamples, grid]: beyond a frontier's ends that of its first or last setting. last [resamples]:
    the saving of the cheapest setting; end [resamples]: its accuracy.
    """

    accuracy: Floats
    last: Floats
    end: Floats

    def band_mean(self, low: float, high: float) -> Floats:
        """Mean accuracy between two savings of GRID [resamples]."""
        inside = self.accuracy[:, (low <= GRID) & (high >= GRID)]
        mean: Floats = (inside.sum(1) - (inside[:, 0] + inside[:, -1]) / 2) / (inside.shape[1] - 1)
        return mean

    def mean_saving(self, reference: Floats, loss: float = LOSS) -> Floats:
        """Mean saving at a loss of 0 to `loss` points below `reference` [resamples], in percent.

        It is the mean over d in [0, loss] of the largest saving at which the frontier is at most d points
        below the reference, 0 where there is none. This equals the integral over savings of how much of
        [0, loss] the best accuracy at this saving or a larger one leaves, divided by loss.
        """
        beyond = self.last[:, None] < GRID
        values = np.where(beyond, -np.inf, self.accuracy)
        best = np.maximum.accumulate(values[:, ::-1], axis=1)[:, ::-1]
        best = np.where(beyond, -np.inf, np.maximum(best, self.end[:, None]))
        height = np.clip(best - (reference[:, None] - loss), 0.0, loss)
        last_height = np.where(self.last > 0, np.clip(self.end - (reference - loss), 0.0, loss), 0.0)
        widths = np.where(beyond[:, 1:], 0.0, STEP)
        area = (widths * (height[:, 1:] + height[:, :-1]) / 2).sum(1)
        # The part of a cell between the last grid point and the cheapest setting.
        at = np.clip((self.last / STEP).astype(int), 0, len(GRID) - 1)
        rest = np.maximum(self.last - GRID[at], 0.0)
        area += rest * (height[np.arange(len(at)), at] + last_height) / 2
        saving: Floats = area / loss
        return saving


def read_curves(results: SettingResults, weights: Floats, axis: str = "macs") -> Curves:
    """A method's frontiers for each column of weights [rows, resamples], read at GRID."""
    lines = results.frontiers(weights, axis)
    accuracy = np.array([np.interp(GRID, saved, values) for saved, values in lines])
    return Curves(
        accuracy,
        np.array([saved[-1] for saved, _ in lines]),
        np.array([values[-1] for _, values in lines]),
    )


def sorted_frontier(saved: Floats, accuracy: Floats) -> Frontier:
    """A frontier from unsorted points, sorted by saving; points with equal savings are averaged."""
    unique, place = np.unique(saved, return_inverse=True)
    return unique, np.bincount(place, accuracy) / np.bincount(place)


def largest_saving(line: Frontier, accuracy: float) -> float:
    """The largest saving at which a frontier has at least this accuracy; 0 if there is none above 0."""
    saved, values = line
    enough = np.flatnonzero(values >= accuracy)
    if not len(enough):
        return 0.0
    at = int(enough[-1])
    if at == len(saved) - 1:
        return max(0.0, float(saved[-1]))
    share = (values[at] - accuracy) / (values[at] - values[at + 1])
    return max(0.0, float(saved[at] + share * (saved[at + 1] - saved[at])))


def elue_score(line: Frontier, static: Frontier) -> float:
    """ELUE's score: mean over a frontier's points of accuracy minus that of a static network of equal cost.

    static: the frontier of truncated networks. Points outside its range are compared with its nearest end.
    """
    return float(np.mean(line[1] - np.interp(line[0], *static)))
