"""Error forecasts: how probably each way to go on from an exit would end in a wrong label.

A reconstruction of QuEE's light predictors (arXiv 2406.14404): no code and no sizes were at hand. A forecast
reads three statistics of its exit's own softmax and says P(wrong) of leaving here and of every path ahead: a
variant and the exit at which it is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

STATISTICS = 3  # certainty, entropy, margin
HIDDEN = 16


def softmax_statistics(logits: Tensor) -> Tensor:
    """What a forecast sees [batch, 3]; logits [batch, classes].

    certainty: log of the top probability over the second. entropy: as a share of its maximum, log(classes).
    margin: top probability minus the second. Not -log(1 - top), as policies read it: near 1 that multiplies
    the last digit of float32 by up to 1e5, and a forecast would differ between engines.
    """
    logs = logits.float().log_softmax(-1)  # [batch, classes]
    first, second = logs.topk(2, dim=-1).values.split(1, dim=-1)  # each [batch, 1]
    entropy = (logs.exp() * logs).sum(-1, keepdim=True) / -math.log(logits.shape[-1])
    return torch.cat([first - second, entropy, first.exp() - second.exp()], dim=-1)


def path_columns(variants: Sequence[int], of: int, exits: Sequence[int], ahead: int) -> list[int]:
    """Places in a forecast of `of` variants and `ahead` exits that some of them keep, in a forecast's order.

    variants, exits: the numbers that are kept (exits: 0 is the next one). The order: for each variant in
    which the row may have come, leaving and then, variant by variant, every exit ahead.
    """
    width = 1 + of * ahead
    kept = []
    for now in variants:
        kept.append(now * width)
        kept += [now * width + 1 + variant * ahead + exit_at for variant in variants for exit_at in exits]
    return kept


class Forecast(nn.Module):
    """P(wrong) as logits [batch, variants * (1 + variants * ahead)] from an exit's logits [batch, classes].

    The statistics are standardized by what they were where the forecast was fitted, then one hidden layer.
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
        return self.read(softmax_statistics(logits))

    def read(self, statistics: Tensor) -> Tensor:
        """The same from statistics [batch, 3] that were computed before."""
        return self.last(self.first((statistics - self.mean) / self.spread).relu())  # type: ignore[no-any-return]

    def folded(self, variants: Sequence[int], exits: Sequence[int]) -> nn.Module:
        """What a graph should carry: logits -> probabilities [batch, ...] of the kept variants and exits
        ahead alone, the standardization moved into the first layer.
        """
        return Folded(self, path_columns(variants, self.variants, exits, self.ahead)).eval()


class Folded(nn.Module):
    """What Forecast.folded() gives."""

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
        hidden = self.first(softmax_statistics(logits)).relu()
        return self.last(hidden).sigmoid()  # type: ignore[no-any-return]
