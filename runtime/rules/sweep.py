"""Operating points of rules that only exit, simulated at many thresholds on the outputs of all exits.

Training uses the outputs of its network, calibration those of the engine that will walk the bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.rules import RuleSpec, bind, normalised_entropy, rules_for, simulate, softmax
from offramp.runtime.rules.exits import answer_change
from offramp.runtime.rules.quality import Quality, RightQuality

# The parameter that is swept for each rule: a number of exits for patience, else a limit of a signal.
SWEPT = {
    "gate": "threshold",
    "max_probability": "threshold",
    "entropy": "threshold",
    "margin": "threshold",
    "patience": "patience",
    "patience_confident": "threshold",
    "settled": "threshold",
}
# Rules with a count as second parameter: both are swept, so that the points do not form a curve.
COUNTED = {"patience_confident": "patience", "settled": "first"}
Setting = float | Mapping[str, float]  # the swept parameter, or both parameters by name
STEPS = 200  # number of thresholds that are tried for a rule
LAYER_SAVINGS = (50.0, 57.0, 65.0)  # least percent of the layers that points save
LOSSES = (0.5, 1.0, 2.0)  # most accuracy points that points lose against full depth on the rows of the sweep
ROUNDING = 1e-9  # percent: a point that loses or saves just what is asked for counts, however it is rounded


@dataclass(frozen=True)
class ExitTable:
    """The outputs of every exit for rows that ran at full depth, and how good they are.

    logits [rows, exits, classes], those that rules read (no classes for rules that read answers); gates
    [rows, exits], P(exit) in 0..1 (that of the last exit is not read), or None without policies; labels
    [rows] of classification. answers [rows, exits, size]: what rule settled compares, or None. quality: that
    of the answers; None for the share of rows with the right label.
    """

    logits: NDArray[np.float32]
    gates: NDArray[np.float32] | None
    labels: NDArray[np.int64]
    answers: NDArray[np.float32] | None = None
    quality: Quality | None = None

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether the prediction of each exit is the label [rows, exits]; for classification alone."""
        return np.asarray(self.logits.argmax(-1) == self.labels[:, None])

    @cached_property
    def measure(self) -> Quality:
        """The quality by which points are chosen."""
        return RightQuality(self.right) if self.quality is None else self.quality

    def at_temperatures(self, temperatures: Sequence[float]) -> ExitTable:
        """The table with the logits of each exit divided by its own temperature; itself if there are none."""
        if not len(temperatures):
            return self
        return replace(self, logits=self.logits / np.array(temperatures, np.float32)[:, None])

    def exits(self, rule: RuleSpec) -> NDArray[np.int64]:
        """The exit (0-based) at which each row leaves by a rule that only exits [rows]."""
        size = 0 if self.answers is None else self.answers.shape[-1]
        bound = bind(rule, self.logits.shape[1], answer_size=size)
        return simulate(bound, self.logits, self.gates, self.answers)

    def score(self, exits: NDArray[np.int64]) -> float:
        """The quality in percent if rows leave at `exits` [rows], 0-based."""
        return self.measure.score(exits)


@dataclass(frozen=True)
class MeasuredPoint:
    """A rule at one setting with its measured accuracy and savings (percent) and mean exit (blocks).

    accuracy: the quality of the answers, see ExitTable.quality. interval: at 95 %, see Quality.interval.
    exit_rows [exits]: how many rows left at each exit.
    """

    rule: RuleSpec
    accuracy: float
    mean_exit: float
    layers_saved: float
    macs_saved: float
    interval: tuple[float, float] | None = None
    exit_rows: tuple[int, ...] = ()

    def figures(self, quality: str = "accuracy") -> dict[str, float]:
        """The measured values by name, rounded as they are written to files.

        quality: the name of the quality (ExitTable.measure.name), "agreement" where right is what full depth
        answers.
        """
        names = ("accuracy", "mean_exit", "layers_saved", "macs_saved")
        values = {name: round(getattr(self, name), 3) for name in names}
        return {quality: values.pop("accuracy"), **values}

    def stated_figures(self, quality: str = "accuracy") -> dict[str, float]:
        """The figures of an operating point: those of figures(), and the interval as "low" and "high"."""
        if self.interval is None:
            return self.figures(quality)
        low, high = self.interval
        return {**self.figures(quality), "low": round(low, 3), "high": round(high, 3)}


