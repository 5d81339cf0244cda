"""Labelled rows from JSON lines: what calibrating and measuring a bundle needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.errors import BadInput
from offramp.runtime.inputs import Item


@dataclass(frozen=True)
class Labelled:
    """Texts (or pairs) and the numbers of their labels [rows]; name: the file's, without folders."""

    name: str
    items: tuple[Item, ...]
    labels: NDArray[np.int64]


def read_labelled(file: Path, names: Sequence[str]) -> Labelled:
    """Read JSON lines with "text" (and "text_b") and "label", a name out of `names` or its number.

    Raises BadInput that names file, line and field.
    """
    items: list[Item] = []
    labels: list[int] = []
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    place = f"{file}, line {number}"
                    row = _row(line, place)
                    items.append(row["text"] if row.get("text_b") is None else (row["text"], row["text_b"]))
                    labels.append(label_number(row.get("label"), names, place))
    except (OSError, UnicodeDecodeError) as problem:
        raise BadInput(f"{file}: cannot be read as UTF-8 text: {problem}") from problem
    if not items:
        raise BadInput(f"{file}: it is empty; give JSON lines with text and label")
    return Labelled(file.name, tuple(items), np.array(labels, np.int64))


def _row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise BadInput(f"{place}: not JSON: {problem}") from problem
    if not isinstance(row, dict):
        raise BadInput(f"{place}: expected a JSON object, found {type(row).__name__}")
    for name in ("text", "text_b"):
        found = row.get(name)
        if not (isinstance(found, str) and found.strip()) and not (name == "text_b" and found is None):
            raise BadInput(f'{place}: "{name}" is not a text: {found!r:.40}')
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
