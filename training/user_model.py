"""The model that a user brings: its backbone and, if it is a fine-tuned classifier, its head and labels."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from offramp.models.families import DECODERS, UnsupportedFamily, family_of
from offramp.models.own_head import NoOwnHead, OwnHead, classification_class, own_head_of, task_of_head
from offramp.models.tasks import CLASSIFICATION, EMBEDDING, MULTI_LABEL, REGRESSION, TOKENS
from offramp.training.data import NO_LABEL, BadData, Columns, Dataset, Rows, Word, load_data
from offramp.training.options import BadModel
from offramp.training.pretrained import check_weights, first_line, load_pretrained_config, load_weights

DROPOUT = 0.1
# Poolings of sentence-transformers, and what they read as OwnPool names it.
SENTENCE_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}


@dataclass(frozen=True)
class UserModel:
    """A loaded model: name as in --model, backbone, own head (None: it has none), and the head's labels.

    unit: whether its embeddings have unit length, if it embeds sentences.
    """

    name: str
    backbone: PreTrainedModel
    head: OwnHead | None = None
    labels: tuple[str, ...] = ()
    unit: bool = True


def load_config(model: str) -> PreTrainedConfig:
    """Read the configuration of a model, a hub name or a folder, of a supported family; raises BadModel."""
    try:
        config = load_pretrained_config(model)
        if config.model_type in DECODERS:
            raise BadModel(
                f"{model}: a {config.model_type} model is a language model, and this recipe is for encoders; "
                "ee-split splits it as it is, and docs/decoders.md has recipes for language models"
            )
        family_of(config.model_type)
    except BadModel:
        raise
    except UnsupportedFamily as problem:
        raise BadModel(f"{model}: {problem}") from problem
    except (OSError, ValueError) as problem:
        raise _not_loaded(model, problem) from problem
    return config


def own_task(model: str) -> str | None:
    """The task of a model's trained head by its configuration; None without one, or if it cannot be read."""
    try:
        return task_of_head(load_config(model))
    except BadModel:
        return None


