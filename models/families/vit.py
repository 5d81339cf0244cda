"""ViT, DeiT and DINOv2: patches and fixed positions in, pre-norm blocks, one LayerNorm behind the last."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from offramp.models.families.family import Context, Family, Vision


def _embed(tokens: tuple[str, ...], backbone: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    embeddings = backbone.embeddings
    patches = embeddings.patch_embeddings(inputs["pixel_values"])  # [batch, patches, hidden]
    rows = patches.shape[0]  # not len(), which would fix the number when exported
    learned = [getattr(embeddings, name).expand(rows, -1, -1) for name in tokens]
    hidden = torch.cat([*learned, patches], dim=1)  # [batch, seq, hidden]
    # As they stand: resize() has made them for this size once, so that no graph interpolates.
    return embeddings.dropout(hidden + embeddings.position_embeddings)  # type: ignore[no-any-return]


def _blocks(backbone: Any) -> nn.ModuleList:
    # Older releases of transformers keep ViT's blocks where DINOv2 has them, in an encoder.
    layers: nn.ModuleList = backbone.layers if hasattr(backbone, "layers") else backbone.encoder.layer
    return layers


def _call(block: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    out: Tensor = block(hidden)
    return out  # [batch, seq, hidden]


def _norm(backbone: Any) -> nn.Module:
    """The last LayerNorm: the head was trained behind it, so every exit stands behind it too (JEI-DNN)."""
    norm: nn.Module = backbone.layernorm
    return norm


def _shape(config: Any) -> tuple[int, int, int]:
    height, width = _pair(config.image_size)
    return int(config.num_channels), height, width


def _patch(config: Any) -> tuple[int, int]:
    return _pair(config.patch_size)


def _tokens(prefix: int, config: Any) -> int:
    (height, width), patch = _pair(config.image_size), _pair(config.patch_size)
    return prefix + (height // patch[0]) * (width // patch[1])


@torch.no_grad()
def _resize(prefix: int, backbone: Any, size: int) -> None:
    """Position embeddings for square images of another size, bicubic, by transformers' own interpolation."""
    embeddings, config = backbone.embeddings, backbone.config
    if _pair(config.image_size) == (size, size):
        return
    height, width = _patch(config)
    patches = (size // height) * (size // width)
    hidden = torch.zeros(1, prefix + patches, config.hidden_size)
    positions = embeddings.interpolate_pos_encoding(hidden, size, size)  # [1, seq, hidden]
    embeddings.position_embeddings = nn.Parameter(positions.clone())
    # What transformers checks its input against, and what a checkpoint is built anew from.
    config.image_size = size
    embeddings.patch_embeddings.image_size = (size, size)
    embeddings.patch_embeddings.num_patches = patches
    if hasattr(embeddings, "image_size"):
        embeddings.image_size = (size, size)


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _family(*tokens: str) -> Family:
    """A family by the learned tokens that go before the patches, as its embeddings name them."""
    prefix = len(tokens)
    return Family(
        inputs=("pixel_values",),
        embed=partial(_embed, tokens),
        blocks=_blocks,
        call=_call,
        longest=partial(_tokens, prefix),
        for_exit=_norm,
        vision=Vision(prefix=prefix, shape=_shape, patch=_patch, resize=partial(_resize, prefix)),
    )


FAMILY = _family("cls_token")
DEIT = _family("cls_token", "distillation_token")
