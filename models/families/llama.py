"""Llama and the families with its parts: Mistral, Qwen2, Qwen3, SmolLM3, Phi-3, OLMo 2, Gemma 2 and 3 (text).

They differ in which norms a block has, in whether projections are joined, and in what a block attends to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from offramp.models.families.decoder import Attention, DecoderFamily, Rotation, require_fixed_rotations
from offramp.models.families.family import UnsupportedFamily, blocks_at, module_at

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROTATION = "rotation"  # the only one of most families; those with several name them by kinds of attention

KINDS = ("full_attention", "sliding_attention")  # of attention, by which a configuration names blocks


class SelfAttention(Protocol):
    """The members of a block's attention that the adapters read.

    q_norm and k_norm: Qwen3 and Gemma 3, a head at a time; OLMo 2, all heads together. qkv_proj: Phi-3, in
    place of q_proj, k_proj and v_proj. sliding_window, use_rope, attn_logit_softcapping: in some families.
    """

    config: PreTrainedConfig
    layer_idx: int
    head_dim: int
    scaling: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    qkv_proj: nn.Linear
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module


class FeedForward(Protocol):
    """The members of a block's feed-forward part: gated linear layers; gate_up_proj in Phi-3 alone."""

    gate_proj: nn.Module
    up_proj: nn.Module
    gate_up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module
    activation_fn: nn.Module


class Block(Protocol):
    """The members of a block that the adapters read; the last two exist in Gemma alone."""

    self_attn: SelfAttention
    mlp: FeedForward
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    post_feedforward_layernorm: nn.Module
    pre_feedforward_layernorm: nn.Module


def _embed(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    hidden: Tensor = model.get_submodule("model.embed_tokens")(ids)
    return hidden  # [batch, seq, hidden]


def _attention(block: nn.Module) -> Attention:
    attention = cast("Block", block).self_attn
    config, size = attention.config, attention.head_dim
    window = getattr(attention, "sliding_window", None)
    return Attention(
        int(config.num_attention_heads),
        int(config.num_key_value_heads),
        size,
        float(attention.scaling),
        ROTATION if getattr(attention, "use_rope", True) else "",
        None if window is None else int(window),
        getattr(attention, "attn_logit_softcapping", None),
    )


def _windowed_attention(block: nn.Module) -> Attention:
    """Of families whose blocks read the window from the configuration, all of them the same."""
    window = getattr(cast("Block", block).self_attn.config, "sliding_window", None)
    return replace(_attention(block), window=None if window is None else int(window))


def _gemma3_attention(block: nn.Module) -> Attention:
    """A rotation for each kind of attention; transformers does not apply attn_logit_softcapping here."""
    attention = cast("Block", block).self_attn
    kind = str(attention.config.layer_types[attention.layer_idx])
    return replace(_attention(block), rotation=kind, softcap=None)


def _rotations(model: nn.Module) -> Mapping[str, Rotation]:
    module: Any = model.get_submodule("model.rotary_emb")
    return {ROTATION: Rotation(module.inv_freq, float(module.attention_scaling))}


def _gemma3_rotations(model: nn.Module) -> Mapping[str, Rotation]:
    """A rotation for each kind of attention."""
    module: Any = model.get_submodule("model.rotary_emb")
    facts = {
        kind: (getattr(module, f"{kind}_inv_freq"), getattr(module, f"{kind}_attention_scaling"))
        for kind in module.layer_types
    }
    return {kind: Rotation(frequencies, float(factor)) for kind, (frequencies, factor) in facts.items()}


def _project(block: nn.Module, hidden: Tensor, what: str) -> Tensor:
    layer = cast("Block", block)
    return _projected(layer.self_attn, layer.input_layernorm(hidden), what)


def _projected(attention: SelfAttention, hidden: Tensor, what: str) -> Tensor:
    """Queries, keys and values side by side: an export merges the projections into one product."""
    projections = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj}
    return torch.cat([projections[part](hidden) for part in what], dim=-1)


def _project_normed_heads(block: nn.Module, hidden: Tensor, what: str) -> Tensor:
    """The projections of a family that norms every head of queries and keys."""
    layer = cast("Block", block)
    attention = layer.self_attn
    parts = _projected(attention, layer.input_layernorm(hidden), what)
    heads = parts.unflatten(-1, (-1, attention.head_dim))  # [batch, seq, all heads, size]
    form = _attention(block)
    counts = {"q": form.heads, "k": form.kv_heads, "v": form.kv_heads}
    norms = {"q": attention.q_norm, "k": attention.k_norm}
    pieces = heads.split([counts[part] for part in what], dim=2)
    normed = [
        norms[part](piece) if part in norms else piece for part, piece in zip(what, pieces, strict=True)
    ]
    return torch.cat(normed, dim=2).flatten(2)


