"""Rules: pure functions that look at what a segment said and rewrite the rest of the plan, row by row.

A plan is an int8 array [rows, segments] of variant numbers, -1 where a segment is not run. Leaving after
segment k is plan[row, k + 1:] = -1; skipping is a -1 in the middle; changing precision is another number. A
rule that only ever leaves is made from a predicate `leave(signals, memory, segment, **parameters) -> (bool
[rows], memory)`; those are below. A plain bool speaks for all rows: of a walk of one row, numpy would be a
third of the time between two segments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.manifest import (
    RuleSpec as RuleSpec,
)  # training writes specs and may enter this file alone
from offramp.runtime.bundle.manifest import StepCosts as StepCosts  # as above
from offramp.runtime.errors import BadSetting

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Plan = NDArray[np.int8]  # [rows, segments]: variant number, -1 = not run


@dataclass(frozen=True)
class Signals:
    """What one segment said: logits [rows, classes]; gate [rows], P(exit) 0..1, or None without a policy;
    forecast [rows, variants * (1 + variants * exits ahead)], P(wrong) of leaving here and of every path, for
    each variant in which the row may have come here, or None.
    """

    logits: Floats
    gate: Floats | None = None
    forecast: Floats | None = None


class Rule(Protocol):
    """Rewrites the rest of the plan; memory [rows, width] is zeros at the start and follows its row."""

    @property
    def width(self) -> int:
        """Numbers of memory a row."""
        ...

    def __call__(self, signals: Signals, memory: Floats, plan: Plan, segment: int) -> tuple[Plan, Floats]:
        """New plan and memory after `segment` (0-based); the arguments are left as they are."""
        ...


Leave = Callable[..., tuple["Bools | bool", Floats]]
_NOTHING = np.zeros((1, 0), np.float32)  # the memory of one row under a rule that has none


def softmax(logits: Floats) -> Floats:
    """Probabilities [..., classes] from logits of the same shape."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Floats = powers / powers.sum(axis=-1, keepdims=True)
    return result


def normalised_entropy(logits: Floats) -> Floats:
    """Entropy of the softmax [...] as a share of its maximum log(classes); logits [..., classes]."""
    probabilities = softmax(logits)
    nats: Floats = -(probabilities * np.log(np.maximum(probabilities, 1e-30))).sum(axis=-1)
    return nats / math.log(probabilities.shape[-1])


def gate(signals: Signals, memory: Floats, segment: int, *, threshold: float) -> tuple[Bools, Floats]:
    """Leave where the policy's P(exit) is above the threshold."""
    if signals.gate is None:
        raise _no_policy(segment)
    return signals.gate > threshold, memory


def _no_policy(segment: int) -> BadSetting:
    return BadSetting(
        f"rule gate: segment {segment + 1} has no policy; choose another of: {', '.join(KNOWN)}"
    )


def max_probability(
    signals: Signals, memory: Floats, segment: int, *, threshold: float
) -> tuple[Bools, Floats]:
    """Leave where the top probability reaches the threshold (0..1)."""
    return softmax(signals.logits).max(axis=-1) >= threshold, memory


def entropy(signals: Signals, memory: Floats, segment: int, *, threshold: float) -> tuple[Bools, Floats]:
    """Leave where the entropy, as a share of its maximum log(classes), is at most the threshold (0..1)."""
    return normalised_entropy(signals.logits) <= threshold, memory


def margin(signals: Signals, memory: Floats, segment: int, *, threshold: float) -> tuple[Bools, Floats]:
    """Leave where the top probability leads the second by at least the threshold (0..1)."""
    two = np.partition(softmax(signals.logits), -2, axis=-1)[..., -2:]
    return two[..., 1] - two[..., 0] >= threshold, memory


def patience(signals: Signals, memory: Floats, segment: int, *, patience: float) -> tuple[Bools, Floats]:
    """Leave where this many exits in a row agreed with the exit before them (PABEE; the first exit agrees
    with none).

    memory: label of the last exit + 1 (0 before any), streak of agreements.
    """
    label = signals.logits.argmax(axis=-1) + 1
    streak = np.where(label == memory[:, 0], memory[:, 1] + 1, 0)
    return streak >= patience, np.stack([label, streak], axis=1).astype(np.float32)


def patience_confident(
    signals: Signals, memory: Floats, segment: int, *, threshold: float, patience: float
) -> tuple[Bools, Floats]:
    """Leave where this many exits in a row had an entropy, as a share of its maximum, below the threshold
    (PCEE-BERT).

    memory: streak of confident exits.
    """
    streak = np.where(normalised_entropy(signals.logits) < threshold, memory[:, 0] + 1, 0)
    return streak >= patience, streak[:, None].astype(np.float32)


def fixed(signals: Signals, memory: Floats, segment: int, *, exit: float) -> tuple[bool, Floats]:
    """Leave at exit number `exit` (1-based), whatever it says."""
    return segment + 1 >= exit, memory


def never(signals: Signals, memory: Floats, segment: int) -> tuple[bool, Floats]:
    """Go to the end."""
    return False, memory


def _quee(spec: RuleSpec, segments: int, costs: Mapping[str, StepCosts]) -> Rule:
    from offramp.runtime.rules.quee import make  # here: it needs the classes of this file

    return make(spec, segments, costs)


