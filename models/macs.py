"""Multiply-accumulates and bit operations of stem, blocks, exits and policies, counted over every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from offramp.models.families.family import linear_weights
from offramp.models.network import EarlyExitNetwork
from offramp.models.own_head import OwnHead
from offramp.models.precision import PRECISIONS


class MacTerms(Protocol):
    """The terms of a row's multiply-accumulates: token * n + pair * n * n + row for n tokens."""

    @property
    def token(self) -> int:
        """Multiply-accumulates for each token."""
        ...

    @property
    def pair(self) -> int:
        """Multiply-accumulates for each pair of tokens."""
        ...

    @property
    def row(self) -> int:
        """Multiply-accumulates for each row, whatever its length."""
        ...


@dataclass(frozen=True)
class RowMacs:
    """The multiply-accumulates of one row as terms: token * n + pair * n * n + row for n tokens."""

    token: int = 0
    pair: int = 0
    row: int = 0

    def of(self, tokens: float) -> float:
        """The multiply-accumulates of a row of this number of tokens."""
        return self.token * tokens + self.pair * tokens * tokens + self.row

    def __add__(self, other: RowMacs) -> RowMacs:
        return RowMacs(self.token + other.token, self.pair + other.pair, self.row + other.row)


def stem_macs(network: EarlyExitNetwork) -> RowMacs:
    """The multiply-accumulates of the stem: look-ups cost none, projections of embeddings or patches do."""
    projection = network.family.projection(network.backbone)
    vision = network.family.vision
    row = 0
    if vision is not None:  # all rows have one length, and the first tokens are no patches
        kernels = [m.weight.numel() for m in network.backbone.modules() if isinstance(m, nn.Conv2d)]
        row = (network.longest - vision.prefix(network.config)) * sum(kernels)
    return RowMacs(token=linear_weights(projection) if projection is not None else 0, row=row)


def block_macs(network: EarlyExitNetwork, block: int) -> RowMacs:
    """The multiply-accumulates of one block (0-based).

    In most families its linear layers count once a token, attention's two products 2 * hidden for each pair
    of tokens.
    """
    family, module = network.family, network.blocks[block]
    return RowMacs(token=family.token_macs(module), pair=family.pair_macs(module, network.hidden_size))


def exit_macs(network: EarlyExitNetwork, exit_index: int) -> RowMacs:
    """The multiply-accumulates of one exit (0-based) with its policy and forecast.

    Pooling counts once a token, all other parts once a row, or once a token where the exit reads each.
    """
    exit = network.exits[exit_index]
    row, token = linear_weights(exit), 0
    if network.task.per_token:
        return RowMacs(token=row)
    if isinstance(exit, OwnHead):
        return RowMacs(token=0 if exit.own_pool.reads == "first" else network.hidden_size, row=row)
    if network.spec.pooling == "mean":
        token = network.hidden_size
    elif exit.attention is not None:
        query = linear_weights(exit.attention)  # type: ignore[arg-type]
        token, row = query + network.hidden_size, row - query
    if network.pooler is not None:
        row += linear_weights(network.pooler)
    if exit_index < len(network.policies):
        row += linear_weights(network.policies[exit_index])
    if exit_index < len(network.forecasts):
        row += linear_weights(network.forecasts[exit_index])
    return RowMacs(token=token, row=row)


def segment_macs(network: EarlyExitNetwork) -> list[RowMacs]:
    """The multiply-accumulates of each segment with its exit, in order; the stem is not included."""
    costs, start = [], 0
    for index, end in enumerate(network.spec.exits):
        cost = exit_macs(network, index)
        for block in range(start, end):
            cost = cost + block_macs(network, block)
        costs.append(cost)
        start = end
    return costs


def bit_operations(macs: MacTerms, precision: str, tokens: float) -> float:
    """The bit operations (BOPs) of a segment for a row of `tokens` tokens in a precision.

    They are multiply-accumulates times the bits of both factors. KeyError for a name that is not in
    PRECISIONS. The term `token` (the linear layers of blocks) counts in the precision; attention's products,
    exits, policies and forecasts count at 32 bits. (Pooling is part of `token`: 0.02 % of a block for the
    mean, 0.04 % for attention.)
    """
    bits = PRECISIONS[precision]
    in_blocks = macs.token * tokens * bits.weight_bits * bits.activation_bits
    return in_blocks + (macs.pair * tokens**2 + macs.row) * 32 * 32


__all__ = [
    "MacTerms",
    "RowMacs",
    "bit_operations",
    "block_macs",
    "exit_macs",
    "linear_weights",
    "segment_macs",
    "stem_macs",
]
