"""DistilBERT: BERT's shape without token types, blocks under transformer.layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from offramp.models.families.family import Family


def _embed(backbone: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    hidden: Tensor = backbone.embeddings(input_ids=inputs["input_ids"])
    return hidden  # [batch, seq, hidden]


def _blocks(backbone: Any) -> nn.ModuleList:
    layers: nn.ModuleList = backbone.transformer.layer
    return layers


FAMILY = Family(inputs=("input_ids",), embed=_embed, blocks=_blocks)
