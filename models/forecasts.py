"""Error forecasts: for each path onward from an exit, the probability that it ends in a wrong label.

A reconstruction of QuEE's light predictors (arXiv 2406.14404): neither code nor sizes were available. A
forecast reads three statistics of its exit's softmax and gives P(wrong) of exiting here and of every path
ahead; a path is a variant and the exit at which it ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

STATISTICS = 3  # certainty, entropy, margin
HIDDEN = 16


def softmax_statistics(logits: Tensor) -> Tensor:
    """The three statistics of a softmax that a forecast reads [batch, 3]; logits [batch, classes].

    certainty: log of the top probability over the second. entropy: as a share of its maximum, log(classes).
    margin: top probability minus the second. The certainty is not -log(1 - top), as policies read it: near 1
    that multiplies the last digit of float32 by up to 1e5, and a forecast would differ between engines.
    """
    log_p = logits.float().log_softmax(-1)  # [batch, classes]
    first, second = log_p.topk(2, dim=-1).values.split(1, dim=-1)  # each [batch, 1]
    entropy = (log_p.exp() * log_p).sum(-1, keepdim=True) / -math.log(logits.shape[-1])
    return torch.cat([first - second, entropy, first.exp() - second.exp()], dim=-1)


def path_columns(variants: Sequence[int], variant_count: int, exits: Sequence[int], ahead: int) -> list[int]:
    """The columns of a forecast that belong to a subset of its variants and exits, in order.

    The forecast is for `variant_count` variants and `ahead` exits. variants, exits: the numbers in the subset
    (exit 0 is the next one). The order of columns: for each variant in which the row may have run so far,
    exiting here and then, variant by variant, every exit ahead.
    """
    width = 1 + variant_count * ahead
    columns = []
    for current in variants:
        columns.append(current * width)
        columns += [
            current * width + 1 + variant * ahead + exit_index for variant in variants for exit_index in exits
        ]
    return columns


class Forecast(nn.Module):
    """A small network that forecasts errors of paths from an exit's logits [batch, classes].

    It gives logits of P(wrong) [batch, variants * (1 + variants * ahead)].
    The statistics are standardized by the mean and spread of the rows of the fit; one hidden layer follows.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, variants: int, ahead: int) -> None:
        super().__init__()
        self.variants, self.ahead = variants, ahead
        self.register_buffer("mean", torch.zeros(STATISTICS))
        self.register_buffer("spread", torch.ones(STATISTICS))
        self.first = nn.Linear(STATISTICS, HIDDEN)
        self.last = nn.Linear(HIDDEN, variants * (1 + variants * ahead))

    def forward(self, logits: Tensor) -> Tensor:
        """Compute logits of P(wrong) from an exit's logits [batch, classes]."""
        return self.from_statistics(softmax_statistics(logits))

    def from_statistics(self, statistics: Tensor) -> Tensor:
        """The logits of P(wrong), as of forward(), from softmax_statistics [batch, 3]."""
        hidden = self.first((statistics - self.mean) / self.spread).relu()
        return self.last(hidden)  # type: ignore[no-any-return]

    def folded(self, variants: Sequence[int], exits: Sequence[int]) -> nn.Module:
        """This forecast for a subset of variants and exits ahead, as a module for an exported graph.

        It gives probabilities [batch, columns] from logits; the standardization is in the first layer.
        """
        return FoldedForecast(self, path_columns(variants, self.variants, exits, self.ahead)).eval()


class FoldedForecast(nn.Module):
    """A Forecast restricted to some columns, which gives probabilities; see Forecast.folded."""

    @torch.no_grad()
    def __init__(self, forecast: Forecast, columns: Sequence[int]) -> None:
        super().__init__()
        self.first = nn.Linear(STATISTICS, HIDDEN)
        weight = forecast.first.weight / forecast.spread
        self.first.weight.copy_(weight)
        self.first.bias.copy_(forecast.first.bias - weight @ forecast.mean)
        self.last = nn.Linear(HIDDEN, len(columns))
        self.last.weight.copy_(forecast.last.weight[list(columns)])
        self.last.bias.copy_(forecast.last.bias[list(columns)])

    def forward(self, logits: Tensor) -> Tensor:
        """Compute P(wrong) [batch, columns] from an exit's logits [batch, classes]."""
        hidden = self.first(softmax_statistics(logits)).relu()
        return self.last(hidden).sigmoid()  # type: ignore[no-any-return]
