"""The model that a user brings: its backbone and, if it is a fine-tuned classifier, its head and labels."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

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
from offramp.training.pretrained import (
    check_weights,
    first_line,
    load_pretrained_config,
    read_weights,
    wrapper_of,
)
from offramp.training.user_input import (
    check_tokenizer_settings,
    lowercases,
    match_image_size,
    match_token_types,
    preprocessor_of,
    read_tokenizer,
)

DROPOUT = 0.1
HEADS = ("classifier.", "pre_classifier.", "score.")  # how names of weights of trained heads begin
POOLING_MODE = "pooling_mode_"
# Poolings of sentence-transformers, and what they read as OwnPool names it.
SENTENCE_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}


@dataclass(frozen=True)
class UserModel:
    """A loaded model: name as in --model, backbone, own head (None: it has none), and the head's labels.

    unit: whether its embeddings have unit length, if it embeds sentences. tokenizer: as transformers reads
    it; None for a model of images.
    """

    name: str
    backbone: PreTrainedModel
    head: OwnHead | None = None
    labels: tuple[str, ...] = ()
    unit: bool = True
    tokenizer: Any = None


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
        if getattr(config, "is_decoder", False):
            raise BadModel(
                f"{model}: config.json.is_decoder: tokens of this model read only those before them, and "
                "encoders with that have no adapter; take it out if the model was not trained with it"
            )
    except BadModel:
        raise
    except UnsupportedFamily as problem:
        raise BadModel(f"{model}: {problem}") from problem
    except (OSError, ValueError) as problem:
        raise _not_loaded(model, problem) from problem
    return config


def own_task(model: str) -> str | None:
    """The task of a model's trained head by its configuration; None without one. Raises BadModel."""
    return task_of_head(load_config(model))


def load_user_model(
    model: str,
    seed: int,
    task: str = CLASSIFICATION,
    *,
    pairs: bool = True,
    image_size: int | None = None,
    no_crop: bool = False,
) -> UserModel:
    """Load a model from a hub name or a folder, with its own head if it has a trained one for the task.

    seed: for weights that the file lacks. pairs: whether the data has pairs of texts; see match_token_types.
    image_size: side of the images that the network will read; None for the size that the preprocessor makes,
    where the model reads several. new_network changes the backbone to it. no_crop: see preprocessor_of.
    A head of another task is dropped, and a line on stderr says so.
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
        if family_of(config.model_type).vision is not None:
            tokenizer, processor = None, preprocessor_of(model, no_crop=no_crop)
        else:
            tokenizer = processor = read_tokenizer(model)
            check_tokenizer_settings(tokenizer)
        matched = partial(
            _matched_to_inputs, model, processor, pairs=pairs, image_size=image_size, no_crop=no_crop
        )
        if task == EMBEDDING:
            pooling, unit = sentence_pooling(model, tokenizer)
            head = OwnHead(pooling, (), DROPOUT)
            return UserModel(model, matched(_backbone(model)), head, unit=unit, tokenizer=tokenizer)
        if own != task:
            backbone = matched(_backbone(model, names_head=own is not None))
            return UserModel(model, backbone, tokenizer=tokenizer)
        labels = _labels_of(config, task)
        classifier, report = read_weights(classification_class(config, per_token=per_token), model)
        if not report["missing_keys"]:
            check_weights(classifier, (), report["unexpected_keys"], base=True)
        head = own_head_of(classifier, DROPOUT, per_token=per_token)
        backbone = matched(cast("PreTrainedModel", classifier.base_model))
    except NoOwnHead as problem:
        raise BadModel(
            f"{model}: {problem}; load its backbone alone with transformers and save that"
        ) from problem
    except BadModel:
        raise
    except Exception as problem:  # files that do not fit make transformers raise nearly anything
        raise _not_loaded(model, problem) from problem
    if missing := sorted(report["missing_keys"]):
        cure = wrapper_of(missing, report["unexpected_keys"]) or (
            "save the fine-tuned model again, or take the name out of `architectures` to train a new head"
        )
        raise BadModel(
            f"{model}: config.json names {type(classifier).__name__}, but the weights have no {missing[0]}; "
            f"{cure}"
        )
    return UserModel(model, backbone, head, labels, tokenizer=tokenizer)


def _labels_of(config: PreTrainedConfig, task: str) -> tuple[str, ...]:
    """The names of a trained head's outputs, in order; none for a value. Raises ValueError."""
    if task == REGRESSION:
        if config.num_labels != 1:
            raise ValueError(
                f"config.json: problem_type is regression, and id2label has {config.num_labels} entries; "
                "only one value for each row is supported"
            )
        return ()
    names: Any = config.id2label or {}
    if sorted(names) != list(range(len(names))):
        raise ValueError(
            f"config.json.id2label: the outputs {sorted(names)[:10]} have names; number them from 0 to "
            f"{len(names) - 1}, in the order of the head's outputs"
        )
    labels = tuple(str(names[number]) for number in range(len(names)))
    for number, label in enumerate(labels):
        if not label or label in labels[:number]:
            fault = f"has the name {label!r} of another one" if label else "has no name"
            raise ValueError(f"config.json.id2label: output {number} {fault}; give each output its own name")
    return labels


