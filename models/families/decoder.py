"""The adapter of a decoder family: how tokens become queries, keys and values, and what follows attention.

Attention itself is the same for all families (models.decoder).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from offramp.models.families.family import Context

if TYPE_CHECKING:  # a slow import, needed for annotations only
    from transformers import PreTrainedConfig

# queries [batch, heads, seq, size], keys and values [batch, kv heads, seq, size]
Heads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class DecoderFamily:
    """The adapter of one family of decoders; `model` is an object that AutoModelForCausalLM loads.

    embed: (model, ids [batch, seq], positions [batch, seq]) -> hidden [batch, seq, hidden].
    blocks: model -> its blocks in order.
    context: (model, hidden, positions) -> tensors that every block reads, such as rotations.
    project: (block, hidden, context) -> queries, keys and values; the product of queries and keys is scaled.
    cache_fill: (block, hidden, context) -> the keys and values alone, for a token that skips the block.
    finish_block: (block, hidden, attended [batch, seq, heads * size]) -> hidden.
    norm: model -> the norm between the last block and the head.
    longest: configuration -> most tokens of prompt and answer together.
    """

    embed: Callable[[nn.Module, Tensor, Tensor], Tensor]
    blocks: Callable[[nn.Module], nn.ModuleList]
    context: Callable[[nn.Module, Tensor, Tensor], Context]
    project: Callable[[nn.Module, Tensor, Context], Heads]
    cache_fill: Callable[[nn.Module, Tensor, Context], tuple[Tensor, Tensor]]
    finish_block: Callable[[nn.Module, Tensor, Tensor], Tensor]
    norm: Callable[[nn.Module], nn.Module]
    longest: Callable[[PreTrainedConfig], int]
