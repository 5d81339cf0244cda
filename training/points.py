"""Operating points: settings of a rule chosen on dev, with the accuracy and cost measured there."""

from __future__ import annotations

from typing import Any

from offramp.models.network import EarlyExitNetwork
from offramp.training.collect import Collected
from offramp.training.frontier import (
    SWEPT,
    Costs,
    Point,
    full_depth,
    most_accurate,
    settings_to_try,
    shallowest,
    signals_of,
    sweep,
)

SAVINGS = (50.0, 57.0, 65.0)  # per cent of the layers that a point saves at least on dev
LOSSES = (0.5, 1.0, 2.0)  # accuracy points on dev that a point may lose against full depth


def operating_points(network: EarlyExitNetwork, dev: Collected, learned: str | None) -> dict[str, Any]:
    """What goes into training.json: dev figures, points "full", "within-X", "saves-X" of the recipe's rule.

    learned: the rule that the recipe trained for ("gate"), or None for max-probability, the plain rule.
    "default" is the point within 0.5: a deployment that nobody tuned should not cost what its owner notices.
    """
    signals = signals_of(dev)
    costs = Costs(network, signals.lengths)
    rule = learned or "max_probability"
    reference = full_depth(signals, costs)
    points = sweep(rule, settings_to_try(rule, signals), signals, costs)
    found: list[tuple[str, Point]] = [("full", reference)]
    for loss in LOSSES:
        best = shallowest(points, reference.accuracy - loss)
        if best is not None:
            found.append((f"within-{loss}", best))
    for saved in SAVINGS:
        best = most_accurate(points, saved)
        if best is not None:
            found.append((f"saves-{saved:.0f}", best))
    default = next((point for name, point in found if name == f"within-{LOSSES[0]}"), reference)
    found.insert(0, ("default", default))
    if learned == "gate":
        trained = sweep("gate", [0.5], signals, costs)[0]
        found.append(
            ("trained", trained)
        )  # the published operating point: P(exit) > 0.5, depth set by alpha in training
    return {
        "dev": {
            "exit_accuracy": [round(100 * float(v), 2) for v in signals.right.mean(0)],
            "full_depth": reference.accuracy,
            "rows": len(dev.labels),
        },
        "operating_points": [_as_json(name, point) for name, point in found],
    }


def _as_json(name: str, point: Point) -> dict[str, Any]:
    parameters = {key: float(value) for key, value in point.rule.parameters.items()}
    rule = {"name": point.rule.name, "parameters": parameters}
    return {
        "name": name,
        "rule": rule,
        "variant": "fp32",
        "data": "",
        "split": "dev",
        "measured": point.figures(),
    }


__all__ = ["LOSSES", "SWEPT", "operating_points"]
