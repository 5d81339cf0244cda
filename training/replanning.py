"""Walks of rule quee replayed on collected outcomes: frontiers over its price, and static lines beside them.

The very rule of the runtime decides; only what it is told comes from a table instead of from an engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.models.macs import bit_operations, exit_macs, segment_macs, stem_macs
from offramp.models.network import EarlyExitNetwork
from offramp.runtime.rules import Plan, RowSignals, Rule, RuleSpec, StepCosts, bind
from offramp.runtime.rules.walk_points import WalkPoint
from offramp.training.forecasters import Forecaster, Place
from offramp.training.outcomes import Floats, Outcomes

PRICES = (0.0, *np.geomspace(1e-3, 20.0, 60).tolist())  # errors for a full walk in fp32


@dataclass(frozen=True)
class Ledger:
    """What was spent, in one unit: steps [rows, variants, segments], stem and full [rows], full the network
    without early exits in fp32. blocks [segments]: how many blocks each runs. stated: what the rule is told.
    """

    unit: str
    steps: NDArray[np.float64]
    stem: NDArray[np.float64]
    full: NDArray[np.float64]
    blocks: NDArray[np.int64]
    stated: StepCosts

    def of(self, plans: Plan) -> NDArray[np.float64]:
        """Cost of each row's walk [rows]; plans int8 [rows, segments]."""
        ran = plans >= 0
        each = np.take_along_axis(self.steps, np.maximum(plans, 0)[:, None], axis=1)[:, 0]
        return self.stem + (each * ran).sum(1)  # type: ignore[no-any-return]

    def only(self, numbers: Sequence[int]) -> Ledger:
        """Those variants alone; shares are still of the network in the first one that was there before."""
        kept = [name for at, name in enumerate(self.stated.steps) if at in numbers]
        stated = StepCosts(self.stated.tokens, {name: self.stated.steps[name] for name in kept})
        return Ledger(self.unit, self.steps[:, list(numbers)], self.stem, self.full, self.blocks, stated)


def bit_ledger(network: EarlyExitNetwork, lengths: NDArray[np.int64], variants: Sequence[str]) -> Ledger:
    """Bit operations of rows of these lengths, exits and forecasts charged; stated at their mean length."""
    segments, stem = segment_macs(network), stem_macs(network)
    unique, back = np.unique(lengths, return_inverse=True)
    steps = np.array([[[bit_operations(s, v, n) for s in segments] for v in variants] for n in unique])[back]
    begun = np.array([bit_operations(stem, "fp32", n) for n in unique])[back]
    heads = [exit_macs(network, index) for index in range(len(segments) - 1)]
    spared = np.array([sum(bit_operations(head, "fp32", n) for head in heads) for n in unique])[back]
    plain = np.array([sum(bit_operations(s, "fp32", n) for s in segments) for n in unique])[back]
    blocks = np.diff((0, *network.spec.exits))
    mean = round(float(lengths.mean()))
    stated = {v: tuple(bit_operations(s, v, mean) for s in segments) for v in variants}
    return Ledger("bops", steps, begun, begun + plain - spared, blocks, StepCosts(mean, stated))


def clock_ledger(
    ms: Mapping[str, Sequence[float]], stem_ms: float, full_ms: float, tokens: int, like: Ledger
) -> Ledger:
    """Milliseconds of each step by variant, measured at `tokens` tokens, for the rows of another ledger."""
    rows = len(like.full)
    steps = np.broadcast_to(np.array([ms[name] for name in like.stated.steps]), like.steps.shape)
    stated = StepCosts(tokens, {name: tuple(ms[name]) for name in like.stated.steps})
    return Ledger("ms", steps, np.full(rows, stem_ms), np.full(rows, full_ms), like.blocks, stated)


