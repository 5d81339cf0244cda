"""Policies: the learned part that gives, at an exit, the probability of leaving there.

ConsistentEE's policy reads the pooled state alone (inputs "state"), which overfits on small data sets. Two
statistics of the exit's softmax are offered instead of it or beside it, few and cheap on purpose: at short
inputs an operator costs as much to start as to run, and a policy stands in every segment.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

POLICY_INPUTS = ("statistics", "state", "both")
STATISTICS = 2  # certainty, agreement
HIDDEN = 16
FADE = 0.5  # what an exit's say in the evidence keeps from exit to exit


def evidence_size(classes: int) -> int:
    """Numbers a row that travel from exit to exit: the fading sum of the exits' probabilities."""
    return classes


def no_evidence(rows: Tensor, classes: int) -> Tensor:
    """Zeros [batch, evidence] for rows that have met no exit; `rows` is any tensor with the batch first."""
    return torch.zeros(rows.shape[0], evidence_size(classes), dtype=torch.float32, device=rows.device)


def weigh_evidence(logits: Tensor, evidence: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics [batch, 2] of this exit against what the earlier exits said, and the evidence [batch,
    classes] for the next exit.

    certainty: -log(1 - top probability), which orders rows as the top probability does and stays learnable
    near 1.
    agreement: the inner product of this exit's probabilities with the fading sum of the earlier exits', a
    smooth form of patience.
    """
    probabilities = logits.float().softmax(-1)  # [batch, classes]
    certainty = -(1.0 + 1e-5 - probabilities.amax(-1, keepdim=True)).log()
    agreement = (probabilities * evidence).sum(-1, keepdim=True)
    return torch.cat([certainty, agreement], dim=-1), FADE * evidence + probabilities


class Policy(nn.Module):
    """P(exit) at one exit as a logit [batch].

    statistics: a straight line in the certainty plus a perceptron over both statistics. The perceptron starts
    at zero, so that learning starts from the rule "leave where the top probability is high" and departs from
    it only where that pays. state: Linear(hidden, 32), GELU, Linear(32, 1) on the pooled state, the published
    shape (ConsistentEE, class Policy of its public code). both: the sum.
    """

    def __init__(self, hidden_size: int, inputs: str, dropout: float = 0.1) -> None:
        super().__init__()
        if inputs not in POLICY_INPUTS:
            raise ValueError(f"policy inputs {inputs!r}; choose one of {', '.join(POLICY_INPUTS)}")
        sees_statistics = inputs in ("statistics", "both")
        self.state: nn.Sequential | None = None
        if inputs in ("state", "both"):
            self.state = nn.Sequential(
                nn.Dropout(dropout), nn.Linear(hidden_size, 32), nn.GELU(), _silent(32)
            )
        self.statistics: nn.Sequential | None = None
        if sees_statistics:
            self.statistics = nn.Sequential(nn.Linear(STATISTICS, HIDDEN), nn.ReLU(), _silent(HIDDEN))
        self.slope = nn.Parameter(torch.tensor(1.0)) if sees_statistics else None
        # Closed at first: gates that start half open leave nobody to learn the deep ones from.
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, pooled: Tensor, statistics: Tensor) -> Tensor:
        logit = self.bias
        if self.state is not None:
            logit = logit + self.state(pooled)[:, 0]
        if self.statistics is not None and self.slope is not None:
            logit = logit + self.slope * statistics[:, 0] + self.statistics(statistics)[:, 0]
        return logit  # [batch]

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """The same policy in evaluation mode, line and bias inside the perceptron: fewer operators in a
        graph.

        The certainty is never negative, so one more hidden unit of the ReLU hands it through as it is.
        """
        if self.statistics is None or self.slope is None:
            return self
        first, last = self.statistics[0], self.statistics[2]
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        through = torch.tensor([[1.0, 0.0]])
        wider, out = nn.Linear(STATISTICS, HIDDEN + 1), nn.Linear(HIDDEN + 1, 1)
        wider.weight.copy_(torch.cat([first.weight, through]))
        wider.bias.copy_(torch.cat([first.bias, torch.zeros(1)]))
        out.weight.copy_(torch.cat([last.weight, self.slope.view(1, 1)], dim=1))
        out.bias.copy_(last.bias + self.bias)
        return Folded(self.state, nn.Sequential(wider, nn.ReLU(), out)).eval()


class Folded(nn.Module):
    """What Policy.folded() gives: the sum of the perceptrons and nothing else."""

    def __init__(self, state: nn.Sequential | None, statistics: nn.Sequential) -> None:
        super().__init__()
        self.state, self.statistics = state, statistics

    def forward(self, pooled: Tensor, statistics: Tensor) -> Tensor:
        logit = self.statistics(statistics)
        if self.state is not None:
            logit = logit + self.state(pooled)
        return logit.squeeze(1)  # type: ignore[no-any-return]


def make_policies(hidden_size: int, inputs: str, count: int) -> nn.ModuleList:
    """One policy an exit.

    What reads the statistics is one perceptron for all of them (each exit keeps its bias): they mean the same
    everywhere, and one for each exit overfits. What reads the state is each exit's own, as published.
    """
    policies = [Policy(hidden_size, inputs) for _ in range(count)]
    for policy in policies[1:]:
        policy.statistics, policy.slope = policies[0].statistics, policies[0].slope
    return nn.ModuleList(policies)


def _silent(width: int) -> nn.Linear:
    last = nn.Linear(width, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return last
