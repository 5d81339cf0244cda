"""statistics, state, both: a small perceptron trained by reward is the gate (ConsistentEE, AAAI 2024).

ConsistentEE's policy reads the pooled state alone (inputs "state", as published). Two statistics of the
exit's softmax can replace it ("statistics") or join it ("both"); these two are ours. They are few and cheap
on purpose: at short inputs starting an operator costs as much as running it, and every segment has a policy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offramp.models.exits import Standardize

POLICY_INPUTS = ("statistics", "state", "both")
STATISTICS = 2  # certainty, agreement
HIDDEN = 16
FADE = 0.5  # factor on the evidence of earlier exits from one exit to the next
_ONE = 1.0 + 1e-5  # keeps log(1 - top probability) finite
# Logit of P(exit) before training. Gates start nearly closed: if they start half open, few rows reach the
# deep gates and train them. In the public code P(exit) starts near 0.5.
CLOSED = -2.0


def evidence_size(classes: int) -> int:
    """The size of the evidence: the fading sum of the exits' probabilities has one number for each class."""
    return classes


def weigh_evidence(logits: Tensor, evidence: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the statistics of this exit [batch, 2], and the evidence for the next exit [batch, classes].

    logits [batch, classes] of this exit, evidence [batch, classes] of the exits before it.
    certainty: -log(1 - top probability), which orders rows as the top probability does and has a useful
    gradient near 1.
    agreement: the inner product of this exit's probabilities with the fading sum of the earlier exits', a
    smooth form of patience.
    """
    probabilities = logits.float().softmax(-1)  # [batch, classes]
    certainty = -(_ONE - probabilities.amax(-1, keepdim=True)).log()
    agreement = (probabilities * evidence).sum(-1, keepdim=True)
    return torch.cat([certainty, agreement], dim=-1), FADE * evidence + probabilities


class ConsistentEEPolicy(nn.Module):
    """ConsistentEE's policy at one exit, which gives the logit of P(exit) [batch].

    statistics: linear in the certainty, plus a perceptron over both statistics. The perceptron's output
    starts at zero, so training starts from the rule "exit where the top probability is high" and departs from
    it only where that pays. state: Linear(hidden, 32), GELU, Linear(32, 1) on the pooled state and nothing
    else, the published shape (class Policy of ConsistentEE's public code). both: the sum, with dropout before
    the part that reads the state.

    The pooled state is standardized first, as an exit's input is. A pooler that was not pretrained gives
    states that differ by some hundredths between rows, and a policy then learns one decision for all of them.
    """

    bias: Tensor

    def __init__(self, hidden_size: int, inputs: str, dropout: float = 0.1) -> None:
        super().__init__()
        if inputs not in POLICY_INPUTS:
            raise ValueError(f"policy inputs {inputs!r}; choose one of {', '.join(POLICY_INPUTS)}")
        reads_statistics = inputs in ("statistics", "both")
        self.state: nn.Sequential | None = None
        if inputs in ("state", "both"):
            self.state = nn.Sequential(
                Standardize(hidden_size),
                nn.Dropout(dropout if reads_statistics else 0.0),
                nn.Linear(hidden_size, 32),
                nn.GELU(),
                _zero_linear(32) if reads_statistics else nn.Linear(32, 1),
            )
        self.statistics: nn.Sequential | None = None
        if reads_statistics:
            self.statistics = nn.Sequential(nn.Linear(STATISTICS, HIDDEN), nn.ReLU(), _zero_linear(HIDDEN))
        self.slope = nn.Parameter(torch.tensor(1.0)) if reads_statistics else None
        if reads_statistics:
            self.bias = nn.Parameter(torch.tensor(CLOSED))
        else:  # the last linear layer has a trained bias
            self.register_buffer("bias", torch.tensor(CLOSED))

    def forward(
        self, pooled: Tensor, logits: Tensor, evidence: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the logit of P(exit) [batch] and the evidence for the next exit; inputs as in Policy."""
        if self.statistics is None:
            return self.score(pooled, None), None
        if evidence is None:
            evidence = _zero_evidence(logits)
        statistics, evidence = weigh_evidence(logits, evidence)
        return self.score(pooled, statistics), evidence

    def score(self, pooled: Tensor, statistics: Tensor | None) -> Tensor:
        """The logit of P(exit) [batch] from the inputs that this policy reads.

        pooled [batch, hidden]; statistics [batch, 2] or None.
        """
        logit = self.bias
        if self.state is not None:
            logit = logit + self.state(pooled)[:, 0]
        if self.statistics is not None and self.slope is not None:
            assert statistics is not None
            logit = logit + self.slope * statistics[:, 0] + self.statistics(statistics)[:, 0]
        return logit  # [batch]

    def folded(self, classes: int) -> FoldedConsistentEEPolicy:
        """This policy in evaluation mode as a module of few operators, for an exported graph."""
        return FoldedConsistentEEPolicy(self, classes).eval()


class FoldedConsistentEEPolicy(nn.Module):
    """A ConsistentEEPolicy whose sums of policy and evidence are moved into matrix products.

    Reads pooled [batch, hidden], logits [batch, classes] and evidence (None: the policy reads the state
    alone); gives the logit [batch] and the evidence for the next exit. The linear term and the bias are two
    more hidden units: the certainty is never negative, so a ReLU passes it on unchanged, and a unit that is
    always one carries the bias.
    """

    certain: Tensor
    agree: Tensor
    start: Tensor
    last: Tensor
    fade: Tensor

    @torch.no_grad()
    def __init__(self, policy: ConsistentEEPolicy, classes: int) -> None:
        super().__init__()
        self.state = None if policy.state is None else _fold_state(policy.state)
        self.bias = policy.bias.detach().clone()
        self.reads_statistics = policy.statistics is not None
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
        """Compute the logit of P(exit) [batch] and the evidence for the next exit; inputs as in Policy."""
        if not self.reads_statistics:
            assert self.state is not None
            return self.bias + self.state(pooled).squeeze(1), None  # [batch]
        if evidence is None:
            evidence = _zero_evidence(logits)
        probabilities = logits.softmax(-1)  # [batch, classes]
        negative_certainty = (_ONE - probabilities.amax(-1, keepdim=True)).log()  # [batch, 1]
        hidden = torch.addmm(self.start, negative_certainty, self.certain)
        hidden = torch.addmm(hidden, probabilities * evidence, self.agree).relu()  # [batch, hidden + 2]
        logit = hidden @ self.last
        if self.state is not None:
            logit = logit + self.state(pooled).squeeze(1)
        return logit, torch.addmm(probabilities, evidence, self.fade)


def make_policies(hidden_size: int, count: int, *, inputs: str) -> nn.ModuleList:
    """Create `count` policies of ConsistentEE, one for each exit but the last.

    The part that reads statistics is one perceptron for all exits (each exit has its own bias): statistics
    mean the same at every exit, and one perceptron for each exit overfits. The part that reads the state is
    separate for each exit, as published.
    """
    policies = [ConsistentEEPolicy(hidden_size, inputs) for _ in range(count)]
    for policy in policies[1:]:
        policy.statistics, policy.slope = policies[0].statistics, policies[0].slope
    return nn.ModuleList(policies)


def _fold_state(state: nn.Sequential) -> nn.Sequential:
    """The part that reads the state, in evaluation mode and without standardization."""
    standardize, _, first, activation, last = state
    assert isinstance(standardize, Standardize) and isinstance(first, nn.Linear)
    return nn.Sequential(standardize.folded_into(first), activation, last)


def _zero_evidence(logits: Tensor) -> Tensor:
    """The evidence [batch, classes] of rows that have passed no exit; logits [batch, classes]."""
    return torch.zeros(
        logits.shape[0], evidence_size(logits.shape[-1]), dtype=torch.float32, device=logits.device
    )


def _zero_linear(width: int) -> nn.Linear:
    """A Linear(width, 1) whose output is zero before training."""
    linear = nn.Linear(width, 1)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
