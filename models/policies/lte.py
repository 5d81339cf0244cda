"""lte: learning to exit, one linear layer tells for all exits whether they are wrong (BERxiT, EACL 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offramp.models.policies.kind import Kind


class LearningToExit(nn.Module):
    """P(exit) at one exit as a logit [batch]: that the exit is right, from the pooled state alone.

    wrong: Linear(hidden, 1), the same for every exit; its sigmoid is P(wrong), which training holds against
    0/1 by squared error (recipe berxit). BERxiT leaves where that is below a threshold; the gate is 1 -
    P(wrong), so that the rule `gate` with 1 - threshold is the same rule.
    """

    def __init__(self, wrong: nn.Linear) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, pooled: Tensor, logits: Tensor, evidence: Tensor | None) -> tuple[Tensor, None]:
        return -self.wrong(pooled)[:, 0], None  # [batch]

    def folded(self, classes: int) -> Folded:
        """The sign goes into the weights."""
        return Folded(self.wrong).eval()


class Folded(nn.Module):
    """What LearningToExit.folded() gives: the logit of P(right) by one product."""

    @torch.no_grad()
    def __init__(self, wrong: nn.Linear) -> None:
        super().__init__()
        self.right = nn.Linear(wrong.in_features, 1)
        self.right.weight.copy_(-wrong.weight)
        self.right.bias.copy_(-wrong.bias)

    def forward(self, pooled: Tensor, logits: Tensor, evidence: Tensor | None) -> tuple[Tensor, None]:
        return self.right(pooled).squeeze(1), None  # [batch]


def make(hidden_size: int, count: int) -> nn.ModuleList:
    """One module an exit around one and the same layer."""
    wrong = nn.Linear(hidden_size, 1)
    return nn.ModuleList(LearningToExit(wrong) for _ in range(count))


KIND = Kind(make)