@dataclass(frozen=True)
class _Facts:
    """A predicate, its main parameter (None: it has none), a count beside it, and its memory; or what makes a
    rule that does more than leave.
    """

    leave: Leave
    parameter: str | None = "threshold"
    whole: bool = False  # the parameter is a whole number, 1 or more
    width: int = 0
    count: str | None = None  # a second parameter, a whole number, 1 or more
    make: Callable[[RuleSpec, int, Mapping[str, StepCosts]], Rule] | None = None


KNOWN: Mapping[str, _Facts] = {
    "gate": _Facts(gate),
    "max_probability": _Facts(max_probability),
    "entropy": _Facts(entropy),
    "margin": _Facts(margin),
    "patience": _Facts(patience, "patience", whole=True, width=2),
    "patience_confident": _Facts(patience_confident, width=1, count="patience"),
    "fixed": _Facts(fixed, "exit", whole=True),
    "never": _Facts(never, None),
    "quee": _Facts(never, "price", make=_quee),
}


@dataclass(frozen=True)
class ExitRule:
    """A rule that cuts the plan where its predicate says so."""

    spec: RuleSpec
    leave: Leave
    width: int
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def leaves(self) -> Callable[[Signals, int], bool] | None:
        """Whether one row leaves after a segment, asked without plan and memory; None: the rule has memory.

        For a walk of one row: what is not touched between two segments need not come into the cache.
        """
        if self.width:
            return None
        if self.leave is gate:
            threshold = self.parameters["threshold"]

            def opens(signals: Signals, segment: int) -> bool:
                if signals.gate is None:
                    raise _no_policy(segment)
                return bool(signals.gate.item() > threshold)

            return opens
        return lambda signals, segment: bool(self.leave(signals, _NOTHING, segment, **self.parameters)[0])

    def __call__(self, signals: Signals, memory: Floats, plan: Plan, segment: int) -> tuple[Plan, Floats]:
        leaves, memory = self.leave(signals, memory, segment, **self.parameters)
        if leaves is False:
            return plan, memory
        if leaves is True or np.count_nonzero(leaves):  # a fifth of the time of any()
            plan = plan.copy()
            plan[slice(None) if leaves is True else leaves, segment + 1 :] = -1
        return plan, memory


def main_parameter(name: str) -> str | None:
    """The parameter that --threshold sets for the rule of that name; BadSetting if unknown."""
    if name not in KNOWN:
        raise BadSetting(f"rule {name!r} is not known; choose one of: {', '.join(KNOWN)}")
    return KNOWN[name].parameter


def bind(spec: RuleSpec, segments: int, costs: Mapping[str, StepCosts] | None = None) -> Rule:
    """Make the rule that a spec describes for a walk of that many segments; BadSetting says what is wrong.

    costs: the manifest's, which rules that choose between variants need.
    """
    parameter = main_parameter(spec.name)
    facts = KNOWN[spec.name]
    if facts.make is not None:
        return facts.make(spec, segments, costs or {})
    known = [name for name in (parameter, facts.count) if name is not None]
    unknown = sorted(set(spec.parameters) - set(known))
    if unknown:
        takes = ("it has none", f"its parameter is {parameter}", f"its parameters are {' and '.join(known)}")
        raise BadSetting(f"rule {spec.name}: parameter {unknown[0]!r} is not known; {takes[len(known)]}")
    bound = {name: _value(spec, name, whole=facts.whole or name == facts.count) for name in known}
    if spec.name == "fixed" and bound["exit"] > segments:
        raise BadSetting(
            f"rule fixed: exit {bound['exit']:g} does not exist; there are exits 1 to {segments}"
        )
    return ExitRule(spec, facts.leave, facts.width, bound)


def _value(spec: RuleSpec, name: str, *, whole: bool) -> float:
    """A parameter of the spec, checked."""
    if name not in spec.parameters:
        cure = "give a threshold (--threshold NUMBER)"
        if name != main_parameter(spec.name):
            cure = "choose an operating point that sets it, or say RuleSpec(name, parameters) in Python"
        raise BadSetting(f"rule {spec.name} needs {name}: {cure}")
    value = spec.parameters[name]
    if not math.isfinite(value):
        raise BadSetting(f"rule {spec.name}: {name} {value} is not a finite number")
    if whole and (value != int(value) or value < 1):
        raise BadSetting(f"rule {spec.name}: {name} {value:g} must be a whole number from 1")
    # In float32, as the signals are: one row and many must be compared alike, in every version of numpy.
    return float(np.float32(value))


def simulate(rule: Rule, logits: Floats, gates: Floats | None) -> NDArray[np.int64]:
    """The exit [N] (0-based segment) at which each row's walk ends, from what every exit said at full depth.

    logits [N, segments, classes]; gates [N, segments] or [N, segments - 1], P(exit) in 0..1, or None. For
    rules that leave: a rule that skips or changes precision would change later signals, which no table can
    know.
    """
    rows, segments = logits.shape[:2]
    plan: Plan = np.zeros((rows, segments), dtype=np.int8)
    memory: Floats = np.zeros((rows, rule.width), dtype=np.float32)
    for segment in range(segments - 1):
        here = np.flatnonzero(plan[:, segment] >= 0)
        said = None if gates is None else gates[here, segment]
        signals = Signals(logits[here, segment], said)
        plan[here], memory[here] = rule(signals, memory[here], plan[here], segment)
    exits: NDArray[np.int64] = segments - 1 - (plan[:, ::-1] >= 0).argmax(axis=1)
    return exits
