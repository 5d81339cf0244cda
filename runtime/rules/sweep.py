"""Operating points of rules that only exit, simulated at many thresholds on the outputs of all exits.

Training passes the outputs of its network, calibration those of the engine that will walk the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.rules import RuleSpec, bind, normalised_entropy, simulate, softmax

# The parameter that is swept for each rule; patience counts exits, the others compare a signal.
SWEPT = {
    "gate": "threshold",
    "max_probability": "threshold",
    "entropy": "threshold",
    "margin": "threshold",
    "patience": "patience",
    "patience_confident": "threshold",
}
# Rules with a count as second parameter: both are swept, and the points are a cloud instead of a curve.
COUNTED = {"patience_confident": "patience"}
Setting = float | Mapping[str, float]  # the swept parameter, or both parameters by name
STEPS = 200  # thresholds that are tried for a rule
LAYER_SAVINGS = (50.0, 57.0, 65.0)  # percent of the layers that a point saves at least
LOSSES = (0.5, 1.0, 2.0)  # accuracy points that a point may lose against full depth


@dataclass(frozen=True)
class ExitTable:
    """The outputs of every exit for labelled rows at full depth.

    logits [rows, exits, classes]; gates [rows, exits], P(exit) in 0..1 (the last exit's is not read), or None
    without policies; labels [rows].
    """

    logits: NDArray[np.float32]
    gates: NDArray[np.float32] | None
    labels: NDArray[np.int64]

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether each exit predicts the label [rows, exits]."""
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
        """The measured values, rounded as they are written to files."""
        names = ("accuracy", "mean_exit", "layers_saved", "macs_saved")
        return {name: round(getattr(self, name), 3) for name in names}


@dataclass(frozen=True)
class ExitMacs:
    """Multiply-accumulates of rows by the exit where they leave.

    to_exit [rows, exits]: of a walk that leaves there, heads and policies on its way included. full [rows]:
    of the network without early exits. blocks [exits]: the block that each exit follows.
    """

    to_exit: NDArray[np.float64]
    full: NDArray[np.float64]
    blocks: NDArray[np.int64]

    def point(self, rule: RuleSpec, exits: NDArray[np.int64], table: ExitTable) -> Point:
        """The point of rows that leave at `exits` [rows], 0-based."""
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
    """Values of the swept parameter: STEPS quantiles of the rule's own signal.

    Every rule gets the same number of settings, so that no grid favours one. A rule with a count has them
    divided among its counts.
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
    thresholds = [float(value) for value in np.unique(np.quantile(values, np.linspace(0, 1, steps)))]
    if rule in COUNTED:
        return [
            {SWEPT[rule]: threshold, COUNTED[rule]: count} for count in counts for threshold in thresholds
        ]
    return list(thresholds)


def sweep(rule: str, values: Sequence[Setting], table: ExitTable, macs: ExitMacs) -> list[Point]:
    """A point for every value, the smallest mean exit first."""
    points = []
    for value in values:
        spec = RuleSpec(rule, dict(value) if isinstance(value, Mapping) else {SWEPT[rule]: value})
        bound = bind(spec, table.logits.shape[1])
        points.append(macs.point(spec, simulate(bound, table.logits, table.gates), table))
    return sorted(points, key=lambda point: point.mean_exit)


def undominated(points: Sequence[Point]) -> list[Point]:
    """The points that are more accurate than every shallower one, the smallest mean exit first.

    For rules with two parameters: settings that are chosen so on dev make a curve on other rows.
    """
    edge: list[Point] = []
    for point in sorted(points, key=lambda point: (point.mean_exit, -point.accuracy)):
        if not edge or point.accuracy > edge[-1].accuracy:
            edge.append(point)
    return edge


def full_depth(table: ExitTable, macs: ExitMacs) -> Point:
    """The point of rows that all leave at the last exit."""
    exits = np.full(len(table.labels), table.logits.shape[1] - 1)
    return macs.point(RuleSpec("never", {}), exits, table)


def shallowest(points: Sequence[Point], min_accuracy: float) -> Point | None:
    """The first point, in order of the mean exit, whose accuracy is at least `min_accuracy`."""
    return next((point for point in points if point.accuracy >= min_accuracy), None)


def most_accurate(points: Sequence[Point], min_saved: float) -> Point | None:
    """The most accurate point that saves at least `min_saved` percent of layers; the shallowest of equals."""
    enough = [point for point in points if point.layers_saved >= min_saved]
    return max(enough, key=lambda point: (point.accuracy, point.layers_saved), default=None)


def accuracy_at(points: Sequence[Point], mean_exit: float) -> float | None:
    """Accuracy at a mean exit, interpolated linearly between points; None outside of their range."""
    depths = np.array([point.mean_exit for point in points])
    if not len(depths) or not depths.min() <= mean_exit <= depths.max():
        return None
    # Points with the same depth are averaged: np.interp would take one of them at random.
    unique = np.unique(depths)
    accuracy = [np.mean([p.accuracy for p in points if p.mean_exit == depth]) for depth in unique]
    return float(np.interp(mean_exit, unique, accuracy))


def choose_points(
    rule: str, table: ExitTable, macs: ExitMacs, *, reference: float | None = None
) -> dict[str, Point]:
    """Points by name: "default", "full", "within-X", "saves-X", and for rule gate "trained".

    within-X: the shallowest point that loses at most X accuracy points against `reference` (percent; None:
    full depth in this table). saves-X: the most accurate point that saves at least X percent of the layers.
    trained: P(exit) above 0.5. "default" is within-0.5, or full depth where there is no such point: a
    deployment that nobody tuned should not lose accuracy that its owner notices.
    """
    full = full_depth(table, macs)
    target = full.accuracy if reference is None else reference
    points = sweep(rule, settings_to_try(rule, table), table, macs)
    within = {f"within-{loss}": shallowest(points, target - loss) for loss in LOSSES}
    saves = {f"saves-{saved:.0f}": most_accurate(points, saved) for saved in LAYER_SAVINGS}
    chosen = {"default": within[f"within-{LOSSES[0]}"] or full, "full": full}
    chosen |= {name: point for name, point in (within | saves).items() if point is not None}
    if rule == "gate":
        # The published operating point: training sets its depth by the weight of the cost.
        chosen["trained"] = sweep("gate", [0.5], table, macs)[0]
    return chosen
