"""Frontiers of accuracy against what is saved: areas between them, scores, and paired intervals.

A frontier is a broken line through a method's settings, which were chosen on dev and read on test. Cost is
the share of multiply-accumulates saved, in percent; accuracy is in percent too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
GRID = 61  # points at which two lines are compared when rows are drawn anew


@dataclass(frozen=True)
class Settings:
    """A method at its settings, row by row: right [settings, rows], macs [settings, rows] spent, full [rows]
    of the network without early exits.
    """

    right: NDArray[np.bool_]
    macs: Floats
    full: Floats

    def line(self, weights: Floats | None = None) -> tuple[Floats, Floats]:
        """Saved and accuracy [settings] in percent, cheapest last; weights [rows]: how often a row counts."""
        weights = np.ones(len(self.full)) if weights is None else weights
        saved = 100 * (1 - self.macs @ weights / (self.full @ weights))
        accuracy = 100 * (self.right @ weights) / weights.sum()
        return ordered(saved, accuracy)


def ordered(saved: Floats, accuracy: Floats) -> tuple[Floats, Floats]:
    """A line by rising saving; settings that save the same are averaged."""
    unique, place = np.unique(saved, return_inverse=True)
    return unique, np.bincount(place, accuracy) / np.bincount(place)


def area(
    one: tuple[Floats, Floats], other: tuple[Floats, Floats], low: float, high: float
) -> tuple[float, float]:
    """How far `one` lies above and below `other` between two savings, each divided by the width where both
    exist: percent points, both positive. NaN where they have no width in common.

    Trapezoids between all corners of both lines, and their crossings (BERxiT's public plotting/auc.py does
    the same over mean exits).
    """
    low, high = max(low, one[0][0], other[0][0]), min(high, one[0][-1], other[0][-1])
    if high <= low:
        return float("nan"), float("nan")
    inside = [x[(x > low) & (x < high)] for x, _ in (one, other)]
    corners = np.unique(np.concatenate([[low], *inside, [high]]))
    gap = np.interp(corners, *one) - np.interp(corners, *other)
    above = below = 0.0
    for width, left, right in zip(np.diff(corners), gap, gap[1:], strict=False):
        parts = [(width, left, right)]
        if left * right < 0:
            cut = width * left / (left - right)
            parts = [(cut, left, 0.0), (width - cut, 0.0, right)]
        for wide, a, b in parts:
            size = wide * (a + b) / 2
            above, below = above + max(size, 0.0), below - min(size, 0.0)
    return above / (high - low), below / (high - low)


def score(line: tuple[Floats, Floats], static: tuple[Floats, Floats]) -> float:
    """ELUE's score: mean over the line's points of accuracy less a static network's at the same cost.

    static: truncated networks, one an exit. Points outside of what they save are held against the nearest.
    """
    return float(np.mean(line[1] - np.interp(line[0], *static)))


def paired(
    one: Settings, other: Settings, low: float, high: float, *, resamples: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Mean of `one` less `other` between two savings, and its 95 % interval over rows drawn anew, the same
    rows for both.
    """
    draw, rows = np.random.default_rng(seed), len(one.full)
    grid = np.linspace(low, high, GRID)

    def gap(weights: Floats) -> float:
        return float(np.mean(np.interp(grid, *one.line(weights)) - np.interp(grid, *other.line(weights))))

    gaps = [
        gap(np.bincount(draw.integers(0, rows, rows), minlength=rows).astype(float)) for _ in range(resamples)
    ]
    least, most = np.percentile(gaps, [2.5, 97.5])
    return {"difference": gap(np.ones(rows)), "low": float(least), "high": float(most)}
