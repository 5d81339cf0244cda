"""The adapter of a decoder family: how tokens become queries, keys and values, and what follows attention.

Attention itself, and rotations by position, are the same for all families (models.decoder).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from offramp.models.families.family import UnsupportedFamily

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


ROTATIONS = ("default", "linear", "llama3", "proportional", "yarn")  # rope_type of fixed rotations


def require_fixed_rotations(config: PreTrainedConfig) -> None:
    """Raise UnsupportedFamily if rotations change with the text's length: keys in a cache cannot follow."""
    parameters = config.rope_parameters
    sets = [value for value in parameters.values() if isinstance(value, Mapping)] or [parameters]
    kinds = {str(entry.get("rope_type", "default")) for entry in sets}
    cures = {
        "dynamic": "up to max_position_embeddings tokens, the longest text of a bundle, 'default' rotates in "
        "the same way: set that",
        "longrope": f"give a model whose rotations are fixed ({', '.join(ROTATIONS)}), such as the one of a "
        "shorter context",
    }
    if changing := sorted(kinds & cures.keys()):
        raise UnsupportedFamily(
            f"config.json: rotations of type {changing[0]!r} (rope_type in rope_parameters or rope_scaling) "
            f"change with the length of the text, and keys in a cache cannot follow; {cures[changing[0]]}"
        )
    if others := sorted(kinds - set(ROTATIONS)):
        raise UnsupportedFamily(
            f"config.json: rotations of type {others[0]!r:.40} (rope_type in rope_parameters or "
            f"rope_scaling); supported are {', '.join(ROTATIONS)}"
        )


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
