"""What all rules share: the signals of a segment, plans, and the protocol of a rule.

A plan is an int8 array [rows, segments] of variant numbers, -1 where a segment is not run. Exit after segment
k is plan[row, k + 1:] = -1; a skipped segment is a -1 in the middle; another precision is another number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.manifest import RuleSpec

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Plan = NDArray[np.int8]  # [rows, segments]: variant number, -1 = not run


class Signals(Protocol):
    """What a segment put out for the rows of one step.

    logits [rows, classes]. gate [rows]: P(exit) 0..1, None without a policy. forecast [rows, variants * (1 +
    variants * exits ahead)]: P(wrong) of an exit here and of every path ahead, for each variant in which the
    row may have come here, None without error forecasts. hidden [rows, hidden size]: of decoders alone.
    """

    @property
    def logits(self) -> Floats: ...

    @property
    def gate(self) -> Floats | None: ...

    @property
    def forecast(self) -> Floats | None: ...

    @property
    def hidden(self) -> Floats | None: ...


@dataclass(frozen=True)
class RowSignals:
    """Signals held in arrays; see Signals."""

    logits: Floats
    gate: Floats | None = None
    forecast: Floats | None = None
    hidden: Floats | None = None


ExitTest = Callable[[Signals, int], bool]


class Rule(Protocol):
    """Decides what is left of the plan of a row after each segment; a pure function of its arguments."""

    @property
    def spec(self) -> RuleSpec:
        """Name and parameters."""
        ...

    @property
    def width(self) -> int:
        """Numbers of memory that follow each row; zeros at the start."""
        ...

    @property
    def exit_test(self) -> ExitTest | None:
        """For rules that only exit and need no memory: whether a single row exits after a segment (0-based).

        A walk of one row then needs neither plan nor memory, which saves several microseconds a segment.
        None: the rule has to be called.
        """
        ...

    def first_plan(self, segments: int, variant: int, hidden: Floats | None = None) -> Plan:
        """The plan [1, segments] with which a row, or each token of an answer, starts in `variant`.

        hidden [hidden size]: of a decoder, the prompt's last token after the first segment.
        """
        ...

    def __call__(self, signals: Signals, memory: Floats, plan: Plan, segment: int) -> tuple[Plan, Floats]:
        """New plan [rows, segments] and memory [rows, width] after `segment` (0-based).

        The arguments are not changed; a plan that stays as it is may be returned itself.
        """
        ...


def full_plan(segments: int, variant: int) -> Plan:
    """Every segment in one variant [1, segments]."""
    return np.full((1, segments), variant, np.int8)


def never_exits(signals: Signals, segment: int) -> bool:
    """The exit test of rules whose plan is fixed before the walk."""
    return False


def softmax(logits: Floats) -> Floats:
    """Probabilities [..., classes] from logits of the same shape."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: Floats = powers / powers.sum(axis=-1, keepdims=True)
    return probabilities


def normalised_entropy(logits: Floats) -> Floats:
    """Entropy of the softmax [...] as a share of its maximum log(classes); logits [..., classes]."""
    probabilities = softmax(logits)
    nats: Floats = -(probabilities * np.log(np.maximum(probabilities, 1e-30))).sum(axis=-1)
    return nats / math.log(probabilities.shape[-1])
