"""Error forecasts: for each path onward from an exit, the probability that it ends in a wrong label.

A reconstruction of QuEE's light predictors (arXiv 2406.14404): neither code nor sizes were available. A
forecast reads three statistics of its exit's softmax, a few compact features of its pooled vector, or both,
and gives P(wrong) of exiting here and of every path ahead; a path is a variant and the exit at which it ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

STATISTICS = 3  # certainty, entropy, margin
COMPACT = 8  # features to which a pooled vector is compressed
HIDDEN = 16
INPUTS = {"statistics": STATISTICS, "features": COMPACT, "both": STATISTICS + COMPACT}


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
    Its inputs are standardized by the mean and spread of the rows of the fit; one hidden layer follows.
    inputs: a name in INPUTS. hidden_size: that of the pooled vector, from which `compress`, a fixed linear
    layer, computes the compact features; None if they are only ever given to from_inputs().
    """

    mean: Tensor
    spread: Tensor

    def __init__(
        self, variants: int, ahead: int, inputs: str = "statistics", hidden_size: int | None = None
    ) -> None:
        super().__init__()
        self.variants, self.ahead, self.inputs = variants, ahead, inputs
        self.register_buffer("mean", torch.zeros(INPUTS[inputs]))
        self.register_buffer("spread", torch.ones(INPUTS[inputs]))
        self.compress: nn.Linear | None = None
        if inputs != "statistics" and hidden_size is not None:
            self.compress = nn.Linear(hidden_size, COMPACT)
        self.first = nn.Linear(INPUTS[inputs], HIDDEN)
        self.last = nn.Linear(HIDDEN, variants * (1 + variants * ahead))

    def forward(self, logits: Tensor, pooled: Tensor | None = None) -> Tensor:
        """Compute logits of P(wrong) from logits [batch, classes] and pooled vector [batch, hidden].

        pooled: not read where the inputs are the statistics alone.
        """
        return self.from_inputs(forecast_inputs(self.inputs, self.compress, logits, pooled))

    def from_inputs(self, inputs: Tensor) -> Tensor:
        """The logits of P(wrong), as of forward(), from the inputs [batch, INPUTS[...]]."""
        hidden = self.first((inputs - self.mean) / self.spread).relu()
        return self.last(hidden)  # type: ignore[no-any-return]

    def folded(self, variants: Sequence[int], exits: Sequence[int]) -> nn.Module:
        """This forecast for a subset of variants and exits ahead, as a module for an exported graph.

        It gives probabilities [batch, columns] from logits and pooled vector; the standardization is in the
        first layer.
        """
        return FoldedForecast(self, path_columns(variants, self.variants, exits, self.ahead)).eval()


def forecast_inputs(kind: str, compress: nn.Linear | None, logits: Tensor, pooled: Tensor | None) -> Tensor:
    """The inputs of a forecast [batch, INPUTS[kind]]: statistics of the softmax, then compact features."""
    if kind == "statistics":
        return softmax_statistics(logits)
    assert compress is not None and pooled is not None
    features = compress(pooled)  # [batch, COMPACT]
    if kind == "features":
        return features  # type: ignore[no-any-return]
    return torch.cat([softmax_statistics(logits), features], dim=-1)


class FoldedForecast(nn.Module):
    """A Forecast restricted to some columns, which gives probabilities; see Forecast.folded."""

    @torch.no_grad()
    def __init__(self, forecast: Forecast, columns: Sequence[int]) -> None:
        super().__init__()
        self.inputs, self.compress = forecast.inputs, forecast.compress
        self.first = nn.Linear(INPUTS[forecast.inputs], HIDDEN)
        weight = forecast.first.weight / forecast.spread
        self.first.weight.copy_(weight)
        self.first.bias.copy_(forecast.first.bias - weight @ forecast.mean)
        self.last = nn.Linear(HIDDEN, len(columns))
        self.last.weight.copy_(forecast.last.weight[list(columns)])
        self.last.bias.copy_(forecast.last.bias[list(columns)])

    def forward(self, logits: Tensor, pooled: Tensor | None = None) -> Tensor:
        """Compute P(wrong) [batch, columns]; arguments as in Forecast.forward()."""
        hidden = self.first(forecast_inputs(self.inputs, self.compress, logits, pooled)).relu()
        return self.last(hidden).sigmoid()  # type: ignore[no-any-return]
