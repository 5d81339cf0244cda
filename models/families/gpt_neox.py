"""GPT-NeoX (Pythia): part of each head is rotated; both parts of a block read the same input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import Tensor, nn

from offramp.models.families.decoder import Attention, DecoderFamily, Rotation, require_fixed_rotations
from offramp.models.families.family import blocks_at, module_at

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROTATION = "rotation"


class SelfAttention(Protocol):
    """The members of a block's attention that the adapter reads."""

    config: PreTrainedConfig
    head_size: int
    scaling: float
    query_key_value: nn.Linear
    dense: nn.Module


class Block(Protocol):
    """The members of a block that the adapter reads."""

    use_parallel_residual: bool
    attention: SelfAttention
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module


def _embed(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    hidden: Tensor = model.get_submodule("gpt_neox.embed_in")(ids)
    return hidden  # [batch, seq, hidden]


def _attention(block: nn.Module) -> Attention:
    attention = cast("Block", block).attention
    heads = int(attention.config.num_attention_heads)
    return Attention(heads, heads, attention.head_size, float(attention.scaling), ROTATION)


def _rotations(model: nn.Module) -> Mapping[str, Rotation]:
    module: Any = model.get_submodule("gpt_neox.rotary_emb")
    return {ROTATION: Rotation(module.inv_freq, float(module.attention_scaling))}


def _project(block: nn.Module, hidden: Tensor, what: str) -> Tensor:
    """Queries, keys and values side by side; the model's own projection has them head by head.

    The products are moved, not the weights: weights that a graph computes would not be quantized.
    """
    layer = cast("Block", block)
    joined, size = layer.attention.query_key_value, layer.attention.head_size
    by_head = joined(layer.input_layernorm(hidden)).unflatten(-1, (-1, 3, size))  # [..., heads, parts, size]
    heads: Tensor = by_head[..., "qkv".index(what[0]) :, :].transpose(-3, -2).flatten(-3)
    return heads


def _finish_block(block: nn.Module, hidden: Tensor, attended: Tensor) -> Tensor:
    layer = cast("Block", block)
    after = hidden + layer.attention.dense(attended)
    fed: Tensor = layer.mlp(layer.post_attention_layernorm(hidden if layer.use_parallel_residual else after))
    output: Tensor = after + fed
    return output  # [batch, seq, hidden]


def _longest(config: PreTrainedConfig) -> int:
    require_fixed_rotations(config)
    return int(config.max_position_embeddings)


GPT_NEOX = DecoderFamily(
    embed=_embed,
    blocks=blocks_at("gpt_neox.layers"),
    attention=_attention,
    project=_project,
    finish_block=_finish_block,
    norm=module_at("gpt_neox.final_layer_norm"),
    longest=_longest,
    rotations=_rotations,
)