def _backbone(model: str, *, names_head: bool = True) -> PreTrainedModel:
    """The base model of a hub name or a folder; weights are read from safetensors, never from pickles.

    names_head: whether the configuration names a classification model; if not, a line on stderr reports
    weights of one.
    """
    backbone, report = read_weights(AutoModel, model)
    check_weights(backbone, report["missing_keys"], report["unexpected_keys"], base=True)
    heads = sorted(key for key in report["unexpected_keys"] if key.startswith(HEADS))
    if heads and not names_head:
        named = getattr(backbone.config, "architectures", None)
        print(
            f"{model}: the files hold {heads[0]}, a head that is not read: config.json.architectures is "
            f"{named}, and names no classification model of transformers",
            file=sys.stderr,
        )
    return backbone


def _matched_to_inputs(
    model: str,
    processor: Any,
    backbone: PreTrainedModel,
    *,
    pairs: bool,
    image_size: int | None,
    no_crop: bool,
) -> PreTrainedModel:
    """The backbone, which reads what its tokenizer or preprocessor gives as transformers does.

    processor: tokenizer or preprocessor, None if there is no preprocessor. Others: see load_user_model.
    """
    if processor is not None and family_of(backbone.config.model_type).vision is None:
        match_token_types(model, backbone, processor, pairs=pairs)
    elif processor is not None and image_size is None:
        match_image_size(model, backbone, processor, no_crop=no_crop)
    # A graph could not count the parts of a text. They save memory and change no answer.
    parts: list[Any] = [backbone.config, *backbone.modules()]
    for part in parts:
        if getattr(part, "chunk_size_feed_forward", 0):
            part.chunk_size_feed_forward = 0
    return backbone


def _not_loaded(model: str, problem: Exception) -> BadModel:
    if isinstance(problem, OSError) and not Path(model).is_dir():
        return BadModel(f"{model}: neither a model folder here nor given by the hub: {first_line(problem)}")
    kind = "" if isinstance(problem, (ValueError, OSError)) else f"{type(problem).__name__}: "
    return BadModel(f"{model}: it cannot be loaded: {kind}{first_line(problem)}")


