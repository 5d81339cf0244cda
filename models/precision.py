"""Precisions: how many bits each has, and blocks computed as they would be in it, simulated in float32.

int8 and int4 are what ONNX Runtime computes (dynamic quantization, MatMulNBits at accuracy level 4). int6 is
int8's arithmetic with fewer levels, which no engine here runs: for asking what a lossy precision would do.
Rows are quantized one by one, as at batch 1: an engine takes one scale for all rows of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

BLOCK = 128  # numbers that share a scale in int4


class Cost(Protocol):
    """Multiply-accumulates of a row of n tokens: token * n + pair * n * n + row."""

    @property
    def token(self) -> int: ...
    @property
    def pair(self) -> int: ...
    @property
    def row(self) -> int: ...


def channels(weight: Tensor, bits: int) -> Tensor:
    """A weight [out, in] on a symmetric grid of `bits` bits, one scale an output."""
    levels = 2 ** (bits - 1) - 1
    scale: Tensor = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / levels
    rounded: Tensor = (weight / scale).round() * scale
    return rounded


def rows(values: Tensor, bits: int) -> Tensor:
    """Activations [batch, ...] on an asymmetric grid of `bits` bits that holds zero, one scale a row."""
    levels = 2**bits - 1
    flat = values.flatten(1)
    low, high = flat.amin(1).clamp(max=0.0), flat.amax(1).clamp(min=0.0)  # [batch]
    shape = (-1, *[1] * (values.dim() - 1))
    scale: Tensor = ((high - low) / levels).clamp(min=1e-12).view(shape)
    zero = (-low.view(shape) / scale).round()
    rounded: Tensor = ((values / scale).round() + zero).clamp(0, levels).sub(zero) * scale
    return rounded


def groups(weight: Tensor) -> Tensor:
    """A weight [out, in] in 4 bits: BLOCK neighbours share a scale, which takes the largest of them to -8."""
    blocks = _blocks(weight)
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = torch.where(extreme == 0, torch.ones_like(extreme), extreme / -8)
    return _whole((blocks / scale).round().clamp(-8, 7) * scale, weight)


def group_rows(values: Tensor) -> Tensor:
    """Activations [..., in] in 8 bits, symmetric, BLOCK neighbours share a scale."""
    blocks = _blocks(values)
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return _whole((blocks / scale).round() * scale, values)


@dataclass(frozen=True)
class Precision:
    """Bits of weights and activations inside blocks, and what puts them on their grids (None: they stay)."""

    weight_bits: int = 32
    activation_bits: int = 32
    weight: Callable[[Tensor], Tensor] | None = None
    activation: Callable[[Tensor], Tensor] | None = None


PRECISIONS: Mapping[str, Precision] = {
    "fp32": Precision(),
    "int8": Precision(8, 8, lambda w: channels(w, 8), lambda x: rows(x, 8)),
    "int6": Precision(6, 6, lambda w: channels(w, 6), lambda x: rows(x, 6)),
    "int4": Precision(4, 8, groups, group_rows),
}


class Rounded(nn.Module):
    """A linear layer whose weight is on its grid for good and whose input is put on one at every call."""

    @torch.no_grad()
    def __init__(self, linear: nn.Linear, precision: Precision) -> None:
        super().__init__()
        assert precision.weight is not None and precision.activation is not None
        self.activation = precision.activation
        self.bias = linear.bias
        self.weight = nn.Parameter(precision.weight(linear.weight), requires_grad=False)

    def forward(self, values: Tensor) -> Tensor:
        return functional.linear(self.activation(values), self.weight, self.bias)


def in_precision(blocks: nn.ModuleList, name: str) -> nn.ModuleList:
    """The blocks as they compute in a precision: themselves in fp32, else copies with rounded linear layers.

    Attention's own products, softmax and norms stay in float32, as in the exported variants. KeyError for a
    name that is not in PRECISIONS.
    """
    precision = PRECISIONS[name]
    if precision.weight is None:
        return blocks
    copies = copy.deepcopy(blocks)
    for module in list(copies.modules()):
        for child, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, child, Rounded(layer, precision))
    return copies


def bit_operations(cost: Cost, name: str, tokens: float) -> float:
    """BOPs of a stage for a row of that many tokens: multiply-accumulates times the bits of both factors.

    What is done once a token is the linear layers of blocks, in the precision; attention's products, exits,
    policies and forecasts stay at 32 bits. (Mean pooling is counted with the former: 0.02 % of a block.)
    """
    precision = PRECISIONS[name]
    inside = cost.token * tokens * precision.weight_bits * precision.activation_bits
    return inside + (cost.pair * tokens**2 + cost.row) * 32 * 32


def _blocks(values: Tensor) -> Tensor:
    """[..., in] -> [..., blocks, BLOCK], zeros at the end."""
    missing = -values.shape[-1] % BLOCK
    padded: Tensor = functional.pad(values, (0, missing))
    return padded.reshape(*values.shape[:-1], -1, BLOCK)


def _whole(blocks: Tensor, like: Tensor) -> Tensor:
    return blocks.flatten(-2)[..., : like.shape[-1]]
