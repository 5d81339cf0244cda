"""The adapter of an encoder family: its inputs, its embedding, its blocks and how a block is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # a slow import, needed for annotations only
    from transformers import PreTrainedConfig

# Tensors that the stem computes once and every block reads, by name: the additive mask and, in some families,
# a position bias.
Context = dict[str, Tensor]


class UnsupportedFamily(ValueError):
    """Error for a configuration of a family that has no adapter."""


def no_context(backbone: nn.Module, hidden: Tensor) -> Context:
    """An empty context, since the blocks of most families read only the additive mask."""
    return {}


def run_masked_block(block: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    """Run a block by calling block(hidden, additive mask), the signature that most text families share."""
    output = block(hidden, context["mask"])
    assert isinstance(output, Tensor)
    return output  # [batch, seq, hidden]


def run_first_output(block: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    """Run a block that returns a tuple, whose first entry is the hidden state."""
    output: Tensor = block(hidden, context["mask"])[0]
    return output  # [batch, seq, hidden]


def same_block(block: nn.Module) -> nn.Module:
    """The block itself, the form in which most families' blocks are exported."""
    return block


def all_positions(config: PreTrainedConfig) -> int:
    """The longest input in tokens of families whose position ids count from zero."""
    return int(config.max_position_embeddings)


def positions_after_padding(config: PreTrainedConfig) -> int:
    """The longest input in tokens of families whose position ids count from pad_token_id + 1 (RoBERTa,
    MPNet).
    """
    assert config.pad_token_id is not None
    return int(config.max_position_embeddings) - int(config.pad_token_id) - 1


def no_exit_norm(backbone: nn.Module) -> nn.Module | None:
    """None, since a block of most text families already ends with a LayerNorm."""
    return None


def no_projection(backbone: nn.Module) -> nn.Module | None:
    """None, since embeddings of most families have the hidden size."""
    return None


def module_at(path: str) -> Callable[[nn.Module], nn.Module]:
    """A function from a backbone to its module at `path`."""
    return lambda backbone: backbone.get_submodule(path)


def blocks_at(path: str) -> Callable[[nn.Module], nn.ModuleList]:
    """A function from a backbone to its blocks, which are the ModuleList at `path`."""

    def blocks(backbone: nn.Module) -> nn.ModuleList:
        layers = backbone.get_submodule(path)
        assert isinstance(layers, nn.ModuleList)
        return layers

    return blocks


def linear_weights(module: nn.Module) -> int:
    """The number of weights in all linear layers; each weight costs one multiply-accumulate a use."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def two_products(block: nn.Module, hidden_size: int) -> int:
    """The multiply-accumulates of attention's two products for each pair of tokens."""
    return 2 * hidden_size


READS = ("first", "mean", "patches", "first_and_patches", "tokens")


@dataclass(frozen=True)
class HeadLayout:
    """What the trained head of a family's classification model reads, and where that model keeps its layers.

    reads: of the last block's normed output the "first" token, the "mean" of the tokens, the mean of the
    patches ("patches"), the first followed by that mean ("first_and_patches"), or each token ("tokens").
    layers: in order, paths of modules of the model ("backbone." stands for the prefix of its backbone) and
    activations; dropout is left out. prefix: tokens before the patches.
    """

    reads: str
    layers: tuple[str | nn.Module, ...]
    prefix: int = 1


def prefix_of(tokens: int) -> Callable[[PreTrainedConfig], int]:
    """A function that gives this number of tokens before the patches for every configuration."""
    return lambda config: tokens


def head_on_first(*layers: str | nn.Module) -> Callable[[PreTrainedConfig], HeadLayout]:
    """The layout of a head of these layers on the first token, the same for all configurations."""
    return lambda config: HeadLayout("first", layers)


def one_layer_on_tokens(config: PreTrainedConfig) -> HeadLayout:
    """The layout of most heads that classify each token: one linear layer."""
    return HeadLayout("tokens", ("classifier",))


@dataclass(frozen=True)
class Vision:
    """The part of a family's adapter for images; all images have the same number of tokens.

    prefix: configuration -> tokens before the patches. shape: configuration -> (channels, height, width) of
    an image. patch: configuration -> (height, width) of a patch. resize: (backbone, size) changes the
    backbone in place so that it reads square images of that size. any_size: whether transformers' model also
    reads images of another size than its configuration says, with positions interpolated.
    """

    prefix: Callable[[PreTrainedConfig], int]
    shape: Callable[[PreTrainedConfig], tuple[int, int, int]]
    patch: Callable[[PreTrainedConfig], tuple[int, int]]
    resize: Callable[[nn.Module, int], None]
    any_size: bool = False


@dataclass(frozen=True)
class Family:
    """The adapter of one family of encoders; `backbone` is an object that AutoModel loads.

    inputs: names of the stem's inputs besides the attention_mask of text: integers [batch, seq] or, if
    `vision` is set, pixel_values [batch, channels, height, width]. embed: (backbone, inputs) -> hidden
    [batch, seq, hidden]. blocks: backbone -> its blocks in order; a block whose weights are shared is listed
    several times. context: (backbone, hidden) -> tensors that every block reads, computed once. run_block:
    (block, hidden, context) -> hidden. folded: block -> the module that is exported in its place, with
    constants for what weights alone determine; run_block runs it, too. longest: configuration -> most tokens
    that the position embedding can number; for images the tokens of each. exit_norm: backbone -> the norm
    applied to each token before an exit pools a block's output, or None. vision: the part for images; None
    for families that read text. head: configuration -> the layout of the head in transformers'
    classification model, None for a head with none; head is None if there is no such model. token_head: the
    same for the model that classifies each token.

    For multiply-accumulates: projection: backbone -> the linear layer of the stem that widens embeddings to
    the hidden size, or None. token_macs: block -> those for each token. pair_macs: (block, hidden size) ->
    those for each pair of tokens.
    """

    inputs: tuple[str, ...]
    embed: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
    blocks: Callable[[nn.Module], nn.ModuleList]
    context: Callable[[nn.Module, Tensor], Context] = no_context
    run_block: Callable[[nn.Module, Tensor, Context], Tensor] = run_masked_block
    folded: Callable[[nn.Module], nn.Module] = same_block
    longest: Callable[[PreTrainedConfig], int] = all_positions
    exit_norm: Callable[[nn.Module], nn.Module | None] = no_exit_norm
    vision: Vision | None = None
    head: Callable[[PreTrainedConfig], HeadLayout | None] | None = None
    token_head: Callable[[PreTrainedConfig], HeadLayout] = one_layer_on_tokens
    projection: Callable[[nn.Module], nn.Module | None] = no_projection
    token_macs: Callable[[nn.Module], int] = linear_weights
    pair_macs: Callable[[nn.Module, int], int] = two_products


def additive_mask(attention_mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The additive form [batch, 1, 1, seq] of a 0/1 mask [batch, seq]: 0 at tokens, a large negative at
    padding.

    That value is half the lowest float16. It is far below any score, so softmax gives exactly 0 there in
    float32 too. It and its sum with any score are finite in float16: a row of only -inf would make softmax
    NaN.
    """
    return additive(attention_mask[:, None, None, :].to(dtype))  # [batch, 1, 1, seq]


def additive(keep: Tensor) -> Tensor:
    """The additive form of a mask of 0 and 1 as floats, see additive_mask."""
    return (1.0 - keep) * (torch.finfo(torch.float16).min / 2)
