"""The vision towers of SigLIP and CLIP, each of which is trained together with an encoder of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from offramp.models.families.family import Context, Family, Vision, blocks_at, module_at, prefix_of
from offramp.models.families.vit import image_shape, image_tokens, pair, patch_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Embeddings(Protocol):
    """The members of a tower's embeddings; class_embedding [hidden] exists in CLIP alone."""

    patch_embedding: nn.Module
    class_embedding: nn.Parameter
    position_embedding: nn.Embedding
    position_ids: Tensor
    image_size: int
    num_patches: int
    num_positions: int

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """The position embeddings for images of this size, interpolated [1, seq, hidden]."""
        ...


def _embeddings(backbone: nn.Module) -> Embeddings:
    return cast("Embeddings", backbone.get_submodule("embeddings"))


def _embed(backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    embeddings = _embeddings(backbone)
    patches = embeddings.patch_embedding(inputs["pixel_values"])  # [batch, hidden, rows, columns]
    hidden = patches.flatten(2).transpose(1, 2)  # [batch, patches, hidden]
    if hasattr(embeddings, "class_embedding"):
        first = embeddings.class_embedding.expand(hidden.shape[0], 1, -1)
        hidden = torch.cat([first, hidden], dim=1)
    # Positions are not looked up: the table is in order, and resize() made one for another size.
    positioned: Tensor = hidden + embeddings.position_embedding.weight
    return positioned  # [batch, seq, hidden]


def _embed_clip(backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    hidden: Tensor = backbone.get_submodule("pre_layrnorm")(_embed(backbone, inputs))
    return hidden  # [batch, seq, hidden]


def _run_block(block: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    output: Tensor = block(hidden, None)  # no token of an image is masked
    return output  # [batch, seq, hidden]


@torch.no_grad()
def _resize(prefix: int, backbone: nn.Module, size: int) -> None:
    """Interpolate position embeddings for square images of another size, bicubic, as transformers does."""
    config, embeddings = cast("PreTrainedModel", backbone).config, _embeddings(backbone)
    if pair(config.image_size) == (size, size):
        return
    height, width = patch_shape(config)
    patches = (size // height) * (size // width)
    tokens = prefix + patches
    hidden = torch.zeros(1, tokens, config.hidden_size)
    positions = embeddings.interpolate_pos_encoding(hidden, size, size)[0]
    embeddings.position_embedding = nn.Embedding.from_pretrained(positions.clone(), freeze=False)
    embeddings.position_ids = torch.arange(tokens)[None]
    # transformers checks its input against these sizes, and builds a checkpoint's backbone from the first.
    config.image_size = embeddings.image_size = size
    embeddings.num_patches, embeddings.num_positions = patches, tokens


def _family(prefix: int, embed: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]) -> Family:
    """The adapter of one tower; prefix: tokens before the patches."""
    return Family(
        inputs=("pixel_values",),
        embed=embed,
        blocks=blocks_at("encoder.layers"),
        run_block=_run_block,
        longest=partial(image_tokens, prefix),
        exit_norm=module_at("post_layernorm"),
        vision=Vision(prefix_of(prefix), image_shape, patch_shape, partial(_resize, prefix)),
    )


SIGLIP = _family(0, _embed)
CLIP = _family(1, _embed_clip)
