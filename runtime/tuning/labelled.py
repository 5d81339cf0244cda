"""Rows that calibration and benchmarks read: labelled texts or images, prompts, prompts with completions."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.manifest import CLASSIFICATION, TOKENS
from offramp.runtime.errors import BadInput
from offramp.runtime.inputs.lines import IMAGES, PROMPTS, TEXTS, Line, read_lines
from offramp.runtime.inputs.text import Text
from offramp.runtime.tuning.row_labels import LABELS, joined_words, label_array, label_number

if TYPE_CHECKING:
    from offramp.runtime.inputs.chat import Message

MAX_COMPLETION = 64  # tokens of a completion that are read
MIN_PAIRS = 8  # prompts with completions


@dataclass(frozen=True)
class LabelledRows:
    """Rows with labels: texts, pairs of texts or paths of images, and what is right for them [rows].

    labels: numbers of labels (classification), bool [rows, labels] (multi-label), numbers (regression), or
    for each row a list of words with start, end and number of the label (tokens; dtype object); -1 for tasks
    without labels. name: of the file or folder, without its path.
    """

    name: str
    items: tuple[Text, ...]
    labels: NDArray[Any]


def read_labelled(
    file: Path, names: Sequence[str], *, images: bool = False, kind: str = CLASSIFICATION
) -> LabelledRows:
    """Read labelled rows from JSON lines with "text" (and "text_b"), and labels as row_labels.py has them.

    images: rows have "image", a path relative to the file's folder, instead of text; or, to classify, `file`
    is a folder that holds one folder of images for each label. kind: of the task, see Manifest.kind. Raises
    BadInput that names file, line and field.
    """
    labels_of = LABELS[kind]
    fields = " and ".join(["image" if images else "text", *labels_of.fields[:1]])
    if file.is_dir():
        if not images or kind != CLASSIFICATION:
            raise BadInput(f"{file}: a folder; give a file of JSON lines with {fields}")
        return _read_class_folders(file, names)
    items: list[Text] = []
    labels: list[Any] = []
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    place = f"{file}, line {number}"
                    row = _parse_row(line, place, ("image",) if images else ("text", "text_b"), kind)
                    items.append(_image_item(row["image"], file, place) if images else _text_item(row))
                    label = labels_of.read(row, names, place)
                    if label is None and labels_of.fields:
                        raise BadInput(f'{place}: no "{labels_of.fields[0]}"; every row needs one')
                    labels.append(label)
    except (OSError, UnicodeDecodeError) as problem:
        raise BadInput(f"{file}: cannot be read as UTF-8 text: {problem}") from problem
    if not items:
        raise BadInput(f"{file}: it is empty; give JSON lines with {fields}")
    return LabelledRows(file.name, tuple(items), label_array(labels))


def read_perhaps_labelled(
    file: Path, names: Sequence[str], *, images: bool = False, kind: str = CLASSIFICATION
) -> tuple[LabelledRows, bool]:
    """Read rows with labels (see read_labelled) or without any, also from plain lines.

    Gives whether they have labels, too; without, all labels are -1.
    """
    if file.is_dir() or _has_labels(file, LABELS[kind].fields):
        return read_labelled(file, names, images=images, kind=kind), True
    items, _, _ = read_rows(file, names, sys.maxsize, images=images, kind=kind)
    return LabelledRows(file.name, tuple(items), np.full(len(items), -1)), False


def _has_labels(file: Path, fields: Sequence[str]) -> bool:
    """Whether any line is a JSON object with one of the fields, not null; False for an unreadable file."""
    keys = [json.dumps(field).encode() for field in fields]
    try:
        with file.open("rb") as lines:
            return any(
                any(_json_object(line).get(field) is not None for field in fields)
                for line in lines
                if any(key in line for key in keys)  # a text may have the word, too
            )
    except OSError:
        return False


def read_rows(
    path: Path, names: Sequence[str], max_rows: int, *, images: bool = False, kind: str = CLASSIFICATION
) -> tuple[list[Text], NDArray[Any] | None, int]:
    """Read the first rows of a file of plain or JSON lines, with or without labels.

    Gives items, their labels (see LabelledRows; None without labels), and the number of rows in the file.
    images: lines are paths relative to the file's folder, or JSON with "image". kind: of the task. Empty
    lines are skipped. Raises BadInput naming the line.
    """
    data, lines = _read_lines(path, IMAGES if images else TEXTS, "lines", "text")
    raw, plain = data.split(b"\n"), not data.decode("utf-8-sig", "replace").lstrip().startswith("{")
    labels_of = LABELS[kind]
    items: list[Text] = []
    labels: list[Any] = []
    for line in lines[:max_rows]:
        place = f"{path}:{line.number}"
        row = {} if plain else _json_object(raw[line.number - 1])
        if kind == TOKENS and "tokens" in row:
            items.append(joined_words(row["tokens"], place))
        else:
            _raise_problem(line, place)
            items.append(str(path.parent / line.text) if images else line.item)
        labels.append(labels_of.read(row, names, place))
        if (labels[-1] is None) != (labels[0] is None):
            raise BadInput(f'{place}: "{labels_of.fields[0]}" must be on every line or on none')
    return items, None if labels[0] is None else label_array(labels), len(lines)


def read_prompts(
    path: Path, max_rows: int, encode_prompt: Callable[[str | Sequence[Message]], list[int]]
) -> tuple[list[list[int]], int]:
    """Read and encode the first prompts of a file; gives their token ids, and the number of prompts in it.

    Raises BadInput naming the line.
    """
    _, lines = _read_lines(path, PROMPTS, "prompts", "prompt")
    prompts = []
    for line in lines[:max_rows]:
        place = f"{path}:{line.number}"
        _raise_problem(line, place)
        try:
            prompts.append(encode_prompt(line.text or (line.others or {}).get("messages", "")))
        except BadInput as problem:
            raise BadInput(f"{place}: {problem}") from problem
    return prompts, len(lines)


def read_pairs(
    file: Path,
    max_tokens: int,
    encode_prompt: Callable[[str], list[int]],
    encode_completion: Callable[[str], list[int]],
) -> list[tuple[list[int], list[int]]]:
    """Read JSON lines of prompts and completions; gives the token ids of both for each line.

    A completion is cut to MAX_COMPLETION tokens and to half of max_tokens, a prompt to its last tokens such
    that both fit into max_tokens. Raises BadInput naming the line.
    """
    pairs = []
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as problem:
        raise BadInput(f"{file}: {problem.strerror}; name a file of JSON lines") from problem
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            prompt, completion = value["prompt"], value["completion"]
            if not (isinstance(prompt, str) and isinstance(completion, str)):
                raise ValueError("prompt and completion must be texts")
        except (ValueError, KeyError, TypeError) as problem:
            what = f"field {problem} is missing" if isinstance(problem, KeyError) else str(problem)
            raise BadInput(f"{file}, line {number}: {what}; expected prompt and completion") from problem
        longest = min(MAX_COMPLETION, max_tokens // 2)
        before, after = encode_prompt(prompt), encode_completion(completion)[:longest]
        if before and len(after) > 1:
            pairs.append((before[-(max_tokens - len(after)) :], after))
    if len(pairs) < MIN_PAIRS:
        raise BadInput(
            f"{file}: {len(pairs)} rows with a prompt and two tokens of completion, {MIN_PAIRS} are needed"
        )
    return pairs


def _text_item(row: dict[str, Any]) -> Text:
    return row["text"] if row.get("text_b") is None else (row["text"], row["text_b"])


def _image_item(name: str, file: Path, place: str) -> str:
    path = file.parent / name
    if not path.is_file():
        raise BadInput(f"{place}: no such image file: {path}")
    return str(path)


def _read_class_folders(folder: Path, names: Sequence[str]) -> LabelledRows:
    items: list[Text] = []
    labels: list[int] = []
    for inside in sorted(folder.iterdir()):
        if inside.is_dir() and not inside.name.startswith("."):
            number = label_number(inside.name, names, str(inside))
            files = sorted(file for file in inside.iterdir() if not file.name.startswith("."))
            items += [str(file) for file in files]
            labels += [number] * len(files)
    if not items:
        raise BadInput(f"{folder}: no images in it; expected a folder of images for each label")
    return LabelledRows(folder.name, tuple(items), np.array(labels, np.int64))


def _json_object(raw: bytes) -> dict[str, Any]:
    """The object of a JSON line; empty for any other line, which read_lines reports."""
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _parse_row(line: str, place: str, names: Sequence[str], kind: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise BadInput(f"{place}: not JSON: {problem}") from problem
    if not isinstance(row, dict):
        raise BadInput(f"{place}: expected a JSON object, found {type(row).__name__}")
    if kind == TOKENS and "tokens" in row:
        row = {**row, "text": joined_words(row["tokens"], place)}
    for name in names:
        value = row.get(name)
        if not (isinstance(value, str) and value.strip()) and not (name == "text_b" and value is None):
            what = "a path" if name == "image" else "a text"
            raise BadInput(f'{place}: "{name}" is not {what}: {value!r:.40}')
    return row


def _read_lines(path: Path, names: Sequence[str], what: str, item: str) -> tuple[bytes, list[Line]]:
    """The bytes of a file and its lines that are not empty; what: the word for its lines in errors."""
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise BadInput(f"{path}: {problem.strerror}; name a file of {what} with --data") from problem
    lines = [line for line in read_lines(io.BytesIO(data), names=names) if line.problem != "empty line"]
    if not lines:
        raise BadInput(f"{path}: no lines in it; put one {item} on each line")
    return data, lines


def _raise_problem(line: Line, place: str) -> None:
    if line.problem is not None:
        raise BadInput(f"{place}: {line.problem}; repair the line or take it out")