def replay(rule: Rule, outcomes: Outcomes, forecaster: Forecaster, start: int) -> Plan:
    """The variants in which every row's segments run, -1 where they do not [rows, segments]."""
    rows, segments = len(outcomes), outcomes.exits
    plan: Plan = np.full((rows, segments), start, np.int8)
    change = np.zeros(rows, np.int64)  # the last segment before the variant changed
    memory: Floats = np.zeros((rows, rule.width), np.float32)
    for segment in range(segments - 1):
        here = np.flatnonzero(plan[:, segment] >= 0)
        if not len(here):
            break
        now = plan[here, segment].astype(np.int64)
        place = Place(here, segment, now, np.full(len(here), start), change[here])
        said = RowSignals(np.zeros((len(here), 2), np.float32), None, forecaster(outcomes, place))
        plan[here], memory[here] = rule(said, memory[here], plan[here], segment)
        turns = here[(plan[here, segment + 1] >= 0) & (plan[here, segment + 1] != now)]
        change[turns] = segment
    return plan


def measured(rule: RuleSpec, start: int, plans: Plan, outcomes: Outcomes, ledger: Ledger) -> WalkPoint:
    """The figures of walks that took these plans from a starting variant."""
    rows = np.arange(len(plans))
    ran = plans >= 0
    exits = ran.shape[1] - 1 - ran[:, ::-1].argmax(1)
    ended = plans[rows, exits]
    change = np.maximum((plans == start).sum(1) - 1, 0)  # rows run in one variant, then in one other
    wrong = outcomes.wrong[rows, start, ended, change, exits]
    return WalkPoint(
        rule,
        outcomes.variants[start],
        100 * float(1 - wrong.mean()),
        float((ran * ledger.blocks).sum(1).mean()),
        100 * float(ledger.of(plans).sum() / ledger.full.sum()),
        100 * float((ended != start).mean()),
    )


def frontier(
    outcomes: Outcomes, forecaster: Forecaster, ledger: Ledger, prices: Sequence[float] = PRICES
) -> list[WalkPoint]:
    """A point for every price and starting variant, the cheapest first."""
    points = []
    flag = {"measured": 1.0} if ledger.unit == "ms" else {}
    for price in prices:
        spec = RuleSpec("quee", {"price": price, **flag})
        rule = bind(spec, outcomes.exits, {ledger.unit: ledger.stated})
        for start in range(len(outcomes.variants)):
            plans = replay(rule, outcomes, forecaster, start)
            points.append(measured(spec, start, plans, outcomes, ledger))
    return sorted(points, key=lambda point: point.cost)


def static_points(outcomes: Outcomes, ledger: Ledger) -> list[WalkPoint]:
    """Every row at one exit in one variant, for all of both; the last exits are quantizing alone."""
    points = []
    for start in range(len(outcomes.variants)):
        for exit_at in range(outcomes.exits):
            plans: Plan = np.full((len(outcomes), outcomes.exits), start, np.int8)
            plans[:, exit_at + 1 :] = -1
            spec = RuleSpec("fixed", {"exit": exit_at + 1.0})
            points.append(measured(spec, start, plans, outcomes, ledger))
    return points


def full_depth(outcomes: Outcomes, ledger: Ledger) -> WalkPoint:
    """The last exit in the first variant for every row."""
    plans: Plan = np.zeros((len(outcomes), outcomes.exits), np.int8)
    return measured(RuleSpec("never", {}), 0, plans, outcomes, ledger)


def hull(points: Sequence[WalkPoint]) -> list[WalkPoint]:
    """The upper convex hull: what drawing lots between the points gives, which no line may fall below."""
    kept: list[WalkPoint] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy)):
        if kept and point.accuracy <= kept[-1].accuracy:
            continue
        while len(kept) > 1 and _below(kept[-2], kept[-1], point):
            kept.pop()
        kept.append(point)
    return kept


def accuracy_at(line: Sequence[WalkPoint], cost: float) -> float | None:
    """Accuracy in per cent on a hull's straight lines at a cost; beyond its end the end's, None before it."""
    if not line or cost < line[0].cost:
        return None
    return float(np.interp(cost, [p.cost for p in line], [p.accuracy for p in line]))


def _below(left: WalkPoint, middle: WalkPoint, right: WalkPoint) -> bool:
    """Whether the middle lies on or below the straight line between its neighbours."""
    along = (right.accuracy - left.accuracy) * (middle.cost - left.cost)
    return (middle.accuracy - left.accuracy) * (right.cost - left.cost) <= along
