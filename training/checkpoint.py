"""The checkpoint: a folder of safetensors, JSON and a tokenizer, without pickles."""

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
    """Error for a checkpoint folder that is missing, incomplete or inconsistent.

    The message names the file and the cure.
    """


@dataclass(frozen=True)
class TextFacts:
    """How a network's input text is prepared: prefix, padding id, longest input in tokens."""

    prefix: str
    pad_id: int
    longest: int


@dataclass
class Checkpoint:
    """A trained network with everything needed to use it.

    input: how text becomes token ids, or images become pixels.
    tokenizer: path of its tokenizer.json; None for a network that reads images.
    training: the content of training.json: recipe, settings, data name, seeds, versions, dev measurements,
    operating points.
    """

    network: EarlyExitNetwork
    input: TextFacts | ImageInput
    tokenizer: Path | None
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> TextFacts:
        """The input facts of a network that reads text; raises BadCheckpoint for one that reads images."""
        if not isinstance(self.input, TextFacts):
            raise BadCheckpoint("this checkpoint reads images, and text is needed here")
        return self.input


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a checkpoint folder completely or not at all; an old checkpoint there is replaced.

    A sibling folder is written first and then renamed.
    """
    temporary = folder.with_name(folder.name + ".writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_checkpoint(checkpoint, temporary)
    replace_folder(temporary, folder)


def write_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the checkpoint's files into an empty folder."""
    network = checkpoint.network
    # Cloned: policies share a perceptron, and safetensors refuses tensors that share memory.
    state = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()
    }
    save_file(state, folder / WEIGHTS)
    input_key = "text" if isinstance(checkpoint.input, TextFacts) else "image"
    description = {
        "format": 1,
        "backbone": network.config.to_dict(),
        "network": dataclasses.asdict(network.spec),
        input_key: dataclasses.asdict(checkpoint.input),
    }
    write_json(folder / NETWORK, description)
    write_json(folder / TRAINING, checkpoint.training)
    if checkpoint.tokenizer is not None:
        shutil.copyfile(checkpoint.tokenizer, folder / TOKENIZER)


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Read a checkpoint folder; raises BadCheckpoint naming the file that is missing or wrong."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadCheckpoint(f"{folder}: no such folder; train one with: ee-train --out {folder}")
    for name in (WEIGHTS, NETWORK, TRAINING):
        _require_file(folder / name)
    description = read_json(folder / NETWORK)
    try:
        spec = _with_tuples(description["network"])
        backbone = dict(description["backbone"])
        config = AutoConfig.for_model(backbone.pop("model_type"), **backbone)
        network_input: TextFacts | ImageInput
        if "image" in description:
            network_input = ImageInput(**_with_tuples(description["image"]))
        else:
            network_input = TextFacts(**description["text"])
        network = EarlyExitNetwork(AutoModel.from_config(config), NetworkSpec(**spec))
    except (KeyError, TypeError) as problem:
        raise BadCheckpoint(f"{folder / NETWORK}: field missing or unknown: {problem}") from problem
    try:
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError) as problem:
        raise BadCheckpoint(f"{folder / WEIGHTS} does not fit {NETWORK}: {problem}") from problem
    network.eval()
    tokenizer = None if "image" in description else _require_file(folder / TOKENIZER)
    return Checkpoint(network, network_input, tokenizer, read_json(folder / TRAINING))


def save_exits(network: DecoderNetwork, folder: Path) -> None:
    """Write a language model's translators, policies and controllers into its folder, if it has any."""
    added = {name: value for name, value in network.state_dict().items() if not name.startswith("model.")}
    if added:
        tensors = {name: value.detach().cpu().contiguous() for name, value in added.items()}
        save_file(tensors, folder / EXITS)


def load_exits(network: DecoderNetwork, folder: str | Path) -> None:
    """Add the translators, policies and controllers in a language model's folder to the network, if any.

    Raises BadCheckpoint if they do not fit.
    """
    if not (file := Path(folder) / EXITS).is_file():
        return
    try:
        tensors = load_file(file)
        names = [name.split(".") for name in tensors]
        if beyond := [int(block) for _, block, *_ in names if int(block) > network.block_count]:
            raise ValueError(f"it is for block {beyond[0]}, the model has {network.block_count}")
        blocks = sorted({int(block) for part, block, *_ in names if part in ("exits", "policies")})
        network.add_exits(blocks, policies=any(part == "policies" for part, *_ in names))
        if any(part == "controllers" for part, *_ in names):
            network.controllers = load_controllers(tensors, network.block_count, network.hidden_size)
        mismatch = network.load_state_dict(tensors, strict=False)
        missing = [name for name in mismatch.missing_keys if not name.startswith("model.")]
        if missing or mismatch.unexpected_keys:
            raise ValueError(f"{[*missing, *mismatch.unexpected_keys][0]} is missing or unknown")
    except (SafetensorError, RuntimeError, ValueError, IndexError) as problem:
        raise BadCheckpoint(f"{file} does not fit the model beside it: {problem}") from problem


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """The values with tuples in place of lists, since JSON has no tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _require_file(file: Path) -> Path:
    if not file.is_file():
        raise BadCheckpoint(f"{file} is missing: not a complete checkpoint; train it again with ee-train")
    return file


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a sibling file, then rename it, so that the file is never half written."""
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; raises BadCheckpoint naming the file and the line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise BadCheckpoint(f"{path}: not valid JSON: {problem}") from problem
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; an old folder of that name is removed only after the new one is in place."""
    # Hidden and with a suffix of offramp, so that it is no backup of a user.
    old = folder.with_name(f".{folder.name}.replaced-by-ee-train")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
