"""How a user's model reads its input: settings of its tokenizer and preprocessor that change its answers.

The runtime reads tokenizer.json and a few facts. What transformers does beyond these is refused here, before
anything is trained, or made part of the weights.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from offramp.models.families import family_of
from offramp.runtime.inputs.tokenizer_checks import check_tokenizer, tokenizer_reason
from offramp.training.options import BadModel

if TYPE_CHECKING:  # a slow import, needed for annotations only
    from transformers import PreTrainedModel

TYPES = "token_type_ids"
ANY_VOCABULARY = 2**31
# Steps of image processors: those that the runtime does, and one that changes maps of labels alone.
IMAGE_STEPS = {"resize", "center_crop", "rescale", "normalize", "convert_rgb", "flip_channel_order"}
OTHER_STEPS = {"reduce_labels"}
NO_STEP = ": ee-run does not do this step; fine-tune the model with a preprocessor without it"
CONVNEXT_WARPS_FROM = 384  # pixels: from this shortest edge on ConvNextImageProcessor makes a square


def read_tokenizer(model: str) -> Any:
    """The tokenizer of a model's folder or hub name, as transformers reads it, in its tokenizer.json form.

    Raises BadModel if it cannot be used: also for a folder with the file of sentencepiece alone where that
    package is not installed, since transformers takes it for another file then.
    """
    from transformers import AutoTokenizer

    pieces = sorted(Path(model).glob("*.model"))
    if pieces and not (Path(model) / "tokenizer.json").exists() and find_spec("sentencepiece") is None:
        raise BadModel(
            f"{model}: its tokenizer is {pieces[0].name} alone, which only the package sentencepiece reads; "
            "pip install sentencepiece, or save the tokenizer with transformers where it is installed: that "
            "writes tokenizer.json"
        )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except BaseException as problem:  # a panic of the library is no Exception
        reason = tokenizer_reason(problem)
        raise BadModel(f"{model}: no tokenizer that can be read: {reason}") from problem
    if not tokenizer.is_fast:
        raise BadModel(f"{model}: its tokenizer has no tokenizer.json form, which the runtime needs")
    try:  # that the ids fit the embeddings is checked later
        check_tokenizer(tokenizer.backend_tokenizer.to_str(), ANY_VOCABULARY)
    except ValueError as problem:
        raise BadModel(f"{model}: its tokenizer cannot be used: {problem}") from problem
    return tokenizer


def check_tokenizer_settings(tokenizer: Any) -> None:
    """Raise ValueError for settings of a tokenizer with which transformers reads other tokens than ee-run."""
    words = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    if not words.keys() - set(tokenizer.all_special_tokens):
        raise ValueError(
            "the folder has no tokenizer: transformers makes up one without words; save the one that the "
            "model was trained with there: tokenizer.save_pretrained(FOLDER)"
        )
    if tokenizer.truncation_side == "left":
        raise ValueError(
            "its tokenizer cuts long texts at their beginning (truncation_side: left), and ee-run at their "
            'end; if this changes nothing for your texts, say "truncation_side": "right" in '
            "tokenizer_config.json"
        )
    if getattr(tokenizer, "split_special_tokens", False):
        raise ValueError(
            "tokenizer_config.json.split_special_tokens: texts that contain special tokens such as [SEP] "
            "would be read otherwise by ee-run; take it out"
        )


def lowercases(tokenizer: Any) -> bool:
    """Whether a tokenizer reads capital letters as small ones."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer is not None and "A" not in normalizer.normalize_str("A")


@torch.no_grad()
def match_token_types(name: str, backbone: PreTrainedModel, tokenizer: Any, *, pairs: bool = True) -> None:
    """Let a backbone read the token types of its tokenizer as transformers does.

    The runtime gives the types that tokenizer.json says: 1 for the second text of a pair. transformers gives
    them if `model_input_names` lists token_type_ids, else 0 for all tokens: then all types get the embedding
    of type 0 here. name: of the model, for lines on stderr. pairs: whether the data has pairs. Raises
    ValueError if the family's adapter leaves out types that transformers gives.
    """
    config = backbone.config
    try:
        encoded = [tokenizer.backend_tokenizer.encode("a")]
        if pairs:
            encoded.append(tokenizer.backend_tokenizer.encode("a", "b"))
    except BaseException as problem:  # a panic of the library is no Exception
        raise ValueError(f"its tokenizer fails at a text: {tokenizer_reason(problem)}") from problem
    largest_type = max((number for encoding in encoded for number in encoding.type_ids), default=0)
    table_size, types_are_given = getattr(config, "type_vocab_size", 0), TYPES in tokenizer.model_input_names
    if not largest_type:
        return
    if TYPES not in family_of(config.model_type).inputs:
        if types_are_given and table_size > 1:
            raise ValueError(
                f"config.json.type_vocab_size: {table_size}: {config.model_type} with types of tokens, which "
                "its tokenizer gives to the second text of a pair, is not supported; if the model reads "
                f'single texts, leave {TYPES} out of "model_input_names" in tokenizer_config.json'
            )
        return
    if types_are_given and largest_type < table_size:
        return
    table = cast("nn.Embedding", backbone.get_submodule("embeddings.token_type_embeddings"))
    rows = table.weight if types_are_given else table.weight[:1]
    last = rows[-1:].expand(max(largest_type + 1, table_size) - len(rows), -1)
    new = nn.Embedding.from_pretrained(torch.cat([rows, last]).clone(), freeze=False)
    backbone.set_submodule("embeddings.token_type_embeddings", new)
    config.type_vocab_size = len(new.weight)
    if types_are_given:
        why = f"config.json.type_vocab_size is {table_size}, and its tokenizer gives type {largest_type}"
    else:
        why = f"transformers gives no {TYPES} of its tokenizer to the model (model_input_names)"
    print(f"{name}: {why}: the second text of a pair is read as type {len(rows) - 1}", file=sys.stderr)