@dataclass(frozen=True)
class ExitMacs:
    """Multiply-accumulates of each row by the exit at which it leaves.

    to_exit [rows, exits]: those of a walk that ends there, including exits and policies on the way. full
    [rows]: those of the network without early exits. blocks [exits]: the block (1-based) before each exit.
    """

    to_exit: NDArray[np.float64]
    full: NDArray[np.float64]
    blocks: NDArray[np.int64]

    def point(self, rule: RuleSpec, exits: NDArray[np.int64], table: ExitTable) -> MeasuredPoint:
        """Compute the point of a rule with which rows leave at `exits` [rows], 0-based."""
        rows = np.arange(len(exits))
        mean_exit = float(self.blocks[exits].mean())
        full = float(self.full.sum())
        return MeasuredPoint(
            rule,
            accuracy=table.score(exits),
            mean_exit=mean_exit,
            layers_saved=100 * (1 - mean_exit / float(self.blocks[-1])),
            # A manifest may count no multiply-accumulates: then none are saved.
            macs_saved=100 * (1 - float(self.to_exit[rows, exits].sum()) / full) if full else 0.0,
            interval=table.measure.interval(exits),
            exit_rows=tuple(np.bincount(exits, minlength=len(self.blocks)).tolist()),
        )


def swept_rules(kind: str) -> tuple[str, ...]:
    """The rules that can be swept for a kind of task (Manifest.kind), those that need policies included."""
    known = rules_for(kind)
    return tuple(rule for rule in SWEPT if rule in known)


def settings_to_try(rule: str, table: ExitTable) -> list[Setting]:
    """Choose the settings of a rule to try: STEPS quantiles of the signal that the rule reads.

    Every rule gets the same number of settings, so that no rule has an advantage. If a rule has a count, the
    settings are divided among the counts.
    """
    least = 2 if rule == "settled" else 1  # there is nothing to compare at the first exit
    counts = [float(count) for count in range(least, table.logits.shape[1])]
    if rule == "patience":
        return list(counts)
    steps = STEPS // max(1, len(counts)) if rule in COUNTED else STEPS
    values = _SIGNALS[rule](table)
    if not values.size:  # no exit at which rows could leave early
        return [0.0]
    thresholds = [float(value) for value in np.unique(np.quantile(values, np.linspace(0, 1, steps)))]
    if rule in COUNTED:
        return [
            {SWEPT[rule]: threshold, COUNTED[rule]: count} for count in counts for threshold in thresholds
        ]
    return list(thresholds)


def fixed_settings(rule: str, exits: int) -> list[list[Setting]]:
    """Settings of a rule that do not depend on any rows, in sequences from the safest to the cheapest.

    exits: how many a network has. Risk control tests them (tuning.risk): its statement holds for settings and
    an order that were fixed before the rows were seen, so that thresholds cannot be quantiles of the rows'
    signals, as in settings_to_try. Along a sequence no row exits later. There is one sequence, or one for
    each count of a rule with two parameters. Raises KeyError for a rule that is not in SWEPT.
    """
    counts = [float(count) for count in range(exits - 1, 0, -1)]
    if rule == "patience":
        return [list(counts)]
    thresholds = _FIXED_THRESHOLDS[SAFE_SIDES[rule]]
    if rule not in COUNTED:
        return [list(thresholds)]
    least = 2.0 if rule == "settled" else 1.0  # as in settings_to_try
    return [
        [{SWEPT[rule]: threshold, COUNTED[rule]: count} for threshold in thresholds]
        for count in counts
        if count >= least
    ]


# Thresholds are close together where networks are certain: at equal steps of the log-odds for signals that
# are high where an exit is safe, and of the logarithm for those that are low there.
_FIXED_THRESHOLDS: Mapping[str, list[float]] = {
    "high": [float(1 / (1 + np.exp(-odds))) for odds in np.linspace(14, -5, 115)],
    "low": [float(share) for share in np.geomspace(1e-6, 1, 115)],
}
SAFE_SIDES = {
    "gate": "high",
    "max_probability": "high",
    "margin": "high",
    "entropy": "low",
    "patience_confident": "low",
    "settled": "low",
}


def setting_rule(rule: str, value: Setting) -> RuleSpec:
    """The rule at one setting."""
    return RuleSpec(rule, dict(value) if isinstance(value, Mapping) else {SWEPT[rule]: value})


def _gates(table: ExitTable) -> NDArray[np.float32]:
    if table.gates is None:
        if table.logits.shape[1] == 1:  # the only exit has no policy
            return np.zeros((len(table.logits), 0), np.float32)
        raise ValueError("rule gate: there are no policies")
    return table.gates[:, :-1]


def _entropies(table: ExitTable) -> NDArray[np.float32]:
    return normalised_entropy(table.logits)


def _margins(table: ExitTable) -> NDArray[np.float32]:
    ordered = np.sort(softmax(table.logits), -1)
    margins: NDArray[np.float32] = ordered[..., -1] - ordered[..., -2]
    return margins