def sentence_pooling(model: str, tokenizer: Any = None) -> tuple[str, bool]:
    """How a model pools its tokens, "mean" or "first", and whether its embeddings have unit length.

    It is read from the files of sentence-transformers in the model's folder; without them it is the mean at
    unit length, and a line on stderr says so. tokenizer: as transformers reads it; None if it
    need not be checked. Raises BadModel for modules and settings that are not supported.
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
        reads, unit, reads_prompt = _pooling_of(model, listing)
        _check_sentence_settings(model, tokenizer, reads_prompt)
        return reads, unit
    except BadModel:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as problem:
        raise BadModel(f"{listing}: {type(problem).__name__}: {first_line(problem)}") from problem


def _pooling_of(model: str, listing: str) -> tuple[str, bool, bool]:
    """What sentence_pooling gives, and whether the pooling reads the tokens of a prompt.

    listing: the path of modules.json. Raises nearly anything for other contents.
    """
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
    facts = json.loads(Path(file).read_text("utf-8"))
    modes = sorted(name for name, on in facts.items() if on is True and name.startswith(POOLING_MODE))
    if isinstance(mode := facts.get("pooling_mode"), str):  # as newer versions write it
        modes = [f"{POOLING_MODE}{mode}{'_token' if mode == 'cls' else '_tokens'}"]
    if len(modes) == 1 and modes[0] in SENTENCE_POOLINGS:
        reads = SENTENCE_POOLINGS[modes[0]]
        return reads, "Normalize" in kinds, reads == "first" or bool(facts.get("include_prompt", True))
    raise BadModel(f"{file}: pooling {modes}; supported is one of {', '.join(SENTENCE_POOLINGS)}")


def _check_sentence_settings(model: str, tokenizer: Any, reads_prompt: bool) -> None:
    """Refuse or report what sentence-transformers does to a text before the tokenizer reads it.

    tokenizer: see sentence_pooling. reads_prompt: see _pooling_of.
    """
    facts = _json_of(model, "sentence_bert_config.json")
    if facts.get("do_lower_case") is True and tokenizer is not None and not lowercases(tokenizer):
        raise BadModel(
            f"{model}: sentence_bert_config.json.do_lower_case: its tokenizer keeps capital letters, and "
            'ee-run changes no text before it; set "do_lower_case" in tokenizer_config.json, or add '
            '{"type": "Lowercase"} to the normalizer in tokenizer.json'
        )
    if isinstance(longest := facts.get("max_seq_length"), int):
        print(
            f"{model}: sentence-transformers cuts texts after {longest} tokens; --max-length {longest} does "
            "the same",
            file=sys.stderr,
        )
    facts = _json_of(model, "config_sentence_transformers.json")
    name = facts.get("default_prompt_name")
    prompt = "" if name is None else str(facts["prompts"][name])
    if prompt and not reads_prompt:
        raise BadModel(
            f"{model}: sentence-transformers puts {prompt!r} before each text and leaves it out of the mean "
            "(include_prompt: false of its pooling), and ee-run takes the mean of all tokens; if the "
            'embeddings are to be those without a prompt, take "default_prompt_name" out of '
            "config_sentence_transformers.json"
        )
    if prompt:
        print(
            f"{model}: sentence-transformers puts {prompt!r} before each text; --prefix {prompt!r} does the "
            "same",
            file=sys.stderr,
        )


def _json_of(model: str, name: str) -> dict[str, Any]:
    """The object in a file of a model's folder or hub name; empty without the file."""
    file = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    value = {} if file is None else json.loads(Path(file).read_text("utf-8"))
    if not isinstance(value, dict):
        raise BadModel(f"{file}: expected an object")
    return value


def match_labels(data: Dataset, own: Sequence[str]) -> tuple[Dataset | None, str]:
    """The data with its labels renumbered as a model numbers its own, and a note on how they were matched.

    Labels match by name, without regard to case; or by number if the data has numbers, or the model has only
    the names LABEL_0, LABEL_1, …. The note is empty where the names are equal. None if they do not match; the
    note says why.
    """
    if not data.labels:
        return _renumbered(data, own, []), ""
    for as_compared in (str, str.casefold):  # names that differ only by case are names of their own
        by_name = {as_compared(name): number for number, name in enumerate(own)}
        wanted = [by_name.get(as_compared(name)) for name in data.labels]
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
