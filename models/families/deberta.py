"""DeBERTa and DeBERTa-v2 (v3 has the same model): attention also reads the distance of two tokens.

A score is the sum of three products: content with content, content with distance ("c2p"), and distance with
content ("p2c"). The attention is written out here, because that of transformers computes keys and queries of
all distances at every call. They depend on weights alone: in an exported graph they are constants, of which a
text of n tokens reads 2 * n rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.models.families.family import (
    Context,
    Family,
    HeadLayout,
    UnsupportedFamily,
    linear_weights,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Attention(Protocol):
    """The members of the two attention modules that the adapter reads.

    in_proj, q_bias, v_bias, pos_proj and pos_q_proj exist in DeBERTa alone, the other projections and
    share_att_key in DeBERTa-v2. Projections of distances exist for the products in pos_att_type.
    """

    num_attention_heads: int
    pos_att_type: list[str]
    relative_attention: bool
    pos_dropout: nn.Module
    dropout: nn.Module
    in_proj: nn.Module
    q_bias: Tensor
    v_bias: Tensor
    pos_proj: nn.Module
    pos_q_proj: nn.Module
    query_proj: nn.Module
    key_proj: nn.Module
    value_proj: nn.Module
    share_att_key: bool
    pos_key_proj: nn.Module
    pos_query_proj: nn.Module


class Convolution(Protocol):
    """The members of the convolution beside the first block, which some DeBERTa-v2 have."""

    conv: nn.Conv1d
    conv_act: str
    dropout: nn.Module
    LayerNorm: nn.Module


class Encoder(Protocol):
    """The members of the encoder; norm_rel_ebd, LayerNorm and conv exist in DeBERTa-v2 alone."""

    layer: nn.ModuleList
    relative_attention: bool
    rel_embeddings: nn.Embedding
    norm_rel_ebd: list[str]
    LayerNorm: nn.Module
    conv: nn.Module | None


class Heads(NamedTuple):
    """Queries, keys and values, each [batch, heads, seq, head size]."""

    queries: Tensor
    keys: Tensor
    values: Tensor


class Distances(NamedTuple):
    """Keys and queries of all distances, each [distances, hidden]; None if attention does not read them.

    Queries are multiplied with the factor of all scores already, see _scale.
    """

    keys: Tensor | None
    queries: Tensor | None


class ProjectedDistances(nn.Module):
    """The distances of one block, projected from the embeddings that all blocks share at every call."""

    def __init__(
        self, encoder: Encoder, attention: nn.Module, project: Callable[[Attention, Tensor], Distances]
    ) -> None:
        super().__init__()
        self.attention, self.project = attention, project
        self.embeddings = encoder.rel_embeddings
        self.norm = encoder.LayerNorm if "layer_norm" in getattr(encoder, "norm_rel_ebd", []) else None

    def forward(self) -> Distances:
        """Compute keys and queries of all distances, from the most negative distance on."""
        embedded = self.embeddings.weight if self.norm is None else self.norm(self.embeddings.weight)
        attention = cast("Attention", self.attention)
        return self.project(attention, attention.pos_dropout(embedded))


class ConstantDistances(nn.Module):
    """The distances of one block as constants, the form for an exported graph."""

    keys: Tensor | None
    queries: Tensor | None

    def __init__(self, distances: Distances) -> None:
        super().__init__()
        self.register_buffer("keys", distances.keys)
        self.register_buffer("queries", distances.queries)

    def forward(self) -> Distances:
        """The keys and queries of all distances."""
        return Distances(self.keys, self.queries)


class DebertaBlock(nn.Module):
    """A block with what it reads beyond its layer: distances, and the convolution beside the first block."""

    def __init__(self, layer: nn.Module, distances: nn.Module | None, convolution: nn.Module | None) -> None:
        super().__init__()
        self.layer, self.distances, self.convolution = layer, distances, convolution

    @property
    def attention(self) -> Attention:
        """The attention module of transformers."""
        return cast("Attention", self.layer.get_submodule("attention.self"))

    @torch.no_grad()
    def folded(self) -> DebertaBlock:
        """This block in evaluation mode with its distances as constants, the form for an exported graph."""
        distances = None if self.distances is None else ConstantDistances(self.distances.eval()())
        return DebertaBlock(self.layer, distances, self.convolution)


def _encoder(backbone: nn.Module) -> Encoder:
    return cast("Encoder", backbone.get_submodule("encoder"))


def _projection(backbone: nn.Module) -> nn.Module | None:
    return getattr(backbone.get_submodule("embeddings"), "embed_proj", None)


def _embed(backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    ids = inputs["input_ids"]
    # Few models have token types, and all texts get the first one.
    hidden: Tensor = backbone.get_submodule("embeddings")(
        input_ids=ids, token_type_ids=torch.zeros_like(ids), mask=inputs["attention_mask"]
    )
    return hidden  # [batch, seq, hidden]; zeros at padding, so that the convolution reads none


def _blocks(project: Callable[[Attention, Tensor], Distances], backbone: nn.Module) -> nn.ModuleList:
    config, encoder = cast("PreTrainedModel", backbone).config, _encoder(backbone)
    if getattr(config, "talking_head", False):
        raise UnsupportedFamily(f"{config.model_type} with talking_head has no adapter; train without it")
    blocks = nn.ModuleList()
    for number, layer in enumerate(encoder.layer):
        attention = layer.get_submodule("attention.self")
        distances = ProjectedDistances(encoder, attention, project) if encoder.relative_attention else None
        convolution = getattr(encoder, "conv", None) if number == 0 else None
        blocks.append(DebertaBlock(layer, distances, convolution))
    return blocks


def _context(backbone: nn.Module, hidden: Tensor) -> Context:
    """Which distance a pair of tokens has, computed once for all blocks.

    A block gathers key_rows [2, seq] of the keys of distances, in order: row seq + d is that of distance d,
    from -seq to seq - 1; and query_rows [2, seq] of the queries, in the opposite order. relative_index [1, 1,
    seq, seq] is seq + i - j for tokens i and j: the row of keys for distance i - j and the row of queries for
    distance j - i.
    """
    encoder, config = _encoder(backbone), cast("PreTrainedModel", backbone).config
    if not encoder.relative_attention:
        return {}
    tokens = hidden.shape[1]
    positions = torch.arange(tokens, device=hidden.device)
    distances = torch.stack([positions - tokens, positions])  # [2, seq]: -seq to seq - 1
    rows = torch.tensor(_rows(encoder.rel_embeddings.num_embeddings, *_buckets(config)), device=hidden.device)
    middle = config.max_position_embeddings  # rows has entries for distances -middle to middle
    return {
        "key_rows": rows[middle + distances],
        "query_rows": rows[middle - distances],
        "relative_index": (tokens + positions[:, None] - positions[None, :])[None, None],
    }


def _buckets(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Buckets of distances (0: every distance has its own), the largest distance, and the longest text."""
    farthest = getattr(config, "max_relative_positions", -1)
    longest = int(config.max_position_embeddings)
    return max(getattr(config, "position_buckets", -1), 0), farthest if farthest > 0 else longest, longest


