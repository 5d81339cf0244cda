"""Operating points: sweep a rule over its threshold on what every exit said of labelled rows, and choose.

Training calls it with what torch said, calibration with what the deployed engine said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.rules import RuleSpec, bind, normalised_entropy, simulate, softmax

# The parameter that is swept for each rule; patience counts exits, the others cut a signal.
SWEPT = {
    "gate": "threshold",
    "max_probability": "threshold",
    "entropy": "threshold",
    "margin": "threshold",
    "patience": "patience",
    "patience_confident": "threshold",
}
# Rules with a count beside it: both are swept, and their settings are a cloud of points instead of a curve.
COUNTED = {"patience_confident": "patience"}
Setting = float | Mapping[str, float]  # the swept parameter, or both by name
STEPS = 200
SAVINGS = (50.0, 57.0, 65.0)  # per cent of the layers that a point saves at least
LOSSES = (0.5, 1.0, 2.0)  # accuracy points that a point may lose against full depth


@dataclass(frozen=True)
class ExitTable:
    """What every exit said at full depth, and what is right.

    logits [rows, exits, classes]; gates [rows, exits] in 0..1 (of the last exit: not read) or None; labels
    [rows].
    """

    logits: NDArray[np.float32]
    gates: NDArray[np.float32] | None
    labels: NDArray[np.int64]

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether each exit is right [rows, exits]."""
        return np.asarray(self.logits.argmax(-1) == self.labels[:, None])


@dataclass(frozen=True)
class Point:
    """A rule at one setting, measured: accuracy and savings in percent, mean exit in blocks."""

    rule: RuleSpec
    accuracy: float
    mean_exit: float
    layers_saved: float
    macs_saved: float

    def figures(self) -> dict[str, float]:
        """The measured part, rounded as it is written to files."""
        names = ("accuracy", "mean_exit", "layers_saved", "macs_saved")
        return {name: round(getattr(self, name), 3) for name in names}


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates: to_exit [rows, exits] of leaving there, heads and policies charged; full [rows]
    of the network without early exits. blocks [exits]: the block that each exit follows.
    """

    to_exit: NDArray[np.float64]
    full: NDArray[np.float64]
    blocks: NDArray[np.int64]

    def point(self, rule: RuleSpec, exits: NDArray[np.int64], table: ExitTable) -> Point:
        """The figures of leaving at `exits` [rows], 0-based."""
        rows = np.arange(len(exits))
        mean_exit = float(self.blocks[exits].mean())
        return Point(
            rule,
            accuracy=100 * float(table.right[rows, exits].mean()),
            mean_exit=mean_exit,
            layers_saved=100 * (1 - mean_exit / float(self.blocks[-1])),
            macs_saved=100 * (1 - float(self.to_exit[rows, exits].sum() / self.full.sum())),
        )


def settings_to_try(rule: str, table: ExitTable) -> list[Setting]:
    """Values of the swept parameter: STEPS quantiles of the signal itself, the same number for every rule,
    so that no grid favours one. A rule with a count besides has them divided among its counts.
    """
    counts = [float(count) for count in range(1, table.logits.shape[1])]
    if rule == "patience":
        return list(counts)
    steps = STEPS // max(1, len(counts)) if rule in COUNTED else STEPS
    if rule == "gate":
        if table.gates is None:
            raise ValueError("rule gate: there are no policies")
        values = table.gates[:, :-1]
    else:
        ordered = np.sort(softmax(table.logits), -1)
        if rule in ("entropy", "patience_confident"):
            values = normalised_entropy(table.logits)
        elif rule == "margin":
            values = ordered[..., -1] - ordered[..., -2]
        else:
            values = ordered[..., -1]
    cuts = [float(value) for value in np.unique(np.quantile(values, np.linspace(0, 1, steps)))]
    if rule in COUNTED:
        return [{SWEPT[rule]: cut, COUNTED[rule]: count} for count in counts for cut in cuts]
    return list(cuts)


def sweep(rule: str, values: Sequence[Setting], table: ExitTable, costs: Costs) -> list[Point]:
    """A point for every value, shallowest first."""
    points = []
    for value in values:
        spec = RuleSpec(rule, dict(value) if isinstance(value, Mapping) else {SWEPT[rule]: value})
        bound = bind(spec, table.logits.shape[1])
        points.append(costs.point(spec, simulate(bound, table.logits, table.gates), table))
    return sorted(points, key=lambda point: point.mean_exit)


def undominated(points: Sequence[Point]) -> list[Point]:
    """Those that are more accurate than every shallower one, shallowest first: the edge of a cloud.

    For rules with two parameters: chosen on dev, the settings of these points make a curve elsewhere.
    """
    edge: list[Point] = []
    for point in sorted(points, key=lambda point: (point.mean_exit, -point.accuracy)):
        if not edge or point.accuracy > edge[-1].accuracy:
            edge.append(point)
    return edge


def full_depth(table: ExitTable, costs: Costs) -> Point:
    """The last exit for every row."""
    exits = np.full(len(table.labels), table.logits.shape[1] - 1)
    return costs.point(RuleSpec("never", {}), exits, table)


def shallowest(points: list[Point], floor: float) -> Point | None:
    """The point with the smallest mean exit whose accuracy reaches `floor`."""
    return next((point for point in points if point.accuracy >= floor), None)


def most_accurate(points: list[Point], saved: float) -> Point | None:
    """The most accurate point that saves at least `saved` per cent of layers; the shallowest of equals."""
    enough = [point for point in points if point.layers_saved >= saved]
    return max(enough, key=lambda point: (point.accuracy, point.layers_saved), default=None)


def accuracy_at(points: list[Point], mean_exit: float) -> float | None:
    """Accuracy at a mean exit, on the straight line between neighbouring points; None outside of what was
    reached.
    """
    depths = np.array([point.mean_exit for point in points])
    if not len(depths) or not depths.min() <= mean_exit <= depths.max():
        return None
    # Points with the same depth are averaged: np.interp would take one of them at random.
    unique = np.unique(depths)
    accuracy = [np.mean([p.accuracy for p in points if p.mean_exit == depth]) for depth in unique]
    return float(np.interp(mean_exit, unique, accuracy))


def choose_points(
    rule: str, table: ExitTable, costs: Costs, *, reference: float | None = None
) -> dict[str, Point]:
    """Points by name, "default" first: "full", "within-X" (shallowest that loses X at most), "saves-X" (most
    accurate that saves X), and for the rule gate "trained" (P(exit) > 0.5).

    reference: the accuracy that "within" is held against, in percent; None: full depth in this table.
    "default" is the point within 0.5: a deployment that nobody tuned should not cost what its owner notices.
    """
    full = full_depth(table, costs)
    target = full.accuracy if reference is None else reference
    points = sweep(rule, settings_to_try(rule, table), table, costs)
    within = {f"within-{loss}": shallowest(points, target - loss) for loss in LOSSES}
    saves = {f"saves-{saved:.0f}": most_accurate(points, saved) for saved in SAVINGS}
    found = {"default": within[f"within-{LOSSES[0]}"] or full, "full": full}
    found |= {name: point for name, point in (within | saves).items() if point is not None}
    if rule == "gate":
        # The published operating point: depth is set by alpha in training.
        found["trained"] = sweep("gate", [0.5], table, costs)[0]
    return found
