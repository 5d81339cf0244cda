"""RoBERTa: positions numbered from the padding id, no useful token types, encoder.layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offramp.models.families.family import Family, positions_after_padding


def _embed(backbone: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    input_ids = inputs["input_ids"]
    # Types are given, all zero: left out, transformers gathers them by position, which only adds operators.
    hidden: Tensor = backbone.embeddings(input_ids=input_ids, token_type_ids=torch.zeros_like(input_ids))
    return hidden  # [batch, seq, hidden]


def _blocks(backbone: Any) -> nn.ModuleList:
    layers: nn.ModuleList = backbone.encoder.layer
    return layers


FAMILY = Family(inputs=("input_ids",), embed=_embed, blocks=_blocks, longest=positions_after_padding)
