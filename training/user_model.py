"""The model that a user brings: its backbone and, if it is a fine-tuned classifier, its head and labels."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from offramp.models.families import UnsupportedFamily, family_of
from offramp.models.own_head import (
    NoOwnHead,
    OwnHead,
    classification_class,
    names_own_head,
    own_head_of,
)
from offramp.training.data import NO_LABEL, BadData, Columns, Dataset, Rows, load_data
from offramp.training.options import BadModel

DROPOUT = 0.1


@dataclass(frozen=True)
class UserModel:
    """A loaded model: name as in --model, backbone, own head (None: it has none), and the head's labels."""

    name: str
    backbone: PreTrainedModel
    head: OwnHead | None = None
    labels: tuple[str, ...] = ()


def load_config(model: str) -> PreTrainedConfig:
    """Read the configuration of a model, a hub name or a folder, of a supported family; raises BadModel."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model)
        family_of(config.model_type)
    except UnsupportedFamily as problem:
        raise BadModel(f"{model}: {problem}") from problem
    except (OSError, ValueError) as problem:
        raise _not_loaded(model, problem) from problem
    return config


def has_own_head(model: str) -> bool:
    """Whether a model's configuration names a classification model; False if it cannot be read."""
    try:
        return names_own_head(load_config(model))
    except BadModel:
        return False


def load_user_model(model: str, seed: int) -> UserModel:
    """Load a model from a hub name or a folder, with its own head if it is a classification model.

    seed: for weights that the file lacks. Raises BadModel for what cannot be loaded, and for a head of
    another task than single-label classification.
    """
    transformers.utils.logging.set_verbosity_error()  # notes on unused weights would hide our messages
    transformers.utils.logging.disable_progress_bar()
    config = load_config(model)
    torch.manual_seed(seed)
    try:
        if not names_own_head(config):
            return UserModel(model, AutoModel.from_pretrained(model, dtype=torch.float32))
        _require_single_label(model, config)
        loaded: tuple[Any, dict[str, Any]] = classification_class(config).from_pretrained(
            model, dtype=torch.float32, output_loading_info=True
        )
        classifier, report = loaded
        head = own_head_of(classifier, DROPOUT)
    except NoOwnHead as problem:
        raise BadModel(
            f"{model}: {problem}; load its backbone alone with transformers and save that"
        ) from problem
    except (OSError, ValueError) as problem:
        raise _not_loaded(model, problem) from problem
    if missing := sorted(report["missing_keys"]):
        raise BadModel(
            f"{model}: config.json names {type(classifier).__name__}, but the weights have no {missing[0]}; "
            "save the fine-tuned model again, or take the name out of `architectures` to train a new head"
        )
    names: Any = config.id2label
    labels = tuple(str(names[number]) for number in sorted(names))
    return UserModel(model, classifier.base_model, head, labels)


def _not_loaded(model: str, problem: Exception) -> BadModel:
    reason = str(problem).splitlines()[0]
    return BadModel(f"{model}: neither a model folder here nor given by the hub: {reason}")


def _require_single_label(model: str, config: PreTrainedConfig) -> None:
    kind = getattr(config, "problem_type", None)
    if config.num_labels == 1 or kind == "regression":
        raise BadModel(f"{model}: its head gives one number (regression), which is not supported")
    if kind == "multi_label_classification":
        raise BadModel(f"{model}: its head gives several labels at once, which is not supported")


def match_labels(data: Dataset, own: Sequence[str]) -> tuple[Dataset | None, str]:
    """The data with its labels renumbered as a model numbers its own, and a note on how they were matched.

    Labels match by name, without regard to case; or by number if the data has numbers, or the model has only
    the names LABEL_0, LABEL_1, …. The note is empty where the names are equal. None if they do not match; the
    note says why.
    """
    if not data.labels:
        return dataclasses.replace(data, labels=tuple(own)), ""
    by_name = {name.casefold(): number for number, name in enumerate(own)}
    wanted = [by_name.get(name.casefold()) for name in data.labels]
    if len(by_name) == len(own) and None not in wanted and len(set(wanted)) == len(wanted):
        return _renumbered(data, own, [number for number in wanted if number is not None]), ""
    numbers = all(name == str(number) for number, name in enumerate(data.labels))
    generic = all(name == f"LABEL_{number}" for number, name in enumerate(own))
    pairs = ", ".join(f"{b} = {a}" for a, b in zip(own, data.labels, strict=False))
    if (numbers and len(data.labels) <= len(own)) or (generic and len(data.labels) == len(own)):
        return _renumbered(data, own, list(range(len(data.labels)))), f"labels matched by number: {pairs}"
    return None, f"its labels are {list(own)[:20]}, those of the data {list(data.labels)[:20]}"


def _renumbered(data: Dataset, own: Sequence[str], numbers: Sequence[int]) -> Dataset:
    table = np.array([*numbers, NO_LABEL])  # NO_LABEL is -1, the last entry

    def renumber(rows: Rows) -> Rows:
        return dataclasses.replace(rows, label=table[rows.label])

    splits = {name: renumber(rows) for name, rows in data.splits.items()}
    return dataclasses.replace(data, labels=tuple(own), splits=splits)


def load_matching(source: str, columns: Columns, labels: Sequence[str]) -> Dataset:
    """Read labelled data as load_data does, numbered as a checkpoint with these labels numbers them.

    Raises BadData if the labels are others.
    """
    data = load_data(source, columns)
    matched, note = match_labels(data, labels)
    if matched is None:
        raise BadData(f"{source}: it does not fit the checkpoint: {note}")
    if note:
        print(f"{source}: {note}", file=sys.stderr)
    return matched


def without_labels(data: Dataset, own: Sequence[str]) -> Dataset:
    """The data with no label at any row, for a model with these labels."""
    splits = {
        name: dataclasses.replace(rows, label=np.full(len(rows), NO_LABEL))
        for name, rows in data.splits.items()
    }
    return dataclasses.replace(data, labels=tuple(own), splits=splits)
