"""The common parts of all rules: the signals of a segment, plans, and the protocol of a rule.

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
    """The outputs of a segment for the rows of one step, which rules read."""

    @property
    def logits(self) -> Floats:
        """Logits of the exit [rows, classes], of which rules read how certain it is.

        Of tasks other than classification and text generation: two classes, the least certain decision of a
        row and its nearest alternative; no class where nothing is decided (regression, embeddings).
        """
        ...

    @property
    def gate(self) -> Floats | None:
        """P(exit) of the policy [rows], 0..1; None without a policy."""
        ...

    @property
    def forecast(self) -> Floats | None:
        """P(wrong) of an exit here and of every path ahead; None without error forecasts.

        [rows, variants * (1 + variants * exits ahead)]: the first axis of the product is the variant in which
        the row ran this segment.
        """
        ...

    @property
    def hidden(self) -> Floats | None:
        """Hidden state after the segment [rows, hidden size]; None for classifiers."""
        ...

    @property
    def answer(self) -> Floats | None:
        """All that the session's answer is made from [rows, ...]; None if that is the logits.

        [rows, labels] one logit a label; [rows, tokens, labels] those of each token; [rows, 1] a number;
        [rows, size] an embedding.
        """
        ...

    @property
    def controller(self) -> Floats | None:
        """P(run) of the segments ahead, but for the last one [rows, segments ahead - 1]; None without any."""
        ...


@dataclass(frozen=True)
class RowSignals:
    """Signals that are stored in arrays; see Signals for their shapes."""

    logits: Floats
    gate: Floats | None = None
    forecast: Floats | None = None
    hidden: Floats | None = None
    answer: Floats | None = None
    controller: Floats | None = None


ExitTest = Callable[[Signals, int], bool]


class Rule(Protocol):
    """A function that rewrites the rest of each row's plan after a segment, without side effects."""

    @property
    def spec(self) -> RuleSpec:
        """Name and parameters of the rule."""
        ...

    @property
    def width(self) -> int:
        """How many numbers the rule remembers for each row; they are zero at the start."""
        ...

    @property
    def exit_test(self) -> ExitTest | None:
        """A function that tells whether a single row exits after a segment (0-based); None: call the rule.

        Rules have it that only exit and need no memory. A walk of one row then needs neither plan nor memory,
        which saves several microseconds a segment.
        """
        ...

    def first_plan(self, segments: int, variant: int, hidden: Floats | None = None) -> Plan:
        """The plan [1, segments] with which a row, or each token of an answer, starts in `variant`.

        hidden [hidden size]: for a decoder, the state of the prompt's last token after the first segment.
        """
        ...

    def __call__(self, signals: Signals, memory: Floats, plan: Plan, segment: int) -> tuple[Plan, Floats]:
        """Return the new plan [rows, segments] and memory [rows, width] after `segment` (0-based).

        The arguments are not changed; an unchanged plan may be returned itself.
        """
        ...


def full_plan(segments: int, variant: int) -> Plan:
    """The plan that runs every segment in one variant [1, segments]."""
    return np.full((1, segments), variant, np.int8)


def never_exits(signals: Signals, segment: int) -> bool:
    """The exit test of rules whose plan is fixed before the walk: always False."""
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
