"""MPNet: one relative position bias, computed once, that every block adds to its attention scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from offramp.models.families.family import Context, Family, positions_after_padding


def _embed(backbone: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    hidden: Tensor = backbone.embeddings(input_ids=inputs["input_ids"])
    return hidden  # [batch, seq, hidden]


def _blocks(backbone: Any) -> nn.ModuleList:
    layers: nn.ModuleList = backbone.encoder.layer
    return layers


def _context(backbone: Any, hidden: Tensor) -> Context:
    # One row is enough: the bias depends on the length alone, and a graph that carries it per row would
    # copy heads * seq * seq numbers for each row at every compaction.
    return {"position_bias": backbone.encoder.compute_position_bias(hidden[:1])}  # [1, heads, seq, seq]


def _call(block: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    out: Tensor = block(hidden, context["mask"], context["position_bias"])[0]
    return out  # [batch, seq, hidden]


FAMILY = Family(
    inputs=("input_ids",),
    embed=_embed,
    blocks=_blocks,
    context=_context,
    call=_call,
    longest=positions_after_padding,
)
