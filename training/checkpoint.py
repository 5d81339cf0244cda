"""The checkpoint: a folder of safetensors, JSON and a tokenizer; nothing in it is ever unpickled."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from offramp.models.controllers import load_controllers
from offramp.models.decoder import DecoderNetwork
from offramp.models.network import EarlyExitNetwork, NetworkSpec
from offramp.runtime.inputs.images import ImageInput

WEIGHTS, NETWORK, TRAINING, TOKENIZER = (
    "weights.safetensors",
    "network.json",
    "training.json",
    "tokenizer.json",
)


EXITS = "exits.safetensors"  # beside a language model as transformers saves it


class BadCheckpoint(ValueError):
    """A checkpoint folder that is missing, incomplete or contradicts itself; the message names the file
    and the cure.
    """


@dataclass(frozen=True)
class TextFacts:
    """How text becomes token ids for this network: put before every text, padded with, cut to (tokens)."""

    prefix: str
    pad_id: int
    longest: int


@dataclass
class Checkpoint:
    """A trained network with everything needed to use it.

    input: how text becomes token ids, or images become pixels.
    tokenizer: the tokenizer.json that belongs to it; None where the network reads images.
    training: what training.json holds: recipe, settings, data name, seeds, versions, dev measurements,
    operating points.
    """

    network: EarlyExitNetwork
    input: TextFacts | ImageInput
    tokenizer: Path | None
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> TextFacts:
        """The facts of a network that reads text; raises BadCheckpoint for one that reads images."""
        if not isinstance(self.input, TextFacts):
            raise BadCheckpoint("this checkpoint reads images, and text is needed here")
        return self.input


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the folder whole or not at all: beside it first, then renamed. Replaces a checkpoint that
    stands there.
    """
    beside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    network = checkpoint.network
    # Cloned: policies share what reads their statistics, and safetensors refuses tensors that share memory.
    state = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()
    }
    save_file(state, beside / WEIGHTS)
    reads = "text" if isinstance(checkpoint.input, TextFacts) else "image"
    facts = {
        "format": 1,
        "backbone": network.config.to_dict(),
        "network": dataclasses.asdict(network.spec),
        reads: dataclasses.asdict(checkpoint.input),
    }
    write_json(beside / NETWORK, facts)
    write_json(beside / TRAINING, checkpoint.training)
    if checkpoint.tokenizer is not None:
        shutil.copyfile(checkpoint.tokenizer, beside / TOKENIZER)
    replace_folder(beside, folder)


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Read a checkpoint folder; raises BadCheckpoint naming the file that is missing or wrong."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadCheckpoint(f"{folder}: no such folder; train one with: ee-train --out {folder}")
    for name in (WEIGHTS, NETWORK, TRAINING):
        _must_be_there(folder / name)
    facts = read_json(folder / NETWORK)
    try:
        spec = dict(facts["network"])
        spec = {key: tuple(value) if isinstance(value, list) else value for key, value in spec.items()}
        backbone_facts = dict(facts["backbone"])
        config = AutoConfig.for_model(backbone_facts.pop("model_type"), **backbone_facts)
        reads = _image(facts["image"]) if "image" in facts else TextFacts(**facts["text"])
        network = EarlyExitNetwork(AutoModel.from_config(config), NetworkSpec(**spec))
    except (KeyError, TypeError) as problem:
        raise BadCheckpoint(f"{folder / NETWORK}: field missing or unknown: {problem}") from problem
    try:
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError) as problem:
        raise BadCheckpoint(f"{folder / WEIGHTS} does not fit {NETWORK}: {problem}") from problem
    network.eval()
    tokenizer = None if "image" in facts else _must_be_there(folder / TOKENIZER)
    return Checkpoint(network, reads, tokenizer, read_json(folder / TRAINING))


def save_exits(network: DecoderNetwork, folder: Path) -> None:
    """Write what a language model learned beyond itself, if anything: translators, policies, controllers."""
    own = {name: value for name, value in network.state_dict().items() if not name.startswith("model.")}
    if own:
        save_file({name: value.detach().cpu().contiguous() for name, value in own.items()}, folder / EXITS)


def load_exits(network: DecoderNetwork, folder: str | Path) -> None:
    """Give a language model the translators, policies and controllers of its folder, if any; raises
    BadCheckpoint where they do not fit.
    """
    if not (file := Path(folder) / EXITS).is_file():
        return
    try:
        own = load_file(file)
        named = [name.split(".") for name in own]
        if beyond := [int(block) for _, block, *_ in named if int(block) > network.block_count]:
            raise ValueError(f"it is for block {beyond[0]}, the model has {network.block_count}")
        blocks = sorted({int(block) for part, block, *_ in named if part in ("exits", "policies")})
        network.add_exits(blocks, policies=any(part == "policies" for part, *_ in named))
        if any(part == "controllers" for part, *_ in named):
            network.controllers = load_controllers(own, network.block_count, network.hidden_size)
        found = network.load_state_dict(own, strict=False)
        missing = [name for name in found.missing_keys if not name.startswith("model.")]
        if missing or found.unexpected_keys:
            raise ValueError(f"{[*missing, *found.unexpected_keys][0]} is missing or unknown")
    except (SafetensorError, RuntimeError, ValueError, IndexError) as problem:
        raise BadCheckpoint(f"{file} does not fit the model beside it: {problem}") from problem


def _image(facts: dict[str, Any]) -> ImageInput:
    # JSON has no tuples.
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in facts.items()}
    return ImageInput(**values)


def _must_be_there(file: Path) -> Path:
    if not file.is_file():
        raise BadCheckpoint(f"{file} is missing: not a complete checkpoint; train it again with ee-train")
    return file


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside the target, then rename, so that no reader meets half a file."""
    beside = path.with_name(path.name + ".writing")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises BadCheckpoint naming the file and the line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise BadCheckpoint(f"{path}: not valid JSON: {problem}") from problem
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def replace_folder(new: Path, folder: Path) -> None:
    """Put `new` where `folder` stands; the old one is removed only once the new one is in its place."""
    old = folder.with_name(
        f".{folder.name}.replaced-by-ee-train"
    )  # hidden and ours: nobody's backup has this name
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
