"""Policies: the learned part that gives, at an exit, the probability of leaving there.

ConsistentEE's policy reads the pooled state alone (section "state"). Two things are added, each of them
optional, because the pooled state overfits on small data sets: the statistics of the exit's own softmax, and
the evidence of the exits before it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

POLICY_INPUTS = ("statistics", "state", "both")
# top log-odds, margin, entropy, agreement, streak, top of the running mean, the mean's probability of today's
# label
STATISTICS = 7


def evidence_size(classes: int) -> int:
    """Numbers a row that travel from exit to exit: last probabilities, their running sum, the streak."""
    return 2 * classes + 1


def no_evidence(rows: Tensor, classes: int) -> Tensor:
    """Zeros [batch, evidence] for rows that have met no exit; `rows` is any tensor with the batch first."""
    return torch.zeros(rows.shape[0], evidence_size(classes), dtype=torch.float32, device=rows.device)


def weigh_evidence(logits: Tensor, evidence: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics [batch, 7] of this exit against what the earlier exits saw, and the evidence [batch, 2C + 1]
    for the next.

    Agreement is the inner product of this exit's probabilities with the last exit's: the chance that two
    draws agree, a smooth form of patience; the streak lets it accumulate. Everything is a ratio or a
    probability, so that an exit left out at export changes the features little.
    """
    classes = logits.shape[-1]
    log_probabilities = logits.float().log_softmax(-1)
    probabilities = log_probabilities.exp()  # [batch, classes]
    last, total, streak = evidence.split([classes, classes, 1], dim=-1)
    top, second = probabilities.topk(2, dim=-1).values.split([1, 1], dim=-1)
    certain = top.clamp(max=1.0 - 1e-5)  # keeps the odds finite
    entropy = -(probabilities * log_probabilities).sum(-1, keepdim=True)
    agreement = (probabilities * last).sum(-1, keepdim=True)
    streak = agreement * (streak + 1.0)
    total = total + probabilities
    mean = total / total.sum(-1, keepdim=True)
    # A soft pick of the label of today (temperature 0.05) instead of an arg max: smooth, and no gather in the
    # graph.
    label = (probabilities * 20.0).softmax(-1)
    statistics = torch.cat(
        [
            # 0.2: log-odds reach some 10; the others stay within 0..1, the streak within the number of exits
            0.2 * (certain / (1.0 - certain)).log(),
            top - second,
            entropy,
            agreement,
            0.2 * streak,
            mean.amax(-1, keepdim=True),
            (mean * label).sum(-1, keepdim=True),
        ],
        dim=-1,
    )  # [batch, 7]
    return statistics, torch.cat([probabilities, total, streak], dim=-1)


class Policy(nn.Module):
    """P(exit) at one exit as a logit [batch].

    statistics: a straight line in the top log-odds plus a perceptron over the seven statistics. The
    perceptron starts at zero, so that learning starts from the rule "leave where the top probability is high"
    and departs from it only where that pays. state: Linear(hidden, 32), GELU, Linear(32, 1) on the pooled
    state, the published shape (ConsistentEE, class Policy of its public code). both: the sum.
    """

    def __init__(self, hidden_size: int, inputs: str, dropout: float = 0.1) -> None:
        super().__init__()
        if inputs not in POLICY_INPUTS:
            raise ValueError(f"policy inputs {inputs!r}; choose one of {', '.join(POLICY_INPUTS)}")
        sees_statistics = inputs in ("statistics", "both")
        self.state = _perceptron(hidden_size, 32, dropout) if inputs in ("state", "both") else None
        self.statistics = _perceptron(STATISTICS, 16, 0.0) if sees_statistics else None
        self.slope = nn.Parameter(torch.tensor(5.0)) if sees_statistics else None
        # Closed at first: gates that start half open leave nobody to learn the deep ones from.
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, pooled: Tensor, statistics: Tensor) -> Tensor:
        logit = self.bias
        if self.state is not None:
            logit = logit + self.state(pooled)[:, 0]
        if self.statistics is not None and self.slope is not None:
            logit = logit + self.slope * statistics[:, 0] + self.statistics(statistics)[:, 0]
        return logit  # [batch]


def make_policies(hidden_size: int, inputs: str, count: int) -> nn.ModuleList:
    """One policy an exit. What reads the statistics is one perceptron for all of them (each exit keeps its
    bias): they mean the same everywhere, and one for each exit overfits. What reads the state is each exit's
    own, as published.
    """
    policies = [Policy(hidden_size, inputs) for _ in range(count)]
    for policy in policies[1:]:
        policy.statistics, policy.slope = policies[0].statistics, policies[0].slope
    return nn.ModuleList(policies)


def _perceptron(inputs: int, width: int, dropout: float) -> nn.Sequential:
    last = nn.Linear(width, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(inputs, width), nn.GELU(), last)