def _top_probabilities(table: ExitTable) -> NDArray[np.float32]:
    top: NDArray[np.float32] = softmax(table.logits).max(-1)
    return top


def _changes(table: ExitTable) -> NDArray[np.float32]:
    """How much each early exit but the first changes the answer of the exit before it."""
    if table.answers is None:
        raise ValueError("rule settled: there are no answers to compare")
    after, before = table.answers[:, 1:-1], table.answers[:, :-2]
    size = after.shape[-1]
    return answer_change(after.reshape(-1, size), before.reshape(-1, size))


# The signal of every early exit that a rule compares with its threshold, from which thresholds are chosen.
_SIGNALS: Mapping[str, Callable[[ExitTable], NDArray[np.float32]]] = {
    "gate": _gates,
    "max_probability": _top_probabilities,
    "entropy": _entropies,
    "margin": _margins,
    "patience_confident": _entropies,
    "settled": _changes,
}


def sweep(rule: str, values: Sequence[Setting], table: ExitTable, macs: ExitMacs) -> list[MeasuredPoint]:
    """Compute the point of a rule at every setting, the smallest mean exit first."""
    points = []
    for value in values:
        spec = setting_rule(rule, value)
        points.append(macs.point(spec, table.exits(spec), table))
    return sorted(points, key=lambda point: point.mean_exit)


def undominated_points(points: Sequence[MeasuredPoint]) -> list[MeasuredPoint]:
    """Select the points that are more accurate than every shallower point, the smallest mean exit first.

    This is for rules with two parameters: the selected settings form a curve on other rows.
    """
    edge: list[MeasuredPoint] = []
    for point in sorted(points, key=lambda point: (point.mean_exit, -point.accuracy)):
        if not edge or point.accuracy > edge[-1].accuracy:
            edge.append(point)
    return edge


def full_depth_point(table: ExitTable, macs: ExitMacs) -> MeasuredPoint:
    """Compute the point at which all rows leave at the last exit."""
    exits = np.full(len(table.logits), table.logits.shape[1] - 1)
    return macs.point(RuleSpec("never", {}), exits, table)


def shallowest_point(points: Sequence[MeasuredPoint], min_accuracy: float) -> MeasuredPoint | None:
    """Find the first point (in order of the mean exit) with at least `min_accuracy` percent; None if none."""
    return next((point for point in points if point.accuracy >= min_accuracy - ROUNDING), None)


def most_accurate_point(points: Sequence[MeasuredPoint], min_saved: float) -> MeasuredPoint | None:
    """Find the most accurate point that saves at least `min_saved` percent of the layers; None if none.

    Of equally accurate points the shallowest is chosen.
    """
    enough = [point for point in points if point.layers_saved >= min_saved - ROUNDING]
    return max(enough, key=lambda point: (point.accuracy, point.layers_saved), default=None)


def accuracy_at(points: Sequence[MeasuredPoint], mean_exit: float) -> float | None:
    """Interpolate the accuracy (percent) at a mean exit between points; None outside of their range."""
    depths = np.array([point.mean_exit for point in points])
    if not len(depths) or not depths.min() <= mean_exit <= depths.max():
        return None
    # Points with the same depth are averaged: np.interp would take one of them at random.
    unique = np.unique(depths)
    accuracy = [np.mean([p.accuracy for p in points if p.mean_exit == depth]) for depth in unique]
    return float(np.interp(mean_exit, unique, accuracy))


def choose_points(
    rule: str, table: ExitTable, macs: ExitMacs, *, reference: float | None = None
) -> dict[str, MeasuredPoint]:
    """Choose the operating points of a rule: "default", "full", "dev-X", "saves-X", for gate "trained".

    dev-X: the shallowest point that loses, on the rows of this table, at most X accuracy points against
    `reference` (percent; None: full depth in this table). As the best of many settings it may lose more on
    other rows. saves-X: the most accurate point that saves at least X percent of the layers. trained: P(exit)
    above 0.5. "default" is dev-0.5, or full depth if there is no such point, so that a deployment that was
    not tuned loses little accuracy.
    """
    full = full_depth_point(table, macs)
    target = full.accuracy if reference is None else reference
    points = sweep(rule, settings_to_try(rule, table), table, macs)
    close = {f"dev-{loss}": shallowest_point(points, target - loss) for loss in LOSSES}
    saves = {f"saves-{saved:.0f}": most_accurate_point(points, saved) for saved in LAYER_SAVINGS}
    chosen = {"default": close[f"dev-{LOSSES[0]}"] or full, "full": full}
    chosen |= {name: point for name, point in (close | saves).items() if point is not None}
    if rule == "gate":
        # The published operating point, whose depth training sets by the weight of the cost.
        chosen["trained"] = sweep("gate", [0.5], table, macs)[0]
    return chosen
