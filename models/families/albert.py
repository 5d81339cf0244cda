"""ALBERT and RemBERT: embeddings narrower than the hidden state; blocks of ALBERT share their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

from torch import Tensor, nn

from offramp.models.families.family import (
    Family,
    blocks_at,
    head_on_first,
    module_at,
    run_first_output,
)


class Encoder(Protocol):
    """The member of ALBERT's encoder that the adapter reads: the groups of layers."""

    albert_layer_groups: nn.ModuleList


class Config(Protocol):
    """The field of ALBERT's configuration that the adapter reads."""

    num_hidden_layers: int


class Group(Protocol):
    """The member of one of ALBERT's groups that the adapter reads: the layers that run one after another."""

    albert_layers: nn.ModuleList


_projection = module_at("encoder.embedding_hidden_mapping_in")


def _embed(backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    embeddings = backbone.get_submodule("embeddings")
    narrow = embeddings(input_ids=inputs["input_ids"], token_type_ids=inputs["token_type_ids"])
    hidden: Tensor = _projection(backbone)(narrow)
    return hidden  # [batch, seq, hidden]


def _blocks(backbone: nn.Module) -> nn.ModuleList:
    """The group of every block. Blocks of one group are one module, listed several times: its weights exist,
    are trained and are saved once.
    """
    groups = cast("Encoder", backbone.get_submodule("encoder")).albert_layer_groups
    count = cast("Config", backbone.config).num_hidden_layers
    return nn.ModuleList(groups[int(number / (count / len(groups)))] for number in range(count))


def _pair_macs(block: nn.Module, hidden_size: int) -> int:
    return 2 * hidden_size * len(cast("Group", block).albert_layers)


ALBERT = Family(
    inputs=("input_ids", "token_type_ids"),
    embed=_embed,
    blocks=_blocks,
    head=head_on_first("backbone.pooler", nn.Tanh(), "classifier"),
    projection=_projection,
    pair_macs=_pair_macs,
)
REMBERT = Family(
    inputs=("input_ids", "token_type_ids"),
    embed=_embed,
    blocks=blocks_at("encoder.layer"),
    run_block=run_first_output,
    head=head_on_first("backbone.pooler.dense", nn.Tanh(), "classifier"),
    projection=_projection,
)
