"""statistics, state, both: a small perceptron learned by reward opens the gate (ConsistentEE, AAAI 2024).

ConsistentEE's policy reads the pooled state alone (inputs "state"), which overfits on small data sets. Two
statistics of the exit's softmax are offered instead of it or beside it, few and cheap on purpose: at short
inputs an operator costs as much to start as to run, and a policy stands in every segment.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from offramp.models.policies.kind import Kind

POLICY_INPUTS = ("statistics", "state", "both")
STATISTICS = 2  # certainty, agreement
HIDDEN = 16
FADE = 0.5  # what an exit's say in the evidence keeps from exit to exit
_ONE = 1.0 + 1e-5  # keeps the logarithm of what is left beside the top probability finite


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
    certainty = -(_ONE - probabilities.amax(-1, keepdim=True)).log()
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

    def forward(
        self, pooled: Tensor, logits: Tensor, evidence: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.statistics is None:
            return self.score(pooled, None), None
        if evidence is None:
            evidence = no_evidence(logits, logits.shape[-1])
        statistics, evidence = weigh_evidence(logits, evidence)
        return self.score(pooled, statistics), evidence

    def score(self, pooled: Tensor, statistics: Tensor | None) -> Tensor:
        """The logit [batch] from pooled [batch, hidden] and, where they are read, statistics [batch, 2]."""
        logit = self.bias
        if self.state is not None:
            logit = logit + self.state(pooled)[:, 0]
        if self.statistics is not None and self.slope is not None:
            assert statistics is not None
            logit = logit + self.slope * statistics[:, 0] + self.statistics(statistics)[:, 0]
        return logit  # [batch]

    def folded(self, classes: int) -> Folded:
        """The same policy in evaluation mode as a graph should carry it: in as few operators as will do."""
        return Folded(self, classes).eval()


class Folded(nn.Module):
    """What Policy.folded() gives: a policy and the evidence's step, with sums moved into matrix products.

    Reads pooled [batch, hidden], logits [batch, classes] and evidence as before them (None: the policy sees
    the state alone); gives the logit [batch] and the evidence for the next exit. Line and bias are two more
    hidden units: the certainty is never negative, so a ReLU hands it through as it is, and a unit that is
    always one carries the bias.
    """

    certain: Tensor
    agree: Tensor
    start: Tensor
    last: Tensor
    fade: Tensor

    @torch.no_grad()
    def __init__(self, policy: Policy, classes: int) -> None:
        super().__init__()
        self.state = policy.state
        self.bias = policy.bias.detach().clone()
        self.sees_statistics = policy.statistics is not None
        if policy.statistics is None or policy.slope is None:
            return
        first, last = policy.statistics[0], policy.statistics[2]
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        certainty, agreement = first.weight.unbind(1)  # each [hidden]
        zero, one = torch.zeros(1), torch.ones(1)
        # The logarithm's sign is in the weight; the sum over classes is in the product.
        self.register_buffer("certain", -torch.cat([certainty, one, zero]).view(1, -1))
        self.register_buffer("agree", torch.cat([agreement, zero, zero]).repeat(classes, 1))
        self.register_buffer("start", torch.cat([first.bias, zero, one]))
        self.register_buffer(
            "last", torch.cat([last.weight[0], policy.slope.view(1), (last.bias + policy.bias).view(1)])
        )
        self.register_buffer("fade", FADE * torch.eye(classes))

    def forward(
        self, pooled: Tensor, logits: Tensor, evidence: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if not self.sees_statistics:
            assert self.state is not None
            return self.bias + self.state(pooled).squeeze(1), None  # [batch]
        if evidence is None:
            evidence = no_evidence(logits, logits.shape[-1])
        probabilities = logits.softmax(-1)  # [batch, classes]
        doubt = (_ONE - probabilities.amax(-1, keepdim=True)).log()  # [batch, 1]
        hidden = torch.addmm(self.start, doubt, self.certain)
        hidden = torch.addmm(hidden, probabilities * evidence, self.agree).relu()  # [batch, hidden + 2]
        logit = hidden @ self.last
        if self.state is not None:
            logit = logit + self.state(pooled).squeeze(1)
        return logit, torch.addmm(probabilities, evidence, self.fade)


def make(hidden_size: int, count: int, *, inputs: str) -> nn.ModuleList:
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


KINDS = {
    "statistics": Kind(partial(make, inputs="statistics"), evidence_size),
    "state": Kind(partial(make, inputs="state")),
    "both": Kind(partial(make, inputs="both"), evidence_size),
}
