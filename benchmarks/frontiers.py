"""Frontiers of accuracy against what is saved: areas between them, scores, and paired intervals.

A frontier is a broken line through a method's settings, which were chosen on dev and read on test. Cost is
the share saved on an axis (layers, multiply-accumulates, bit operations), accuracy likewise: in per cent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Line = tuple[Floats, Floats]  # saved and accuracy, by rising saving
GRID = 61  # points at which two lines are compared when rows are drawn anew
DRAWS = 500


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
        """A line for every column of weights [rows, draws], which say how often a row counts."""
        saved = 100 * (1 - self.spent[axis] @ weights / (self.full[axis] @ weights))
        accuracy = 100 * (self.right.astype(float) @ weights) / weights.sum(0)
        return [ordered(saved[:, at], accuracy[:, at]) for at in range(weights.shape[1])]


def ordered(saved: Floats, accuracy: Floats) -> Line:
    """A line by rising saving; settings that save the same are averaged."""
    unique, place = np.unique(saved, return_inverse=True)
    return unique, np.bincount(place, accuracy) / np.bincount(place)


def area(one: Line, other: Line, low: float, high: float) -> tuple[float, float]:
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


def score(line: Line, static: Line) -> float:
    """ELUE's score: mean over the line's points of accuracy less a static network's at the same cost.

    static: truncated networks, one an exit. Points outside of what they save are held against the nearest.
    """
    return float(np.mean(line[1] - np.interp(line[0], *static)))


def redrawn(rows: int, draws: int = DRAWS, seed: int = 0) -> Floats:
    """How often each row counts when rows are drawn anew [rows, draws]; the same for everybody who asks."""
    draw = np.random.default_rng(seed)
    counts = [np.bincount(draw.integers(0, rows, rows), minlength=rows) for _ in range(draws)]
    return np.stack(counts, axis=1).astype(float)


def gaps(
    one: Settings, other: Settings, low: float, high: float, weights: Floats, axis: str = "macs"
) -> Floats:
    """Mean of `one` less `other` between two savings, once as it is and then for every draw [1 + draws]."""
    grid = np.linspace(low, high, GRID)
    weights = np.concatenate([np.ones((len(weights), 1)), weights], axis=1)
    pairs = zip(one.lines(weights, axis), other.lines(weights, axis), strict=True)
    return np.array([np.mean(np.interp(grid, *mine) - np.interp(grid, *yours)) for mine, yours in pairs])


def interval(found: Sequence[Floats]) -> dict[str, float]:
    """Mean difference and its 95 % interval over rows: found holds gaps() of several seeds or data sets, in
    which draw n drew the same rows of the same data; they are averaged first.
    """
    mean = np.mean(found, axis=0)
    low, high = np.percentile(mean[1:], [2.5, 97.5])
    return {"difference": float(mean[0]), "low": float(low), "high": float(high)}
