"""Frontiers of accuracy against what is saved: areas between them, scores, and paired intervals.

A frontier is a broken line through a method's settings, which were chosen on dev and read on test. Both axes
are in per cent: the share saved (of layers, multiply-accumulates or bit operations) and accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Line = tuple[Floats, Floats]  # saved and accuracy, by rising saving
GRID = 61  # points at which two lines are compared for each resample
RESAMPLES = 500


@dataclass(frozen=True)
class Settings:
    """A method at its settings, row by row: right [settings, rows]; by axis what was spent [settings, rows]
    and what the network without early exits spends, full [rows].
    """

    right: NDArray[np.bool_]
    spent: Mapping[str, Floats]
    full: Mapping[str, Floats]

    def line(self, axis: str = "macs") -> Line:
        """Saved and accuracy on an axis."""
        return self.lines(np.ones((len(self.full[axis]), 1)), axis)[0]

    def lines(self, weights: Floats, axis: str = "macs") -> list[Line]:
        """A line for every column of weights [rows, resamples]; a weight is how often a row counts."""
        saved = 100 * (1 - self.spent[axis] @ weights / (self.full[axis] @ weights))
        accuracy = 100 * (self.right.astype(float) @ weights) / weights.sum(0)
        return [ordered(saved[:, at], accuracy[:, at]) for at in range(weights.shape[1])]


def ordered(saved: Floats, accuracy: Floats) -> Line:
    """A line by rising saving; settings that save the same are averaged."""
    unique, place = np.unique(saved, return_inverse=True)
    return unique, np.bincount(place, accuracy) / np.bincount(place)


def area(line: Line, reference: Line, low: float, high: float) -> tuple[float, float]:
    """How far `line` lies above and below `reference` between two savings, each divided by the width where
    both exist: percent points, both positive. NaN where they have no width in common.

    Trapezoids between all corners of both lines, and their crossings (BERxiT's public plotting/auc.py does
    the same over mean exits).
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


def score(line: Line, static: Line) -> float:
    """ELUE's score: mean over the line's points of accuracy less a static network's at the same cost.

    static: truncated networks, one an exit. Points outside of what they save are compared with the nearest.
    """
    return float(np.mean(line[1] - np.interp(line[0], *static)))


def resampled(rows: int, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Bootstrap weights [rows, resamples]: how often each row was drawn; the same for every caller."""
    draw = np.random.default_rng(seed)
    counts = [np.bincount(draw.integers(0, rows, rows), minlength=rows) for _ in range(resamples)]
    return np.stack(counts, axis=1).astype(float)


def gaps(
    method: Settings, reference: Settings, low: float, high: float, weights: Floats, axis: str = "macs"
) -> Floats:
    """Mean of `method` less `reference` between two savings: over all rows, then for every resample
    [1 + resamples].
    """
    grid = np.linspace(low, high, GRID)
    weights = np.concatenate([np.ones((len(weights), 1)), weights], axis=1)
    pairs = zip(method.lines(weights, axis), reference.lines(weights, axis), strict=True)
    return np.array([np.mean(np.interp(grid, *line) - np.interp(grid, *other)) for line, other in pairs])


def interval(differences: Sequence[Floats]) -> dict[str, float]:
    """Mean difference and its 95 % interval over rows: `differences` holds gaps() of several seeds or data
    sets, in which resample n drew the same rows of the same data; they are averaged first.
    """
    mean = np.mean(differences, axis=0)
    low, high = np.percentile(mean[1:], [2.5, 97.5])
    return {"difference": float(mean[0]), "low": float(low), "high": float(high)}
