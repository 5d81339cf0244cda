"""BEiT: patches after a class token, and a learned bias for the offset of each patch to each other one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from offramp.models.families.family import Context, Family, HeadLayout, Vision, blocks_at, prefix_of
from offramp.models.families.vit import image_shape, image_tokens, pair, patch_shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

BEYOND_PATCHES = (
    3  # rows of a table of biases: class token to patch, patch to class token, class token to itself
)


class PositionBias(Protocol):
    """A table with a bias for each offset of two patches [offsets + 3, heads], and the size of the grid."""

    window_size: tuple[int, int]
    num_relative_distance: int
    relative_position_bias_table: nn.Parameter


class Block(Protocol):
    """The members of a BEiT block; lambda_1 and lambda_2 scale what a part adds (1.0: not learned)."""

    attention: nn.Module
    mlp: nn.Module
    layernorm_before: nn.Module
    layernorm_after: nn.Module
    dropout: nn.Module
    drop_path: nn.Module
    lambda_1: Tensor | float
    lambda_2: Tensor | float
    relative_position_bias: nn.Module | None


class PatchEmbeddings(Protocol):
    """The convolution that computes patches, and the sizes that transformers keeps beside it."""

    image_size: tuple[int, int]
    num_patches: int

    def __call__(self, pixel_values: Tensor) -> Tensor: ...


class Embeddings(Protocol):
    """The members of the embeddings; position_embeddings [1, seq, hidden] may be None."""

    patch_embeddings: PatchEmbeddings
    cls_token: nn.Parameter
    position_embeddings: nn.Parameter | None
    dropout: nn.Module

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """The position embeddings for images of this size, interpolated [1, seq, hidden]."""
        ...


def _embed(backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    embeddings = cast("Embeddings", backbone.get_submodule("embeddings"))
    patches = embeddings.patch_embeddings(inputs["pixel_values"])  # [batch, patches, hidden]
    first = embeddings.cls_token.expand(patches.shape[0], -1, -1)
    hidden = torch.cat([first, patches], dim=1)  # [batch, seq, hidden]
    if embeddings.position_embeddings is not None:
        hidden = hidden + embeddings.position_embeddings
    return embeddings.dropout(hidden)  # type: ignore[no-any-return]


def _context(backbone: nn.Module, hidden: Tensor) -> Context:
    """The bias that all blocks share, in models that have one."""
    shared = getattr(backbone, "shared_position_bias", None)
    return {} if shared is None else {"position_bias": _bias(shared)}  # [1, heads, seq, seq]


def _run_block(block: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    # Written out: the block of transformers interpolates its table in every call, even to the same size.
    layer, bias = cast("Block", block), context.get("position_bias")
    if layer.relative_position_bias is not None:
        own = _bias(layer.relative_position_bias)
        bias = own if bias is None else own + bias
    attended, _ = layer.attention(layer.layernorm_before(hidden), attention_mask=bias)
    hidden = hidden + layer.drop_path(layer.lambda_1 * layer.dropout(attended))
    changed = layer.mlp(layer.layernorm_after(hidden))
    output: Tensor = hidden + layer.drop_path(layer.lambda_2 * layer.dropout(changed))
    return output  # [batch, seq, hidden]


def _bias(module: nn.Module) -> Tensor:
    """The bias of each pair of tokens [1, heads, seq, seq], looked up in a table."""
    position_bias = cast("PositionBias", module)
    table = position_bias.relative_position_bias_table
    rows = torch.tensor(_rows(*position_bias.window_size), device=table.device)  # [seq, seq]
    return functional.embedding(rows, table).permute(2, 0, 1)[None]


@lru_cache
def _rows(height: int, width: int) -> NDArray[np.int64]:
    """The row in a table of biases of each pair of tokens [seq, seq]; token 0 is the class token."""
    row, column = np.divmod(np.arange(height * width), width)
    offsets = (2 * height - 1) * (2 * width - 1)
    down, right = row[:, None] - row + height - 1, column[:, None] - column + width - 1
    rows = np.full((1 + len(row), 1 + len(row)), offsets)  # from the class token to a patch
    rows[1:, 0] = offsets + 1
    rows[0, 0] = offsets + 2
    rows[1:, 1:] = down * (2 * width - 1) + right
    return rows


def _exit_norm(backbone: nn.Module) -> nn.Module | None:
    """The norm after the last block; None in models that norm the mean of the patches, which is no token."""
    norm = backbone.get_submodule("layernorm")
    return None if isinstance(norm, nn.Identity) else norm


@torch.no_grad()
def _resize(backbone: nn.Module, size: int) -> None:
    """Interpolate positions and tables of biases for square images of another size, as transformers does."""
    config = cast("PreTrainedModel", backbone).config
    embeddings = cast("Embeddings", backbone.get_submodule("embeddings"))
    if pair(config.image_size) == (size, size):
        return
    height, width = patch_shape(config)
    grid = size // height, size // width
    if embeddings.position_embeddings is not None:
        hidden = torch.zeros(1, 1 + grid[0] * grid[1], config.hidden_size)
        positions = embeddings.interpolate_pos_encoding(hidden, size, size)
        embeddings.position_embeddings = nn.Parameter(positions.clone())
    for module in backbone.modules():
        if hasattr(module, "relative_position_bias_table"):
            _resize_table(cast("PositionBias", module), grid)
    config.image_size = size
    embeddings.patch_embeddings.image_size = (size, size)
    embeddings.patch_embeddings.num_patches = grid[0] * grid[1]


def _resize_table(position_bias: PositionBias, grid: tuple[int, int]) -> None:
    table = position_bias.relative_position_bias_table
    sides = [2 * side - 1 for side in position_bias.window_size]
    offsets = table[:-BEYOND_PATCHES].T.reshape(1, -1, *sides)  # [1, heads, height, width]
    resized = functional.interpolate(offsets, size=[2 * side - 1 for side in grid], mode="bilinear")
    rows = torch.cat([resized.flatten(2)[0].T, table[-BEYOND_PATCHES:]])
    position_bias.relative_position_bias_table = nn.Parameter(rows.contiguous())
    position_bias.window_size, position_bias.num_relative_distance = grid, len(rows)


def _head(config: PreTrainedConfig) -> HeadLayout:
    if config.use_mean_pooling:
        return HeadLayout("patches", ("backbone.pooler.layernorm", "classifier"))
    return HeadLayout("first", ("classifier",))


def _longest(config: PreTrainedConfig) -> int:
    return image_tokens(1, config)


BEIT = Family(
    inputs=("pixel_values",),
    embed=_embed,
    blocks=blocks_at("layers"),
    context=_context,
    run_block=_run_block,
    longest=_longest,
    exit_norm=_exit_norm,
    vision=Vision(prefix_of(1), image_shape, patch_shape, _resize, any_size=True),
    head=_head,
)
