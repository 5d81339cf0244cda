"""Accuracy against depth: sweep a rule over its threshold on what the exits said, with the very rules that
the runtime walks by.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offramp.models.macs import segment_macs, stem_macs
from offramp.models.network import EarlyExitNetwork
from offramp.runtime.rules import RuleSpec, bind, simulate
from offramp.training.collect import Collected

# The parameter that is swept for each rule; patience counts exits, the others cut a signal.
SWEPT = {
    "gate": "threshold",
    "max_probability": "threshold",
    "entropy": "threshold",
    "margin": "threshold",
    "patience": "patience",
}
STEPS = 200


@dataclass(frozen=True)
class Signals:
    """What rules read: logits [rows, exits, classes], gates [rows, exits] in 0..1 or None; labels and
    tokens [rows].
    """

    logits: np.ndarray
    gates: np.ndarray | None
    labels: np.ndarray
    lengths: np.ndarray

    @property
    def right(self) -> np.ndarray:
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


class Costs:
    """Multiply-accumulates to every exit, heads and policies charged, against the network without early
    exits.
    """

    def __init__(self, network: EarlyExitNetwork, lengths: np.ndarray) -> None:
        tokens = lengths.astype(np.float64)
        segments = segment_macs(network)
        per_segment = np.stack(
            [cost.token * tokens + cost.pair * tokens**2 + cost.row for cost in segments], 1
        )
        stem = stem_macs(network).token * tokens
        self.to_exit = stem[:, None] + per_segment.cumsum(1)  # [rows, exits]
        spared = [_head_and_policy(network, index, tokens) for index in range(len(segments) - 1)]
        self.full = self.to_exit[:, -1] - np.sum(spared, axis=0)  # [rows]
        self.blocks = np.array(network.spec.exits)

    def point(self, rule: RuleSpec, exits: np.ndarray, signals: Signals) -> Point:
        """The figures of leaving at `exits` [rows], 0-based."""
        rows = np.arange(len(exits))
        mean_exit = float(self.blocks[exits].mean())
        return Point(
            rule,
            accuracy=100 * float(signals.right[rows, exits].mean()),
            mean_exit=mean_exit,
            layers_saved=100 * (1 - mean_exit / float(self.blocks[-1])),
            macs_saved=100 * (1 - float(self.to_exit[rows, exits].sum() / self.full.sum())),
        )


def _head_and_policy(network: EarlyExitNetwork, index: int, tokens: np.ndarray) -> np.ndarray:
    from offramp.models.macs import exit_macs

    cost = exit_macs(network, index)
    return np.asarray(cost.token * tokens + cost.row)


def signals_of(seen: Collected) -> Signals:
    """Collected tensors as the rules read them; the last exit has no gate, everybody left leaves there."""
    gates = None
    if seen.gates is not None:
        opened = seen.gates.sigmoid().numpy()
        gates = np.concatenate([opened, np.ones_like(opened[:, :1])], axis=1)
    return Signals(seen.logits.numpy(), gates, seen.labels.numpy(), seen.lengths)


def settings_to_try(rule: str, signals: Signals) -> list[float]:
    """Values of the swept parameter: STEPS quantiles of the signal itself, the same number for every rule,
    so that no grid favours one.
    """
    exits = signals.logits.shape[1]
    if rule == "patience":
        return [float(count) for count in range(1, exits)]
    if rule == "gate":
        assert signals.gates is not None
        values = signals.gates[:, :-1]
    else:
        shifted = signals.logits - signals.logits.max(-1, keepdims=True)
        probabilities = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
        ordered = np.sort(probabilities, -1)
        if rule == "entropy":
            values = -(probabilities * np.log(np.clip(probabilities, 1e-12, 1))).sum(-1) / np.log(
                probabilities.shape[-1]
            )
        elif rule == "margin":
            values = ordered[..., -1] - ordered[..., -2]
        else:
            values = ordered[..., -1]
    return [float(value) for value in np.unique(np.quantile(values, np.linspace(0, 1, STEPS)))]


def sweep(rule: str, values: list[float], signals: Signals, costs: Costs) -> list[Point]:
    """A point for every value, shallowest first."""
    points = []
    for value in values:
        spec = RuleSpec(rule, {SWEPT[rule]: value})
        bound = bind(spec, signals.logits.shape[1])
        points.append(costs.point(spec, simulate(bound, signals.logits, signals.gates), signals))
    return sorted(points, key=lambda point: point.mean_exit)


def full_depth(signals: Signals, costs: Costs) -> Point:
    """The last exit for every row."""
    exits = np.full(len(signals.labels), signals.logits.shape[1] - 1)
    return costs.point(RuleSpec("never", {}), exits, signals)


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


def random_control(point_exits: np.ndarray, signals: Signals) -> float:
    """Expected accuracy in percent of leaving at random with the same histogram of exits, computed
    exactly.
    """
    share = np.bincount(point_exits, minlength=signals.logits.shape[1]) / len(point_exits)
    return 100 * float(share @ signals.right.mean(0))


def oracle(signals: Signals, costs: Costs) -> Point:
    """Leave at the first exit that is right; the last exit where none is: the bound for any rule on these
    exits.
    """
    right = signals.right
    exits = np.where(right.any(1), right.argmax(1), right.shape[1] - 1)
    return costs.point(RuleSpec("oracle", {}), exits, signals)
