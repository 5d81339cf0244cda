"""What an adapter has to say about a family of decoders: how tokens become queries, keys and values, and what
happens to them behind attention. Attention itself is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from offramp.models.families.family import Context

Heads = tuple[
    Tensor, Tensor, Tensor
]  # queries [batch, heads, seq, size], keys and values [batch, kv heads, …]


@dataclass(frozen=True)
class DecoderFamily:
    """An adapter; model is what AutoModelForCausalLM gives.

    embed: (model, ids [batch, seq], positions [batch, seq]) -> hidden [batch, seq, hidden].
    blocks: model -> its blocks in order.
    context: (model, hidden, positions) -> what every block reads beside it, such as rotations.
    project: (block, hidden, context) -> queries, keys and values; the product of the first two is scaled.
    keep: the same without queries: what a token that goes past a block leaves there.
    finish: (block, hidden, attended [batch, seq, heads * size]) -> hidden.
    norm: model -> what stands between the last block and the head.
    longest: configuration -> most tokens of prompt and answer together.
    """

    embed: Callable[[Any, Tensor, Tensor], Tensor]
    blocks: Callable[[Any], nn.ModuleList]
    context: Callable[[Any, Tensor, Tensor], Context]
    project: Callable[[nn.Module, Tensor, Context], Heads]
    keep: Callable[[nn.Module, Tensor, Context], tuple[Tensor, Tensor]]
    finish: Callable[[nn.Module, Tensor, Tensor], Tensor]
    norm: Callable[[Any], nn.Module]
    longest: Callable[[Any], int]
