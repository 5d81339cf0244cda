"""Rules that only exit: predicates over the signals of one segment, and the rule made from one.

A predicate `exits(signals, memory, segment, **parameters)` returns which rows exit (bool [rows]) and the new
memory. A plain bool stands for all rows: in a walk of one row, numpy would take a third of the time between
two segments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.errors import BadSetting
from offramp.runtime.rules.base import (
    Bools,
    ExitTest,
    Floats,
    Plan,
    RowSignals,
    Rule,
    Signals,
    full_plan,
    normalised_entropy,
    softmax,
)

_NO_MEMORY = np.zeros((1, 0), np.float32)  # of one row under a rule without memory


def gate(signals: Signals, memory: Floats, segment: int, *, threshold: float) -> tuple[Bools, Floats]:
    """Exit where the policy's P(exit) is above the threshold."""
    if signals.gate is None:
        raise _no_policy(segment)
    return signals.gate > threshold, memory


def _no_policy(segment: int) -> BadSetting:
    return BadSetting(f"rule gate: segment {segment + 1} has no policy; choose another rule")


def max_probability(
    signals: Signals, memory: Floats, segment: int, *, threshold: float
) -> tuple[Bools, Floats]:
    """Exit where the top probability reaches the threshold (0..1)."""
    return softmax(signals.logits).max(axis=-1) >= threshold, memory


def entropy(signals: Signals, memory: Floats, segment: int, *, threshold: float) -> tuple[Bools, Floats]:
    """Exit where the entropy, as a share of its maximum log(classes), is at most the threshold (0..1)."""
    return normalised_entropy(signals.logits) <= threshold, memory


def margin(signals: Signals, memory: Floats, segment: int, *, threshold: float) -> tuple[Bools, Floats]:
    """Exit where the top probability exceeds the second by at least the threshold (0..1)."""
    top_two = np.partition(softmax(signals.logits), -2, axis=-1)[..., -2:]
    return top_two[..., 1] - top_two[..., 0] >= threshold, memory


def patience(signals: Signals, memory: Floats, segment: int, *, patience: float) -> tuple[Bools, Floats]:
    """Exit where this many exits in a row agree with the exit before them (PABEE); the first exit agrees
    with none.

    memory: label of the last exit + 1 (0 before any), number of agreements in a row.
    """
    label = signals.logits.argmax(axis=-1) + 1
    streak = np.where(label == memory[:, 0], memory[:, 1] + 1, 0)
    return streak >= patience, np.stack([label, streak], axis=1).astype(np.float32)


def patience_confident(
    signals: Signals, memory: Floats, segment: int, *, threshold: float, patience: float
) -> tuple[Bools, Floats]:
    """Exit where this many exits in a row have an entropy, as a share of its maximum, below the threshold
    (PCEE-BERT).

    memory: number of confident exits in a row.
    """
    streak = np.where(normalised_entropy(signals.logits) < threshold, memory[:, 0] + 1, 0)
    return streak >= patience, streak[:, None].astype(np.float32)


def fixed(signals: Signals, memory: Floats, segment: int, *, exit: float) -> tuple[bool, Floats]:
    """Exit at exit number `exit` (1-based), whatever the signals are."""
    return segment + 1 >= exit, memory


def never(signals: Signals, memory: Floats, segment: int) -> tuple[bool, Floats]:
    """Run every segment."""
    return False, memory


@dataclass(frozen=True)
class ExitRule:
    """A rule that cuts the plan of the rows for which its predicate is true."""

    spec: RuleSpec
    exits: Callable[..., tuple[Bools | bool, Floats]]
    width: int
    parameters: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def exit_test(self) -> ExitTest | None:
        """See Rule.exit_test; None where the predicate needs memory."""
        if self.width:
            return None
        if self.exits is gate:
            threshold = self.parameters["threshold"]

            def is_open(signals: Signals, segment: int) -> bool:
                if (probability := signals.gate) is None:
                    raise _no_policy(segment)
                return bool(probability.item() > threshold)

            return is_open
        return lambda signals, segment: bool(self.exits(signals, _NO_MEMORY, segment, **self.parameters)[0])

    def first_plan(self, segments: int, variant: int, hidden: Floats | None = None) -> Plan:
        """Every segment; see Rule.first_plan."""
        return full_plan(segments, variant)

    def __call__(self, signals: Signals, memory: Floats, plan: Plan, segment: int) -> tuple[Plan, Floats]:
        exits, memory = self.exits(signals, memory, segment, **self.parameters)
        if exits is False:
            return plan, memory
        if exits is True or np.count_nonzero(exits):  # a fifth of the time of any()
            plan = plan.copy()
            plan[slice(None) if exits is True else exits, segment + 1 :] = -1
        return plan, memory


def simulate(rule: Rule, logits: Floats, gates: Floats | None) -> NDArray[np.int64]:
    """The exit [rows] (0-based segment) at which each row's walk ends, from the outputs of every exit.

    logits [rows, segments, classes]; gates [rows, segments] or [rows, segments - 1], P(exit) in 0..1, or
    None. For rules that only exit: a rule that skips or changes precision would change later signals, which
    no table of outputs can hold.
    """
    rows, segments = logits.shape[:2]
    plan: Plan = np.zeros((rows, segments), dtype=np.int8)
    memory: Floats = np.zeros((rows, rule.width), dtype=np.float32)
    for segment in range(segments - 1):
        walking = np.flatnonzero(plan[:, segment] >= 0)
        signals = RowSignals(logits[walking, segment], None if gates is None else gates[walking, segment])
        plan[walking], memory[walking] = rule(signals, memory[walking], plan[walking], segment)
    exits: NDArray[np.int64] = segments - 1 - (plan[:, ::-1] >= 0).argmax(axis=1)
    return exits
