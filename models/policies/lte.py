"""lte: learning to exit; one linear layer for all exits predicts whether an exit is wrong (BERxiT, EACL
2021).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LearningToExit(nn.Module):
    """The logit of P(exit) [batch] at one exit: the probability that the exit is right, from the pooled
    state.

    wrong: Linear(hidden, 1), the same for every exit; its sigmoid is P(wrong), trained by squared error
    against 0/1 (recipe berxit). BERxiT exits where P(wrong) is below a threshold; the gate is 1 - P(wrong),
    so rule `gate` with 1 - threshold is the same rule.
    """

    def __init__(self, wrong: nn.Linear) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, pooled: Tensor, logits: Tensor, evidence: Tensor | None) -> tuple[Tensor, None]:
        return -self.wrong(pooled)[:, 0], None  # [batch]

    def folded(self, classes: int) -> FoldedLearningToExit:
        """The form for a graph: the minus sign is part of the weights."""
        return FoldedLearningToExit(self.wrong).eval()


class FoldedLearningToExit(nn.Module):
    """LearningToExit as one product that gives the logit of P(right)."""

    @torch.no_grad()
    def __init__(self, wrong: nn.Linear) -> None:
        super().__init__()
        self.right = nn.Linear(wrong.in_features, 1)
        self.right.weight.copy_(-wrong.weight)
        self.right.bias.copy_(-wrong.bias)

    def forward(self, pooled: Tensor, logits: Tensor, evidence: Tensor | None) -> tuple[Tensor, None]:
        return self.right(pooled).squeeze(1), None  # [batch]


def make(hidden_size: int, count: int) -> nn.ModuleList:
    """`count` policies around one shared linear layer."""
    wrong = nn.Linear(hidden_size, 1)
    return nn.ModuleList(LearningToExit(wrong) for _ in range(count))