@lru_cache
def _rows(embeddings: int, buckets: int, farthest: int, longest: int) -> list[int]:
    """The row of each distance -longest to longest among this many embeddings of distances.

    With buckets, distances above half of them share rows, in steps that grow with the distance. Python
    computes it and not the graph, whose logarithm may round to another bucket.
    """
    half, rows = buckets // 2, []
    for distance in range(-longest, longest + 1):
        bucket = distance
        if buckets and abs(distance) > half:
            steps = math.log(abs(distance) / half) / math.log((farthest - 1) / half) * (half - 1)
            bucket = int(math.copysign(half + math.ceil(steps), distance))
        rows.append(min(max(embeddings // 2 + bucket, 0), embeddings - 1))
    return rows


def _heads(attention: Attention, hidden: Tensor) -> Heads:
    """Queries, keys and values of DeBERTa, whose one projection has them side by side for each head."""
    rows, tokens, _ = hidden.shape
    count = attention.num_attention_heads
    joined = attention.in_proj(hidden).view(rows, tokens, count, -1).transpose(1, 2)
    queries, keys, values = joined.chunk(3, dim=-1)
    q_bias, v_bias = (bias.view(count, 1, -1) for bias in (attention.q_bias, attention.v_bias))
    return Heads(queries + q_bias, keys, values + v_bias)


def _heads_v2(attention: Attention, hidden: Tensor) -> Heads:
    rows, tokens, _ = hidden.shape
    projections = attention.query_proj, attention.key_proj, attention.value_proj
    shape = (rows, tokens, attention.num_attention_heads, -1)
    return Heads(*(projection(hidden).view(shape).transpose(1, 2) for projection in projections))


def _scale(attention: Attention, hidden_size: int) -> float:
    """The factor of all scores: a score is a sum of up to three products of heads."""
    return 1 / math.sqrt(hidden_size / attention.num_attention_heads * (1 + len(attention.pos_att_type)))


def _project(attention: Attention, embedded: Tensor) -> Distances:
    kinds = attention.pos_att_type
    keys = attention.pos_proj(embedded) if "c2p" in kinds else None
    queries = attention.pos_q_proj(embedded) if "p2c" in kinds else None
    return _scaled(attention, keys, queries)


def _project_v2(attention: Attention, embedded: Tensor) -> Distances:
    kinds, shared = attention.pos_att_type, attention.share_att_key
    keys = queries = None
    if "c2p" in kinds:
        keys = (attention.key_proj if shared else attention.pos_key_proj)(embedded)
    if "p2c" in kinds:
        queries = (attention.query_proj if shared else attention.pos_query_proj)(embedded)
    return _scaled(attention, keys, queries)


def _scaled(attention: Attention, keys: Tensor | None, queries: Tensor | None) -> Distances:
    return Distances(keys, None if queries is None else queries * _scale(attention, queries.shape[-1]))


def _run_block(
    heads_of: Callable[[Attention, Tensor], Heads], block: nn.Module, hidden: Tensor, context: Context
) -> Tensor:
    parts = cast("DebertaBlock", block)
    attention, layer = parts.attention, parts.layer
    queries, keys, values = heads_of(attention, hidden)
    queries = queries * _scale(attention, queries.shape[1] * queries.shape[-1])
    scores = queries @ keys.transpose(-1, -2)  # [batch, heads, seq, seq]
    if parts.distances is not None:
        distances, index = parts.distances(), context["relative_index"]
        if distances.keys is not None:
            scores = scores + _products(queries, distances.keys, context["key_rows"], index)
        if distances.queries is not None:
            swapped = _products(keys, distances.queries, context["query_rows"], index)
            scores = scores + swapped.transpose(-1, -2)
    weights = attention.dropout((scores + context["mask"]).softmax(-1))
    attended = (weights @ values).transpose(1, 2).flatten(2)  # [batch, seq, hidden]
    attended = layer.get_submodule("attention.output")(attended, hidden)
    output: Tensor = layer.get_submodule("output")(layer.get_submodule("intermediate")(attended), attended)
    return output if parts.convolution is None else _add_convolution(parts.convolution, hidden, output)


def _products(heads: Tensor, table: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """The product of every token with the table's entry for its distance to every token.

    heads [batch, heads, seq, head size]; table [distances, hidden]; rows, index: see _context. Gives [batch,
    heads, seq, seq].
    """
    batch, count, _, size = heads.shape
    near = functional.embedding(rows, table).view(-1, count, size).permute(1, 2, 0)  # [heads, size, 2 * seq]
    return (heads @ near).gather(-1, index.expand(batch, count, -1, -1))


def _add_convolution(convolution: nn.Module, hidden: Tensor, output: Tensor) -> Tensor:
    """The norm of a block's output plus the convolution of its input, whose padding is zero, see _embed."""
    from transformers.activations import ACT2FN

    parts = cast("Convolution", convolution)
    convolved = parts.conv(hidden.transpose(1, 2)).transpose(1, 2)
    added: Tensor = parts.LayerNorm(output + ACT2FN[parts.conv_act](parts.dropout(convolved)))
    return added  # [batch, seq, hidden]


def _token_macs(block: nn.Module) -> int:
    """Those of the linear layers and of the convolution, without layers that only project distances."""
    parts = cast("DebertaBlock", block)
    names = ("pos_proj", "pos_q_proj", "pos_key_proj", "pos_query_proj")
    constant = sum(linear_weights(getattr(parts.attention, name, nn.Identity())) for name in names)
    kernel = 0 if parts.convolution is None else cast("Convolution", parts.convolution).conv.weight.numel()
    return linear_weights(parts.layer) - constant + kernel


def _pair_macs(block: nn.Module, hidden_size: int) -> int:
    """Two products of tokens, and for each product with distances 2 * seq of them."""
    parts = cast("DebertaBlock", block)
    kinds = {"c2p", "p2c"} & set(parts.attention.pos_att_type) if parts.distances is not None else set()
    return 2 * hidden_size * (1 + len(kinds))


def _head(config: PreTrainedConfig) -> HeadLayout:
    from transformers.activations import ACT2FN

    return HeadLayout("first", ("pooler.dense", ACT2FN[config.pooler_hidden_act], "classifier"))


def _folded(block: nn.Module) -> nn.Module:
    return cast("DebertaBlock", block).folded()


def _family(
    heads: Callable[[Attention, Tensor], Heads], project: Callable[[Attention, Tensor], Distances]
) -> Family:
    """The adapter of one version, whose attention has its own projections."""
    return Family(
        inputs=("input_ids",),
        embed=_embed,
        blocks=partial(_blocks, project),
        context=_context,
        run_block=partial(_run_block, heads),
        folded=_folded,
        head=_head,
        projection=_projection,
        token_macs=_token_macs,
        pair_macs=_pair_macs,
    )


DEBERTA = _family(_heads, _project)
DEBERTA_V2 = _family(_heads_v2, _project_v2)
