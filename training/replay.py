"""Replay walks of rule quee on collected outcomes: frontiers over its price, and static points beside them.

The runtime's rule makes the decisions; its signals come from a table instead of from an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.models.macs import bit_operations, exit_macs, segment_macs, stem_macs
from offramp.models.network import EarlyExitNetwork
from offramp.runtime.rules import Plan, RowSignals, Rule, RuleSpec, StepCosts, bind
from offramp.runtime.rules.walk_points import WalkPoint
from offramp.training.forecasters import Forecaster, WalkState
from offramp.training.outcomes import Floats, Outcomes
from offramp.training.walk_tree import WalkTree

PRICES = (0.0, *np.geomspace(1e-3, 20.0, 60).tolist())  # errors for a full walk in fp32


@dataclass(frozen=True)
class WalkCosts:
    """The costs of each row's steps in one unit, from which the costs of walks are computed.

    steps [rows, variants, segments]; stem [rows]; full [rows]: the network without early exits in fp32.
    blocks [segments]: number of blocks of each segment. stated: the costs that the rule reads.
    """

    unit: str
    steps: NDArray[np.float64]
    stem: NDArray[np.float64]
    full: NDArray[np.float64]
    blocks: NDArray[np.int64]
    stated: StepCosts

    def walk_costs(self, plans: Plan) -> NDArray[np.float64]:
        """The cost of each row's walk [rows] by its plan; plans int8 [rows, segments]."""
        run = plans >= 0
        step_costs = np.take_along_axis(self.steps, np.maximum(plans, 0)[:, None], axis=1)[:, 0]
        return self.stem + (step_costs * run).sum(1)  # type: ignore[no-any-return]

    def select_variants(self, variants: Sequence[int]) -> WalkCosts:
        """The costs restricted to the variants with these numbers; `full` is not changed."""
        names = [name for number, name in enumerate(self.stated.steps) if number in variants]
        stated = StepCosts(self.stated.tokens, {name: self.stated.steps[name] for name in names})
        return WalkCosts(self.unit, self.steps[:, list(variants)], self.stem, self.full, self.blocks, stated)


def bit_costs(network: EarlyExitNetwork, lengths: NDArray[np.int64], variants: Sequence[str]) -> WalkCosts:
    """The costs in bit operations for rows of these lengths in tokens, exits and forecasts included.

    The costs that the rule reads are those at the mean length.
    """
    segments, stem = segment_macs(network), stem_macs(network)
    unique, inverse = np.unique(lengths, return_inverse=True)
    steps = np.array([[[bit_operations(s, v, n) for s in segments] for v in variants] for n in unique])
    stem_costs = np.array([bit_operations(stem, "fp32", n) for n in unique])
    early_exits = [exit_macs(network, index) for index in range(len(segments) - 1)]
    early = np.array([sum(bit_operations(macs, "fp32", n) for macs in early_exits) for n in unique])
    all_segments = np.array([sum(bit_operations(s, "fp32", n) for s in segments) for n in unique])
    full = stem_costs + all_segments - early
    blocks = np.diff((0, *network.spec.exits))
    mean = round(float(lengths.mean()))
    stated = {v: tuple(bit_operations(s, v, mean) for s in segments) for v in variants}
    return WalkCosts(
        "bops", steps[inverse], stem_costs[inverse], full[inverse], blocks, StepCosts(mean, stated)
    )


def replay_walks(rule: Rule, outcomes: Outcomes, forecaster: Forecaster, start: int) -> Plan:
    """Replay all rows' walks under a rule from a starting variant; gives plans [rows, segments].

    A plan holds the variant in which each segment runs, -1 for segments that do not run.
    """
    rows, segments, tree = len(outcomes), outcomes.exits, outcomes.tree
    plan: Plan = np.full((rows, segments), start, np.int8)
    node = np.full(rows, start, np.int64)
    memory: Floats = np.zeros((rows, rule.width), np.float32)
    for segment in range(segments - 1):
        active = np.flatnonzero(plan[:, segment] >= 0)
        if not len(active):
            break
        state = WalkState(active, segment, node[active])
        no_logits = np.zeros((len(active), 2), np.float32)
        signals = RowSignals(no_logits, forecast=forecaster(outcomes, state))
        plan[active], memory[active] = rule(signals, memory[active], plan[active], segment)
        onward = active[plan[active, segment + 1] >= 0]
        node[onward] = tree.child[node[onward], plan[onward, segment + 1]]
        if (node < 0).any():
            raise ValueError(f"rule {rule.spec.name} changes the variant in a way that was not collected")
    return plan


