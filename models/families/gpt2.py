"""GPT-2: learned positions, LayerNorm, one projection for queries, keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor, nn

from offramp.models.families.decoder import Attention, DecoderFamily
from offramp.models.families.family import UnsupportedFamily, blocks_at, module_at

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Conv1D(Protocol):
    """The members of GPT-2's linear layer that the adapter reads; weight [in, out]."""

    weight: Tensor
    bias: Tensor


class SelfAttention(Protocol):
    """The members of a GPT-2 block's attention that the adapter reads; split_size is heads * head_dim."""

    head_dim: int
    split_size: int
    c_attn: Conv1D
    c_proj: Conv1D


class FeedForward(Protocol):
    """The members of a GPT-2 block's feed-forward part: two linear layers and the activation between them."""

    act: nn.Module
    c_fc: Conv1D
    c_proj: Conv1D


class Block(Protocol):
    """The members of a GPT-2 block that the adapter reads."""

    attn: SelfAttention
    mlp: FeedForward
    ln_1: nn.Module
    ln_2: nn.Module


def _embed(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    words = model.get_submodule("transformer.wte")
    hidden: Tensor = words(ids) + model.get_submodule("transformer.wpe")(positions)
    return hidden  # [batch, seq, hidden]


def _attention(block: nn.Module) -> Attention:
    attention = cast("Block", block).attn
    heads = attention.split_size // attention.head_dim
    return Attention(heads, heads, attention.head_dim, attention.head_dim**-0.5)


def _project(block: nn.Module, hidden: Tensor, what: str) -> Tensor:
    layer = cast("Block", block)
    joined = _linear(layer.attn.c_attn, layer.ln_1(hidden))  # one product computes all three
    return joined if what == "qkv" else joined[..., layer.attn.split_size :]


def _finish_block(block: nn.Module, hidden: Tensor, attended: Tensor) -> Tensor:
    layer = cast("Block", block)
    hidden = hidden + _linear(layer.attn.c_proj, attended)
    wide = layer.mlp.act(_linear(layer.mlp.c_fc, layer.ln_2(hidden)))
    return hidden + _linear(layer.mlp.c_proj, wide)  # [batch, seq, hidden]


def _linear(layer: Conv1D, values: Tensor) -> Tensor:
    """Apply a Conv1D layer as a plain matrix product.

    transformers' Conv1D flattens its input first, and no quantizer accepts the exported form.
    """
    return values @ layer.weight + layer.bias


def _longest(config: PreTrainedConfig) -> int:
    expected = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    for name, value in {**expected, "add_cross_attention": False}.items():
        if bool(getattr(config, name)) != value:
            raise UnsupportedFamily(
                f"config.json.{name}: {str(not value).lower()}; only GPT-2 with {str(value).lower()} is "
                "supported, and weights are trained for one of the two: give another model"
            )
    return int(config.n_positions)


GPT2 = DecoderFamily(
    embed=_embed,
    blocks=blocks_at("transformer.h"),
    attention=_attention,
    project=_project,
    finish_block=_finish_block,
    norm=module_at("transformer.ln_f"),
    longest=_longest,
)
