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
    """Rotations, with what every block would do done once: the scale of scores is in them, its root in
    queries and in keys, and the sign of the half that changes places with the other is in the sine.
    """
    cos, sin = model.model.rotary_emb(hidden, positions)
    first, second = sin.chunk(2, dim=-1)
    half = model.model.layers[0].self_attn.scaling ** 0.5
    cos, sin = cos * half, torch.cat([-first, second], dim=-1) * half
    return {"cosine": cos[:, None], "sine": sin[:, None]}  # [batch, 1, seq, size]


def _project(block: Any, hidden: Tensor, context: Context) -> Heads:
    attention = block.self_attn
    products = [attention.q_proj, attention.k_proj, attention.v_proj]
    queries, keys, values = _turned(attention, products, block.input_layernorm(hidden), context)
    return queries, keys, values


def _keep(block: Any, hidden: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    attention = block.self_attn
    products = [attention.k_proj, attention.v_proj]
    keys, values = _turned(attention, products, block.input_layernorm(hidden), context)
    return keys, values


def _turned(attention: Any, products: list[Any], normed: Tensor, context: Context) -> tuple[Tensor, ...]:
    """Heads [batch, heads, seq, size] of each product, the last one's as they are, the others' turned.

    They stand side by side while the same is done to them: half as many operators, and one product of all,
    which an export makes of products that stand so (export.rewrite).
    """
    parts = [product(normed) for product in products]
    *turning, kept = (part.shape[-1] // attention.head_dim for part in parts)
    rows, tokens, _ = normed.shape
    heads = torch.cat(parts, dim=-1).view(rows, tokens, -1, attention.head_dim).transpose(1, 2)
    heads, values = heads.split([sum(turning), kept], dim=1)
    if hasattr(attention, "q_norm"):
        norms = [attention.q_norm, attention.k_norm][-len(turning) :]
        pieces = heads.split(turning, dim=1)
        heads = torch.cat([norm(piece) for norm, piece in zip(norms, pieces, strict=True)], dim=1)
    first, second = heads.chunk(2, dim=-1)
    heads = heads * context["cosine"] + torch.cat([second, first], dim=-1) * context["sine"]
    return *heads.split(turning, dim=1), values


def _finish(block: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    hidden = hidden + block.self_attn.o_proj(attended)
    mlp, normed = block.mlp, block.post_attention_layernorm(hidden)
    gates, values = torch.cat([mlp.gate_proj(normed), mlp.up_proj(normed)], dim=-1).chunk(2, dim=-1)
    out: Tensor = hidden + mlp.down_proj(mlp.act_fn(gates) * values)
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


FAMILY = DecoderFamily(_embed, _blocks, _context, _project, _keep, _finish, _norm, _longest)
