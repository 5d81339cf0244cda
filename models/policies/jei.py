"""jei: a linear function of four uncertainties of the exit's softmax is the gate (JEI-DNN, arXiv 2310.09163).

The gates g of all exits share a total probability of 1: P(exit at l) is P_l = max(0, min(g_l, 1 - sum of g
before l)). A row exits at the first exit whose conditional c_l = P_l / prod over j < l of (1 - c_j), clipped
to 0..1, is at least one half. The product equals the remainder 1 - sum of g before l, until that is 0. So one
number is passed from exit to exit, the sum of g, and c_l = min(1, g_l / remainder).

The output is the logit log(2 * g_l / remainder). It is above 0 if c_l is above one half, the published
decision, and it grows further when c_l has reached 1. So thresholds other than one half, our extension, reach
every depth, and no threshold lies at a value at which the gates of many rows differ by rounding only.

Two deviations: the runtime's rule `gate` exits above its threshold, not at it (a tie at exactly 0.5 goes on);
and a remainder below MIN_REMAINDER counts as MIN_REMAINDER, because with a quotient of two small differences
the rounding of an engine would change decisions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

UNCERTAINTIES = 4
MIN_REMAINDER = 0.05  # of a total of 1
LOG_TWO = math.log(2.0)  # makes the logit zero where c_l is one half


def uncertainties(logits: Tensor) -> Tensor:
    """The four uncertainties of a softmax that a gate reads [..., 4]; logits [..., classes].

    They are top probability, entropy in nats, top minus second, and entropy of p^2 / sum of p^2. The
    distribution of squares is the softmax of the doubled logits.
    """
    log_p = logits.log_softmax(-1)
    log_squares = (2.0 * log_p).log_softmax(-1)
    p = log_p.exp()
    top, second = p.topk(2, dim=-1).values.unbind(-1)
    entropy_of_squares = -(log_squares.exp() * log_squares).sum(-1)
    return torch.stack([top, -(p * log_p).sum(-1), top - second, entropy_of_squares], dim=-1)


def exit_probabilities(gates: Tensor) -> Tensor:
    """The probability P_l of exiting at each exit but the last [batch, exits - 1], from the gates g in 0..1.

    gates [batch, exits - 1].
    """
    before = gates.cumsum(-1) - gates
    return torch.minimum(gates, 1.0 - before).clamp(min=0.0)


def remaining_probability(gate_sum: Tensor) -> Tensor:
    """The remaining probability: 1 minus the sum of the gates so far, at least MIN_REMAINDER; any shape."""
    return (1.0 - gate_sum).clamp(min=MIN_REMAINDER)


class JeiGate(nn.Module):
    """The gate of one exit; called as a policy, it gives the logit of the conditional c_l [batch]."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(UNCERTAINTIES, 1)

    def gate_logit(self, logits: Tensor) -> Tensor:
        """The logit of g [batch], which is trained; logits [batch, classes] are detached, as published."""
        return self.line(uncertainties(logits.detach()))[:, 0]  # type: ignore[no-any-return]

    def forward(self, pooled: Tensor, logits: Tensor, evidence: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the logit of P(exit) [batch] and the sum of the gates [batch, 1]; inputs as in Policy."""
        gate_logit = self.gate_logit(logits)  # [batch]
        gate_sum = torch.zeros_like(gate_logit) if evidence is None else evidence[:, 0]
        conditional = LOG_TWO + logsigmoid(gate_logit) - remaining_probability(gate_sum).log()
        return conditional, (gate_sum + gate_logit.sigmoid())[:, None]

    def folded(self, classes: int) -> FoldedJeiGate:
        """This gate in evaluation mode as a module of few operators, for an exported graph."""
        return FoldedJeiGate(self.line).eval()


class FoldedJeiGate(nn.Module):
    """A JeiGate whose linear layer is split into its terms, so that no vector of four is concatenated."""

    pair: Tensor
    bias: Tensor

    @torch.no_grad()
    def __init__(self, line: nn.Linear) -> None:
        super().__init__()
        top, entropy, margin, squares = line.weight[0].tolist()
        # Of the two top probabilities: the first is part of top and margin, the second of the margin alone.
        self.register_buffer("pair", torch.tensor([[top + margin], [-margin]]))
        self.register_buffer("bias", line.bias.clone())
        self.entropy, self.squares = entropy, squares

    def forward(self, pooled: Tensor, logits: Tensor, evidence: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the logit of P(exit) [batch] and the sum of the gates [batch, 1]; inputs as in Policy."""
        log_p = logits.log_softmax(-1)
        log_squares = (2.0 * log_p).log_softmax(-1)
        p = log_p.exp()
        entropies = self.entropy * p * log_p + self.squares * log_squares.exp() * log_squares
        top_two = torch.addmm(self.bias, p.topk(2, dim=-1).values, self.pair)
        gate_logit = top_two - entropies.sum(-1, keepdim=True)  # [batch, 1]
        gate_sum = torch.zeros_like(gate_logit) if evidence is None else evidence  # [batch, 1]
        conditional = LOG_TWO + logsigmoid(gate_logit) - remaining_probability(gate_sum).log()
        return conditional.squeeze(1), gate_sum + gate_logit.sigmoid()


def make_policies(hidden_size: int, count: int) -> nn.ModuleList:
    """Create `count` gates, one for each exit but the last; they do not read the pooled state."""
    return nn.ModuleList(JeiGate() for _ in range(count))


def evidence_size(classes: int) -> int:
    """The size of the evidence: 1, the sum of the gates."""
    return 1
