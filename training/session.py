"""One training from wish to checkpoint: network, data, recipe, dev figures, the folder."""

from __future__ import annotations

import dataclasses
import importlib
import json
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer

from offramp.training.batches import encode
from offramp.training.checkpoint import Checkpoint, read_json, save_checkpoint, write_json
from offramp.training.data import Columns, load_data
from offramp.training.loop import Run, best_precision
from offramp.training.prepare import (
    BadModel,
    fresh_network,
    network_from_checkpoint,
    save_tokenizer,
    text_facts,
)
from offramp.training.settings import BadSetting, settings_from


@dataclass(frozen=True)
class TrainingWish:
    """What ee-train was asked for, as it stands in training.json; the flags are described in its --help."""

    model: str | None
    init: str | None
    data: str
    recipe: str
    out: Path
    exits: str
    pooling: str
    prefix: str
    max_length: int
    seed: int
    precision: str
    wishes: tuple[str, ...]
    save_every: float
    text_column: str
    text_b_column: str
    label_column: str

    def __post_init__(self) -> None:
        if (self.model is None) == (self.init is None):
            raise BadSetting("give one of --model (a backbone) and --init (a checkpoint to go on from)")


def train_checkpoint(wish: TrainingWish) -> Checkpoint:
    """Train as wished, resuming from `out`.partial if it is there, and write the checkpoint folder whole."""
    recipe = importlib.import_module(f"offramp.training.recipes.{wish.recipe}")
    settings = settings_from(recipe.SETTINGS, wish.wishes)
    data = load_data(wish.data, Columns(wish.text_column, wish.text_b_column, wish.label_column))
    partial = wish.out.with_name(wish.out.name + ".partial")
    _same_command(partial, wish)
    policy = recipe.policy_of(settings)
    tokenizer_file = partial / "tokenizer.json"
    if wish.init is not None:
        start = network_from_checkpoint(wish.init, data.labels, policy, wish.seed)
        network, facts = start.network, start.text
        shutil.copyfile(start.tokenizer, tokenizer_file)
    else:
        assert wish.model is not None
        network = fresh_network(
            wish.model, data.labels, exits=wish.exits, pooling=wish.pooling, policy=policy, seed=wish.seed
        )
        facts = text_facts(save_tokenizer(wish.model, tokenizer_file), network, wish.prefix, wish.max_length)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    precision = {"auto": best_precision(), "fp32": "no", "bf16": "bf16"}[wish.precision]
    run = Run(network, partial, seed=wish.seed, precision=precision, save_every=wish.save_every)
    if run.position != {"stage": 0, "step": 0}:
        print(
            f"going on from {partial}: stage {run.position['stage'] + 1}, step {run.position['step']}",
            file=sys.stderr,
        )
    encoded = {name: encode(rows, tokenizer, facts) for name, rows in data.splits.items() if name != "test"}
    if "train" not in encoded:
        raise BadModel(f"{wish.data} has no train split")
    found = recipe.train(
        run, encoded["train"], encoded["dev"], settings, skip_warm_start=wish.init is not None
    )
    training = {
        "recipe": wish.recipe,
        "settings": dataclasses.asdict(settings),
        "command": {**dataclasses.asdict(wish), "out": str(wish.out), "wishes": list(wish.wishes)},
        "data": {
            "name": Path(wish.data).name,
            "rows": {name: len(rows) for name, rows in data.splits.items()},
        },
        "seed": wish.seed,
        "precision": precision,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")}
        | {"python": platform.python_version()},
        **found,
    }
    checkpoint = Checkpoint(network.to("cpu"), facts, tokenizer_file, training)
    if run.main:
        save_checkpoint(checkpoint, wish.out)
        shutil.copyfile(partial / "log.jsonl", wish.out / "log.jsonl")
        shutil.rmtree(partial)
    return checkpoint


def _same_command(partial: Path, wish: TrainingWish) -> None:
    """A resumed run must be the same run: refuse to go on from the state of a different command."""
    partial.mkdir(parents=True, exist_ok=True)
    file = partial / "command.json"
    # Through JSON and back, so that tuples compare with the lists that were read.
    facts = json.loads(json.dumps({**dataclasses.asdict(wish), "out": str(wish.out), "save_every": None}))
    if file.is_file():
        before = read_json(file)
        changed = [name for name, value in facts.items() if before.get(name) != value]
        if changed:
            raise BadSetting(
                f"{partial} holds an unfinished run with another {', '.join(changed)}; "
                "repeat its command, or remove that folder"
            )
    write_json(file, facts)