def load_user_model(model: str, seed: int, task: str = CLASSIFICATION) -> UserModel:
    """Load a model from a hub name or a folder, with its own head if it has a trained one for the task.

    seed: for weights that the file lacks. A head of another task is dropped, and a line on stderr says so.
    Sentence embeddings need no head: the model's pooling takes its place. Raises BadModel for what cannot be
    loaded.
    """
    transformers.utils.logging.set_verbosity_error()  # notes on unused weights would hide our messages
    transformers.utils.logging.disable_progress_bar()
    config = load_config(model)
    if getattr(config, "auto_map", None):
        print(
            f"{model}: its own code (auto_map) is not run; transformers' class for {config.model_type} "
            "reads it",
            file=sys.stderr,
        )
    torch.manual_seed(seed)
    own, per_token = task_of_head(config), task == TOKENS
    if own is not None and own != task:
        print(f"{model}: its own head is dropped: it is for {own}, and the task is {task}", file=sys.stderr)
    try:
        if task == EMBEDDING:
            pooling, unit = sentence_pooling(model)
            backbone = _backbone(model)
            return UserModel(model, backbone, OwnHead(pooling, (), DROPOUT), unit=unit)
        if own != task:
            return UserModel(model, _backbone(model))
        loaded: tuple[Any, dict[str, Any]] = classification_class(
            config, per_token=per_token
        ).from_pretrained(
            model,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        classifier, report = loaded
        if not report["missing_keys"]:
            check_weights(classifier, (), report["unexpected_keys"], base=True)
        head = own_head_of(classifier, DROPOUT, per_token=per_token)
    except NoOwnHead as problem:
        raise BadModel(
            f"{model}: {problem}; load its backbone alone with transformers and save that"
        ) from problem
    except BadModel:
        raise
    except Exception as problem:  # files that do not fit make transformers raise nearly anything
        raise _not_loaded(model, problem) from problem
    if missing := sorted(report["missing_keys"]):
        raise BadModel(
            f"{model}: config.json names {type(classifier).__name__}, but the weights have no {missing[0]}; "
            "save the fine-tuned model again, or take the name out of `architectures` to train a new head"
        )
    names: Any = {} if task == REGRESSION else config.id2label
    labels = tuple(str(names[number]) for number in sorted(names))
    return UserModel(model, classifier.base_model, head, labels)


def _backbone(model: str) -> PreTrainedModel:
    """The base model of a hub name or a folder; weights are read from safetensors, never from pickles."""
    return load_weights(AutoModel, model, base=True)


def _not_loaded(model: str, problem: Exception) -> BadModel:
    if isinstance(problem, OSError):
        return BadModel(f"{model}: neither a model folder here nor given by the hub: {first_line(problem)}")
    kind = "" if isinstance(problem, ValueError) else f"{type(problem).__name__}: "
    return BadModel(f"{model}: it cannot be loaded: {kind}{first_line(problem)}")


def sentence_pooling(model: str) -> tuple[str, bool]:
    """How a model pools its tokens, "mean" or "first", and whether its embeddings have unit length.

    It is read from the files of sentence-transformers in the model's folder; without them it is the mean at
    unit length, and a line on stderr says so. Raises BadModel for modules that are not supported.
    """
    listing = cached_file(model, "modules.json", _raise_exceptions_for_missing_entries=False)
    if listing is None:
        print(
            f"{model}: no modules.json of sentence-transformers; embeddings are the mean of the tokens, of "
            "length 1",
            file=sys.stderr,
        )
        return "mean", True
    try:
        return _pooling_of(model, listing)
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as problem:
        raise BadModel(f"{listing}: {type(problem).__name__}: {first_line(problem)}") from problem


def _pooling_of(model: str, listing: str) -> tuple[str, bool]:
    """See sentence_pooling; listing: the path of modules.json. Raises nearly anything for other contents."""
    modules = json.loads(Path(listing).read_text("utf-8"))
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    if unknown := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise BadModel(f"{listing}: module {unknown[0]} is not supported; only pooling and normalizing are")
    (folder,) = (
        str(module["path"]) for module, kind in zip(modules, kinds, strict=True) if kind == "Pooling"
    )
    if ".." in Path(folder).parts or Path(folder).is_absolute():
        raise BadModel(f"{listing}: path {folder[:60]!r} leads out of the model's folder")
    file = cached_file(model, f"{folder}/config.json", _raise_exceptions_for_missing_entries=False)
    if file is None:
        raise BadModel(f"{listing}: it names {folder[:60]!r}, which has no config.json")
    modes = {name for name, on in json.loads(Path(file).read_text("utf-8")).items() if on is True}
    for mode, reads in SENTENCE_POOLINGS.items():
        if mode in modes:
            return reads, "Normalize" in kinds
    raise BadModel(f"{file}: pooling {sorted(modes)}; supported are {', '.join(SENTENCE_POOLINGS)}")


def match_labels(data: Dataset, own: Sequence[str]) -> tuple[Dataset | None, str]:
    """The data with its labels renumbered as a model numbers its own, and a note on how they were matched.

    Labels match by name, without regard to case; or by number if the data has numbers, or the model has only
    the names LABEL_0, LABEL_1, …. The note is empty where the names are equal. None if they do not match; the
    note says why.
    """
    if not data.labels:
        return _renumbered(data, own, []), ""
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
        if data.task == MULTI_LABEL:
            label = np.zeros((len(rows), len(own)), np.float32)
            label[:, numbers] = rows.label
            label[~rows.has_label] = NO_LABEL
            return dataclasses.replace(rows, label=label)
        if rows.words is not None:
            words = [[word._replace(label=int(table[word.label])) for word in row] for row in rows.words]
            return dataclasses.replace(rows, words=words)
        if rows.label.dtype != np.int64:  # values
            return rows
        return dataclasses.replace(rows, label=table[rows.label])

    splits = {name: renumber(rows) for name, rows in data.splits.items()}
    return dataclasses.replace(data, labels=tuple(own), splits=splits)


def load_matching(
    source: str, columns: Columns, labels: Sequence[str], task: str = CLASSIFICATION
) -> Dataset:
    """Read labelled data as load_data does, numbered as a checkpoint with these labels numbers them.

    task: that of the checkpoint. Raises BadData if the labels are others.
    """
    data = load_data(source, columns, task=task, labels_needed=task != EMBEDDING)
    matched, note = match_labels(data, labels)
    if matched is None:
        raise BadData(f"{source}: it does not fit the checkpoint: {note}")
    if note:
        print(f"{source}: {note}", file=sys.stderr)
    return matched


def without_labels(data: Dataset, own: Sequence[str]) -> Dataset:
    """The data with no label at any row, for a model with these labels."""

    def unlabelled(rows: Rows) -> Rows:
        shape = (len(rows), len(own)) if data.task == MULTI_LABEL else (len(rows),)
        words = None if rows.words is None else [list[Word]() for _ in rows.words]
        none = math.nan if data.task == REGRESSION else NO_LABEL
        return dataclasses.replace(rows, label=np.full(shape, none, rows.label.dtype), words=words)

    splits = {name: unlabelled(rows) for name, rows in data.splits.items()}
    return dataclasses.replace(data, labels=tuple(own), splits=splits)
