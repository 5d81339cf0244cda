"""The checkpoint: a folder of safetensors, JSON and a tokenizer, without pickles."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModel, PreTrainedConfig

from offramp.models.controllers import load_controllers
from offramp.models.decoder import DecoderNetwork
from offramp.models.draft_head import PREFIX, load_draft_head
from offramp.models.network import EarlyExitNetwork, NetworkSpec
from offramp.runtime.bundle.strict_json import build_value
from offramp.runtime.inputs.images import ImageInput
from offramp.runtime.inputs.tokenizer_checks import check_tokenizer, tokenizer_reason
from offramp.training.pretrained import check_config, first_line

WEIGHTS, NETWORK, TRAINING, TOKENIZER = (
    "weights.safetensors",
    "network.json",
    "training.json",
    "tokenizer.json",
)
EXITS = "exits.safetensors"  # beside a language model as transformers saves it
DRAFT_HEAD = "draft_head.safetensors"  # the same
FORMAT = 1


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
        "format": FORMAT,
        "backbone": network.config.to_dict(),
        "network": dataclasses.asdict(network.spec),
        input_key: dataclasses.asdict(checkpoint.input),
    }
    write_json(folder / NETWORK, description)
    write_json(folder / TRAINING, checkpoint.training)
    if checkpoint.tokenizer is not None:
        shutil.copyfile(checkpoint.tokenizer, folder / TOKENIZER)


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Read a checkpoint folder; raises BadCheckpoint, which names the file and the field that are wrong.

    Everything is compared with the header of the weights before memory is taken for them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadCheckpoint(f"{folder}: no such folder; train one with: ee-train --out {folder}")
    for name in (WEIGHTS, NETWORK, TRAINING):
        _require_file(folder / name)
    file = folder / NETWORK
    description = read_json(file)
    if (written := description.get("format")) != FORMAT:
        raise BadCheckpoint(f"{file}: format: {written!r:.40}; this version reads format {FORMAT}")
    kind = "image" if "image" in description else "text"
    try:
        unknown = description.keys() - {"format", "backbone", "network", kind}
        if unknown or not description.keys() >= {"backbone", "network", kind}:
            raise ValueError(f"expected backbone, network and {kind}, found {', '.join(description)[:200]}")
        spec = build_value(NetworkSpec, description["network"], "network")
        network_input: TextFacts | ImageInput = build_value(
            ImageInput if kind == "image" else TextFacts, description[kind], kind
        )
        if isinstance(network_input, TextFacts) and not 1 <= network_input.longest <= 2**31:
            raise ValueError(f"text.longest: {network_input.longest}; expected 1 or more")
        config = check_config(description["backbone"], "backbone")
        network = _network_of(config, spec, folder / WEIGHTS)
    except BadCheckpoint:
        raise
    except ValueError as problem:
        raise BadCheckpoint(f"{file}: {first_line(problem)}") from problem
    try:
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError) as problem:
        raise BadCheckpoint(f"{folder / WEIGHTS} does not fit {NETWORK}: {first_line(problem)}") from problem
    network.eval()
    tokenizer = None
    if isinstance(network_input, TextFacts):
        if not 0 <= network_input.pad_id < network.vocab_size:
            raise BadCheckpoint(f"{file}: text.pad_id: {network_input.pad_id} of {network.vocab_size} ids")
        tokenizer = _checked_tokenizer(_require_file(folder / TOKENIZER), network.vocab_size)
    return Checkpoint(network, network_input, tokenizer, read_json(folder / TRAINING))


def _network_of(config: PreTrainedConfig, spec: NetworkSpec, weights: Path) -> EarlyExitNetwork:
    """The network without its weights, whose shapes are compared with those of a file first."""

    def build() -> EarlyExitNetwork:
        return EarlyExitNetwork(AutoModel.from_config(config, trust_remote_code=False), spec)

    try:
        with safe_open(weights, "pt") as tensors:
            stored = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as problem:
        raise BadCheckpoint(f"{weights}: not safetensors: {first_line(problem)}") from problem
    try:
        with torch.device("meta"):  # takes no memory, however large the numbers are
            expected = {name: tuple(value.shape) for name, value in build().state_dict().items()}
    except Exception as problem:  # transformers checks little, so nearly anything can be raised
        raise ValueError(
            f"backbone and network: {type(problem).__name__}: {first_line(problem)}"
        ) from problem
    for name in sorted(expected.keys() | stored.keys()):
        if expected.get(name) != stored.get(name):
            raise BadCheckpoint(
                f"{weights} does not fit {NETWORK}: {name} is {_shape(stored.get(name))} in the file, and by "
                f"{NETWORK} {_shape(expected.get(name))}"
            )
    return build()


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _checked_tokenizer(file: Path, vocab_size: int) -> Path:
    """The file, if it is a tokenizer that can be used; raises BadCheckpoint."""
    try:
        text = file.read_text("utf-8")
        check_tokenizer(text, vocab_size)
        Tokenizer.from_str(text)
    except BaseException as problem:  # a panic of the library is no Exception
        reason = tokenizer_reason(problem)
        raise BadCheckpoint(f"{file}: not a tokenizer that can be used: {reason}") from problem
    return file


def save_exits(network: DecoderNetwork, folder: Path) -> None:
    """Write a language model's translators, policies, controllers and draft head into its folder, if any.

    The draft head has a file of its own.
    """
    added = {name: value for name, value in network.state_dict().items() if not name.startswith("model.")}
    for file, of_draft_head in ((EXITS, False), (DRAFT_HEAD, True)):
        tensors = {
            name: value.detach().cpu().contiguous()
            for name, value in added.items()
            if name.startswith(PREFIX) == of_draft_head
        }
        if tensors:
            save_file(tensors, folder / file)


def load_exits(network: DecoderNetwork, folder: str | Path) -> None:
    """Add the translators, policies, controllers and draft head in a language model's folder to the network.

    There may be none of them. Raises BadCheckpoint if they do not fit.
    """
    for name, load in ((EXITS, _load_exits), (DRAFT_HEAD, load_draft_head)):
        if not (file := Path(folder) / name).is_file():
            continue
        try:
            load(network, load_file(file))
        except (SafetensorError, OSError, RuntimeError, ValueError, IndexError, KeyError) as problem:
            reason = first_line(problem)
            raise BadCheckpoint(f"{file} does not fit the model beside it: {reason}") from problem


def _load_exits(network: DecoderNetwork, tensors: dict[str, torch.Tensor]) -> None:
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
    except RecursionError:
        raise BadCheckpoint(f"{path}: not valid JSON: nested too deeply") from None
    except ValueError as problem:
        raise BadCheckpoint(f"{path}: not valid JSON: {first_line(problem)}") from problem
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; an old folder of that name is removed only after the new one is in place.

    If the renaming fails, the old folder has its name again.
    """
    # Hidden and with a suffix of offramp, so that it is no backup of a user.
    old = folder.with_name(f".{folder.name}.replaced-by-ee-train")
    if old.exists() and not folder.exists():
        old.rename(folder)  # an earlier run was killed between the two renames below
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
