"""Policies: the learned part of an exit that gives the probability of exiting there; one file a kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from offramp.models.policies import consistentee, jei, lte


class Policy(Protocol):
    """What each module of a policy implements: the decision at one exit."""

    def __call__(
        self, pooled: Tensor, logits: Tensor, evidence: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The logit of P(exit) [batch] and the evidence for the next exit (None: this kind has none).

        pooled [batch, hidden], logits [batch, classes], evidence [batch, numbers] of the exits before.
        """
        ...

    def folded(self, classes: int) -> nn.Module:
        """A module of the same signature in evaluation mode, in as few operators as possible, for a graph."""
        ...


def without_evidence(classes: int) -> int:
    """0: a policy that reads one exit alone passes nothing on."""
    return 0


@dataclass(frozen=True)
class PolicyKind:
    """A kind of policy.

    make: (hidden size, count) -> that many policies, one for each exit but the last; they may share parts.
    evidence: classes -> numbers a row that are passed from exit to exit, zeros before the first; 0: none.
    """

    make: Callable[[int, int], nn.ModuleList]
    evidence: Callable[[int], int] = without_evidence


# NetworkSpec.policy is one of these names.
KINDS: Mapping[str, PolicyKind] = {
    "statistics": PolicyKind(partial(consistentee.make, inputs="statistics"), consistentee.evidence_size),
    "state": PolicyKind(partial(consistentee.make, inputs="state")),
    "both": PolicyKind(partial(consistentee.make, inputs="both"), consistentee.evidence_size),
    "jei": PolicyKind(jei.make, jei.evidence_size),
    "lte": PolicyKind(lte.make),
}

__all__ = ["KINDS", "Policy", "PolicyKind"]
