"""What an adapter has to say about a family: its stem inputs, its embedding, its blocks, how a block is
called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Made once in the stem, read by every block: the additive mask and, for some families, a position bias.
Context = dict[str, Tensor]


class UnsupportedFamily(ValueError):
    """The configuration belongs to a family without an adapter."""


def no_context(backbone: nn.Module, hidden: Tensor) -> Context:
    """The blocks of most families need nothing beyond the additive mask."""
    return {}


def plain_block(block: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    """Call a block as block(hidden, additive mask), the signature that most encoder families share."""
    out = block(hidden, context["mask"])
    assert isinstance(out, Tensor)
    return out  # [batch, seq, hidden]


def all_positions(config: Any) -> int:
    """Longest input when position ids count from zero."""
    return int(config.max_position_embeddings)


def positions_after_padding(config: Any) -> int:
    """Longest input when position ids count from pad_token_id + 1 (RoBERTa and those that follow it)."""
    return int(config.max_position_embeddings) - int(config.pad_token_id) - 1


def bare(backbone: nn.Module) -> nn.Module | None:
    """Exits of most text families read what the block puts out: its own LayerNorm comes last."""
    return None


@dataclass(frozen=True)
class Vision:
    """What a family of images adds: all rows have the same number of tokens, and none of them is padding.

    prefix: tokens before the patches. shape: configuration -> channels, height, width of an image. patch:
    configuration -> height, width of a patch. resize: (backbone, size) -> makes the backbone one for square
    images of that size, a multiple of the patch.
    """

    prefix: int
    shape: Callable[[Any], tuple[int, int, int]]
    patch: Callable[[Any], tuple[int, int]]
    resize: Callable[[nn.Module, int], None]


@dataclass(frozen=True)
class Family:
    """An adapter.

    inputs: names of the stem's inputs besides attention_mask, which text has: integers [batch, seq] or, where
    there is `vision`, pixel_values [batch, channels, height, width].
    embed: (backbone, inputs) -> hidden [batch, seq, hidden].
    blocks: backbone -> its blocks in order.
    context: (backbone, hidden) -> tensors that every block reads, computed once.
    call: (block, hidden, context) -> hidden.
    longest: configuration -> most tokens that the position embedding can number; images: tokens of each.
    for_exit: backbone -> what is applied, token by token, before an exit pools a block's output; None:
    nothing.
    vision: what there is to say of images; None: the family reads text.
    """

    inputs: tuple[str, ...]
    embed: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
    blocks: Callable[[nn.Module], nn.ModuleList]
    context: Callable[[nn.Module, Tensor], Context] = no_context
    call: Callable[[nn.Module, Tensor, Context], Tensor] = plain_block
    longest: Callable[[Any], int] = all_positions
    for_exit: Callable[[nn.Module], nn.Module | None] = bare
    vision: Vision | None = None


def additive_mask(attention_mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Additive form of a 0/1 mask [batch, seq] -> [batch, 1, 1, seq]: 0 where a token stands, half the least
    finite number of float16 at padding.

    Far below any score, so that softmax gives exactly 0 there in float32 too; and still finite in float16, as
    is its sum with any score: a row of only -inf would make softmax NaN.
    """
    keep = attention_mask[:, None, None, :].to(dtype)  # [batch, 1, 1, seq]
    return (1.0 - keep) * (torch.finfo(torch.float16).min / 2)
