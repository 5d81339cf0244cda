"""Operating points of a checkpoint: settings of its rule chosen on dev, as training.json holds them."""

from __future__ import annotations

from typing import Any

from offramp.runtime.rules.sweep import Point, choose_points, full_depth
from offramp.training.batches import Encoded
from offramp.training.collect import collect
from offramp.training.frontier import costs_of, table_of
from offramp.training.loop import Run


def operating_points(run: Run, dev: Encoded, rule: str) -> dict[str, Any]:
    """What goes into training.json: figures of the network on dev and the points that choose_points gives.

    rule: the one that the recipe leaves by, a name in offramp.runtime.rules.sweep.SWEPT.
    """
    seen = collect(run.network, dev, device=run.accelerator.device, what="dev")
    table, costs = table_of(seen), costs_of(run.network, seen.lengths)
    points = choose_points(rule, table, costs)
    return {
        "rule": rule,
        "dev": {
            "exit_accuracy": [round(100 * float(v), 2) for v in table.right.mean(0)],
            "full_depth": full_depth(table, costs).accuracy,
            "rows": len(seen.labels),
        },
        "operating_points": [_as_json(name, point) for name, point in points.items()],
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
