"""Frontiers of accuracy against the share saved: areas between them, scores, and paired intervals.

A frontier is a polyline through a method's settings, which were chosen on dev and evaluated on test. Both
axes are in percent: the share saved (of layers, multiply-accumulates or bit operations) and accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Frontier = tuple[Floats, Floats]  # saved and accuracy in percent, sorted by saving
GRID = 61  # points at which two lines are compared for each resample
RESAMPLES = 500


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
        return [sorted_frontier(saved[:, at], accuracy[:, at]) for at in range(weights.shape[1])]


def sorted_frontier(saved: Floats, accuracy: Floats) -> Frontier:
    """A frontier from unsorted points, sorted by saving; points with equal savings are averaged."""
    unique, place = np.unique(saved, return_inverse=True)
    return unique, np.bincount(place, accuracy) / np.bincount(place)


def areas_between(line: Frontier, reference: Frontier, low: float, high: float) -> tuple[float, float]:
    """Mean distance in percentage points by which `line` lies above `reference`, and by which it lies below.

    Both are positive: the areas between savings `low` and `high`, divided by the width over which both
    frontiers exist; NaN if there is none. Trapezoids between all corners of both frontiers and their
    crossings are summed (BERxiT's public plotting/auc.py does the same over mean exits).
    """
    low, high = max(low, line[0][0], reference[0][0]), min(high, line[0][-1], reference[0][-1])
    if high <= low:
        return float("nan"), float("nan")
    inside = [x[(x > low) & (x < high)] for x, _ in (line, reference)]
    corners = np.unique(np.concatenate([[low], *inside, [high]]))
    gap = np.interp(corners, *line) - np.interp(corners, *reference)
    above = below = 0.0
    for width, left, right in zip(np.diff(corners), gap, gap[1:], strict=False):
        trapezoids = [(width, left, right)]
        if left * right < 0:
            cut = width * left / (left - right)
            trapezoids = [(cut, left, 0.0), (width - cut, 0.0, right)]
        for wide, a, b in trapezoids:
            size = wide * (a + b) / 2
            above, below = above + max(size, 0.0), below - min(size, 0.0)
    return above / (high - low), below / (high - low)


def elue_score(line: Frontier, static: Frontier) -> float:
    """ELUE's score: mean over a frontier's points of accuracy minus that of a static network of equal cost.

    static: the frontier of truncated networks. Points outside its range are compared with its nearest end.
    """
    return float(np.mean(line[1] - np.interp(line[0], *static)))


def bootstrap_weights(rows: int, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Bootstrap weights [rows, resamples]: how often each row was drawn with replacement.

    They depend on the arguments only, so that methods are compared on the same resamples.
    """
    draw = np.random.default_rng(seed)
    counts = [np.bincount(draw.integers(0, rows, rows), minlength=rows) for _ in range(resamples)]
    return np.stack(counts, axis=1).astype(float)


def accuracy_differences(
    method: SettingResults,
    reference: SettingResults,
    low: float,
    high: float,
    weights: Floats,
    axis: str = "macs",
) -> Floats:
    """Mean accuracy of `method` minus that of `reference` between two savings, in percentage points.

    [1 + resamples]: first over all rows, then for every resample.
    """
    grid = np.linspace(low, high, GRID)
    weights = np.concatenate([np.ones((len(weights), 1)), weights], axis=1)
    pairs = zip(method.frontiers(weights, axis), reference.frontiers(weights, axis), strict=True)
    return np.array([np.mean(np.interp(grid, *line) - np.interp(grid, *other)) for line, other in pairs])


def difference_interval(differences: Sequence[Floats]) -> dict[str, float]:
    """Mean difference and its 95 % interval over rows.

    differences: results of accuracy_differences() for several seeds or data sets, in which resample n drew
    the same rows of the same data; they are averaged first.
    """
    mean = np.mean(differences, axis=0)
    low, high = np.percentile(mean[1:], [2.5, 97.5])
    return {"difference": float(mean[0]), "low": float(low), "high": float(high)}
