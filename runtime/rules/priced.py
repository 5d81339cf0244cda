"""Operating points of rules that trade accuracy for a price: chosen by what walks cost, in whatever unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offramp.runtime.rules import RuleSpec

LOSSES = (0.5, 1.0, 2.0)  # accuracy points that a point may lose against full depth
# Per cent that a point saves at least, by unit: int8 alone saves some 94 % of the bit operations.
SAVINGS = {"bops": (90.0, 95.0, 97.0), "ms": (50.0, 57.0, 65.0)}


@dataclass(frozen=True)
class WalkPoint:
    """A rule at one setting from one starting variant: accuracy, mean exit in blocks, cost in per cent of
    full depth in the default variant, share of rows that changed their variant in per cent.
    """

    rule: RuleSpec
    variant: str
    accuracy: float
    mean_exit: float
    cost: float
    changed: float = 0.0


def choose(points: Sequence[WalkPoint], full: WalkPoint, unit: str) -> dict[str, WalkPoint]:
    """Points by name, "default" first: "full", "within-X" (the cheapest that loses X at most against full
    depth in the default variant), "saves-X" (the most accurate that saves X per cent of the cost).
    """
    found: dict[str, WalkPoint] = {}
    for loss in LOSSES:
        enough = [point for point in points if point.accuracy >= full.accuracy - loss]
        if enough:
            found[f"within-{loss}"] = min(enough, key=lambda point: point.cost)
    for saving in SAVINGS[unit]:
        cheap = [point for point in points if point.cost <= 100 - saving]
        if cheap:
            found[f"saves-{saving:.0f}"] = max(cheap, key=lambda point: (point.accuracy, -point.cost))
    return {"default": found.get(f"within-{LOSSES[0]}", full), "full": full, **found}
