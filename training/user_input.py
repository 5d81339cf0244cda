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

if TYPE_CHECKING:  # a slow import, needed for annotations only
    from transformers import PreTrainedModel

TYPES = "token_type_ids"
ANY_VOCABULARY = 2**31
# Steps of image processors: those that the runtime does, and one that changes maps of labels alone.
IMAGE_STEPS = {"resize", "center_crop", "rescale", "normalize", "convert_rgb", "flip_channel_order"}
OTHER_STEPS = {"reduce_labels"}
NO_STEP = ": ee-run has no such step; fine-tune the model with a preprocessor without it"
CONVNEXT_WARPS_FROM = 384  # pixels: from this size on ConvNextImageProcessor cuts nothing off


def tokenizer_of(model: str) -> Any | None:
    """The tokenizer of a model's folder or hub name as transformers reads it; None if it cannot be used.

    load_tokenizer in training.classifier says why it cannot. Raises ValueError for a folder with the file of
    sentencepiece alone, where that package is not installed: transformers takes it for another file then.
    """
    from transformers import AutoTokenizer

    pieces = sorted(Path(model).glob("*.model"))
    if pieces and not (Path(model) / "tokenizer.json").exists() and find_spec("sentencepiece") is None:
        raise ValueError(
            f"its tokenizer is {pieces[0].name} alone, which only the package sentencepiece reads; pip "
            "install sentencepiece, or save the tokenizer with transformers where it is installed: that "
            "writes tokenizer.json"
        )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        if not tokenizer.is_fast:
            return None
        check_tokenizer(tokenizer.backend_tokenizer.to_str(), ANY_VOCABULARY)
    except BaseException as problem:  # a panic of the library is no Exception
        tokenizer_reason(problem)  # raises it again if it is another one
        return None
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


def makes_small(tokenizer: Any) -> bool:
    """Whether a tokenizer reads capital letters as small ones."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer is not None and "A" not in normalizer.normalize_str("A")


@torch.no_grad()
def settle_token_types(name: str, backbone: PreTrainedModel, tokenizer: Any, *, pairs: bool = True) -> None:
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
    types = max((number for encoding in encoded for number in encoding.type_ids), default=0)
    known, given = getattr(config, "type_vocab_size", 0), TYPES in tokenizer.model_input_names
    if not types:
        return
    if TYPES not in family_of(config.model_type).inputs:
        if given and known > 1:
            raise ValueError(
                f"config.json.type_vocab_size: {known}: {config.model_type} with types of tokens, which its "
                "tokenizer gives to the second text of a pair, is not supported; if the model reads single "
                f'texts, leave {TYPES} out of "model_input_names" in tokenizer_config.json'
            )
        return
    if given and types < known:
        return
    table = cast("nn.Embedding", backbone.get_submodule("embeddings.token_type_embeddings"))
    rows = table.weight[:1] if not given else table.weight
    last = rows[-1:].expand(max(types + 1, known) - len(rows), -1)
    new = nn.Embedding.from_pretrained(torch.cat([rows, last]).clone(), freeze=False)
    backbone.set_submodule("embeddings.token_type_embeddings", new)
    config.type_vocab_size = len(new.weight)
    if given:
        why = f"config.json.type_vocab_size is {known}, and its tokenizer gives type {types}"
    else:
        why = f"transformers gives no {TYPES} of its tokenizer to the model (model_input_names)"
    print(f"{name}: {why}: the second text of a pair is read as type {len(rows) - 1}", file=sys.stderr)


def preprocessor_of(model: str) -> Any | None:
    """The preprocessor of a model of images as transformers reads it; None if it is missing or unreadable.

    image_input in training.classifier reports that. Raises ValueError for steps or numbers that the runtime
    has not.
    """
    from transformers import AutoImageProcessor

    try:
        processor: Any = AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, ImportError):
        return None
    _check_preprocessor(processor)
    return processor


def settle_image_size(name: str, backbone: PreTrainedModel, preprocessor: Any) -> None:
    """Let a backbone read images of its preprocessor's size, where transformers interpolates its positions.

    Others read one size alone, that of their configuration. name: of the model, for a line on stderr. Raises
    ValueError for images that are not square.
    """
    vision = family_of(backbone.config.model_type).vision
    assert vision is not None
    _, *own = vision.shape(backbone.config)
    size = _cut_size(preprocessor)
    if not vision.any_size or size == own:
        return
    if not size:
        raise ValueError(
            "preprocessor_config.json: images keep their own sizes, and only one size is supported; add "
            f'"do_center_crop": true and "crop_size": {{"height": {own[0]}, "width": {own[1]}}}'
        )
    if size[0] != size[1]:
        raise ValueError(
            f"preprocessor_config.json: images of {size[0]} x {size[1]}, config.json.image_size is "
            f"{own[0]}; only square images are supported"
        )
    vision.resize(backbone, size[0])
    print(
        f"{name}: its preprocessor makes images of {size[0]} x {size[1]}, config.json.image_size is "
        f"{own[0]}: positions are interpolated as in transformers",
        file=sys.stderr,
    )


def _cut_size(processor: Any) -> list[int]:
    """Height and width of the images that a preprocessor makes; empty if they depend on the image."""
    size = dict(processor.size or {}) if processor.do_resize else {}
    if getattr(processor, "do_center_crop", False):
        size = dict(processor.crop_size or {})
    return [int(size[side]) for side in ("height", "width") if size.get(side)]


def _check_preprocessor(processor: Any) -> None:
    """Raise ValueError for steps or numbers of a preprocessor that the runtime has not."""
    where = "preprocessor_config.json"
    steps = {key.removeprefix("do_") for key, on in vars(processor).items() if key.startswith("do_") and on}
    if unknown := sorted(steps - IMAGE_STEPS - OTHER_STEPS):
        raise ValueError(f"{where}.do_{unknown[0]}{NO_STEP}")
    if "rescale" in steps and getattr(processor, "rescale_offset", False):
        raise ValueError(f"{where}.rescale_offset{NO_STEP}")
    sides = {side for side, pixels in dict(processor.size or {}).items() if pixels}
    if "resize" in steps and sides and sides not in ({"shortest_edge"}, {"height", "width"}):
        raise ValueError(
            f"{where}.size: {', '.join(sorted(sides))}; supported are shortest_edge alone, or height and "
            "width"
        )
    shortest = dict(processor.size or {}).get("shortest_edge") or CONVNEXT_WARPS_FROM
    if "resize" in steps and getattr(processor, "crop_pct", None) and shortest < CONVNEXT_WARPS_FROM:
        raise ValueError(
            f"{where}.crop_pct: ee-run has no such step; write the same as BitImageProcessor: a size of "
            f"{int(shortest / processor.crop_pct)} and a crop_size of {shortest}"
        )
    if "normalize" in steps:
        for field, least in (("image_mean", -math.inf), ("image_std", 0.0)):
            numbers = getattr(processor, field, None)
            listed = list(numbers) if isinstance(numbers, Iterable) else [numbers] * 3
            if len(listed) != 3 or not all(_is_number(number, least) for number in listed):
                kind = "numbers" if field == "image_mean" else "numbers above 0"
                raise ValueError(
                    f"{where}.{field}: {str(numbers)[:60]}; expected 3 {kind}, one for each channel"
                )


def _is_number(value: Any, least: float) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > least