def _project_phi3(block: nn.Module, hidden: Tensor, what: str) -> Tensor:
    """Queries, keys and values by the model's own joined projection, of which a part may be left out.

    Products are left out, not weights: a part of a weight would not be quantized.
    """
    layer = cast("Block", block)
    attention = layer.self_attn
    joined: Tensor = attention.qkv_proj(layer.input_layernorm(hidden))
    queries = int(attention.config.num_attention_heads) * attention.head_dim
    return joined if what == "qkv" else joined[..., queries:]


def _project_olmo2(block: nn.Module, hidden: Tensor, what: str) -> Tensor:
    attention = cast("Block", block).self_attn
    parts = {
        "q": lambda: attention.q_norm(attention.q_proj(hidden)),
        "k": lambda: attention.k_norm(attention.k_proj(hidden)),
        "v": lambda: attention.v_proj(hidden),
    }
    return torch.cat([parts[part]() for part in what], dim=-1)


def _finish_block(block: nn.Module, hidden: Tensor, attended: Tensor) -> Tensor:
    layer = cast("Block", block)
    hidden = hidden + layer.self_attn.o_proj(attended)
    return hidden + _fed_forward(layer.mlp, layer.post_attention_layernorm(hidden))  # [batch, seq, hidden]


def _fed_forward(mlp: FeedForward, normed: Tensor) -> Tensor:
    gates, values = torch.cat([mlp.gate_proj(normed), mlp.up_proj(normed)], dim=-1).chunk(2, dim=-1)
    output: Tensor = mlp.down_proj(mlp.act_fn(gates) * values)
    return output


def _finish_phi3_block(block: nn.Module, hidden: Tensor, attended: Tensor) -> Tensor:
    layer = cast("Block", block)
    mlp, hidden = layer.mlp, hidden + layer.self_attn.o_proj(attended)
    gates, values = mlp.gate_up_proj(layer.post_attention_layernorm(hidden)).chunk(2, dim=-1)
    output: Tensor = hidden + mlp.down_proj(mlp.activation_fn(gates) * values)
    return output


def _finish_olmo2_block(block: nn.Module, hidden: Tensor, attended: Tensor) -> Tensor:
    """The rest of a block whose norms follow attention and feed-forward part."""
    layer = cast("Block", block)
    hidden = hidden + layer.post_attention_layernorm(layer.self_attn.o_proj(attended))
    output: Tensor = hidden + layer.post_feedforward_layernorm(_fed_forward(layer.mlp, hidden))
    return output


def _finish_gemma_block(block: nn.Module, hidden: Tensor, attended: Tensor) -> Tensor:
    """The rest of a block with norms before and after each part."""
    layer = cast("Block", block)
    hidden = hidden + layer.post_attention_layernorm(layer.self_attn.o_proj(attended))
    fed = _fed_forward(layer.mlp, layer.pre_feedforward_layernorm(hidden))
    output: Tensor = hidden + layer.post_feedforward_layernorm(fed)
    return output


def _longest(config: PreTrainedConfig) -> int:
    """The longest text in tokens; raises UnsupportedFamily if keys and values cannot be cached."""
    require_fixed_rotations(config)
    if others := sorted({*(getattr(config, "layer_types", None) or ())} - set(KINDS)):
        raise UnsupportedFamily(
            f"config.json.layer_types: {others[0]!r:.40}; supported are {' and '.join(KINDS)}"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedFamily(
            "config.json.use_bidirectional_attention: tokens attend to later ones, as in a model of "
            "embeddings, which generates no text; give the language model that it was made from"
        )
    return int(config.max_position_embeddings)


LLAMA = DecoderFamily(
    embed=_embed,
    blocks=blocks_at("model.layers"),
    attention=_attention,
    project=_project,
    finish_block=_finish_block,
    norm=module_at("model.norm"),
    longest=_longest,
    rotations=_rotations,
)
MISTRAL = replace(LLAMA, attention=_windowed_attention)
QWEN3 = replace(LLAMA, project=_project_normed_heads)
PHI3 = replace(LLAMA, attention=_windowed_attention, project=_project_phi3, finish_block=_finish_phi3_block)
OLMO2 = replace(LLAMA, project=_project_olmo2, finish_block=_finish_olmo2_block)
GEMMA2 = replace(LLAMA, finish_block=_finish_gemma_block)
GEMMA3 = replace(
    LLAMA,
    attention=_gemma3_attention,
    project=_project_normed_heads,
    finish_block=_finish_gemma_block,
    rotations=_gemma3_rotations,
)