def walk_point(rule: RuleSpec, start: int, plans: Plan, outcomes: Outcomes, costs: WalkCosts) -> WalkPoint:
    """The figures of walks that ran these plans under a rule from a starting variant."""
    nodes = outcomes.tree.end_nodes(plans)
    run = plans >= 0
    wrong = outcomes.wrong[np.arange(len(plans)), nodes]
    return WalkPoint(
        rule,
        outcomes.variants[start],
        100 * float(1 - wrong.mean()),
        float((run * costs.blocks).sum(1).mean()),
        100 * float(costs.walk_costs(plans).sum() / costs.full.sum()),
        100 * float((outcomes.tree.so_far[nodes] > 0).mean()),
    )


def price_frontier(
    outcomes: Outcomes, forecaster: Forecaster, costs: WalkCosts, prices: Sequence[float] = PRICES
) -> list[WalkPoint]:
    """The points of rule quee for every price and starting variant, the cheapest first."""
    points = []
    parameters = ({"measured": 1.0} if costs.unit == "ms" else {}) | walk_limits(outcomes.tree)
    for price in prices:
        spec = RuleSpec("quee", {"price": price, **parameters})
        rule = bind(spec, outcomes.exits, {costs.unit: costs.stated})
        for start in range(len(outcomes.variants)):
            plans = replay_walks(rule, outcomes, forecaster, start)
            points.append(walk_point(spec, start, plans, outcomes, costs))
    return sorted(points, key=lambda point: point.cost)


def walk_limits(tree: WalkTree) -> dict[str, float]:
    """The parameters of rule quee that keep its walks within a tree, without those of the usual value."""
    limits = {} if tree.changes == 1 else {"changes": float(tree.changes)}
    return limits if tree.increase else {**limits, "increase": 0.0}


def static_points(outcomes: Outcomes, costs: WalkCosts) -> list[WalkPoint]:
    """The points at which all rows leave at one exit in one variant, for every exit and variant.

    Those of the last exit are quantizing alone.
    """
    points = []
    for start in range(len(outcomes.variants)):
        for exit_index in range(outcomes.exits):
            plans: Plan = np.full((len(outcomes), outcomes.exits), start, np.int8)
            plans[:, exit_index + 1 :] = -1
            spec = RuleSpec("fixed", {"exit": exit_index + 1.0})
            points.append(walk_point(spec, start, plans, outcomes, costs))
    return points


def full_depth_point(outcomes: Outcomes, costs: WalkCosts) -> WalkPoint:
    """The point at which all rows run to the last exit in the first variant."""
    plans: Plan = np.zeros((len(outcomes), outcomes.exits), np.int8)
    return walk_point(RuleSpec("never", {}), 0, plans, outcomes, costs)


def upper_hull(points: Sequence[WalkPoint]) -> list[WalkPoint]:
    """The upper convex hull of points by cost and accuracy: a lower bound for any rule.

    The accuracy on it is that of random mixtures of the points.
    """
    kept: list[WalkPoint] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy)):
        if kept and point.accuracy <= kept[-1].accuracy:
            continue
        while len(kept) > 1 and _is_below(kept[-2], kept[-1], point):
            kept.pop()
        kept.append(point)
    return kept


def hull_accuracy(hull_points: Sequence[WalkPoint], cost: float) -> float | None:
    """The accuracy in percent on a hull at a cost; that of its end at higher costs, None before its start."""
    if not hull_points or cost < hull_points[0].cost:
        return None
    return float(np.interp(cost, [p.cost for p in hull_points], [p.accuracy for p in hull_points]))


def _is_below(left: WalkPoint, middle: WalkPoint, right: WalkPoint) -> bool:
    """Whether the middle lies on or below the straight line between its neighbours."""
    interpolated = (right.accuracy - left.accuracy) * (middle.cost - left.cost)
    return (middle.accuracy - left.accuracy) * (right.cost - left.cost) <= interpolated
