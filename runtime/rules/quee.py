"""Rule quee: exit, or go on to one exit in one variant, by forecast errors and the price of the rest.

Source: QuEE (arXiv 2406.14404), of which no code and no formulas were available. The decision is a
reconstruction: after every segment, exit iff P(wrong | exit) is at most the minimum of P(wrong | path) +
price * cost(path) over the paths ahead; otherwise take the first step of the best path and decide again after
it. A path is (variant, exit): every segment up to that exit in that variant. So there are few paths, 1 +
variants * exits ahead, and a further change of variant is not planned: it is decided when the row gets there.
A row changes its variant at most `changes` times, and only to later variants where `increase` is 0, so that
it takes only walks that were seen when the forecasts were fitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.manifest import Manifest, RuleSpec, StepCosts
from offramp.runtime.errors import BadSetting
from offramp.runtime.rules.base import ExitTest, Floats, Plan, Signals, full_plan

UNITS = ("bops", "ms")  # units of costs for values 0 and 1 of the parameter "measured"
PARAMETERS = ("price", "measured", "changes", "increase")
LIMITS = PARAMETERS[2:]  # of the walks that the forecasts were fitted for
MAX_CHANGES = 2
WALK_LIMITS = "walk_limits"  # the key in an entry of provenance
CURES = {
    "bops": "split it again from a checkpoint of recipe quee",
    "ms": "measure them here with ee-calibrate, or leave measured at 0",
}


@dataclass(frozen=True)
class QueeRule:
    """Rule quee at one price: rows exit or change their variant; make_quee() creates it.

    charges: by segment, [changes so far, current variant, 1 + variants * exits ahead]: price times the cost
    of an exit here (0) and of every path; infinite for paths that a row may not take.
    """

    spec: RuleSpec
    charges: Sequence[Floats]
    width: int = field(default=0, init=False)

    @property
    def exit_test(self) -> ExitTest | None:
        """Always None, as this rule may change the variant; see Rule.exit_test."""
        return None

    def first_plan(self, segments: int, variant: int, hidden: Floats | None = None) -> Plan:
        """The plan that runs every segment in `variant`; see Rule.first_plan."""
        return full_plan(segments, variant)

    def __call__(self, signals: Signals, memory: Floats, plan: Plan, segment: int) -> tuple[Plan, Floats]:
        if signals.forecast is None:
            raise BadSetting(f"rule quee: segment {segment + 1} has no error forecast; choose another rule")
        charges = self.charges[segment]
        _, variants, paths = charges.shape
        ahead = (paths - 1) // variants
        if len(plan) == 1:
            return self._plan_one(signals.forecast[0], charges, plan, segment), memory
        current = plan[:, segment]  # the variant in which each row ran this segment
        walked = plan[:, : segment + 1]
        changes = (walked[:, 1:] != walked[:, :-1]).sum(axis=1)  # [rows]
        forecast = signals.forecast.reshape(len(current), variants, paths)
        total = forecast[np.arange(len(current)), current] + charges[changes, current]  # [rows, 1 + paths]
        best = total.argmin(axis=1)  # the first of equal values, so that a row exits at a tie
        variant, last_exit = np.divmod(best - 1, ahead)
        exits_ahead = np.arange(ahead)
        rest = np.where(exits_ahead <= last_exit[:, None], variant[:, None], -1)  # [rows, exits ahead]
        rest[best == 0] = -1
        plan = plan.copy()
        plan[:, segment + 1 :] = rest
        return plan, memory

    def _plan_one(self, forecast: Floats, charges: Floats, plan: Plan, segment: int) -> Plan:
        """Rewrite the plan of one row, with a third of the numpy calls that several rows need."""
        _, variants, paths = charges.shape
        walked = plan[0, : segment + 1].tolist()
        current, changes = walked[-1], sum(before != after for before, after in pairwise(walked))
        path_forecast = forecast[current * paths : (current + 1) * paths]
        best = int((path_forecast + charges[changes, current]).argmin())
        plan = plan.copy()
        plan[0, segment + 1 :] = -1
        if best:
            variant, last_exit = divmod(best - 1, (paths - 1) // variants)
            plan[0, segment + 1 : segment + 2 + last_exit] = variant
        return plan


def make_quee(spec: RuleSpec, segments: int, costs: Mapping[str, StepCosts]) -> QueeRule:
    """Make rule quee from its spec and a bundle's costs.

    Parameters: price, in errors for a full walk in the default variant; measured: 0 charges bit operations, 1
    the milliseconds of the bundle's calibration (default 0); changes: most changes of variant in a walk, 1 or
    2 (default 1); increase: 0 allows only changes to later variants (default 1). Costs are shares of that
    full walk, so that a price means the same in both. Raises BadSetting for parameters that are unknown or
    out of range, and if the bundle lacks the costs.
    """
    unknown = sorted(set(spec.parameters) - set(PARAMETERS))
    if unknown:
        known = f"{', '.join(PARAMETERS[:-1])} and {PARAMETERS[-1]}"
        raise BadSetting(f"rule quee: parameter {unknown[0]!r} is not known; its parameters are {known}")
    if "price" not in spec.parameters:
        raise BadSetting(
            "rule quee needs price: give the errors that a full walk may cost (--threshold NUMBER)"
        )
    price, measured = spec.parameters["price"], spec.parameters.get("measured", 0.0)
    if not math.isfinite(price) or price < 0:
        raise BadSetting(f"rule quee: price {price} is not a finite number from 0")
    if measured not in (0.0, 1.0):
        raise BadSetting(
            f"rule quee: measured {measured:g} is neither 0 (bit operations) nor 1 (milliseconds)"
        )
    changes, increase = spec.parameters.get("changes", 1.0), spec.parameters.get("increase", 1.0)
    if changes not in range(1, MAX_CHANGES + 1) or increase not in (0.0, 1.0):
        raise BadSetting(
            f"rule quee: changes {changes:g}, increase {increase:g}; expected 1 or {MAX_CHANGES}, and 0 or 1"
        )
    unit = UNITS[int(measured)]
    if unit not in costs:
        raise BadSetting(f"rule quee: this bundle has no costs of its steps in {unit}; {CURES[unit]}")
    steps = np.array(list(costs[unit].steps.values()))  # [variants, segments]
    shares = steps / steps[0].sum()
    limits = (int(changes), bool(increase))
    return QueeRule(spec, [path_charges(shares, price, segment, *limits) for segment in range(segments - 1)])


def path_charges(
    steps: NDArray[np.float64], price: float, segment: int, changes: int, increase: bool
) -> Floats:
    """Charges (price times cost) of an exit after a segment and of every path from there.

    steps [variants, segments]: cost of each step. changes, increase: see make_quee. Returns [changes so far,
    current variant, 1 + variants * exits ahead].
    """
    variants = len(steps)
    ahead = price * steps[:, segment + 1 :].cumsum(axis=1)  # [variants, exits ahead]
    charges = np.concatenate([[0.0], ahead.ravel()])  # an exit here is free: it has been computed
    table = np.broadcast_to(charges, (changes + 1, variants, len(charges))).copy()
    for current in range(variants):
        variant = np.repeat(np.arange(variants), ahead.shape[1])  # of each path
        table[changes, current, 1:][variant != current] = np.inf
        if not increase:
            table[:, current, 1:][:, variant < current] = np.inf
    result: Floats = table.astype(np.float32)
    return result


def walk_limits(manifest: Manifest) -> dict[str, float]:
    """The parameters of a bundle's own rule quee that limit its walks, so that other prices keep to them.

    They are in its rule and points or, after ee-calibrate with another rule, in provenance (WALK_LIMITS).
    """
    specs = [manifest.rule, *(point.rule for point in manifest.points)]
    parameters: object = next((spec.parameters for spec in specs if spec.name == "quee"), None)
    if parameters is None:
        entries = [entry for entry in manifest.provenance.values() if isinstance(entry, Mapping)]
        parameters = next((entry[WALK_LIMITS] for entry in entries if WALK_LIMITS in entry), None)
    if not isinstance(parameters, Mapping):
        return {}
    given = {name: parameters[name] for name in LIMITS if name in parameters}
    return {name: float(value) for name, value in given.items() if isinstance(value, (int, float))}
