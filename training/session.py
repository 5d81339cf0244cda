"""One training from wish to checkpoint: network, data, recipe, dev figures, the folder."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState

from offramp.training.batches import encode_for
from offramp.training.checkpoint import Checkpoint, read_json, save_checkpoint, write_json
from offramp.training.data import Columns, load_data
from offramp.training.loop import Run, best_precision
from offramp.training.pixels import parse_augment
from offramp.training.prepare import (
    fresh_network,
    image_facts,
    load_tokenizer,
    network_from_checkpoint,
    text_facts,
)
from offramp.training.recipes import load_recipe
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
    image_column: str = "image"
    image_size: int | None = None
    whole_image: bool = False
    augment: str = "none"

    def __post_init__(self) -> None:
        if (self.model is None) == (self.init is None):
            raise BadSetting("give one of --model (a backbone) and --init (a checkpoint to go on from)")


def train_wish(wish: TrainingWish) -> dict[str, Any]:
    """Train a classifier or, with a recipe for those, a language model; gives what training.json says."""
    if getattr(load_recipe(wish.recipe), "GENERATES", False):
        from offramp.training.decoders import train_decoder

        return train_decoder(wish)
    return train_checkpoint(wish).training


def train_checkpoint(wish: TrainingWish) -> Checkpoint:
    """Train as wished, resuming from `out`.partial if it is there, and write the checkpoint folder whole."""
    recipe = load_recipe(wish.recipe)
    settings = settings_from(recipe.SETTINGS, wish.wishes)
    try:
        augment = parse_augment(wish.augment)
    except ValueError as problem:
        raise BadSetting(f"--augment {problem}") from problem
    columns = Columns(wish.text_column, wish.text_b_column, wish.label_column, wish.image_column)
    data = load_data(wish.data, columns)
    if not data.images and (augment or wish.whole_image):
        raise BadSetting(f"--augment and --whole-image are for images, and {wish.data} holds text")
    if "train" not in data.splits:
        raise BadSetting(f"{wish.data} has no train split")
    partial = wish.out.with_name(wish.out.name + ".partial")
    policy = recipe.policy_of(settings)
    processes = PartialState()
    with processes.main_process_first():  # the first one writes the files that all of them read
        same_command(partial, wish)
        if wish.init is not None:
            if wish.image_size is not None or wish.whole_image:
                raise BadSetting("--image-size and --whole-image go with --model: a checkpoint has its own")
            checkpoint = network_from_checkpoint(wish.init, data.labels, policy, wish.seed)
            tokenizer = None if checkpoint.tokenizer is None else checkpoint.tokenizer.read_text("utf-8")
        else:
            checkpoint, tokenizer = _fresh(wish, data.labels, policy)
        if tokenizer is not None:
            checkpoint.tokenizer = partial / "tokenizer.json"
        if processes.is_main_process:
            partial.mkdir(parents=True, exist_ok=True)
            if checkpoint.tokenizer is not None and tokenizer is not None:
                checkpoint.tokenizer.write_text(tokenizer, encoding="utf-8")
            write_json(partial / "command.json", command_of(wish))
    precision = precision_of(wish)
    run = Run(checkpoint.network, partial, seed=wish.seed, precision=precision, save_every=wish.save_every)
    say_resumed(run)
    train = encode_for(checkpoint, data.splits["train"], augment)
    dev = encode_for(checkpoint, data.splits["dev"])
    found = recipe.train(run, train, dev, settings, skip_warm_start=wish.init is not None)
    run.log(finished=wish.recipe)  # a recipe whose stages were all spared logs nothing else
    checkpoint.training = {
        "recipe": wish.recipe,
        "settings": dataclasses.asdict(settings),
        **told(wish, precision, {name: len(rows) for name, rows in data.splits.items()}),
        **found,
    }
    checkpoint.network.to("cpu")
    if run.main:
        save_checkpoint(checkpoint, wish.out)
        shutil.copyfile(partial / "log.jsonl", wish.out / "log.jsonl")
        shutil.rmtree(partial)
    return checkpoint


def _fresh(wish: TrainingWish, labels: tuple[str, ...], policy: str | None) -> tuple[Checkpoint, str | None]:
    """The wished-for network on its pretrained backbone, and its tokenizer's JSON where it reads text."""
    assert wish.model is not None
    network = fresh_network(
        wish.model,
        labels,
        exits=wish.exits,
        pooling=wish.pooling,
        policy=policy,
        seed=wish.seed,
        image_size=wish.image_size,
    )
    if network.family.vision is not None:
        return Checkpoint(network, image_facts(wish.model, network, wish.whole_image), None), None
    tokenizer, found = load_tokenizer(wish.model)
    facts = text_facts(found, network, wish.prefix, wish.max_length)
    return Checkpoint(network, facts, None), tokenizer.to_str()


def precision_of(wish: TrainingWish) -> str:
    """What accelerate calls the wished precision."""
    return {"auto": best_precision(), "fp32": "no", "bf16": "bf16"}[wish.precision]


def say_resumed(run: Run) -> None:
    """Tell on stderr where a run goes on, unless it begins."""
    if run.position != {"stage": 0, "step": 0}:
        place = f"stage {run.position['stage'] + 1}, step {run.position['step']}"
        print(f"going on from {run.folder}: {place}", file=sys.stderr)


def told(wish: TrainingWish, precision: str, rows: dict[str, int]) -> dict[str, Any]:
    """What training.json says of any training: command, data, versions."""
    return {
        "command": {**dataclasses.asdict(wish), "out": str(wish.out), "wishes": list(wish.wishes)},
        "data": {"name": Path(wish.data).name, "rows": rows},
        "seed": wish.seed,
        "precision": precision,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")}
        | {"python": platform.python_version()},
    }


def same_command(partial: Path, wish: TrainingWish) -> None:
    """A resumed run must be the same run: refuse to go on from the state of a different command."""
    file = partial / "command.json"
    if file.is_file() and (partial / "state.json").is_file():
        before = read_json(file)
        changed = [name for name, value in command_of(wish).items() if before.get(name) != value]
        if changed:
            raise BadSetting(
                f"{partial} holds an unfinished run with another {', '.join(changed)}; "
                "repeat its command, or remove that folder"
            )


def command_of(wish: TrainingWish) -> dict[str, Any]:
    # Through JSON and back, so that tuples compare with the lists that were read.
    facts: dict[str, Any] = json.loads(
        json.dumps({**dataclasses.asdict(wish), "out": str(wish.out), "save_every": None})
    )
    return facts