def preprocessor_of(model: str, *, no_crop: bool = False) -> Any | None:
    """The preprocessor of a model of images as transformers reads it; None if it is missing or unreadable.

    image_input in training.classifier reports that. no_crop: whether the whole image is resized in place of
    the preprocessor's own resize and crop. Raises ValueError for steps or numbers that the runtime does not
    do.
    """
    from transformers import AutoImageProcessor

    try:
        processor: Any = AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, ImportError):
        return None
    _check_preprocessor(processor, no_crop)
    return processor


def match_image_size(name: str, backbone: PreTrainedModel, preprocessor: Any, *, no_crop: bool) -> None:
    """Let a backbone read images of its preprocessor's size, where transformers interpolates its positions.

    Others read one size alone, that of their configuration. name: of the model, for a line on stderr.
    no_crop: see preprocessor_of; the size of the configuration stays then if the preprocessor makes no square
    images. Raises ValueError for images that are not square.
    """
    vision = family_of(backbone.config.model_type).vision
    assert vision is not None
    _, *own = vision.shape(backbone.config)
    size = image_size_of(preprocessor)
    if not vision.any_size or size == own:
        return
    if not size or size[0] != size[1]:
        if no_crop:
            return
        result = f"images of {size[0]} x {size[1]}" if size else "images keep their own sizes"
        raise ValueError(
            f"preprocessor_config.json: {result}, and only square images of one size are supported; say "
            f"--image-size {own[0]}, the size of config.json, or another one"
        )
    vision.resize(backbone, size[0])
    print(
        f"{name}: its preprocessor makes images of {size[0]} x {size[1]}, config.json.image_size is "
        f"{own[0]}: positions are interpolated as in transformers",
        file=sys.stderr,
    )


def image_size_of(processor: Any) -> list[int]:
    """Height and width of the images that a preprocessor makes; empty if they depend on the image."""
    size = crop_of(processor) or resize_of(processor)
    return [size["height"], size["width"]] if {"height", "width"} <= size.keys() else []


def resize_of(processor: Any) -> dict[str, int]:
    """The size to which a preprocessor resizes images: shortest_edge, or height and width.

    Empty if it does not resize them.
    """
    size = _sides(processor.size) if processor.do_resize else {}
    edge = size.get("shortest_edge", 0)
    if type(processor).__name__.startswith("ConvNext") and edge >= CONVNEXT_WARPS_FROM:
        return {"height": edge, "width": edge}
    return size


def crop_of(processor: Any) -> dict[str, int]:
    """Height and width of the centre that a preprocessor cuts out; empty if it cuts nothing."""
    return _sides(processor.crop_size) if getattr(processor, "do_center_crop", False) else {}


def _sides(size: Any) -> dict[str, int]:
    return {side: int(pixels) for side, pixels in dict(size or {}).items() if pixels}


def _check_preprocessor(processor: Any, no_crop: bool) -> None:
    """Raise ValueError for steps or numbers of a preprocessor that the runtime does not do.

    no_crop: see preprocessor_of.
    """
    where = "preprocessor_config.json"
    steps = {key.removeprefix("do_") for key, on in vars(processor).items() if key.startswith("do_") and on}
    if unknown := sorted(steps - IMAGE_STEPS - OTHER_STEPS):
        raise ValueError(f"{where}.do_{unknown[0]}{NO_STEP}")
    if "rescale" in steps and getattr(processor, "rescale_offset", False):
        raise ValueError(f"{where}.rescale_offset{NO_STEP}")
    if not no_crop:
        _check_resize(processor, where)
    if "normalize" in steps:
        for field, least in (("image_mean", -math.inf), ("image_std", 0.0)):
            numbers = getattr(processor, field, None)
            listed = list(numbers) if isinstance(numbers, Iterable) else [numbers] * 3
            if len(listed) != 3 or not all(_is_number(number, least) for number in listed):
                kind = "numbers" if field == "image_mean" else "numbers above 0"
                raise ValueError(
                    f"{where}.{field}: {str(numbers)[:60]}; expected 3 {kind}, one for each channel"
                )


def _check_resize(processor: Any, where: str) -> None:
    """Raise ValueError for a resize that the runtime does not do; where: the file, for the message."""
    size, crop = resize_of(processor), crop_of(processor)
    if size and set(size) not in ({"shortest_edge"}, {"height", "width"}):
        raise ValueError(
            f"{where}.size: {', '.join(sorted(size))}; supported are shortest_edge alone, or height and width"
        )
    share = getattr(processor, "crop_pct", None)
    if size and share and size == _sides(processor.size):  # no square of ConvNextImageProcessor
        edge = size.get("shortest_edge") or size["height"]
        raise ValueError(
            f"{where}.crop_pct: ee-run does not do this step; write the same as BitImageProcessor: a size of "
            f"{int(edge / share)} and a crop_size of {crop.get('height', edge)}"
        )


def _is_number(value: Any, least: float) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > least
