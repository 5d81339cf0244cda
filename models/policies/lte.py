"""lte: learning to exit; one linear layer for all exits predicts whether an exit is wrong (BERxiT, EACL
2021).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LearningToExit(nn.Module):
    """A learning-to-exit policy at one exit, which gives the logit of P(exit) [batch].

    P(exit) is the probability that the exit is right, computed from the pooled state.
    wrong: Linear(hidden, 1), the same for every exit; its sigmoid is P(wrong), trained by squared error
    against 0/1 (recipe berxit). BERxiT exits where P(wrong) is below a threshold; the gate is 1 - P(wrong),
    so rule `gate` with 1 - threshold is the same rule.
    """

    def __init__(self, wrong: nn.Linear) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, pooled: Tensor, logits: Tensor, evidence: Tensor | None) -> tuple[Tensor, None]:
        """Compute the logit of P(exit) [batch] from pooled [batch, hidden]; there is no evidence."""
        return -self.wrong(pooled)[:, 0], None  # [batch]

    def folded(self, classes: int) -> FoldedLearningToExit:
        """This policy as a module for an exported graph, with the minus sign in the weights."""
        return FoldedLearningToExit(self.wrong).eval()


class FoldedLearningToExit(nn.Module):
    """A LearningToExit policy as one product that gives the logit of P(right) [batch]."""

    @torch.no_grad()
    def __init__(self, wrong: nn.Linear) -> None:
        super().__init__()
        self.right = nn.Linear(wrong.in_features, 1)
        self.right.weight.copy_(-wrong.weight)
        self.right.bias.copy_(-wrong.bias)

    def forward(self, pooled: Tensor, logits: Tensor, evidence: Tensor | None) -> tuple[Tensor, None]:
        """Compute the logit of P(exit) [batch] from pooled [batch, hidden]; there is no evidence."""
        return self.right(pooled).squeeze(1), None  # [batch]


def make_policies(hidden_size: int, count: int) -> nn.ModuleList:
    """Create `count` policies that share one linear layer."""
    wrong = nn.Linear(hidden_size, 1)
    return nn.ModuleList(LearningToExit(wrong) for _ in range(count))
