"""Rows of text or images from hub names, folders and files, checked row by row."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import datasets
import numpy as np

from offramp.models.tasks import CLASSIFICATION
from offramp.runtime.bundle.row_samples import Row
from offramp.runtime.rules.entities import inner_labels
from offramp.training.data_csv import NUMBER
from offramp.training.data_files import LINES, NamedTable, read_tables
from offramp.training.data_labels import NO_LABEL as NO_LABEL
from offramp.training.data_labels import RowLabels, tell_lacking
from offramp.training.data_labels import Word as Word
from offramp.training.data_labels import balanced_index as balanced_index
from offramp.training.data_labels import has_label as has_label
from offramp.training.data_open import BadData as BadData
from offramp.training.data_open import Columns as Columns
from offramp.training.data_open import SplitTable, Tell, check_text, form_of
from offramp.training.data_tasks import check_inputs, check_task, needs_of, task_of

SURROGATE = re.compile("[\ud800-\udfff]")


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
    """The rows of one split as plain lists; label is an index into the labels of the data, or NO_LABEL.

    Of several labels for a row it has a 1 for each that the row has, else 0, and NO_LABEL for all of them in
    rows without labels [rows, labels] float32; of values to predict it is the value, or NaN [rows] float32.
    Where words have labels it is NO_LABEL, and words are the words of each row in the order of its text.
    images: set instead of texts, which are empty lists then; not decoded yet.
    """

    text: list[str]
    text_b: list[str] | None
    label: np.ndarray  # [rows] int64
    images: ImageFiles | None = field(default=None)
    words: list[list[Word]] | None = field(default=None)

    def __len__(self) -> int:
        return len(self.label)

    @property
    def has_label(self) -> np.ndarray:
        """Whether each row has a label, or any of its words has one, bool [rows]."""
        return RowLabels(self.label, self.words).present

    @property
    def labelled(self) -> bool:
        """Whether any row has a label."""
        return bool(self.has_label.any())

    @property
    def items(self) -> Iterable[Row]:
        """The rows as ee-calibrate reads them: texts or pairs without prefix, or images in their files."""
        if self.images is not None:
            return self.images.files
        return self.text if self.text_b is None else zip(self.text, self.text_b, strict=True)

    def take(self, index: np.ndarray) -> Rows:
        """The rows at `index`, in that order."""
        if self.images is not None:
            return Rows([], None, self.label[index], self.images.take(index))
        text_b = None if self.text_b is None else [self.text_b[i] for i in index]
        words = None if self.words is None else [self.words[i] for i in index]
        return Rows([self.text[i] for i in index], text_b, self.label[index], words=words)


@dataclass(frozen=True)
class Dataset:
    """A data set: label names, and the splits of text or images among train, dev and test that exist.

    labels: empty if no split has any, and for tasks without names of labels. left_out: of splits that exist
    and lack what is needed, the reason. task: a name in models.tasks.TASKS.
    """

    name: str
    labels: tuple[str, ...]
    splits: dict[str, Rows]
    left_out: Mapping[str, str] = field(default_factory=dict)
    task: str = CLASSIFICATION

    @property
    def has_images(self) -> bool:
        """Whether the rows are images."""
        return any(rows.images is not None for rows in self.splits.values())

    def digest(self) -> str:
        """A hash of all rows with their labels; of an image its bytes count, or the path of its file."""
        whole = hashlib.sha256()
        for name, rows in self.splits.items():
            for item in rows.items:
                whole.update(item if isinstance(item, bytes) else repr(item).encode())
            whole.update(repr((name, rows.words)).encode() + rows.label.tobytes())
        return whole.hexdigest()

    def split(self, name: str) -> Rows:
        """The rows of a split by its name; raises BadData that lists the existing ones."""
        if name in self.left_out:
            raise BadData(self.left_out[name])
        if name not in self.splits:
            raise BadData(f"{self.name} has no split {name!r}; it has: {', '.join(self.splits)}")
        return self.splits[name]


def load_data(
    source: str,
    columns: Columns | None = None,
    *,
    task: str | None = None,
    labels_needed: bool = True,
    dev_share: float = 0.1,
    messages: TextIO | None = None,
) -> Dataset:
    """Read a data set of text or images from a file, a folder or the hub, and check every row.

    source: a file (JSON lines, CSV, parquet, lines of text), a folder of split files or of images, or a hub
    name ("name" or "name:configuration"). Rows are images if there is an image column and no text column: the
    struct of bytes and path that `datasets` writes, or paths relative to the file's folder. A folder of
    images holds one folder for each label, or folders train, dev and test with such folders. Images are
    decoded later.

    task: a name in models.tasks.TASKS; None: words with tags or entities are for token-classification, lists
    of labels for multi-label-classification, numbers that are not whole for regression, all else for
    classification, and any but that is reported.

    Labels may be names, booleans or integers; integers that do not run from 0 are numbered in ascending
    order. A split has no labels if it has no such column, or -1 or nothing in all rows. labels_needed: such
    splits are left out, and in others every row needs a label; if false, rows without a label have NO_LABEL.
    For other tasks see read_label_lists, read_values and read_words; sentence-embedding reads no labels.

    Without a dev split, `dev_share` of train is set aside with a fixed seed. This, and all that is read
    otherwise than it stands in the file, is reported in `messages` (None: stderr), a line each. Raises
    BadData naming file and row; rows are counted without header and blank lines.
    """
    columns = columns or Columns()
    tell = _tell_to(messages)
    if task is not None:
        check_task(task)
    tables = read_tables(source, columns, tell)
    task = task or task_of(source, tables, columns, tell)
    data_of = check_task(task)
    labels_needed = labels_needed and data_of.labels
    tables_of = {
        split: SplitTable(table, name, data_of.columns(table, columns))
        for split, (table, name) in tables.items()
    }
    _check_columns(task, tables_of, labels_needed=labels_needed)
    names, labels = data_of.read(source, tables_of, tell, needed=labels_needed)
    splits: dict[str, Rows] = {}
    left_out: dict[str, str] = {}
    for split, table in tables_of.items():
        if labels_needed and not labels[split].present.any():
            left_out[split] = _no_labels(task, table)
            tell(f"{left_out[split]}; the split is left out")
        else:
            splits[split] = _check_rows(table, labels[split])
    if len({rows.text_b is None for rows in splits.values()}) > 1:
        lacking = next(split for split, rows in splits.items() if rows.text_b is None)
        tell(f"{source}: {lacking} has no column {columns.text_b!r}, and another split has it")
    if not splits:
        raise BadData(next(iter(left_out.values())))
    if "train" in splits:
        if "dev" not in splits:
            splits = _set_dev_aside(source, splits, dev_share, tell)
        if labels_needed and (same := data_of.same(labels["train"], names)):
            raise BadData(f"{tables_of['train'].name}: {same}")
    tell_lacking(source, names, {split: _numbers(rows, names) for split, rows in splits.items()}, tell)
    return Dataset(source, names, splits, left_out, task)


def read_splits(source: str, *, messages: TextIO | None = None) -> dict[str, NamedTable]:
    """Read a data set with any columns; gives by split its table and its name for messages.

    source, messages: as in load_data. Raises BadData naming the file.
    """
    return read_tables(source, Columns(), _tell_to(messages))


def _tell_to(messages: TextIO | None) -> Tell:
    def tell(line: str) -> None:
        print(line, file=messages or sys.stderr)

    return tell


def _check_columns(task: str, splits: Mapping[str, SplitTable], *, labels_needed: bool) -> None:
    """Raise BadData for a split without rows, inputs, or the column of labels where train or dev need it."""
    first = "train" if "train" in splits else next(iter(splits))
    has_images = splits[first].has_images
    if splits[first].input not in splits[first].column_names:
        hint = _header_hint(splits[first].column_names, splits[first].columns)
        raise BadData(_no_column(splits[first], splits[first].input) + hint + needs_of(task, splits[first]))
    for split, table in splits.items():
        if table.input not in table.column_names or table.has_images != has_images:
            raise BadData(
                f"{table.name}: it has not the columns of the other splits, but {table.column_names}"
            )
        if len(table) == 0:
            raise BadData(f"{table.name}: no rows; a split needs some")
        check_inputs(task, table)
        needed = split == first or (split == "dev" and form_of(Path(table.name)) != LINES)
        if labels_needed and needed and table.columns.label not in table.column_names:
            raise BadData(_no_labels(task, table))


def _no_column(split: SplitTable, column: str) -> str:
    return (
        f"{split.name}: no column {column!r}; it has: {', '.join(split.column_names)}; "
        "name yours with --text-column, --image-column, --label-column"
    )


def _header_hint(names: Sequence[str], columns: Columns) -> str:
    """A hint that a file has no header, if names of its columns look like cells."""
    if not any(NUMBER.fullmatch(name) or len(name.split()) > 3 for name in names):
        return ""
    return f"; if its first row is no header, put one above it, such as {columns.text},{columns.label}"


def _no_labels(task: str, split: SplitTable) -> str:
    """Why a split has no labels, and what to do."""
    name, label = split.name, split.columns.label
    if label in split.column_names:
        return f"{name}: no row has a label in column {label!r}"
    if form_of(Path(name)) == LINES:
        return (
            f"{name}: lines of text without labels; needed here: a column {label!r}, as in CSV or JSON lines"
            + needs_of(task, split)
        )
    if Path(name).is_dir():
        return f"{name}: images without labels; needed here: a folder of images for each label"
    return _no_column(split, label) + needs_of(task, split)


def _set_dev_aside(source: str, splits: dict[str, Rows], share: float, tell: Tell) -> dict[str, Rows]:
    """The splits with a part of train as dev, chosen by seed 0."""
    train, others = splits["train"], {name: rows for name, rows in splits.items() if name != "train"}
    order = np.random.default_rng(0).permutation(len(train))
    count = max(1, round(share * len(order)))
    if count >= len(order):
        raise BadData(
            f"{source}: too few train rows ({len(order)}) to set some aside as dev; add rows or a dev split"
        )
    tell(f"{source}: no dev split; set {count} of {len(order)} train rows aside (seed 0)")
    return {
        "train": train.take(np.sort(order[count:])),
        "dev": train.take(np.sort(order[:count])),
        **others,
    }


def _check_rows(split: SplitTable, labels: RowLabels) -> Rows:
    """The checked rows of one split with these labels."""
    columns, name = split.columns, split.name
    if split.has_images:
        return Rows([], None, labels.label, _check_images(split.table, name, columns))
    text, text_b = list(split.table[columns.text]) if labels.text is None else labels.text, None
    if columns.text_b in split.column_names:
        text_b = list(split.table[columns.text_b])
    for row, value in enumerate(text, 1):
        place = f"{name}, row {row}"
        check_text(value, place, columns.text)
        if text_b is not None and not isinstance(text_b[row - 1], str):
            raise BadData(f"{place}: column {columns.text_b!r} must be a text, found {text_b[row - 1]!r:.60}")
        for part in (value,) if text_b is None else (value, text_b[row - 1]):
            if not part.isascii() and SURROGATE.search(part):
                raise BadData(f"{place}: half of a surrogate pair in {part!r:.60}: not Unicode text")
    return Rows(text, text_b, labels.label, words=labels.words)


def _numbers(rows: Rows, names: Sequence[str]) -> np.ndarray:
    """The numbers of all labels in some rows, NO_LABEL where there are none."""
    if rows.words is not None:
        numbers = {word.label for words in rows.words for word in words} or {NO_LABEL}
        inner = inner_labels(names)  # of the entities' further words
        return np.array([*numbers, *(inner[number] for number in numbers - {NO_LABEL})])
    if rows.label.ndim == 1:
        return rows.label
    return np.nonzero(rows.label > 0)[1] if rows.labelled else np.array([NO_LABEL])


def _check_images(table: Any, name: str, columns: Columns) -> ImageFiles:
    """The checked images of one split, as bytes or paths."""
    if isinstance(table.features.get(columns.image), datasets.Image):
        table = table.cast_column(columns.image, datasets.Image(decode=False))
    files: list[bytes | Path] = []
    places = [f"{name}, row {row}" for row in range(1, len(table) + 1)]
    for place, value in zip(places, table[columns.image], strict=True):
        image = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
        if not isinstance(image, (bytes, str)) or not image:
            raise BadData(
                f"{place}: column {columns.image!r} must hold the bytes or the path of an image, "
                f"found {value!r:.60}"
            )
        files.append(image if isinstance(image, bytes) else Path(name).parent / image)
    return ImageFiles(files, places)
