"""Run one training from options to the checkpoint folder: network, data, recipe, dev figures."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

from accelerate import PartialState
from torch import nn

from offramp.models.tasks import EMBEDDING
from offramp.runtime.errors import BadSetting
from offramp.runtime.progress import note
from offramp.training.checkpoint import read_json, replace_folder, write_json
from offramp.training.classifier import ClassifierTraining
from offramp.training.decoder import DecoderTraining
from offramp.training.loop import Run, best_precision
from offramp.training.options import TrainConfig, parse_settings
from offramp.training.recipes import load_recipe
from offramp.training.user_model import own_task

COMMAND = "command.json"  # in the folder of a run: what must be equal for it to be resumed
N = TypeVar("N", bound=nn.Module)


class Training(Protocol[N]):
    """The parts of a training that depend on the kind of network.

    save_every: least seconds between states. row_counts: rows by split. data_digest: a hash of all rows.
    facts: entries of training.json besides those of the recipe.
    """

    save_every: float
    row_counts: dict[str, int]
    data_digest: str
    facts: dict[str, Any]

    def load(self) -> N:
        """Load or create the network to train."""
        ...

    def write_inputs(self) -> None:
        """Write the files that every process reads into the folder of the run."""
        ...

    def run_recipe(self, run: Run[N]) -> dict[str, Any]:
        """Run the recipe's phases; gives its entries of training.json."""
        ...

    def write(self, folder: Path, training: dict[str, Any]) -> None:
        """Write the trained network and training.json into an empty folder."""
        ...


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a classifier or a decoder, by the recipe's kind, and write the folder `out`.

    Gives the content of its training.json.

    Resumes from `out`.partial if it exists. Raises BadSetting, BadData, BadModel, BadCheckpoint.
    """
    name = config.recipe or default_recipe(config)
    recipe = load_recipe(name)
    settings = parse_settings(recipe.SETTINGS, config.settings)
    facts = {"recipe": name, "settings": dataclasses.asdict(settings)}
    if recipe.KIND == "classifier":
        return _train(config, ClassifierTraining(config, recipe, settings), facts)
    return _train(config, DecoderTraining(config, recipe, settings), facts)


def default_recipe(config: TrainConfig) -> str:
    """The recipe where the user names none: attach for a model with a trained head, else offramp.

    For sentence embeddings it is attach.
    """
    if config.task == EMBEDDING:
        return "attach"
    own = None if config.model is None else own_task(config.model)
    if own is None or config.task not in (None, own):
        return "offramp"
    note(
        f"{config.model} holds a fine-tuned model ({own}): recipe attach adds exits and keeps its answers; "
        "to train everything anew say --recipe offramp"
    )
    return "attach"


def _train(config: TrainConfig, training: Training[N], facts: dict[str, Any]) -> dict[str, Any]:
    processes = PartialState()
    with processes.main_process_first():  # the main process writes the files that all processes read
        if processes.is_main_process:
            _prepare_folder(config, training.data_digest)
        network = training.load()
        if processes.is_main_process:
            training.write_inputs()
    precision = {"auto": best_precision(), "fp32": "no", "bf16": "bf16"}[config.precision]
    save_every = max(config.save_every, training.save_every)
    run = Run(network, config.partial, seed=config.seed, precision=precision, save_every=save_every)
    if run.position != {"phase": 0, "step": 0}:
        place = f"phase {run.position['phase'] + 1}, step {run.position['step']}"
        note(f"going on from {run.folder}: {place}")
    results = training.run_recipe(run)
    run.log(finished=facts["recipe"])  # the log exists even if every phase was skipped
    facts |= {
        **training.facts,
        "command": config.as_json(),
        "data": {"name": Path(config.data).name, "rows": training.row_counts},
        "seed": config.seed,
        "precision": precision,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")}
        | {"python": platform.python_version()},
        **results,
    }
    network.to("cpu")
    if run.is_main_process:
        temporary = config.out.with_name(config.out.name + ".writing")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        training.write(temporary, facts)
        shutil.copyfile(config.partial / "log.jsonl", temporary / "log.jsonl")
        replace_folder(temporary, config.out)
        shutil.rmtree(config.partial)
    return facts


def _prepare_folder(config: TrainConfig, data_digest: str) -> None:
    """Make the folder of the run, or keep that of a run with the same command, model and data.

    What another run computed there before its first state is removed. Raises BadSetting if the folder holds
    the state of another run, or files of none, or cannot be written.
    """
    partial, file = config.partial, config.partial / COMMAND
    command = {**config.as_json(), "save_every": None}
    start = "--model" if config.init is None else "--init"
    command |= {
        "content of --data": data_digest,
        f"content of {start}": _fingerprint(config.init or config.model),
    }
    try:
        if file.is_file():
            before = read_json(file)
            changed = [name for name, value in command.items() if name in before and before[name] != value]
            if changed and (partial / "state.json").is_file():
                raise BadSetting(
                    f"{partial} holds an unfinished run with another {', '.join(changed)}; "
                    "repeat its command, or remove that folder"
                )
            if changed:
                shutil.rmtree(partial)
        elif partial.is_dir() and any(partial.iterdir()):
            raise BadSetting(f"{partial} is not the folder of a training; move it, or choose another --out")
        partial.mkdir(parents=True, exist_ok=True)
        write_json(file, command)
    except OSError as problem:
        raise BadSetting(f"--out {config.out}: {partial}: {problem.strerror}") from problem


def _fingerprint(model: str | None) -> str | None:
    """A hash of names, sizes and times of the files in a folder; None for a name on the hub."""
    if model is None or not Path(model).is_dir():
        return None
    files = [(file.name, file.stat()) for file in sorted(Path(model).iterdir()) if file.is_file()]
    facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()
