"""Llama and the families that share its blocks: Mistral, Qwen2 (biases), Qwen3 (normed queries and keys)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from offramp.models.families.decoder import DecoderFamily, Heads
from offramp.models.families.family import Context, UnsupportedFamily

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Attention(Protocol):
    """The members of a Llama block's attention that the adapter reads; q_norm and k_norm exist in Qwen3
    alone.
    """

    head_dim: int
    scaling: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module


class FeedForward(Protocol):
    """The members of a Llama block's feed-forward part: gated linear layers."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module


class Block(Protocol):
    """The members of a Llama block that the adapter reads."""

    self_attn: Attention
    mlp: FeedForward
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module


def _embed(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    hidden: Tensor = model.get_submodule("model.embed_tokens")(ids)
    return hidden  # [batch, seq, hidden]


def _blocks(model: nn.Module) -> nn.ModuleList:
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    return layers


def _context(model: nn.Module, hidden: Tensor, positions: Tensor) -> Context:
    """The rotations of queries and keys, prepared once for all blocks.

    They contain the scale of the scores, as its square root for queries and for keys. The sine contains the
    sign of the half that is swapped with the other.
    """
    cos, sin = model.get_submodule("model.rotary_emb")(hidden, positions)
    first, second = sin.chunk(2, dim=-1)
    half = cast("Block", _blocks(model)[0]).self_attn.scaling ** 0.5
    cos, sin = cos * half, torch.cat([-first, second], dim=-1) * half
    return {"cosine": cos[:, None], "sine": sin[:, None]}  # [batch, 1, seq, size]


def _project(block: nn.Module, hidden: Tensor, context: Context) -> Heads:
    layer = cast("Block", block)
    attention = layer.self_attn
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    queries, keys, values = _rotated(attention, projections, layer.input_layernorm(hidden), context)
    return queries, keys, values


def _cache_fill(block: nn.Module, hidden: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    layer = cast("Block", block)
    attention = layer.self_attn
    projections = [attention.k_proj, attention.v_proj]
    keys, values = _rotated(attention, projections, layer.input_layernorm(hidden), context)
    return keys, values


def _rotated(
    attention: Attention, projections: Sequence[nn.Module], normed: Tensor, context: Context
) -> tuple[Tensor, ...]:
    """The heads [batch, heads, seq, size] of each projection; all but the last (the values) are rotated.

    They are computed side by side: that takes half as many operators, and an export can merge the projections
    into one product (export.rewrite).
    """
    parts = [projection(normed) for projection in projections]
    *rotated_heads, value_heads = (part.shape[-1] // attention.head_dim for part in parts)
    rows, tokens, _ = normed.shape
    heads = torch.cat(parts, dim=-1).view(rows, tokens, -1, attention.head_dim).transpose(1, 2)
    heads, values = heads.split([sum(rotated_heads), value_heads], dim=1)
    if hasattr(attention, "q_norm"):
        norms = [attention.q_norm, attention.k_norm][-len(rotated_heads) :]
        pieces = heads.split(rotated_heads, dim=1)
        heads = torch.cat([norm(piece) for norm, piece in zip(norms, pieces, strict=True)], dim=1)
    first, second = heads.chunk(2, dim=-1)
    heads = heads * context["cosine"] + torch.cat([second, first], dim=-1) * context["sine"]
    return *heads.split(rotated_heads, dim=1), values


def _finish_block(block: nn.Module, hidden: Tensor, attended: Tensor) -> Tensor:
    layer = cast("Block", block)
    hidden = hidden + layer.self_attn.o_proj(attended)
    mlp, normed = layer.mlp, layer.post_attention_layernorm(hidden)
    gates, values = torch.cat([mlp.gate_proj(normed), mlp.up_proj(normed)], dim=-1).chunk(2, dim=-1)
    output: Tensor = hidden + mlp.down_proj(mlp.act_fn(gates) * values)
    return output  # [batch, seq, hidden]


def _norm(model: nn.Module) -> nn.Module:
    return model.get_submodule("model.norm")


def _longest(config: PreTrainedConfig) -> int:
    """The longest text in tokens: all positions, or the sliding window, in which attention is complete."""
    if config.rope_parameters.get("rope_type", "default") in ("dynamic", "longrope"):
        raise UnsupportedFamily("rotations that change with the length of the text cannot be cached")
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    return min(int(config.max_position_embeddings), int(window))


FAMILY = DecoderFamily(_embed, _blocks, _context, _project, _cache_fill, _finish_block, _norm, _longest)
