"""Rule quee: leave, or go on in one variant to one exit, by forecast errors and the price of what is ahead.

Source: QuEE (arXiv 2406.14404), of which no code and no formulas were at hand. The decision is a
reconstruction: after every segment, leave iff P(wrong | leaving) is at most the least of P(wrong | path) +
price * cost(path) over the paths ahead; otherwise take the first step of the best path and decide anew after
it. A path is (variant, exit): every segment up to that exit in that variant. A row changes its variant once
at most, which keeps the paths few and makes every walk one that was seen when the forecasts were fitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.errors import BadSetting
from offramp.runtime.rules import Floats, Plan, RuleSpec, Signals, StepCosts

UNITS = ("bops", "ms")  # what the parameter "measured" chooses between, 0 and 1
CURES = {
    "bops": "split it again from a checkpoint of recipe quee",
    "ms": "measure them here with ee-calibrate, or leave measured at 0",
}


@dataclass(frozen=True)
class Quee:
    """The rule at one price; see make().

    charges: by segment, [changed, variant now, 1 + variants * exits ahead]: price times the cost of leaving
    (0) and of every path; infinite for the paths that a row which has changed its variant may not take.
    """

    spec: RuleSpec
    charges: Sequence[Floats]
    width: int = field(default=0, init=False)

    def __call__(self, signals: Signals, memory: Floats, plan: Plan, segment: int) -> tuple[Plan, Floats]:
        if signals.forecast is None:
            raise BadSetting(f"rule quee: segment {segment + 1} has no error forecast; choose another rule")
        charges = self.charges[segment]
        _, variants, paths = charges.shape
        ahead = (paths - 1) // variants
        if len(plan) == 1:
            return self._alone(signals.forecast[0], charges, plan, segment), memory
        now = plan[:, segment]  # the variant in which each row was run last
        changed = (now != plan[:, 0]).astype(np.intp)
        forecast = signals.forecast.reshape(len(now), variants, paths)
        total = forecast[np.arange(len(now)), now] + charges[changed, now]  # [rows, 1 + paths]
        best = total.argmin(axis=1)  # the first of equals, so that a tie is for leaving
        variant, exit_at = np.divmod(best - 1, ahead)
        order = np.arange(ahead)
        rest = np.where(order <= exit_at[:, None], variant[:, None], -1)  # [rows, exits ahead]
        rest[best == 0] = -1
        plan = plan.copy()
        plan[:, segment + 1 :] = rest
        return plan, memory

    def _alone(self, forecast: Floats, charges: Floats, plan: Plan, segment: int) -> Plan:
        """The same for one row, in a third of the calls: between two segments every one of them shows."""
        _, variants, paths = charges.shape
        now = plan.item(0, segment)
        total = forecast[now * paths : (now + 1) * paths] + charges[int(now != plan.item(0, 0)), now]
        best = int(total.argmin())
        plan = plan.copy()
        plan[0, segment + 1 :] = -1
        if best:
            variant, exit_at = divmod(best - 1, (paths - 1) // variants)
            plan[0, segment + 1 : segment + 2 + exit_at] = variant
        return plan


def make(spec: RuleSpec, segments: int, costs: Mapping[str, StepCosts]) -> Quee:
    """The rule that a spec describes.

    Parameters: price, in errors for a full walk in the default variant; measured: 0 charges bit operations, 1
    the milliseconds of the bundle's calibration (left out: 0). Costs count as shares of that full walk, so
    that a price means the same in both. Raises BadSetting for parameters that do not exist or cannot be, and
    where the bundle does not say the costs.
    """
    unknown = sorted(set(spec.parameters) - {"price", "measured"})
    if unknown:
        raise BadSetting(
            f"rule quee: parameter {unknown[0]!r} is not known; its parameters are price and measured"
        )
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
    unit = UNITS[int(measured)]
    if unit not in costs:
        raise BadSetting(f"rule quee: this bundle does not say what its steps cost in {unit}; {CURES[unit]}")
    steps = np.array(list(costs[unit].steps.values()))  # [variants, segments]
    return Quee(spec, [charges(steps / steps[0].sum(), price, at) for at in range(segments - 1)])


def charges(steps: NDArray[np.float64], price: float, segment: int) -> Floats:
    """What leaving and every path are charged after a segment, [changed, now, 1 + variants * exits ahead];
    steps [variants, segments].
    """
    variants = len(steps)
    ahead = price * steps[:, segment + 1 :].cumsum(axis=1)  # [variants, exits ahead]
    every = np.concatenate([[0.0], ahead.ravel()])  # leaving is free: its exit has run
    table = np.broadcast_to(every, (2, variants, len(every))).copy()
    for now in range(variants):
        others = np.repeat(np.arange(variants) != now, ahead.shape[1])
        table[1, now, 1:][others] = np.inf
    charged: Floats = table.astype(np.float32)
    return charged
