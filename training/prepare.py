"""From what the user typed to a network, its tokenizer and its data, ready to train."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from offramp.models.families import UnsupportedFamily, family_of
from offramp.models.network import EarlyExitNetwork, NetworkSpec, count_blocks, parse_exits
from offramp.runtime.inputs.images import ImageInput
from offramp.training.checkpoint import BadCheckpoint, Checkpoint, TextFacts, load_checkpoint
from offramp.training.settings import BadSetting

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, where a model does not say
RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers


class BadModel(ValueError):
    """A model that cannot be loaded or has no adapter; the message names it and the cure."""


def fresh_network(
    model: str,
    labels: tuple[str, ...],
    *,
    exits: str,
    pooling: str,
    policy: str | None,
    seed: int,
    image_size: int | None = None,
) -> EarlyExitNetwork:
    """Exits and policies with random weights (by `seed`) on the pretrained backbone `model`, a hub name or
    a folder.

    image_size: side of the images that it will read, None: as the model says.
    """
    transformers.utils.logging.set_verbosity_error()  # its notes on unused heads would bury ours
    transformers.utils.logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(model)
        family_of(config.model_type)
        torch.manual_seed(seed)
        backbone = AutoModel.from_pretrained(model, dtype=torch.float32)
    except UnsupportedFamily as problem:
        raise BadModel(f"{model}: {problem}") from problem
    except (OSError, ValueError) as problem:
        raise BadModel(
            f"{model}: neither a model folder here nor given by the hub: {str(problem).splitlines()[0]}"
        ) from problem
    _resize(backbone, model, image_size)
    try:
        spec = NetworkSpec(labels, parse_exits(exits, count_blocks(config)), pooling, policy)
    except ValueError as problem:
        raise BadSetting(f"--exits {exits}: {problem}") from problem
    torch.manual_seed(seed)
    return EarlyExitNetwork(backbone, spec)


def _resize(backbone: Any, model: str, size: int | None) -> None:
    if size is None:
        return
    vision = family_of(backbone.config.model_type).vision
    if vision is None:
        raise BadSetting(f"--image-size {size}: {model} reads text")
    for side in vision.patch(backbone.config):
        if size % side:
            near = max(1, round(size / side)) * side
            raise BadSetting(f"--image-size {size}: patches are {side} pixels, say a multiple such as {near}")
    vision.resize(backbone, size)


def image_facts(model: str, network: EarlyExitNetwork, whole: bool, say: Any = None) -> ImageInput:
    """Preprocessing as the model's preprocessor_config.json has it, scaled to the size that the network
    reads; where there is none, the whole image, bicubic, with ImageNet's mean and deviation, told on stderr.

    whole: no centre is cut out, whatever the preprocessor says.
    """
    vision = network.family.vision
    assert vision is not None
    channels, height, width = vision.shape(network.config)
    if channels != 3:
        raise BadModel(f"{model}: it reads {channels} channels; only images of 3 are supported")
    plain = ImageInput(height, width, (height, width), "bicubic", "RGB", 1 / 255, MEAN, DEVIATION)
    try:
        found: Any = AutoImageProcessor.from_pretrained(model)
    except (OSError, ValueError, ImportError) as problem:
        reason = str(problem).strip().splitlines()[0]
        print(f"{model}: no preprocessor, taking the usual: {plain} ({reason})", file=say or sys.stderr)
        return plain
    resize: tuple[int, ...] = (height, width) if whole else ()
    if found.do_resize and not whole:
        size, crop = _sizes(found.size), _sizes(getattr(found, "crop_size", None))
        cut = getattr(found, "do_center_crop", False)
        # As much of the picture as at the preprocessor's own size: 256 for crops of 224 is 128 for 112.
        if size.get("shortest_edge"):
            of = crop["height"] if cut and crop.get("height") else size["shortest_edge"]
            resize = (round(size["shortest_edge"] * min(height, width) / of),)
        elif cut and crop.get("height") and size.get("height"):
            resize = (
                round(size["height"] * height / crop["height"]),
                round(size["width"] * width / crop["width"]),
            )
        else:
            resize = (height, width)
    normalizes, rescales = found.do_normalize, found.do_rescale
    return ImageInput(
        height,
        width,
        resize,
        RESAMPLING[int(found.resample)],
        "BGR" if getattr(found, "do_flip_channel_order", False) else "RGB",
        float(found.rescale_factor) if rescales else 1.0,
        _three(found.image_mean) if normalizes else (0.0, 0.0, 0.0),
        _three(found.image_std) if normalizes else (1.0, 1.0, 1.0),
    )


def _sizes(size: Any) -> dict[str, int]:
    return {} if size is None else {key: int(value) for key, value in dict(size).items() if value}


def _three(numbers: Any) -> tuple[float, ...]:
    return tuple(float(n) for n in (numbers if isinstance(numbers, (list, tuple)) else [numbers] * 3))


def load_tokenizer(model: str) -> tuple[Tokenizer, TextFacts]:
    """The model's tokenizer in its tokenizer.json form, and what else must be known of it; the prefix is
    the caller's.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as problem:
        raise BadModel(f"{model}: no tokenizer found: {str(problem).splitlines()[0]}") from problem
    if not tokenizer.is_fast:
        raise BadModel(f"{model}: its tokenizer has no tokenizer.json form, which the runtime needs")
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    longest = int(min(tokenizer.model_max_length, 2**31))  # "no limit" is a number too large for a file
    return backend, TextFacts(prefix="", pad_id=int(tokenizer.pad_token_id or 0), longest=longest)


def network_from_checkpoint(
    folder: str, labels: tuple[str, ...], policy: str | None, seed: int
) -> Checkpoint:
    """A trained checkpoint to go on from, with policies added (random, by `seed`) where the recipe wants
    them.
    """
    checkpoint = load_checkpoint(folder)
    spec = checkpoint.network.spec
    if spec.labels != labels:
        raise BadCheckpoint(
            f"{folder} was trained for the labels {list(spec.labels)}, the data has {list(labels)}"
        )
    if policy != spec.policy:
        old = checkpoint.network.state_dict()
        torch.manual_seed(seed)
        config = checkpoint.network.config
        wanted = NetworkSpec(spec.labels, spec.exits, spec.pooling, policy, spec.dropout)
        network = EarlyExitNetwork(AutoModel.from_config(config), wanted)
        kept = {name: value for name, value in old.items() if not name.startswith("policies")}
        network.load_state_dict(kept, strict=False)
        checkpoint.network = network
    elif spec.forecast:
        # They tell the errors of the very weights that they were fitted on.
        checkpoint.network.forecasts = torch.nn.ModuleList()
        checkpoint.network.spec = dataclasses.replace(spec, forecast=())
    return checkpoint


def text_facts(found: TextFacts, network: EarlyExitNetwork, prefix: str, max_length: int) -> TextFacts:
    """The prefix, and the longest input that tokenizer, position embedding and wish allow."""
    return TextFacts(prefix, found.pad_id, min(found.longest, network.longest, max_length))
