"""BERT and the text encoders built like it: ELECTRA, RoBERTa and its kin, DistilBERT, MPNet, Megatron."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from offramp.models.families.family import (
    Context,
    Family,
    blocks_at,
    head_on_first,
    module_at,
    positions_after_padding,
    run_first_output,
)


class PositionBias(Protocol):
    """The part of MPNet's encoder that computes the relative position bias."""

    def compute_position_bias(self, hidden: Tensor) -> Tensor:
        """The bias of every pair of positions; hidden [batch, seq, hidden] gives the sizes."""
        ...


def _embeddings(backbone: nn.Module) -> nn.Module:
    return backbone.get_submodule("embeddings")


def _embed_ids(backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    hidden: Tensor = _embeddings(backbone)(input_ids=inputs["input_ids"])
    return hidden  # [batch, seq, hidden]


def _embed_typed(backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    hidden: Tensor = _embeddings(backbone)(
        input_ids=inputs["input_ids"], token_type_ids=inputs["token_type_ids"]
    )
    return hidden  # [batch, seq, hidden]


def _electra_projection(backbone: nn.Module) -> nn.Module | None:
    """The projection of embeddings, which exists only if embedding and hidden size differ."""
    return getattr(backbone, "embeddings_project", None)


def _embed_electra(backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    hidden, projection = _embed_typed(backbone, inputs), _electra_projection(backbone)
    return hidden if projection is None else projection(hidden)


def _embed_roberta(backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    ids = inputs["input_ids"]
    # Zero token types are passed: without them transformers gathers zeros by position, more operators.
    hidden: Tensor = _embeddings(backbone)(input_ids=ids, token_type_ids=torch.zeros_like(ids))
    return hidden  # [batch, seq, hidden]


def _mpnet_context(backbone: nn.Module, hidden: Tensor) -> Context:
    """One relative position bias, which every block adds to its attention scores."""
    encoder = cast("PositionBias", backbone.get_submodule("encoder"))
    # One row is enough: the bias depends on the length alone, and a graph that carries it per row would
    # copy heads * seq * seq numbers for each row at every compaction.
    return {"position_bias": encoder.compute_position_bias(hidden[:1])}  # [1, heads, seq, seq]


def _run_mpnet_block(block: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    output: Tensor = block(hidden, context["mask"], context["position_bias"])[0]
    return output  # [batch, seq, hidden]


_encoder_blocks = blocks_at("encoder.layer")
_roberta_head = head_on_first("classifier.dense", nn.Tanh(), "classifier.out_proj")

BERT = Family(
    inputs=("input_ids", "token_type_ids"),
    embed=_embed_typed,
    blocks=_encoder_blocks,
    head=head_on_first("backbone.pooler.dense", nn.Tanh(), "classifier"),
)
ELECTRA = Family(
    inputs=("input_ids", "token_type_ids"),
    embed=_embed_electra,
    blocks=_encoder_blocks,
    projection=_electra_projection,
    head=head_on_first("classifier.dense", nn.GELU(), "classifier.out_proj"),
)
ROBERTA = Family(
    inputs=("input_ids",),
    embed=_embed_roberta,
    blocks=_encoder_blocks,
    longest=positions_after_padding,
    head=_roberta_head,
)
# Pre-norm blocks, and a norm after the last one, which is kept at different places.
ROBERTA_PRENORM = replace(ROBERTA, exit_norm=module_at("LayerNorm"))
XLM_ROBERTA_XL = replace(ROBERTA, exit_norm=module_at("encoder.LayerNorm"))
MEGATRON = replace(BERT, run_block=run_first_output, exit_norm=module_at("encoder.ln"))
DISTILBERT = Family(
    inputs=("input_ids",),
    embed=_embed_ids,
    blocks=blocks_at("transformer.layer"),
    head=head_on_first("pre_classifier", nn.ReLU(), "classifier"),
)
MPNET = Family(
    inputs=("input_ids",),
    embed=_embed_ids,
    blocks=_encoder_blocks,
    context=_mpnet_context,
    run_block=_run_mpnet_block,
    longest=positions_after_padding,
    head=_roberta_head,
)
