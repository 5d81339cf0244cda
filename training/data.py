"""Rows of text or images from hub names, folders and files, checked row by row."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import datasets
import numpy as np

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}
NO_LABEL = -1  # in public test sets

# A data set's tables by split, and the name of each in messages.
Tables = tuple[dict[str, Any], dict[str, str]]


class BadData(ValueError):
    """Error for data that cannot be used; the message names the file, the row and the cure."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read; text_b is optional, image is read if there is no text column."""

    text: str = "text"
    text_b: str = "text_b"
    label: str = "label"
    image: str = "image"


@dataclass(frozen=True)
class ImageFiles:
    """Images of one split as bytes or paths of their files; places: file and row of each, for messages."""

    files: list[bytes | Path]
    places: list[str]

    def take(self, index: np.ndarray) -> ImageFiles:
        """The images at `index`, in that order."""
        return ImageFiles([self.files[i] for i in index], [self.places[i] for i in index])


@dataclass(frozen=True)
class Rows:
    """The rows of one split as plain lists; label is an index into the labels of the data.

    images: set instead of texts, which are empty lists then; not decoded yet.
    """

    text: list[str]
    text_b: list[str] | None
    label: np.ndarray  # [rows] int64
    images: ImageFiles | None = field(default=None)

    def __len__(self) -> int:
        return len(self.label)

    def take(self, index: np.ndarray) -> Rows:
        """The rows at `index`, in that order."""
        if self.images is not None:
            return Rows([], None, self.label[index], self.images.take(index))
        text_b = None if self.text_b is None else [self.text_b[i] for i in index]
        return Rows([self.text[i] for i in index], text_b, self.label[index])


@dataclass(frozen=True)
class Dataset:
    """A data set: label names, and the splits of text or images among train, dev and test that exist."""

    name: str
    labels: tuple[str, ...]
    splits: dict[str, Rows]

    @property
    def has_images(self) -> bool:
        """Whether the rows are images."""
        return any(rows.images is not None for rows in self.splits.values())

    def split(self, name: str) -> Rows:
        """The rows of a split by its name; raises BadData that lists the existing ones."""
        if name not in self.splits:
            raise BadData(f"{self.name} has no split {name!r}; it has: {', '.join(self.splits)}")
        return self.splits[name]


def load_data(
    source: str, columns: Columns | None = None, *, dev_share: float = 0.1, messages: TextIO | None = None
) -> Dataset:
    """Read a labelled data set of text or images from a file, a folder or the hub, and check every row.

    source: a file (JSON lines, CSV, parquet), a folder of split files or of images, or a hub name ("name" or
    "name:configuration"). Rows are images if there is an image column and no text column: the struct of bytes
    and path that `datasets` writes, or paths relative to the file's folder. A folder of images holds one
    folder for each label, or folders train, dev and test with such folders. Images are decoded later.

    Labels may be integers from 0 or strings. Without a dev split, `dev_share` of train is set aside with a
    fixed seed, and a line in `messages` (None: stderr) reports it. Raises BadData naming file and row.
    """
    columns = columns or Columns()
    tables, names = _read(Path(source), source, columns)
    labels = _label_names(tables, names, columns)
    splits: dict[str, Rows] = {}
    for split, table in tables.items():
        rows = _check_rows(table, names[split], columns, labels)
        if rows is not None:
            splits[split] = rows
    if "train" in splits and "dev" not in splits:
        order = np.random.default_rng(0).permutation(len(splits["train"]))
        count = max(1, round(dev_share * len(order)))
        train = splits.pop("train")
        splits = {
            "train": train.take(np.sort(order[count:])),
            "dev": train.take(np.sort(order[:count])),
            **splits,
        }
        print(
            f"{source}: no dev split; set {count} of {len(order)} train rows aside (seed 0)",
            file=messages or sys.stderr,
        )
    return Dataset(source, labels, splits)


