"""ModernBERT, NomicBERT, EuroBERT and Jina's encoder: queries and keys are rotated by their positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from offramp.models.families.family import (
    Context,
    Family,
    HeadLayout,
    UnsupportedFamily,
    additive,
    all_positions,
    blocks_at,
    head_on_first,
    module_at,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LOCAL = "sliding_attention"  # transformers' name of attention within a window


class Block(Protocol):
    """A block that is given the mask and the rotations; attention_type exists in ModernBERT alone."""

    attention_type: str

    def __call__(
        self, hidden: Tensor, *, attention_mask: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> Tensor: ...


class Projection(Protocol):
    """The member of a linear layer that the adapter reads."""

    out_features: int


def _rotations(backbone: nn.Module, hidden: Tensor, *kind: str) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotations of all positions, each [1, seq, head size].

    kind: of attention, for a backbone that rotates each kind by other frequencies.
    """
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    cosine, sine = backbone.get_submodule("rotary_emb")(hidden, positions, *kind)
    return cosine, sine


def _context(backbone: nn.Module, hidden: Tensor) -> Context:
    cosine, sine = _rotations(backbone, hidden)
    return {"cosine": cosine, "sine": sine}


def _run_block(block: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    rotations = context["cosine"], context["sine"]
    return cast("Block", block)(hidden, attention_mask=context["mask"], position_embeddings=rotations)


def _modernbert_context(backbone: nn.Module, hidden: Tensor) -> Context:
    """The rotations of each kind of attention that a block has, and the window of local attention."""
    config = cast("PreTrainedModel", backbone).config
    context: Context = {}
    for kind in sorted(set(config.layer_types)):
        context[f"{kind}_cosine"], context[f"{kind}_sine"] = _rotations(backbone, hidden, kind)
    if LOCAL in config.layer_types:
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        distances = (positions[:, None] - positions[None, :]).abs()  # [seq, seq]
        near = (distances <= config.sliding_window).to(hidden.dtype)
        context[f"{LOCAL}_window"] = additive(near)[None, None]  # [1, 1, seq, seq]
    return context


def _run_modernbert_block(block: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    """Run a block with the rotations and the window, if any, of the block's own kind of attention."""
    layer, mask = cast("Block", block), context["mask"]
    kind = layer.attention_type
    window = context.get(f"{kind}_window")
    if window is not None:
        mask = torch.minimum(mask, window)  # [batch, 1, seq, seq]
    rotations = context[f"{kind}_cosine"], context[f"{kind}_sine"]
    return layer(hidden, attention_mask=mask, position_embeddings=rotations)


def _embed_modernbert(backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    hidden: Tensor = backbone.get_submodule("embeddings")(input_ids=inputs["input_ids"])
    return hidden  # [batch, seq, hidden]


def _embed_typed(backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    ids = inputs["input_ids"]
    types = inputs.get("token_type_ids")
    embeddings = backbone.get_submodule("embeddings")
    hidden: Tensor = embeddings(
        input_ids=ids, token_type_ids=torch.zeros_like(ids) if types is None else types
    )
    return hidden  # [batch, seq, hidden]


def _embed_jina(backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Embed ids; all tokens are of the one type that exists, whatever the caller's tokenizer says."""
    return _embed_typed(backbone, {"input_ids": inputs["input_ids"]})


def _embed_eurobert(backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    hidden: Tensor = backbone.get_submodule("embed_tokens")(inputs["input_ids"])
    return hidden  # [batch, seq, hidden]


def _longest(config: PreTrainedConfig) -> int:
    """The longest text in tokens; raises UnsupportedFamily if rotations change with the text's length."""
    for kind in _kinds_of_rotations(config.rope_parameters):
        if kind in ("dynamic", "longrope"):
            raise UnsupportedFamily(
                f"{config.model_type} with rotations of type {kind!r}: they change with the text's length; "
                "only fixed rotations are supported"
            )
    return all_positions(config)


def _kinds_of_rotations(parameters: Mapping[str, Any]) -> set[str]:
    """The types of rotations; a configuration has one set of parameters, or one a kind of attention."""
    sets = [value for value in parameters.values() if isinstance(value, Mapping)] or [parameters]
    return {str(entry.get("rope_type", "default")) for entry in sets}


def _pair_macs(block: nn.Module, hidden_size: int) -> int:
    """Two products of all heads, which together need not have the hidden size."""
    return 2 * cast("Projection", block.get_submodule("self_attn.q_proj")).out_features


def _modernbert_head(config: PreTrainedConfig) -> HeadLayout:
    from transformers.activations import ACT2FN

    reads = {"cls": "first", "mean": "mean"}[config.classifier_pooling]
    activation = ACT2FN[config.classifier_activation]
    return HeadLayout(reads, ("head.dense", activation, "head.norm", "classifier"))


def _modernbert_token_head(config: PreTrainedConfig) -> HeadLayout:
    return replace(_modernbert_head(config), reads="tokens")


def _eurobert_head(config: PreTrainedConfig) -> HeadLayout | None:
    """The head, or None with pooling "late": it classifies every token and averages their logits."""
    reads = {"bos": "first", "mean": "mean"}.get(config.classifier_pooling)
    return None if reads is None else HeadLayout(reads, ("dense", nn.GELU(), "classifier"))


_layers = blocks_at("layers")

MODERNBERT = Family(
    inputs=("input_ids",),
    embed=_embed_modernbert,
    blocks=_layers,
    context=_modernbert_context,
    run_block=_run_modernbert_block,
    longest=_longest,
    exit_norm=module_at("final_norm"),
    head=_modernbert_head,
    token_head=_modernbert_token_head,
)
NOMIC_BERT = Family(
    inputs=("input_ids", "token_type_ids"),
    embed=_embed_typed,
    blocks=_layers,
    context=_context,
    run_block=_run_block,
    longest=_longest,
    head=head_on_first("backbone.pooler.dense", nn.Tanh(), "classifier"),
    pair_macs=_pair_macs,
)
EUROBERT = Family(
    inputs=("input_ids",),
    embed=_embed_eurobert,
    blocks=_layers,
    context=_context,
    run_block=_run_block,
    longest=_longest,
    exit_norm=module_at("norm"),
    head=_eurobert_head,
    pair_macs=_pair_macs,
)
JINA = Family(
    inputs=("input_ids",),
    embed=_embed_jina,
    blocks=_layers,
    context=_context,
    run_block=_run_block,
    longest=_longest,
    head=head_on_first("classifier.dense", nn.Tanh(), "classifier.out_proj"),
    pair_macs=_pair_macs,
)
