"""Llama and those that share its blocks: Mistral, Qwen2 (biases), Qwen3 (queries and keys are normed)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from offramp.models.families.decoder import DecoderFamily, Heads
from offramp.models.families.family import Context, UnsupportedFamily


def _embed(model: Any, ids: Tensor, positions: Tensor) -> Tensor:
    hidden: Tensor = model.model.embed_tokens(ids)
    return hidden  # [batch, seq, hidden]


def _blocks(model: Any) -> nn.ModuleList:
    layers: nn.ModuleList = model.model.layers
    return layers


def _context(model: Any, hidden: Tensor, positions: Tensor) -> Context:
    cos, sin = model.model.rotary_emb(hidden, positions)
    return {"cos": cos, "sin": sin}  # [batch, seq, size]


def _project(block: Any, hidden: Tensor, context: Context) -> Heads:
    attention = block.self_attn
    normed = block.input_layernorm(hidden)
    rows, tokens, _ = normed.shape
    queries, keys, values = (
        projection(normed).view(rows, tokens, -1, attention.head_dim)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    cos, sin = context["cos"][:, :, None], context["sin"][:, :, None]  # [batch, seq, 1, size]
    queries, keys = (one * cos + _turned(one) * sin for one in (queries * attention.scaling, keys))
    return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


def _turned(one: Tensor) -> Tensor:
    first, second = one.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _finish(block: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    hidden = hidden + block.self_attn.o_proj(attended)
    out: Tensor = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return out  # [batch, seq, hidden]


def _norm(model: Any) -> nn.Module:
    norm: nn.Module = model.model.norm
    return norm


def _longest(config: Any) -> int:
    """All positions, or a sliding window: within it, every block sees everything."""
    if config.rope_parameters.get("rope_type", "default") in ("dynamic", "longrope"):
        raise UnsupportedFamily("rotations that change with the length of the text cannot be cached")
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    return min(int(config.max_position_embeddings), int(window))


FAMILY = DecoderFamily(_embed, _blocks, _context, _project, _finish, _norm, _longest)
