"""Multiply-accumulates and bit operations of stem, blocks, exits and policies, counted over every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from offramp.models.network import EarlyExitNetwork
from offramp.models.precision import PRECISIONS


class MacTerms(Protocol):
    """Multiply-accumulates of a row of n tokens as terms: token * n + pair * n * n + row."""

    @property
    def token(self) -> int: ...
    @property
    def pair(self) -> int: ...
    @property
    def row(self) -> int: ...


@dataclass(frozen=True)
class RowMacs:
    """Multiply-accumulates of one row of n tokens: token * n + pair * n * n + row."""

    token: int = 0
    pair: int = 0
    row: int = 0

    def of(self, tokens: float) -> float:
        """Multiply-accumulates of a row of `tokens` tokens."""
        return self.token * tokens + self.pair * tokens * tokens + self.row

    def __add__(self, other: RowMacs) -> RowMacs:
        return RowMacs(self.token + other.token, self.pair + other.pair, self.row + other.row)


def linear_weights(module: nn.Module) -> int:
    """Weights of all linear layers: each costs one multiply-accumulate an application."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def stem_macs(network: EarlyExitNetwork) -> RowMacs:
    """The stem: look-ups are free; a projection of the embedding (ELECTRA) or of patches is not."""
    projection = getattr(network.backbone, "embeddings_project", None)
    vision = network.family.vision
    row = 0
    if vision is not None:  # all rows have one length, and the first tokens are not made from patches
        kernels = [m.weight.numel() for m in network.backbone.modules() if isinstance(m, nn.Conv2d)]
        row = (network.longest - vision.prefix) * sum(kernels)
    return RowMacs(token=linear_weights(projection) if projection is not None else 0, row=row)


def block_macs(network: EarlyExitNetwork, block: int) -> RowMacs:
    """One block (0-based): its linear layers once a token, and attention's two products, 2 * hidden for each
    pair of tokens.
    """
    return RowMacs(token=linear_weights(network.blocks[block]), pair=2 * network.hidden_size)


def exit_macs(network: EarlyExitNetwork, exit_index: int) -> RowMacs:
    """One exit (0-based) with its policy and forecast: pooling once a token, everything else once a row."""
    row = linear_weights(network.exits[exit_index])
    if network.pooler is not None:
        row += linear_weights(network.pooler)
    if exit_index < len(network.policies):
        row += linear_weights(network.policies[exit_index])
    if exit_index < len(network.forecasts):
        row += linear_weights(network.forecasts[exit_index])
    return RowMacs(token=network.hidden_size if network.spec.pooling == "mean" else 0, row=row)


def segment_macs(network: EarlyExitNetwork) -> list[RowMacs]:
    """Each segment with its exit, in order; the stem is not included."""
    costs, start = [], 0
    for index, end in enumerate(network.spec.exits):
        cost = exit_macs(network, index)
        for block in range(start, end):
            cost = cost + block_macs(network, block)
        costs.append(cost)
        start = end
    return costs


def bit_operations(macs: MacTerms, precision: str, tokens: float) -> float:
    """Bit operations (BOPs) of a segment for a row of `tokens` tokens: multiply-accumulates times the bits of
    both factors. KeyError for a name that is not in PRECISIONS.

    The term `token` (the linear layers of blocks) counts in the precision; attention's products, exits,
    policies and forecasts count at 32 bits. (Mean pooling is part of `token`: 0.02 % of a block.)
    """
    bits = PRECISIONS[precision]
    in_blocks = macs.token * tokens * bits.weight_bits * bits.activation_bits
    return in_blocks + (macs.pair * tokens**2 + macs.row) * 32 * 32
