"""Run one training from options to the checkpoint folder: network, data, recipe, dev figures."""

from __future__ import annotations

import dataclasses
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
        command = {**config.as_json(), "save_every": None, "content of --data": training.data_digest}
        _refuse_other_command(config, command)
        network = training.load()
        if processes.is_main_process:
            _prepare_folder(config)
            training.write_inputs()
            write_json(config.partial / "command.json", command)
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


def _prepare_folder(config: TrainConfig) -> None:
    """Make the folder of the run. Raises BadSetting if it cannot be written.

    What a run left there before its first state (hidden states) may be of another model or other data.
    """
    try:
        if config.partial.is_dir() and not (config.partial / "state.json").is_file():
            shutil.rmtree(config.partial)
        config.partial.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise BadSetting(f"--out {config.out}: {config.partial}: {problem.strerror}") from problem


def _refuse_other_command(config: TrainConfig, command: dict[str, Any]) -> None:
    """Raise BadSetting if the folder of the run holds the state of a different command.

    command: the options that must be equal for a run to be resumed, and a hash of the data.
    """
    file = config.partial / "command.json"
    if file.is_file() and (config.partial / "state.json").is_file():
        before = read_json(file)
        changed = [name for name, value in command.items() if before.get(name) != value]
        if changed:
            raise BadSetting(
                f"{config.partial} holds an unfinished run with another {', '.join(changed)}; "
                "repeat its command, or remove that folder"
            )
