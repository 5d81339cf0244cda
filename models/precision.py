"""Precisions: the bits of each, and a simulation in float32 of blocks that compute in it.

int8 and int4 are what the graphs of these variants compute (export/int8.py; MatMulNBits at accuracy level
4). int6 is int8's arithmetic with fewer levels; no engine here runs it, it is for experiments with a lossy
precision.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

BLOCK = 128  # numbers that share a scale in int4


def quantize_vectors(values: Tensor, bits: int) -> Tensor:
    """Round vectors [..., in] to a symmetric grid of `bits` bits, with one scale for each vector.

    A vector is the weights of one output, or the activations of one token.
    """
    levels = 2 ** (bits - 1) - 1
    scale: Tensor = values.abs().amax(-1, keepdim=True).clamp(min=1e-12) / levels
    rounded: Tensor = (values / scale).round() * scale
    return rounded


def quantize_weight_blocks(weight: Tensor) -> Tensor:
    """Round a weight [out, in] to 4 bits: BLOCK neighbours share a scale that maps the largest to -8."""
    blocks = _in_blocks(weight)
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = torch.where(extreme == 0, torch.ones_like(extreme), extreme / -8)
    return _joined((blocks / scale).round().clamp(-8, 7) * scale, weight)


def quantize_activation_blocks(values: Tensor) -> Tensor:
    """Round activations [..., in] to 8 bits on a symmetric grid; BLOCK neighbours share a scale."""
    blocks = _in_blocks(values)
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return _joined((blocks / scale).round() * scale, values)


@dataclass(frozen=True)
class NumberFormat:
    """The bits of weights and activations in blocks, and the functions that round them (None: unchanged)."""

    weight_bits: int = 32
    activation_bits: int = 32
    weight: Callable[[Tensor], Tensor] | None = None
    activation: Callable[[Tensor], Tensor] | None = None


PRECISIONS: Mapping[str, NumberFormat] = {
    "fp32": NumberFormat(),
    "int8": NumberFormat(8, 8, partial(quantize_vectors, bits=8), partial(quantize_vectors, bits=8)),
    "int6": NumberFormat(6, 6, partial(quantize_vectors, bits=6), partial(quantize_vectors, bits=6)),
    "int4": NumberFormat(4, 8, quantize_weight_blocks, quantize_activation_blocks),
}


class QuantizedLinear(nn.Module):
    """A linear layer with a rounded weight that rounds its input at every call."""

    @torch.no_grad()
    def __init__(self, linear: nn.Linear, number_format: NumberFormat) -> None:
        super().__init__()
        assert number_format.weight is not None and number_format.activation is not None
        self.activation = number_format.activation
        self.bias = linear.bias
        self.weight = nn.Parameter(number_format.weight(linear.weight), requires_grad=False)

    def forward(self, values: Tensor) -> Tensor:
        """Round the input [..., in] and apply the layer; gives [..., out]."""
        return functional.linear(self.activation(values), self.weight, self.bias)


def in_precision(blocks: nn.ModuleList, name: str) -> nn.ModuleList:
    """The blocks as they compute in a precision, simulated: copies with quantized linear layers.

    In fp32 they are the same blocks.
    Attention's own products, softmax and norms stay in float32, as in the exported variants. KeyError for a
    name that is not in PRECISIONS.
    """
    number_format = PRECISIONS[name]
    if number_format.weight is None:
        return blocks
    copies = copy.deepcopy(blocks)
    for module in list(copies.modules()):
        for child, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, child, QuantizedLinear(layer, number_format))
    return copies


def _in_blocks(values: Tensor) -> Tensor:
    """The values [..., in] divided into blocks [..., blocks, BLOCK], with zeros at the end."""
    missing = -values.shape[-1] % BLOCK
    padded: Tensor = functional.pad(values, (0, missing))
    return padded.reshape(*values.shape[:-1], -1, BLOCK)


def _joined(blocks: Tensor, like: Tensor) -> Tensor:
    """The blocks [..., blocks, BLOCK] joined to the shape [..., in] of `like`, without the padding."""
    return blocks.flatten(-2)[..., : like.shape[-1]]
