"""GPT-2: learned positions, LayerNorm, one projection for queries, keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from offramp.models.families.decoder import DecoderFamily, Heads
from offramp.models.families.family import Context, UnsupportedFamily


def _embed(model: Any, ids: Tensor, positions: Tensor) -> Tensor:
    hidden: Tensor = model.transformer.wte(ids) + model.transformer.wpe(positions)
    return hidden  # [batch, seq, hidden]


def _blocks(model: Any) -> nn.ModuleList:
    layers: nn.ModuleList = model.transformer.h
    return layers


def _context(model: Any, hidden: Tensor, positions: Tensor) -> Context:
    return {}


def _project(block: Any, hidden: Tensor, context: Context) -> Heads:
    attention = block.attn
    rows, tokens, _ = hidden.shape
    parts = _linear(attention.c_attn, block.ln_1(hidden)).split(attention.split_size, dim=2)
    queries, keys, values = (
        part.view(rows, tokens, -1, attention.head_dim).transpose(1, 2) for part in parts
    )
    return queries * attention.head_dim**-0.5, keys, values


def _keep(block: Any, hidden: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    _, keys, values = _project(block, hidden, context)  # one product makes all three
    return keys, values


def _finish(block: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    hidden = hidden + _linear(block.attn.c_proj, attended)
    wide = block.mlp.act(_linear(block.mlp.c_fc, block.ln_2(hidden)))
    return hidden + _linear(block.mlp.c_proj, wide)  # [batch, seq, hidden]


def _linear(layer: Any, values: Tensor) -> Tensor:
    """As a plain product: transformers' Conv1D flattens its input first, which exports as what no quantizer
    takes.
    """
    out: Tensor = values @ layer.weight + layer.bias
    return out


def _norm(model: Any) -> nn.Module:
    norm: nn.Module = model.transformer.ln_f
    return norm


def _longest(config: Any) -> int:
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights or config.add_cross_attention:
        raise UnsupportedFamily("GPT-2 with scores scaled otherwise, or with attention to another network")
    return int(config.n_positions)


FAMILY = DecoderFamily(_embed, _blocks, _context, _project, _keep, _finish, _norm, _longest)
