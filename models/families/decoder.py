"""The adapter of a decoder family: how tokens become queries, keys and values, and what follows attention.

Attention itself, and rotations by position, are the same for all families (models.decoder).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:  # a slow import, needed for annotations only
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Attention:
    """How a block attends: its heads, the scale of its scores, and what it may attend to.

    size: of a head. rotation: the name of the rotation of queries and keys (DecoderFamily.rotations), "" for
    none. window: a token attends to itself and to the window - 1 tokens before it; None: to all. softcap:
    scores are softcap * tanh(scores / softcap) before the mask is added; None: as they are.
    """

    heads: int
    kv_heads: int
    size: int
    scale: float
    rotation: str = ""
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Rotation:
    """Rotation of the first 2 * len(frequencies) numbers of a head, by position * frequency.

    The first half of them is rotated with the second half. frequencies float32 [n], radians a position;
    factor: of sine and cosine.
    """

    frequencies: Tensor
    factor: float = 1.0


def no_rotations(model: nn.Module) -> Mapping[str, Rotation]:
    """No rotations, for families that add a position to the embedding."""
    return {}


@dataclass(frozen=True)
class DecoderFamily:
    """The adapter of one family of decoders; `model` is an object that AutoModelForCausalLM loads.

    embed: (model, ids [batch, seq], positions [batch, seq]) -> hidden [batch, seq, hidden].
    blocks: model -> its blocks in order.
    attention: block -> how it attends.
    project: (block, hidden, what) -> queries, keys and values side by side [batch, seq, all heads * size],
    neither rotated nor scaled; what: "qkv", or "kv" for keys and values alone.
    finish_block: (block, hidden, attended [batch, seq, heads * size]) -> hidden.
    norm: model -> the norm between the last block and the head.
    longest: configuration -> most tokens of prompt and answer together.
    rotations: model -> the rotations that its blocks name.
    """

    embed: Callable[[nn.Module, Tensor, Tensor], Tensor]
    blocks: Callable[[nn.Module], nn.ModuleList]
    attention: Callable[[nn.Module], Attention]
    project: Callable[[nn.Module, Tensor, str], Tensor]
    finish_block: Callable[[nn.Module, Tensor, Tensor], Tensor]
    norm: Callable[[nn.Module], nn.Module]
    longest: Callable[[PreTrainedConfig], int]
    rotations: Callable[[nn.Module], Mapping[str, Rotation]] = no_rotations
