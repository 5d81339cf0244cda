"""From what the user typed to a network, its tokenizer and its data, ready to train."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, AutoTokenizer

from offramp.models.families import UnsupportedFamily, family_of
from offramp.models.network import EarlyExitNetwork, NetworkSpec, count_blocks, parse_exits
from offramp.training.checkpoint import BadCheckpoint, Checkpoint, TextFacts, load_checkpoint
from offramp.training.settings import BadSetting


class BadModel(ValueError):
    """A model that cannot be loaded or has no adapter; the message names it and the cure."""


def fresh_network(
    model: str, labels: tuple[str, ...], *, exits: str, pooling: str, policy: str | None, seed: int
) -> EarlyExitNetwork:
    """Exits and policies with random weights (by `seed`) on the pretrained backbone `model`, a hub name or
    a folder.
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
    try:
        spec = NetworkSpec(labels, parse_exits(exits, count_blocks(config)), pooling, policy)
    except ValueError as problem:
        raise BadSetting(f"--exits {exits}: {problem}") from problem
    torch.manual_seed(seed)
    return EarlyExitNetwork(backbone, spec)


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
