"""jei: a line through four uncertainties of the exit's own softmax is the gate (JEI-DNN, arXiv 2310.09163).

The gates g of all exits share one unit of probability: P(leave at l) is P_l = max(0, min(g_l, 1 - sum of g
before l)), and a row leaves at the first exit whose conditional c_l = P_l / prod over j < l of (1 - c_j),
clipped to 0..1, is at least one half. The product is what is left of the unit, 1 - sum of g before l, until
nothing is; so one number travels from exit to exit, the sum of g, and c_l = min(1, g_l / what is left).

What is put out is the logit log(2 * g_l / what is left). It is above zero where c_l is above one half, the
published decision, and goes on growing where c_l stands at 1. So thresholds other than one half, which are
our extension, reach every depth, and none lies where the gates of many rows are equal but for rounding.

Two deviations: the runtime's rule `gate` leaves above its threshold, not at it (a tie at exactly 0.5 walks
on); and what is left counts as LEAST where it is less, because a quotient of two small differences would make
of an engine's rounding another decision.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from offramp.models.policies.kind import Kind

UNCERTAINTIES = 4
LEAST = 0.05  # of the unit: with less left, c_l is g_l / LEAST
HALF = math.log(2.0)  # makes the logit zero where c_l is one half


def uncertainties(logits: Tensor) -> Tensor:
    """Top probability, entropy in nats, top minus second, and entropy of p^2 / sum of p^2.

    logits [..., classes] -> [..., 4]. The squares' distribution is the softmax of the doubled logits.
    """
    log_p = logits.log_softmax(-1)
    sharp = (2.0 * log_p).log_softmax(-1)
    p = log_p.exp()
    top, second = p.topk(2, dim=-1).values.unbind(-1)
    return torch.stack([top, -(p * log_p).sum(-1), top - second, -(sharp.exp() * sharp).sum(-1)], dim=-1)


def exit_probabilities(gates: Tensor) -> Tensor:
    """P_l [batch, exits - 1] of leaving at each exit but the last, from g [batch, exits - 1] in 0..1."""
    before = gates.cumsum(-1) - gates
    return torch.minimum(gates, 1.0 - before).clamp(min=0.0)


def left_over(spent: Tensor) -> Tensor:
    """What is left of the unit for rows whose gates so far sum to `spent`, any shape."""
    return (1.0 - spent).clamp(min=LEAST)


class Gate(nn.Module):
    """The gate of one exit; called as a policy it gives the logit that stands for c_l."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(UNCERTAINTIES, 1)

    def own(self, logits: Tensor) -> Tensor:
        """Logit of g [batch], which training teaches; logits [batch, classes] are detached, as published."""
        return self.line(uncertainties(logits.detach()))[:, 0]  # type: ignore[no-any-return]

    def forward(self, pooled: Tensor, logits: Tensor, evidence: Tensor | None) -> tuple[Tensor, Tensor]:
        own = self.own(logits)  # [batch]
        spent = torch.zeros_like(own) if evidence is None else evidence[:, 0]
        opened = HALF + logsigmoid(own) - left_over(spent).log()
        return opened, (spent + own.sigmoid())[:, None]

    def folded(self, classes: int) -> Folded:
        """The same gate for a graph."""
        return Folded(self.line).eval()


class Folded(nn.Module):
    """What Gate.folded() gives: the line taken apart, so that no vector of four has to be put together."""

    pair: Tensor
    bias: Tensor

    @torch.no_grad()
    def __init__(self, line: nn.Linear) -> None:
        super().__init__()
        top, entropy, margin, sharp = line.weight[0].tolist()
        # Of the two top probabilities: the first stands in top and margin, the second in the margin alone.
        self.register_buffer("pair", torch.tensor([[top + margin], [-margin]]))
        self.register_buffer("bias", line.bias.clone())
        self.entropy, self.sharp = entropy, sharp

    def forward(self, pooled: Tensor, logits: Tensor, evidence: Tensor | None) -> tuple[Tensor, Tensor]:
        log_p = logits.log_softmax(-1)
        sharp = (2.0 * log_p).log_softmax(-1)
        p = log_p.exp()
        both = self.entropy * p * log_p + self.sharp * sharp.exp() * sharp  # [batch, classes]
        line = torch.addmm(self.bias, p.topk(2, dim=-1).values, self.pair) - both.sum(-1, keepdim=True)
        spent = torch.zeros_like(line) if evidence is None else evidence  # [batch, 1]
        opened = HALF + logsigmoid(line) - left_over(spent).log()
        return opened.squeeze(1), spent + line.sigmoid()


def make(hidden_size: int, count: int) -> nn.ModuleList:
    """A gate of its own for every exit; the pooled state is not read."""
    return nn.ModuleList(Gate() for _ in range(count))


def one_number(classes: int) -> int:
    """What travels: the sum of the gates."""
    return 1


KIND = Kind(make, one_number)
