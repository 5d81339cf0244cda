"""Multiply-accumulates of stem, blocks, exits and policies, counted over every token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from offramp.models.network import EarlyExitNetwork


@dataclass(frozen=True)
class Macs:
    """Cost of one row of n tokens: token * n + pair * n * n + row."""

    token: int = 0
    pair: int = 0
    row: int = 0

    def of(self, tokens: float) -> float:
        """Multiply-accumulates for a row of `tokens` tokens."""
        return self.token * tokens + self.pair * tokens * tokens + self.row

    def __add__(self, other: Macs) -> Macs:
        return Macs(self.token + other.token, self.pair + other.pair, self.row + other.row)


def linear_weights(module: nn.Module) -> int:
    """Weights of all linear layers: each costs one multiply-accumulate an application."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def stem_macs(network: EarlyExitNetwork) -> Macs:
    """The stem: look-ups are free; a projection of the embedding (ELECTRA) or of patches is not."""
    projection = getattr(network.backbone, "embeddings_project", None)
    vision = network.family.vision
    row = 0
    if vision is not None:  # a row has one length, and its first tokens come from no patch
        kernels = [m.weight.numel() for m in network.backbone.modules() if isinstance(m, nn.Conv2d)]
        row = (network.longest - vision.prefix) * sum(kernels)
    return Macs(token=linear_weights(projection) if projection is not None else 0, row=row)


def block_macs(network: EarlyExitNetwork, block: int) -> Macs:
    """One block (0-based): its linear layers once a token, and attention's two products, 2 * hidden a pair
    of tokens.
    """
    return Macs(token=linear_weights(network.blocks[block]), pair=2 * network.hidden_size)


def exit_macs(network: EarlyExitNetwork, exit_index: int) -> Macs:
    """One exit (0-based) with its policy and forecast: pooling once a token, everything else once a row."""
    row = linear_weights(network.exits[exit_index])
    if network.pooler is not None:
        row += linear_weights(network.pooler)
    if exit_index < len(network.policies):
        row += linear_weights(network.policies[exit_index])
    if exit_index < len(network.forecasts):
        row += linear_weights(network.forecasts[exit_index])
    return Macs(token=network.hidden_size if network.spec.pooling == "mean" else 0, row=row)


def segment_macs(network: EarlyExitNetwork) -> list[Macs]:
    """Cost of each stretch of blocks up to and including its exit, in exit order (the stem is not
    included).
    """
    costs, start = [], 0
    for index, end in enumerate(network.spec.exits):
        cost = exit_macs(network, index)
        for block in range(start, end):
            cost = cost + block_macs(network, block)
        costs.append(cost)
        start = end
    return costs
