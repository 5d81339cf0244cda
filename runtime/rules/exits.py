"""Rules that only exit: predicates over the signals of one segment, and the rule that is made from one.

A predicate `exits(signals, memory, segment, **parameters)` returns which rows exit (bool [rows]) and the new
memory. It may return a plain bool for all rows: in a walk of one row, numpy would take a third of the time
between two segments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

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
    never_exits,
    normalised_entropy,
    softmax,
)

_NO_MEMORY = np.zeros((1, 0), np.float32)  # memory of one row for a rule without memory


def gate(signals: Signals, memory: Floats, segment: int, *, threshold: float) -> tuple[Bools, Floats]:
    """Predicate of rule gate: rows exit whose P(exit), computed by the policy, is above the threshold."""
    if signals.gate is None:
        raise _no_policy(segment)
    return signals.gate > threshold, memory


def _no_policy(segment: int) -> BadSetting:
    return BadSetting(f"rule gate: segment {segment + 1} has no policy; choose another rule")


def max_probability(
    signals: Signals, memory: Floats, segment: int, *, threshold: float
) -> tuple[Bools, Floats]:
    """Predicate of rule max_probability: rows exit whose top probability reaches the threshold (0..1)."""
    return softmax(signals.logits).max(axis=-1) >= threshold, memory


def entropy(signals: Signals, memory: Floats, segment: int, *, threshold: float) -> tuple[Bools, Floats]:
    """Predicate of rule entropy: rows exit whose entropy / log(classes) is at most the threshold (0..1)."""
    return normalised_entropy(signals.logits) <= threshold, memory


def margin(signals: Signals, memory: Floats, segment: int, *, threshold: float) -> tuple[Bools, Floats]:
    """Predicate of rule margin: rows exit whose top probability minus the second reaches the threshold."""
    top_two = np.partition(softmax(signals.logits), -2, axis=-1)[..., -2:]
    return top_two[..., 1] - top_two[..., 0] >= threshold, memory


def patience(signals: Signals, memory: Floats, segment: int, *, patience: float) -> tuple[Bools, Floats]:
    """Predicate of rule patience: rows exit once this many exits in a row gave the label of the exit before.

    The first exit counts as no agreement. Source: PABEE. memory: label of the last exit + 1 (0 before any),
    number of agreements in a row.
    """
    label = signals.logits.argmax(axis=-1) + 1
    streak = np.where(label == memory[:, 0], memory[:, 1] + 1, 0)
    return streak >= patience, np.stack([label, streak], axis=1).astype(np.float32)


def patience_confident(
    signals: Signals, memory: Floats, segment: int, *, threshold: float, patience: float
) -> tuple[Bools, Floats]:
    """Predicate of rule patience_confident: rows exit once this many exits in a row are confident.

    An exit is confident if its entropy, as a share of its maximum, is below the threshold. Source: PCEE-BERT.
    memory: number of confident exits in a row.
    """
    streak = np.where(normalised_entropy(signals.logits) < threshold, memory[:, 0] + 1, 0)
    return streak >= patience, streak[:, None].astype(np.float32)


def settled(
    signals: Signals, memory: Floats, segment: int, *, threshold: float, first: float = 2
) -> tuple[Bools, Floats]:
    """Predicate of rule settled: rows exit whose answer changed by at most the threshold since the last exit.

    first: the first exit (1-based) at which rows may leave; answers of exits before it agree by chance. A row
    does not leave at its own first exit. memory: 1 once there was an exit (0 before any), and its answer. See
    answer_change.
    """
    answer = signals.answer
    if answer is None:
        raise BadSetting(f"rule settled: segment {segment + 1} has no answer to compare; choose another rule")
    change = answer_change(answer, memory[:, 1:])
    exits = (memory[:, 0] > 0) & (change <= threshold) & (segment + 1 >= first)
    return exits, np.concatenate([np.ones_like(memory[:, :1]), answer], axis=1)


def answer_change(answer: Floats, before: Floats) -> Floats:
    """How much the answers of rows changed [rows]; both [rows, numbers].

    The absolute difference of two numbers; 1 minus the cosine of two embeddings, which are several numbers
    (1 if one of them is zero).
    """
    if answer.shape[-1] == 1:
        difference: Floats = np.abs(answer - before)[..., 0]
        return difference
    lengths = np.sqrt((answer * answer).sum(axis=-1)) * np.sqrt((before * before).sum(axis=-1))
    cosine = (answer * before).sum(axis=-1) / np.maximum(lengths, np.float32(1e-30))
    change: Floats = 1 - cosine
    return change


def fixed(signals: Signals, memory: Floats, segment: int, *, exit: float) -> tuple[bool, Floats]:
    """Predicate of rule fixed: all rows exit at exit number `exit` (1-based)."""
    return segment + 1 >= exit, memory


def never(signals: Signals, memory: Floats, segment: int) -> tuple[bool, Floats]:
    """Predicate of rule never: no row exits before the last segment."""
    return False, memory


class _ScaledSignals(NamedTuple):
    """Signals of which a predicate of certainty reads the logits, at a temperature.

    A tuple, as a walk of one row creates it after every segment.
    """

    logits: Floats
    gate: Floats | None
    answer: Floats | None
    forecast: None = None
    hidden: None = None
    controller: None = None


@dataclass(frozen=True)
class ExitRule:
    """A rule that cuts the plan of the rows for which its predicate is true.

    temperatures [segments], each an array of one number: the predicate reads the logits of a segment divided
    by its own; none: as the segment gave them.
    """

    spec: RuleSpec
    exits: Callable[..., tuple[Bools | bool, Floats]]
    width: int
    parameters: Mapping[str, float] = field(default_factory=dict)
    temperatures: tuple[Floats, ...] = field(default=(), compare=False)

    @cached_property
    def exit_test(self) -> ExitTest | None:
        """The predicate for a single row; None if the predicate needs memory. See Rule.exit_test."""
        if self.width:
            return None
        if self.exits is never:
            return never_exits
        if self.exits is gate:
            threshold = self.parameters["threshold"]

            def is_open(signals: Signals, segment: int) -> bool:
                if (probability := signals.gate) is None:
                    raise _no_policy(segment)
                return bool(probability.item() > threshold)

            return is_open
        if self.temperatures:
            exits, parameters, temperatures = self.exits, self.parameters, self.temperatures
            return lambda signals, segment: bool(
                exits(
                    _ScaledSignals(signals.logits / temperatures[segment], None, None),
                    _NO_MEMORY,
                    segment,
                    **parameters,
                )[0]
            )
        return lambda signals, segment: bool(self.exits(signals, _NO_MEMORY, segment, **self.parameters)[0])

    def first_plan(self, segments: int, variant: int, hidden: Floats | None = None) -> Plan:
        """The plan that runs every segment in `variant`; see Rule.first_plan."""
        return full_plan(segments, variant)

    def __call__(self, signals: Signals, memory: Floats, plan: Plan, segment: int) -> tuple[Plan, Floats]:
        if self.temperatures:
            logits = signals.logits / self.temperatures[segment]
            signals = _ScaledSignals(logits, signals.gate, signals.answer)
        exits, memory = self.exits(signals, memory, segment, **self.parameters)
        if exits is False:
            return plan, memory
        if exits is True or np.count_nonzero(exits):  # a fifth of the time of any()
            plan = plan.copy()
            plan[slice(None) if exits is True else exits, segment + 1 :] = -1
        return plan, memory


def simulate(
    rule: Rule, logits: Floats, gates: Floats | None, answers: Floats | None = None
) -> NDArray[np.int64]:
    """Compute the exit (0-based segment) [rows] at which each row's walk ends, from the outputs of all exits.

    logits [rows, segments, classes]; gates [rows, segments] or [rows, segments - 1], P(exit) in 0..1, or
    None; answers [rows, segments, numbers] for rule settled, else None. This is for rules that only exit: a
    rule that skips segments or changes precision changes later signals.
    """
    rows, segments = logits.shape[:2]
    plan: Plan = np.zeros((rows, segments), dtype=np.int8)
    memory: Floats = np.zeros((rows, rule.width), dtype=np.float32)
    for segment in range(segments - 1):
        walking = np.flatnonzero(plan[:, segment] >= 0)
        signals = RowSignals(
            logits[walking, segment],
            None if gates is None else gates[walking, segment],
            answer=None if answers is None else answers[walking, segment],
        )
        plan[walking], memory[walking] = rule(signals, memory[walking], plan[walking], segment)
    exits: NDArray[np.int64] = segments - 1 - (plan[:, ::-1] >= 0).argmax(axis=1)
    return exits
