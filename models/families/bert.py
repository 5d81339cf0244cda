"""BERT and ELECTRA: absolute positions, token types, encoder.layer; ELECTRA may project its embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from offramp.models.families.family import Family


def _embed(backbone: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    hidden: Tensor = backbone.embeddings(
        input_ids=inputs["input_ids"], token_type_ids=inputs["token_type_ids"]
    )
    return hidden  # [batch, seq, hidden]


def _embed_projected(backbone: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    hidden = _embed(backbone, inputs)  # [batch, seq, embedding]
    # transformers makes the projection only where embedding and hidden size differ.
    project = getattr(backbone, "embeddings_project", None)
    return hidden if project is None else project(hidden)


def _blocks(backbone: Any) -> nn.ModuleList:
    layers: nn.ModuleList = backbone.encoder.layer
    return layers


FAMILY = Family(inputs=("input_ids", "token_type_ids"), embed=_embed, blocks=_blocks)
ELECTRA = Family(inputs=("input_ids", "token_type_ids"), embed=_embed_projected, blocks=_blocks)
