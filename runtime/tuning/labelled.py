"""Labelled rows from JSON lines, or images in folders: what calibrating and measuring a bundle needs."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.errors import BadInput
from offramp.runtime.inputs.lines import IMAGES, TEXTS, read_lines
from offramp.runtime.inputs.text import Item


@dataclass(frozen=True)
class Labelled:
    """Texts (or pairs, or paths of images) and the numbers of their labels [rows]; name: the file's or
    folder's, without those it lies in.
    """

    name: str
    items: tuple[Item, ...]
    labels: NDArray[np.int64]


def read_labelled(file: Path, names: Sequence[str], *, images: bool = False) -> Labelled:
    """Read JSON lines with "text" (and "text_b") and "label", a name out of `names` or its number.

    images: "image", a path seen from the file's folder, instead of text; or `file` is a folder that holds one
    folder of images a label. Raises BadInput that names file, line and field.
    """
    if file.is_dir():
        if not images:
            raise BadInput(f"{file}: a folder; give a file of JSON lines with text and label")
        return _class_folders(file, names)
    items: list[Item] = []
    labels: list[int] = []
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    place = f"{file}, line {number}"
                    row = _row(line, place, ("image",) if images else ("text", "text_b"))
                    items.append(_image(row["image"], file, place) if images else _text(row))
                    labels.append(label_number(row.get("label"), names, place))
    except (OSError, UnicodeDecodeError) as problem:
        raise BadInput(f"{file}: cannot be read as UTF-8 text: {problem}") from problem
    if not items:
        raise BadInput(f"{file}: it is empty; give JSON lines with {'image' if images else 'text'} and label")
    return Labelled(file.name, tuple(items), np.array(labels, np.int64))


def _text(row: dict[str, Any]) -> Item:
    return row["text"] if row.get("text_b") is None else (row["text"], row["text_b"])


def _image(name: str, file: Path, place: str) -> str:
    path = file.parent / name
    if not path.is_file():
        raise BadInput(f"{place}: no such image file: {path}")
    return str(path)


def _class_folders(folder: Path, names: Sequence[str]) -> Labelled:
    items: list[Item] = []
    labels: list[int] = []
    for inside in sorted(folder.iterdir()):
        if inside.is_dir() and not inside.name.startswith("."):
            number = label_number(inside.name, names, str(inside))
            found = sorted(file for file in inside.iterdir() if not file.name.startswith("."))
            items += [str(file) for file in found]
            labels += [number] * len(found)
    if not items:
        raise BadInput(f"{folder}: no images in it; expected a folder of images for each label")
    return Labelled(folder.name, tuple(items), np.array(labels, np.int64))


def _row(line: str, place: str, names: Sequence[str]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise BadInput(f"{place}: not JSON: {problem}") from problem
    if not isinstance(row, dict):
        raise BadInput(f"{place}: expected a JSON object, found {type(row).__name__}")
    for name in names:
        found = row.get(name)
        if not (isinstance(found, str) and found.strip()) and not (name == "text_b" and found is None):
            what = "a path" if name == "image" else "a text"
            raise BadInput(f'{place}: "{name}" is not {what}: {found!r:.40}')
    return row


def label_number(value: object, names: Sequence[str], place: str) -> int:
    """The number of a label that is given by name or number; BadInput naming the place for anything else."""
    if isinstance(value, str) and value in names:
        return names.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return value
    if value is None:
        raise BadInput(f'{place}: no "label"; every row needs one')
    known = ", ".join(names[:20])
    raise BadInput(f"{place}: label {value!r:.40} is not one of: {known} (or a number below {len(names)})")


def read_data(
    path: Path, names: Sequence[str], most: int, *, images: bool = False
) -> tuple[list[Item], NDArray[np.int64] | None, int]:
    """Items, numbers of their labels (None: there are none) and how many rows the file holds.

    images: lines are paths seen from the file's folder, or JSON with "image". Raises BadInput naming the
    line; empty lines are passed over.
    """
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise BadInput(f"{path}: {problem.strerror}; name a file of lines with --data") from problem
    found = read_lines(io.BytesIO(data), names=IMAGES if images else TEXTS)
    lines = [line for line in found if line.problem != "empty line"]
    if not lines:
        raise BadInput(f"{path}: no lines in it; put one text on each line")
    raw, plain = data.split(b"\n"), not data.decode("utf-8-sig", "replace").lstrip().startswith("{")
    labels: list[int | None] = []
    for line in lines[:most]:
        where = f"{path}:{line.number}"
        if line.problem is not None:
            raise BadInput(f"{where}: {line.problem}; repair the line or take it out")
        label = None if plain else json.loads(raw[line.number - 1].decode("utf-8-sig")).get("label")
        if label is not None:
            label = label_number(label, names, where)
        labels.append(label)
        if (label is None) != (labels[0] is None):
            raise BadInput(f'{where}: "label" must be on every line or on none')
    items = [str(path.parent / line.text) if images else line.item for line in lines[:most]]
    return items, None if labels[0] is None else np.array(labels, np.int64), len(lines)
