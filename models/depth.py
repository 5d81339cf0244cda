"""A decoder over whole texts at once, every token at a depth of its own: what training and measuring see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from offramp.models.decoder import DecoderNetwork

# (block, 0-based, hidden [batch, seq, hidden] that enters it) -> how much of the block each token takes
# [batch, seq] (1 runs it, 0 goes past it), or None where all run it
Decide = Callable[[int, Tensor], Tensor | None]


def hidden_states(network: DecoderNetwork, ids: Tensor, decide: Decide | None = None) -> Iterator[Tensor]:
    """Hidden [batch, seq, hidden] behind every block in turn, of ids [batch, seq] that are padded at the end.

    A token that goes past a block leaves keys and values there, made of the hidden state that passes by
    through the block's own norm and projections; so a token that leaves early is one that goes past all
    blocks behind its exit (the "propagated" cache). Everything is computed and then chosen from: this counts
    depth, it does not save time.
    """
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    family, hidden = network.family, network.family.embed(network.model, ids, positions)
    context = family.context(network.model, hidden, positions)
    for number, block in enumerate(network.blocks):
        share = None if decide is None else decide(number, hidden)
        queries, keys, values = family.project(block, hidden, context)
        attended = functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=1.0, enable_gqa=True
        )
        attended = attended.transpose(1, 2).flatten(2)  # [batch, seq, heads * size]
        behind = family.finish(block, hidden, attended)
        hidden = behind if share is None else torch.lerp(hidden, behind, share[..., None].to(hidden.dtype))
        yield hidden


def leaves_behind(depths: Tensor) -> Decide:
    """Tokens leave behind so many blocks: depths [batch, seq]."""

    def decide(block: int, hidden: Tensor) -> Tensor:
        return (depths > block).to(hidden.dtype)

    return decide


def goes_past(skipped: frozenset[int], first: int = 0) -> Decide:
    """Tokens from position `first` on go past these blocks (0-based); those before run all of them."""

    def decide(block: int, hidden: Tensor) -> Tensor | None:
        if block not in skipped:
            return None
        share = torch.zeros(hidden.shape[:2], device=hidden.device)
        share[:, :first] = 1
        return share

    return decide
