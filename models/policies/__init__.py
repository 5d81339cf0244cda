"""Policies: the learned part of an exit that gives P(exit); one file for each kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from offramp.models.policies import consistentee, jei, lte


class Policy(Protocol):
    """The protocol of a policy's modules, each of which makes the decision at one exit."""

    def __call__(
        self, pooled: Tensor, logits: Tensor, evidence: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The logit of P(exit) [batch] and the evidence for the next exit (None: this kind has none).

        pooled [batch, hidden], logits [batch, classes], evidence [batch, numbers] of the exits before.
        """
        ...

    def folded(self, classes: int) -> nn.Module:
        """This policy in evaluation mode as a module of few operators, for an exported graph.

        It has the same signature. classes: number of labels.
        """
        ...


def without_evidence(classes: int) -> int:
    """The size of the evidence of a policy that reads one exit alone: 0."""
    return 0


@dataclass(frozen=True)
class PolicyKind:
    """A kind of policy: how its modules are created, and how much evidence they pass on.

    make: (hidden size, count) -> that many policies, one for each exit but the last; they may share parts.
    evidence: classes -> how many numbers a row are passed from exit to exit, zeros before the first; 0: none.
    """

    make: Callable[[int, int], nn.ModuleList]
    evidence: Callable[[int], int] = without_evidence


# NetworkSpec.policy is one of these names.
KINDS: Mapping[str, PolicyKind] = {
    "statistics": PolicyKind(
        partial(consistentee.make_policies, inputs="statistics"), consistentee.evidence_size
    ),
    "state": PolicyKind(partial(consistentee.make_policies, inputs="state")),
    "both": PolicyKind(partial(consistentee.make_policies, inputs="both"), consistentee.evidence_size),
    "jei": PolicyKind(jei.make_policies, jei.evidence_size),
    "lte": PolicyKind(lte.make_policies),
}

__all__ = ["KINDS", "Policy", "PolicyKind"]
