"""Text rows from hub names, folders and files, checked row by row."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}


class BadData(ValueError):
    """Data that cannot be used; the message names the file, the row and the cure."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read; text_b may be absent from the data."""

    text: str = "text"
    text_b: str = "text_b"
    label: str = "label"


@dataclass(frozen=True)
class Rows:
    """One split as plain lists; label is an index into the labels of the data."""

    text: list[str]
    text_b: list[str] | None
    label: np.ndarray  # [rows] int64

    def __len__(self) -> int:
        return len(self.text)

    def take(self, index: np.ndarray) -> Rows:
        """The rows at `index`, in that order."""
        text_b = None if self.text_b is None else [self.text_b[i] for i in index]
        return Rows([self.text[i] for i in index], text_b, self.label[index])


@dataclass(frozen=True)
class TextData:
    """Splits by the names train, dev, test (those that there are), and the names of the labels."""

    name: str
    labels: tuple[str, ...]
    splits: dict[str, Rows]

    def split(self, name: str) -> Rows:
        """A split by name; raises BadData listing those that there are."""
        if name not in self.splits:
            raise BadData(f"{self.name} has no split {name!r}; it has: {', '.join(self.splits)}")
        return self.splits[name]


def load_data(
    source: str, columns: Columns | None = None, *, dev_share: float = 0.1, say: Any = None
) -> TextData:
    """Read a data set: a file (JSON lines, CSV, parquet), a folder of split files, or a hub name ("name" or
    "name:configuration").

    Labels may be integers from 0 or strings. Without a dev split, `dev_share` of train is set aside with a
    fixed seed, and that is told on stderr. Raises BadData naming file and row.
    """
    columns = columns or Columns()
    datasets.disable_progress_bars()
    path = Path(source)
    if path.is_file():
        raw, names = _read_files({"train": path})
    elif path.is_dir():
        raw, names = _read_files(_split_files(path))
    else:
        raw, names = _read_hub(source)
    labels = _label_names(raw, names, columns)
    splits: dict[str, Rows] = {}
    for split, table in raw.items():
        rows = _check_rows(table, names[split], columns, labels)
        if rows is not None:
            splits[split] = rows
    if "train" in splits and "dev" not in splits:
        order = np.random.default_rng(0).permutation(len(splits["train"]))
        cut = max(1, round(dev_share * len(order)))
        train = splits.pop("train")
        splits = {
            "train": train.take(np.sort(order[cut:])),
            "dev": train.take(np.sort(order[:cut])),
            **splits,
        }
        print(
            f"{source}: no dev split; set {cut} of {len(order)} train rows aside (seed 0)",
            file=say or sys.stderr,
        )
    return TextData(source, labels, splits)


def _split_files(folder: Path) -> dict[str, Path]:
    found = {}
    for split, aliases in SPLIT_NAMES.items():
        files = [
            folder / (alias + suffix)
            for alias in aliases
            for suffix in BUILDERS
            if (folder / (alias + suffix)).is_file()
        ]
        if len(files) > 1:
            raise BadData(f"{folder}: {files[0].name} and {files[1].name} are both a {split} split; keep one")
        if files:
            found[split] = files[0]
    if not found:
        raise BadData(f"{folder}: no train/dev/test file ({', '.join(BUILDERS)}) in this folder")
    return found


def _read_files(files: dict[str, Path]) -> tuple[dict[str, Any], dict[str, str]]:
    raw, names = {}, {}
    for split, file in files.items():
        builder = BUILDERS.get(file.suffix)
        if builder is None:
            raise BadData(f"{file}: unknown kind of file; known: {', '.join(BUILDERS)}")
        if file.stat().st_size == 0:
            raise BadData(f"{file}: the file is empty; it needs rows with a text and a label")
        extra = {"sep": "\t"} if file.suffix == ".tsv" else {}
        try:
            raw[split] = datasets.load_dataset(builder, data_files=str(file), split="train", **extra)
        except Exception as problem:  # datasets wraps whatever its readers raise
            raise BadData(f"{file}{_bad_json_line(file)}: cannot be read: {_root(problem)}") from problem
        names[split] = str(file)
    return raw, names


def _bad_json_line(file: Path) -> str:
    """ ", row N" of the first line that is not JSON, where the file is JSON lines: the reader itself does
    not say.
    """
    if BUILDERS[file.suffix] != "json":
        return ""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                json.loads(line)
            except ValueError:
                return f", row {number}"
    return ""


def _root(problem: BaseException) -> str:
    while problem.__cause__ is not None:
        problem = problem.__cause__
    return f"{type(problem).__name__}: {problem}".splitlines()[0]


def _read_hub(source: str) -> tuple[dict[str, Any], dict[str, str]]:
    name, _, configuration = source.partition(":")
    try:
        found = datasets.load_dataset(name, configuration or None)
    except Exception as problem:
        raise BadData(
            f"{source}: neither a file nor a folder here, and the hub did not give it: {_root(problem)}"
        ) from problem
    raw = {
        split: found[alias] for split, aliases in SPLIT_NAMES.items() for alias in aliases if alias in found
    }
    return raw, {split: f"{source}[{split}]" for split in raw}


def _label_names(raw: dict[str, Any], names: dict[str, str], columns: Columns) -> tuple[str, ...]:
    split = "train" if "train" in raw else next(iter(raw))
    table = raw[split]
    for column in (columns.text, columns.label):
        if column not in table.column_names:
            have = ", ".join(table.column_names)
            raise BadData(
                f"{names[split]}: no column {column!r}; it has: {have}; "
                "name yours with --text-column, --label-column"
            )
    feature = table.features[columns.label]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    values = [
        value
        for other in raw.values()
        if columns.label in other.column_names
        for value in other[columns.label]
    ]
    if all(isinstance(value, str) for value in values):
        return tuple(sorted(set(table[columns.label])))
    integers = sorted({value for value in values if isinstance(value, int) and value >= 0})
    if integers != list(range(len(integers))):
        raise BadData(f"{names[split]}: integer labels must run from 0 without a gap, found {integers[:10]}")
    spoken = {}
    if "label_text" in table.column_names:
        spoken = dict(zip(table[columns.label], table["label_text"], strict=True))
    return tuple(str(spoken.get(value, value)) for value in integers)


def _check_rows(table: Any, name: str, columns: Columns, labels: tuple[str, ...]) -> Rows | None:
    """Rows of one split, or None for a split without labels (-1, as in public test sets)."""
    text, label = table[columns.text], table[columns.label]
    text_b = table[columns.text_b] if columns.text_b in table.column_names else None
    if len(text) == 0:
        raise BadData(f"{name}: no rows")
    if all(value == -1 for value in label):
        return None
    indices = {value: i for i, value in enumerate(labels)}
    numbers = np.zeros(len(text), np.int64)
    for row, (words, value) in enumerate(zip(text, label, strict=True), 1):
        if not isinstance(words, str) or not words.strip():
            raise BadData(
                f"{name}, row {row}: column {columns.text!r} must be a non-empty text, found {words!r}"
            )
        if text_b is not None and not isinstance(text_b[row - 1], str):
            raise BadData(
                f"{name}, row {row}: column {columns.text_b!r} must be a text, found {text_b[row - 1]!r}"
            )
        number = indices.get(value, -1) if isinstance(value, str) else value
        if not isinstance(number, int) or not 0 <= number < len(labels):
            raise BadData(f"{name}, row {row}: label {value!r} is not one of {list(labels)[:20]}")
        numbers[row - 1] = number
    return Rows(list(text), None if text_b is None else list(text_b), numbers)
