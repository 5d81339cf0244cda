"""Rows of text or images from hub names, folders and files, checked row by row."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from offramp.training.rows import BadData, Columns, Pictures, Rows

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}


@dataclass(frozen=True)
class TextData:
    """Splits by the names train, dev, test (those that there are), and the names of the labels; text or
    images.
    """

    name: str
    labels: tuple[str, ...]
    splits: dict[str, Rows]

    @property
    def images(self) -> bool:
        """Whether the rows are images."""
        return any(rows.images is not None for rows in self.splits.values())

    def split(self, name: str) -> Rows:
        """A split by name; raises BadData listing those that there are."""
        if name not in self.splits:
            raise BadData(f"{self.name} has no split {name!r}; it has: {', '.join(self.splits)}")
        return self.splits[name]


def load_data(
    source: str, columns: Columns | None = None, *, dev_share: float = 0.1, say: Any = None
) -> TextData:
    """Read a data set: a file (JSON lines, CSV, parquet), a folder of split files or of images, or a hub name
    ("name" or "name:configuration").

    Rows are images where there is no text column but an image column: the struct of bytes and path that
    `datasets` writes, or paths, seen from the file's folder. A folder of images holds one folder a label, or
    train, dev and test that do. Images are decoded later.

    Labels may be integers from 0 or strings. Without a dev split, `dev_share` of train is set aside with a
    fixed seed, and that is told on stderr. Raises BadData naming file and row.
    """
    columns = columns or Columns()
    raw, names = _read(Path(source), source, columns)
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


def read_splits(source: str) -> dict[str, tuple[Any, str]]:
    """Tables of a data set of whatever columns, by the names of their splits; and what to call each in
    messages. Raises BadData naming the file.
    """
    raw, names = _read(Path(source), source, Columns())
    return {split: (table, names[split]) for split, table in raw.items()}


def _read(path: Path, source: str, columns: Columns) -> tuple[dict[str, Any], dict[str, str]]:
    datasets.disable_progress_bars()
    if path.is_file():
        return _read_files({"train": path})
    if path.is_dir():
        files = _split_files(path)
        return _read_files(files) if files else _read_folders(path, columns)
    return _read_hub(source)


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
    return found


def _read_folders(folder: Path, columns: Columns) -> tuple[dict[str, Any], dict[str, str]]:
    """Class folders, in train, dev and test or without; paths are absolute."""
    places = {
        split: folder / alias
        for split, aliases in SPLIT_NAMES.items()
        for alias in aliases
        if (folder / alias).is_dir()
    }
    raw, names = {}, {}
    for split, place in (places or {"train": folder}).items():
        classes = sorted(entry for entry in place.iterdir() if entry.is_dir() and entry.name[0] != ".")
        files = [
            file.absolute() for entry in classes for file in sorted(entry.iterdir()) if file.name[0] != "."
        ]
        if not files:
            raise BadData(
                f"{place}: neither a train/dev/test file ({', '.join(BUILDERS)}) nor a folder of images for "
                "each label"
            )
        found = {columns.image: [str(file) for file in files], columns.label: [f.parent.name for f in files]}
        raw[split], names[split] = datasets.Dataset.from_dict(found), str(place)
    return raw, names


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
    for column in (_kind(table, columns), columns.label):
        if column not in table.column_names:
            have = ", ".join(table.column_names)
            raise BadData(
                f"{names[split]}: no column {column!r}; it has: {have}; "
                "name yours with --text-column, --image-column, --label-column"
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
    if columns.label not in table.column_names or _kind(table, columns) not in table.column_names:
        raise BadData(f"{name}: it has not the columns of the other splits, but {table.column_names}")
    if _kind(table, columns) == columns.image:
        return _check_images(table, name, columns, labels)
    text, label = table[columns.text], table[columns.label]
    text_b = table[columns.text_b] if columns.text_b in table.column_names else None
    if len(text) == 0:
        raise BadData(f"{name}: no rows")
    if all(value == -1 for value in label):
        return None
    for row, words in enumerate(text, 1):
        if not isinstance(words, str) or not words.strip():
            raise BadData(
                f"{name}, row {row}: column {columns.text!r} must be a non-empty text, found {words!r}"
            )
        if text_b is not None and not isinstance(text_b[row - 1], str):
            raise BadData(
                f"{name}, row {row}: column {columns.text_b!r} must be a text, found {text_b[row - 1]!r}"
            )
    numbers = _numbers(label, name, labels)
    return Rows(list(text), None if text_b is None else list(text_b), numbers)


def _numbers(values: Any, name: str, labels: tuple[str, ...]) -> np.ndarray:
    """Numbers of the labels [rows], given by number or by name."""
    indices = {value: i for i, value in enumerate(labels)}
    numbers = np.zeros(len(values), np.int64)
    for row, value in enumerate(values, 1):
        number = indices.get(value, -1) if isinstance(value, str) else value
        if not isinstance(number, int) or not 0 <= number < len(labels):
            raise BadData(f"{name}, row {row}: label {value!r} is not one of {list(labels)[:20]}")
        numbers[row - 1] = number
    return numbers


def _kind(table: Any, columns: Columns) -> str:
    """The column that is read: the text's or, where only that is there, the image's."""
    images = columns.text not in table.column_names and columns.image in table.column_names
    return columns.image if images else columns.text


def _check_images(table: Any, name: str, columns: Columns, labels: tuple[str, ...]) -> Rows | None:
    """Bytes or paths of one split's images; None without labels, as for text."""
    label = table[columns.label]
    if len(label) == 0:
        raise BadData(f"{name}: no rows")
    if all(value == -1 for value in label):
        return None
    if isinstance(table.features[columns.image], datasets.Image):
        table = table.cast_column(columns.image, datasets.Image(decode=False))
    files: list[bytes | Path] = []
    places = [f"{name}, row {row}" for row in range(1, len(label) + 1)]
    for place, value in zip(places, table[columns.image], strict=True):
        found = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
        if not isinstance(found, (bytes, str)) or not found:
            raise BadData(
                f"{place}: column {columns.image!r} must hold the bytes or the path of an image, "
                f"found {value!r:.60}"
            )
        files.append(found if isinstance(found, bytes) else Path(name).parent / found)
    return Rows([], None, _numbers(label, name, labels), Pictures(files, places))


__all__ = ["BadData", "Columns", "Rows", "TextData", "load_data", "read_splits"]
