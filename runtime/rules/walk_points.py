"""Operating points of rules that choose between variants, each measured by walking labelled rows at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offramp.runtime.rules import RuleSpec
from offramp.runtime.rules.sweep import LOSSES, ROUNDING

# Least percent of the full walk's cost that points save, by unit of the cost: int8 alone saves about 94 % of
# the bit operations.
COST_SAVINGS = {"bops": (90.0, 95.0, 97.0), "ms": (50.0, 57.0, 65.0)}


@dataclass(frozen=True)
class WalkPoint:
    """A rule at one setting and with one starting variant, with its measured accuracy and cost.

    accuracy: percent. mean_exit: blocks. cost: percent of full depth in the default variant. changed: percent
    of the rows that changed their variant.
    """

    rule: RuleSpec
    variant: str
    accuracy: float
    mean_exit: float
    cost: float
    changed: float = 0.0


def choose_walk_points(points: Sequence[WalkPoint], full: WalkPoint, unit: str) -> dict[str, WalkPoint]:
    """Choose the operating points "default", "full", "dev-X" and "saves-X", in this order.

    full: full depth in the default variant. dev-X: the cheapest point that loses at most X accuracy points
    against it on these rows. saves-X: the most accurate point that saves at least X percent of the cost.
    unit: unit of the cost, "bops" or "ms". "default" is dev-0.5, or full depth if there is no such point.
    """
    chosen: dict[str, WalkPoint] = {}
    for loss in LOSSES:
        accurate = [point for point in points if point.accuracy >= full.accuracy - loss - ROUNDING]
        if accurate:
            chosen[f"dev-{loss}"] = min(accurate, key=lambda point: point.cost)
    for saving in COST_SAVINGS[unit]:
        cheap = [point for point in points if point.cost <= 100 - saving + ROUNDING]
        if cheap:
            chosen[f"saves-{saving:.0f}"] = max(cheap, key=lambda point: (point.accuracy, -point.cost))
    return {"default": chosen.get(f"dev-{LOSSES[0]}", full), "full": full, **chosen}
