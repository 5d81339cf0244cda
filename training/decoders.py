"""One training of a language model from wish to checkpoint: a folder that transformers loads."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from offramp.models.decoder import DecoderNetwork
from offramp.models.families import UnsupportedFamily, decoder_family_of
from offramp.models.network import parse_exits
from offramp.training.allocator import keep_large_blocks
from offramp.training.checkpoint import TRAINING, load_exits, replace_folder, save_exits, write_json
from offramp.training.loop import Run
from offramp.training.prepare import BadModel
from offramp.training.recipes import load_recipe
from offramp.training.session import (
    TrainingWish,
    command_of,
    precision_of,
    same_command,
    say_resumed,
    told,
)
from offramp.training.settings import BadSetting, settings_from
from offramp.training.texts import load_texts

SAVED_EVERY = 600.0  # seconds, at least: a state is some thirteen bytes a weight


def load_decoder(model: str) -> tuple[DecoderNetwork, Any]:
    """The network of a causal language model, float32, its tokenizer, and the exits that lie beside it; a
    hub name or a folder. Raises BadModel, BadCheckpoint.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        decoder_family_of(AutoConfig.from_pretrained(model).model_type)  # before weights are read
        found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as problem:
        kind = "" if isinstance(problem, UnsupportedFamily) else "neither a model folder here nor given: "
        raise BadModel(f"{model}: {kind}{str(problem).splitlines()[0]}") from problem
    if tokenizer.eos_token_id is None:
        raise BadModel(f"{model}: its tokenizer has no end-of-text token, which ends every text")
    network = DecoderNetwork(found)
    load_exits(network, model)
    return network, tokenizer


def train_decoder(wish: TrainingWish) -> dict[str, Any]:
    """Train as wished, resuming from `out`.partial if it is there, and write the folder whole: model and
    tokenizer as transformers saves them, training.json, log.jsonl. Gives what training.json holds.
    """
    recipe = load_recipe(wish.recipe)
    settings = settings_from(recipe.SETTINGS, wish.wishes)
    if (model := wish.model) is None:
        raise BadSetting(f"recipe {wish.recipe} takes its model with --model, trained before or not")
    network, tokenizer = load_decoder(model)
    try:
        exits = parse_exits(wish.exits, network.block_count)
    except ValueError as problem:
        raise BadSetting(f"--exits {wish.exits}: {problem}") from problem
    texts = load_texts(wish.data, tokenizer, min(wish.max_length, network.longest), text=wish.text_column)
    if "train" not in texts:
        raise BadSetting(f"{wish.data} has no train split")
    if hasattr(recipe, "prepare"):
        recipe.prepare(network, exits, settings)
    partial = wish.out.with_name(wish.out.name + ".partial")
    same_command(partial, wish)
    partial.mkdir(parents=True, exist_ok=True)
    write_json(partial / "command.json", command_of(wish))
    precision = precision_of(wish)
    if not torch.cuda.is_available():
        keep_large_blocks()
    often = max(wish.save_every, SAVED_EVERY)
    run = Run(network, partial, seed=wish.seed, precision=precision, save_every=often)
    say_resumed(run)
    found = recipe.train(run, texts, exits, settings)
    run.log(finished=wish.recipe)
    network.to("cpu")
    training = {
        "recipe": wish.recipe,
        "settings": dataclasses.asdict(settings),
        "exits": list(exits),
        **told(wish, precision, {name: len(rows) for name, rows in texts.items()}),
        **found,
    }
    if run.main:
        _save(network, tokenizer, training, wish.out, partial)
    return training


def _save(network: DecoderNetwork, tokenizer: Any, training: Any, out: Path, partial: Path) -> None:
    beside = out.with_name(out.name + ".writing")
    shutil.rmtree(beside, ignore_errors=True)
    network.model.save_pretrained(beside)
    save_exits(network, beside)
    tokenizer.save_pretrained(beside)
    write_json(beside / TRAINING, training)
    shutil.copyfile(partial / "log.jsonl", beside / "log.jsonl")
    replace_folder(beside, out)
    shutil.rmtree(partial)


__all__ = ["load_decoder", "train_decoder"]