def read_splits(source: str) -> dict[str, tuple[Any, str]]:
    """Read a data set with any columns; gives by split its table and its name for messages.

    source: as in load_data. Raises BadData naming the file.
    """
    tables, names = _read(Path(source), source, Columns())
    return {split: (table, names[split]) for split, table in tables.items()}


def _read(path: Path, source: str, columns: Columns) -> Tables:
    datasets.disable_progress_bars()
    if path.is_file():
        return _read_files({"train": path})
    if path.is_dir():
        files = _split_files(path)
        return _read_files(files) if files else _read_class_folders(path, columns)
    return _read_hub(source)


def _split_files(folder: Path) -> dict[str, Path]:
    split_files = {}
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
            split_files[split] = files[0]
    return split_files


def _read_class_folders(folder: Path, columns: Columns) -> Tables:
    """Tables of image paths from folders named by class, in train, dev and test or directly in `folder`.

    Paths are absolute.
    """
    split_folders = {
        split: folder / alias
        for split, aliases in SPLIT_NAMES.items()
        for alias in aliases
        if (folder / alias).is_dir()
    }
    tables, names = {}, {}
    for split, split_folder in (split_folders or {"train": folder}).items():
        classes = sorted(entry for entry in split_folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
        files = [
            file.absolute() for entry in classes for file in sorted(entry.iterdir()) if file.name[0] != "."
        ]
        if not files:
            raise BadData(
                f"{split_folder}: neither a train/dev/test file ({', '.join(BUILDERS)}) nor a folder of "
                "images for each label"
            )
        values = {columns.image: [str(file) for file in files], columns.label: [f.parent.name for f in files]}
        tables[split], names[split] = datasets.Dataset.from_dict(values), str(split_folder)
    return tables, names


def _read_files(files: dict[str, Path]) -> Tables:
    tables, names = {}, {}
    for split, file in files.items():
        builder = BUILDERS.get(file.suffix)
        if builder is None:
            raise BadData(f"{file}: unknown kind of file; known: {', '.join(BUILDERS)}")
        if file.stat().st_size == 0:
            raise BadData(f"{file}: the file is empty; it needs rows with a text and a label")
        extra = {"sep": "\t"} if file.suffix == ".tsv" else {}
        try:
            tables[split] = datasets.load_dataset(builder, data_files=str(file), split="train", **extra)
        except Exception as problem:  # datasets wraps any error of its readers
            reason = f"cannot be read: {_root_cause(problem)}"
            raise BadData(f"{file}{_bad_json_line(file)}: {reason}") from problem
        names[split] = str(file)
    return tables, names


def _bad_json_line(file: Path) -> str:
    """The text ", row N" for the first line of a JSON lines file that is not JSON, else "".

    The reader's own error does not contain it.
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


def _root_cause(problem: BaseException) -> str:
    while problem.__cause__ is not None:
        problem = problem.__cause__
    return f"{type(problem).__name__}: {problem}".splitlines()[0]


def _read_hub(source: str) -> Tables:
    name, _, configuration = source.partition(":")
    try:
        hub_splits = datasets.load_dataset(name, configuration or None)
    except Exception as problem:
        raise BadData(
            f"{source}: neither a file nor a folder here, and the hub did not give it: {_root_cause(problem)}"
        ) from problem
    tables = {
        split: hub_splits[alias]
        for split, aliases in SPLIT_NAMES.items()
        for alias in aliases
        if alias in hub_splits
    }
    return tables, {split: f"{source}[{split}]" for split in tables}


def _label_names(tables: dict[str, Any], names: dict[str, str], columns: Columns) -> tuple[str, ...]:
    split = "train" if "train" in tables else next(iter(tables))
    table = tables[split]
    for column in (_input_column(table, columns), columns.label):
        if column not in table.column_names:
            existing = ", ".join(table.column_names)
            raise BadData(
                f"{names[split]}: no column {column!r}; it has: {existing}; "
                "name yours with --text-column, --image-column, --label-column"
            )
    feature = table.features[columns.label]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    values = [
        value
        for other in tables.values()
        if columns.label in other.column_names
        for value in other[columns.label]
    ]
    if all(isinstance(value, str) for value in values):
        return tuple(sorted(set(table[columns.label])))
    integers = sorted({value for value in values if isinstance(value, int) and value >= 0})
    if integers != list(range(len(integers))):
        raise BadData(f"{names[split]}: integer labels must run from 0 without a gap, found {integers[:10]}")
    label_texts = {}
    if "label_text" in table.column_names:
        label_texts = dict(zip(table[columns.label], table["label_text"], strict=True))
    return tuple(str(label_texts.get(value, value)) for value in integers)


def _check_rows(table: Any, name: str, columns: Columns, labels: tuple[str, ...]) -> Rows | None:
    """The checked rows of one split, or None for a split without labels."""
    if columns.label not in table.column_names or _input_column(table, columns) not in table.column_names:
        raise BadData(f"{name}: it has not the columns of the other splits, but {table.column_names}")
    if _input_column(table, columns) == columns.image:
        return _check_images(table, name, columns, labels)
    text, label = table[columns.text], table[columns.label]
    text_b = table[columns.text_b] if columns.text_b in table.column_names else None
    if len(text) == 0:
        raise BadData(f"{name}: no rows")
    if all(value == NO_LABEL for value in label):
        return None
    for row, value in enumerate(text, 1):
        if not isinstance(value, str) or not value.strip():
            raise BadData(
                f"{name}, row {row}: column {columns.text!r} must be a non-empty text, found {value!r}"
            )
        if text_b is not None and not isinstance(text_b[row - 1], str):
            raise BadData(
                f"{name}, row {row}: column {columns.text_b!r} must be a text, found {text_b[row - 1]!r}"
            )
    numbers = _label_numbers(label, name, labels)
    return Rows(list(text), None if text_b is None else list(text_b), numbers)


def _label_numbers(values: Any, name: str, labels: tuple[str, ...]) -> np.ndarray:
    """Label numbers [rows] from numbers or names."""
    indices = {value: i for i, value in enumerate(labels)}
    numbers = np.zeros(len(values), np.int64)
    for row, value in enumerate(values, 1):
        number = indices.get(value, -1) if isinstance(value, str) else value
        if not isinstance(number, int) or not 0 <= number < len(labels):
            raise BadData(f"{name}, row {row}: label {value!r} is not one of {list(labels)[:20]}")
        numbers[row - 1] = number
    return numbers


def _input_column(table: Any, columns: Columns) -> str:
    """The name of the input column: the text column, or the image column if only that exists."""
    images = columns.text not in table.column_names and columns.image in table.column_names
    return columns.image if images else columns.text


def _check_images(table: Any, name: str, columns: Columns, labels: tuple[str, ...]) -> Rows | None:
    """The checked rows of one split of images, as bytes or paths; None for a split without labels."""
    label = table[columns.label]
    if len(label) == 0:
        raise BadData(f"{name}: no rows")
    if all(value == NO_LABEL for value in label):
        return None
    if isinstance(table.features[columns.image], datasets.Image):
        table = table.cast_column(columns.image, datasets.Image(decode=False))
    files: list[bytes | Path] = []
    places = [f"{name}, row {row}" for row in range(1, len(label) + 1)]
    for place, value in zip(places, table[columns.image], strict=True):
        image = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
        if not isinstance(image, (bytes, str)) or not image:
            raise BadData(
                f"{place}: column {columns.image!r} must hold the bytes or the path of an image, "
                f"found {value!r:.60}"
            )
        files.append(image if isinstance(image, bytes) else Path(name).parent / image)
    return Rows([], None, _label_numbers(label, name, labels), ImageFiles(files, places))
