"""The parts of a decoder's training: model, exits, data, and a result folder that transformers loads."""

from __future__ import annotations

import ctypes
import hashlib
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from offramp.models.decoder import DecoderNetwork
from offramp.models.families import UnsupportedFamily, decoder_family_of
from offramp.models.network import parse_exits
from offramp.runtime.errors import BadSetting
from offramp.runtime.inputs.tokenizer_checks import tokenizer_reason
from offramp.training.checkpoint import TRAINING, load_exits, save_exits, write_json
from offramp.training.lm_data import load_token_rows
from offramp.training.loop import Run
from offramp.training.options import BadModel, TrainConfig
from offramp.training.pretrained import load_pretrained_config, load_weights, require_causal_lm
from offramp.training.recipes.base import DecoderRecipe, Settings

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
MALLOC_OPTIONS = ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 1 << 28))  # bytes


class DecoderTraining:
    """The parts of a training that only decoders have; see train.Training.

    Raises BadSetting for options that contradict each other or the data.
    """

    save_every = 600.0  # a state has about thirteen bytes a weight

    def __init__(self, config: TrainConfig, recipe: DecoderRecipe[Settings], settings: Settings) -> None:
        self.config, self.recipe, self.settings = config, recipe, settings
        if config.model is None:
            raise BadSetting(f"recipe {config.recipe} takes its model with --model, trained before or not")
        self.network, self.tokenizer = load_decoder(config.model)
        try:
            self.exits = parse_exits(config.exits, self.network.block_count)
        except ValueError as problem:
            raise BadSetting(f"--exits {config.exits}: {problem}") from problem
        longest = min(config.max_length, self.network.longest)
        self.rows = load_token_rows(config.data, self.tokenizer, longest, text=config.text_column)
        if "train" not in self.rows:
            raise BadSetting(f"{config.data} has no train split")
        self.row_counts = {name: len(rows) for name, rows in self.rows.items()}
        self.data_digest = hashlib.sha256(repr(self.rows).encode()).hexdigest()
        self.facts: dict[str, Any] = {"exits": list(self.exits)}

    def load(self) -> DecoderNetwork:
        """The network to train, with the modules that the recipe adds."""
        self.recipe.prepare(self.network, self.exits, self.settings)
        if not torch.cuda.is_available():
            keep_large_blocks()
        return self.network

    def write_inputs(self) -> None:
        """Write nothing, since a decoder's tokenizer is in memory."""

    def run_recipe(self, run: Run[DecoderNetwork]) -> dict[str, Any]:
        """Run the recipe's phases; gives its entries of training.json."""
        return self.recipe.train(run, self.rows, self.exits, self.settings)

    def write(self, folder: Path, training: dict[str, Any]) -> None:
        """Write model, exits, tokenizer and training.json into an empty folder."""
        self.network.model.save_pretrained(folder)
        save_exits(self.network, folder)
        self.tokenizer.save_pretrained(folder)
        write_json(folder / TRAINING, training)


def load_decoder(model: str) -> tuple[DecoderNetwork, PreTrainedTokenizerBase]:
    """Load a causal language model in float32, with the exits saved beside it, and its tokenizer.

    model: a hub name or a folder. Raises BadModel, BadCheckpoint.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = load_pretrained_config(model)
        decoder_family_of(config.model_type)  # before weights are read
        require_causal_lm(config)
        loaded = load_weights(AutoModelForCausalLM, model)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except BaseException as problem:  # files that do not fit raise nearly anything, a panic is no Exception
        reason = tokenizer_reason(problem)
        missing = isinstance(problem, OSError)
        kind = "neither a model folder here nor given: " if missing else "it cannot be loaded: "
        kind = "" if isinstance(problem, UnsupportedFamily) else kind
        raise BadModel(f"{model}: {kind}{reason}") from problem
    if tokenizer.eos_token_id is None:
        raise BadModel(f"{model}: its tokenizer has no end-of-text token, which ends every text")
    network = DecoderNetwork(loaded)
    load_exits(network, model)
    return network, tokenizer


def keep_large_blocks() -> bool:
    """Set glibc's allocator to keep large memory blocks for the rest of this process; False without glibc.

    The logits of a language model are hundreds of megabytes. By default glibc maps each block of this size
    anew and the kernel clears it page by page. That took three fifths of the time of adding a few such blocks
    (231 ms against 91, one core, trial), and two fifths of a training step of SmolLM2-135M.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(name, size) == 1 for name, size in MALLOC_OPTIONS])
