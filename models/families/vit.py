"""ViT, DeiT, ViT-MSN, DINOv2: patches with fixed positions, pre-norm blocks, one LayerNorm after the last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from offramp.models.families.family import Context, Family, HeadLayout, Vision, head_on_first

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class PatchEmbeddings(Protocol):
    """The convolution that computes patches, and the sizes with which transformers compares its input."""

    image_size: tuple[int, int]
    num_patches: int

    def __call__(self, pixel_values: Tensor) -> Tensor: ...


class Embeddings(Protocol):
    """The members of a vision backbone's embeddings: patches, learned tokens, positions [1, seq, hidden].

    image_size exists in some families alone, and so does register_tokens [1, registers, hidden].
    """

    patch_embeddings: PatchEmbeddings
    position_embeddings: nn.Parameter
    dropout: nn.Module
    image_size: tuple[int, int]
    register_tokens: nn.Parameter

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """The position embeddings for images of this size, interpolated [1, seq, hidden]."""
        ...


def _embeddings(backbone: nn.Module) -> Embeddings:
    return cast("Embeddings", backbone.get_submodule("embeddings"))


def _embed(learned: tuple[str, ...], backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    embeddings = _embeddings(backbone)
    patches = embeddings.patch_embeddings(inputs["pixel_values"])  # [batch, patches, hidden]
    rows = patches.shape[0]  # not len(), which would fix the number when exported
    prefix = [getattr(embeddings, name).expand(rows, -1, -1) for name in learned]
    hidden = torch.cat([*prefix, patches], dim=1)  # [batch, seq, hidden]
    # Positions are not interpolated here: resize() did that once, so that no graph does.
    hidden = hidden + embeddings.position_embeddings
    if hasattr(embeddings, "register_tokens"):  # they come after the learned tokens and have no position
        registers = embeddings.register_tokens.expand(rows, -1, -1)
        hidden = torch.cat([hidden[:, : len(learned)], registers, hidden[:, len(learned) :]], dim=1)
    return embeddings.dropout(hidden)  # type: ignore[no-any-return]


def _blocks(backbone: nn.Module) -> nn.ModuleList:
    # Older releases of transformers keep ViT's blocks where DINOv2 has them, in an encoder.
    layers = backbone.get_submodule("layers" if hasattr(backbone, "layers") else "encoder.layer")
    assert isinstance(layers, nn.ModuleList)
    return layers


def _run_block(block: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    output: Tensor = block(hidden)
    return output  # [batch, seq, hidden]


def _exit_norm(backbone: nn.Module) -> nn.Module:
    """The last LayerNorm: the head was trained after it, so every exit applies it too (JEI-DNN)."""
    return backbone.get_submodule("layernorm")


def image_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Channels, height and width of the images that a configuration is for."""
    height, width = pair(config.image_size)
    return int(config.num_channels), height, width


def patch_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width of a patch."""
    return pair(config.patch_size)


def image_tokens(prefix: int, config: PreTrainedConfig) -> int:
    """The number of tokens of an image; prefix: tokens before the patches."""
    (height, width), patch = pair(config.image_size), pair(config.patch_size)
    return prefix + (height // patch[0]) * (width // patch[1])


def _prefix(learned: tuple[str, ...], config: PreTrainedConfig) -> int:
    """The number of tokens before the patches: learned ones with a position, and registers."""
    return len(learned) + getattr(config, "num_register_tokens", 0)


def _tokens(learned: tuple[str, ...], config: PreTrainedConfig) -> int:
    """The number of tokens of an image."""
    return image_tokens(_prefix(learned, config), config)


@torch.no_grad()
def _resize(learned: tuple[str, ...], backbone: nn.Module, size: int) -> None:
    """Interpolate position embeddings for square images of another size, bicubic, as transformers does."""
    embeddings, config = _embeddings(backbone), cast("PreTrainedModel", backbone).config
    if pair(config.image_size) == (size, size):
        return
    height, width = patch_shape(config)
    patches = (size // height) * (size // width)
    hidden = torch.zeros(1, len(learned) + patches, config.hidden_size)
    positions = embeddings.interpolate_pos_encoding(hidden, size, size)  # [1, seq, hidden]
    embeddings.position_embeddings = nn.Parameter(positions.clone())
    # transformers checks its input against these sizes, and builds a checkpoint's backbone from them.
    config.image_size = size
    embeddings.patch_embeddings.image_size = (size, size)
    embeddings.patch_embeddings.num_patches = patches
    if hasattr(embeddings, "image_size"):
        embeddings.image_size = (size, size)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width by a configuration, which has one number for a square."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


_ONE_LAYER = head_on_first("classifier")


def _family(
    *learned: str, head: Callable[[PreTrainedConfig], HeadLayout] = _ONE_LAYER, any_size: bool = False
) -> Family:
    """The adapter of one family; learned: attributes of the embeddings with tokens before the patches.

    any_size: see Vision.
    """
    return Family(
        inputs=("pixel_values",),
        embed=partial(_embed, learned),
        blocks=_blocks,
        run_block=_run_block,
        longest=partial(_tokens, learned),
        exit_norm=_exit_norm,
        vision=Vision(
            partial(_prefix, learned), image_shape, patch_shape, partial(_resize, learned), any_size
        ),
        head=head,
    )


def _dinov2_head(config: PreTrainedConfig) -> HeadLayout:
    """A linear layer on the first token followed by the mean of the patches."""
    return HeadLayout("first_and_patches", ("classifier",), _prefix(("cls_token",), config))


VIT = _family("cls_token")
DINOV2 = _family("cls_token", head=_dinov2_head, any_size=True)
DEIT = _family("cls_token", "distillation_token")
