"""BERT and the text encoders built like it: ELECTRA, RoBERTa, DistilBERT, MPNet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from offramp.models.families.family import Context, Family, positions_after_padding


class PositionBias(Protocol):
    """The part of MPNet's encoder that computes the relative position bias."""

    def compute_position_bias(self, hidden: Tensor) -> Tensor:
        """The bias of every pair of positions; hidden [batch, seq, hidden] gives the sizes."""
        ...


def _embeddings(backbone: nn.Module) -> nn.Module:
    return backbone.get_submodule("embeddings")


def _blocks_at(path: str) -> Callable[[nn.Module], nn.ModuleList]:
    """A function from a backbone to its blocks, which are the ModuleList at `path`."""

    def blocks(backbone: nn.Module) -> nn.ModuleList:
        layers = backbone.get_submodule(path)
        assert isinstance(layers, nn.ModuleList)
        return layers

    return blocks


def _embed_ids(backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    hidden: Tensor = _embeddings(backbone)(input_ids=inputs["input_ids"])
    return hidden  # [batch, seq, hidden]


def _embed_typed(backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    hidden: Tensor = _embeddings(backbone)(
        input_ids=inputs["input_ids"], token_type_ids=inputs["token_type_ids"]
    )
    return hidden  # [batch, seq, hidden]


def _embed_electra(backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    hidden = _embed_typed(backbone, inputs)  # [batch, seq, embedding]
    # transformers has the projection only if embedding and hidden size differ.
    projection = getattr(backbone, "embeddings_project", None)
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


_encoder_blocks = _blocks_at("encoder.layer")

BERT = Family(inputs=("input_ids", "token_type_ids"), embed=_embed_typed, blocks=_encoder_blocks)
ELECTRA = Family(inputs=("input_ids", "token_type_ids"), embed=_embed_electra, blocks=_encoder_blocks)
ROBERTA = Family(
    inputs=("input_ids",), embed=_embed_roberta, blocks=_encoder_blocks, longest=positions_after_padding
)
DISTILBERT = Family(inputs=("input_ids",), embed=_embed_ids, blocks=_blocks_at("transformer.layer"))
MPNET = Family(
    inputs=("input_ids",),
    embed=_embed_ids,
    blocks=_encoder_blocks,
    context=_mpnet_context,
    run_block=_run_mpnet_block,
    longest=positions_after_padding,
)
