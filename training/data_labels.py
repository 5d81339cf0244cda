"""Classes of a data set as numbers: names, integers, booleans, rows without one; rows balanced by class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np

from offramp.training.data_csv import INTEGER
from offramp.training.data_open import BadData, SplitTable, Table, Tell

NO_LABEL = -1  # in public test sets
# More integers than this, each in fewer than two rows on average, are numbers to predict and no classes.
MANY_CLASSES = 100
MISSING_WORDS = {"na", "n/a", "nan", "null", "none"}

Label = str | int | None


class Word(NamedTuple):
    """A word of a text: its first character, the one after its last, and its label's number or NO_LABEL."""

    start: int
    end: int
    label: int


@dataclass(frozen=True)
class RowLabels:
    """The labels of one split.

    label: [rows], see has_label. words: of each row, where words have labels and rows have none; text: of
    each row, where the file has words alone.
    """

    label: np.ndarray
    words: list[list[Word]] | None = None
    text: list[str] | None = None

    @property
    def present(self) -> np.ndarray:
        """Whether a row has a label, or a word of it has, bool [rows]."""
        if self.words is None:
            return has_label(self.label)
        return np.array([any(word.label != NO_LABEL for word in words) for words in self.words], bool)


def has_label(label: np.ndarray) -> np.ndarray:
    """Whether each row has a label [rows], for any task.

    label: numbers of classes [rows] int64, or NO_LABEL; 0 or 1 for each of several labels [rows, labels], or
    NO_LABEL for all of them; numbers to predict [rows] float32, or NaN.
    """
    if label.dtype.kind == "f" and label.ndim == 1:
        return np.asarray(~np.isnan(label))
    present = np.asarray(label != NO_LABEL)
    return np.asarray(present.any(1)) if label.ndim == 2 else present


@dataclass(frozen=True)
class LabelColumn:
    """The labels of one split as they are in its file; None where a row has none.

    name: of the split in messages; rows: the row of each label, counted from 1. class_names: of integer
    labels, if the file has them; texts: the column label_text, likewise. in_lists: whether rows may have
    several labels, and those of all rows are here one after another.
    """

    name: str
    values: list[Label]
    rows: Sequence[int]
    class_names: tuple[str, ...] | None = None
    texts: Sequence[Any] | None = None
    in_lists: bool = False

    @property
    def labelled(self) -> bool:
        """Whether any row has a label: -1 in all rows stands for none."""
        return any(value is not None and value != NO_LABEL for value in self.values)

    @property
    def typed(self) -> bool:
        """Whether any label is an integer or boolean, and no text."""
        return any(isinstance(value, int) for value in self.values)

    @property
    def words(self) -> set[str]:
        """The different labels that are texts."""
        return {value for value in self.values if isinstance(value, str)}

    @property
    def integers(self) -> set[int]:
        """The different labels that are integers, booleans, or texts of integers."""
        integers = {value for value in self.values if isinstance(value, int)}
        return integers | {int(word) for word in self.words if INTEGER.fullmatch(word)}


@dataclass(frozen=True)
class Classes:
    """Names of the classes, and their numbers by what stands for them in files."""

    names: tuple[str, ...]
    numbers: Mapping[str | int, int]


def read_labels(table: Table, name: str, column: str, tell: Tell) -> LabelColumn:
    """Check the labels of one split, and take off the space around names, which a line to `tell` reports.

    Whole floats become integers. Raises BadData naming the row of a fraction, a list or another value.
    """
    raw = list(table[column])
    rows = range(1, len(raw) + 1)
    texts = table["label_text"] if "label_text" in table.column_names else None
    return LabelColumn(
        name, clean_labels(name, raw, rows, tell), rows, class_names(table.features.get(column)), texts
    )


def clean_labels(name: str, raw: Sequence[Any], rows: Sequence[int], tell: Tell) -> list[Label]:
    """Check labels of these rows of a split, and take off the space around names; see read_labels."""
    values = [_label(value, f"{name}, row {row}") for row, value in zip(rows, raw, strict=True)]
    spaced = [index for index, value in enumerate(values) if isinstance(value, str) and value != raw[index]]
    if spaced:
        tell(
            f"{name}: rows whose label has space around it, which is taken off: "
            f"{len({rows[index] for index in spaced})}, first row {rows[spaced[0]]}: {raw[spaced[0]]!r}"
        )
    return values


def class_names(feature: Any) -> tuple[str, ...] | None:
    """The names of integer labels that a file or the hub gives for a column; None if there are none.

    feature: the column's type; labels may be in lists, or the field `label` of structs.
    """
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    if isinstance(feature, Mapping):
        return class_names(feature.get("label"))
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    return None if inner is None else class_names(inner)


def number_labels(
    source: str, columns: Mapping[str, LabelColumn], tell: Tell, *, needed: bool
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Names of the classes, and by split the number of every row's label [rows] or NO_LABEL.

    Integers that do not run from 0, such as 1 to 5, are numbered in ascending order. needed: a split with
    labels has to have one in every row. Raises BadData naming the row of a missing or unknown label.
    """
    labelled = {split: column for split, column in columns.items() if column.labelled}
    if not labelled:
        return (), {
            split: np.full(len(column.values), NO_LABEL, np.int64) for split, column in columns.items()
        }
    first = labelled.get("train") or next(iter(labelled.values()))
    from_zero = _from_zero(labelled)
    classes = _classes(source, first, labelled, from_zero is not None, tell)
    numbers = {}
    for split, column in columns.items():
        numbers[split] = np.full(len(column.values), NO_LABEL, np.int64)
        missing = []
        for index, value in enumerate(column.values):
            number = classes.numbers.get(value) if value is not None else None
            if number is None and value is not None and value != NO_LABEL:
                place = f"{column.name}, row {column.rows[index]}"
                raise BadData(f"{place}: label {value!r} is not one of {list(classes.names)[:20]}")
            if number is None:
                missing.append(index)
            else:
                numbers[split][index] = number
        if missing and column.labelled:
            reason = "no label"
            if column.values[missing[0]] == NO_LABEL and from_zero is not None:
                reason = f"label -1 stands for no label, since those of {from_zero.name} run from 0"
            rows = [column.rows[index] for index in missing]
            report_missing(column.name, rows, len(column.values), tell, needed=needed, reason=reason)
    return classes.names, numbers


def read_classes(
    source: str, splits: Mapping[str, SplitTable], tell: Tell, *, needed: bool
) -> tuple[tuple[str, ...], dict[str, RowLabels]]:
    """Names of the classes, and by split the number of every row's class; see read_labels, number_labels."""
    columns = {
        split: read_labels(table.table, table.name, table.columns.label, tell)
        for split, table in splits.items()
        if table.columns.label in table.table.column_names
    }
    names, numbers = number_labels(source, columns, tell, needed=needed)
    return names, {
        split: RowLabels(numbers[split]) if split in numbers else no_labels(table)
        for split, table in splits.items()
    }


def no_labels(split: SplitTable) -> RowLabels:
    """NO_LABEL at every row of a split."""
    return RowLabels(np.full(len(split), NO_LABEL, np.int64))


def same_class(labels: RowLabels, names: Sequence[str]) -> str:
    """Why nothing can be learned from labels that are the same in all rows; empty if they are not."""
    if (labels.label != labels.label[0]).any():
        return ""
    return (
        f"every row has the label {names[labels.label[0]]!r}; a classifier needs rows of two labels at least"
    )


def _label(value: Any, place: str) -> Label:
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, float):
        raise BadData(
            f"{place}: label {value} is a fraction: numbers to predict are of the task regression; give "
            "classes by name or whole number"
        )
    if isinstance(value, (list, tuple)):
        raise BadData(
            f"{place}: label {value!r:.60} is a list: several labels for a row are of the task "
            "multi-label-classification; give one"
        )
    raise BadData(f"{place}: label {value!r:.60} must be a name or a whole number")


def _from_zero(labelled: Mapping[str, LabelColumn]) -> LabelColumn | None:
    """A split whose integer labels run from 0, so that -1 in another one stands for no label."""
    with_names = (column for column in labelled.values() if column.class_names is not None)
    plain = (column for column in labelled.values() if min(column.integers, default=None) == 0)
    return next(with_names, None) or next(plain, None)


def _classes(
    source: str, first: LabelColumn, labelled: Mapping[str, LabelColumn], minus_one_is_none: bool, tell: Tell
) -> Classes:
    """Classes of a data set: those of the split `first`, and integers that run from 0 over all splits."""
    if first.class_names is not None:
        by_number: dict[str | int, int] = {number: number for number in range(len(first.class_names))}
        return Classes(first.class_names, by_number | _numbered(first.class_names))
    not_classes = {NO_LABEL} if minus_one_is_none else set()
    integers = sorted(set[int]().union(*(column.integers for column in labelled.values())) - not_classes)
    as_integers = first.typed
    if not first.typed and any(column.typed for column in labelled.values()):
        as_integers = _run_from_zero(integers) and all(map(INTEGER.fullmatch, first.words))
    if not as_integers:
        names = tuple(sorted(first.words))
        _tell_similar(source, names, tell)
        by_name = _numbered(names)
        by_text: dict[str | int, int] = {
            value: by_name[str(value)] for value in integers if str(value) in by_name
        }
        return Classes(names, by_name | by_text)
    if not _run_from_zero(integers):
        integers = sorted(first.integers - not_classes)
    if not _run_from_zero(integers):
        _tell_integers(source, integers, first, tell)
    # Integers may be texts in some rows: as text, both are the same.
    texts = dict(zip(map(str, first.values), first.texts, strict=True)) if first.texts is not None else {}
    names = tuple(str(texts.get(str(value), value)) for value in integers)
    by_number = {value: number for number, value in enumerate(integers)}
    return Classes(names, _numbered([str(value) for value in integers]) | _numbered(names) | by_number)


def _run_from_zero(integers: Sequence[int]) -> bool:
    return integers == list(range(len(integers)))


def _numbered(names: Sequence[str]) -> dict[str | int, int]:
    return {name: number for number, name in enumerate(names)}


def _tell_integers(source: str, integers: Sequence[int], first: LabelColumn, tell: Tell) -> None:
    """Report how integers are numbered; raises BadData for as many as numbers to predict have."""
    rows = len(first.values)
    if len(integers) > MANY_CLASSES and rows < 2 * len(integers) and not first.in_lists:
        raise BadData(
            f"{first.name}: {len(integers)} different whole numbers as labels of {rows} rows: numbers to "
            "predict are of the task regression; name it, or give classes"
        )
    tell(
        f"{source}: integer labels {listed([str(value) for value in integers])} are numbered 0 to "
        f"{len(integers) - 1} in ascending order; the classes keep the integers as names"
    )


def _tell_similar(source: str, names: Sequence[str], tell: Tell) -> None:
    """Report names that differ only by case, and a word for "missing" among integers."""
    folded: dict[str, list[str]] = {}
    for name in names:
        folded.setdefault(name.casefold(), []).append(name)
    for same in folded.values():
        if len(same) > 1:
            tell(f"{source}: labels {listed(same)} differ only by case; they are separate classes")
    words = [name for name in names if not INTEGER.fullmatch(name)]
    if len(words) == 1 and len(names) > 1 and words[0].casefold() in MISSING_WORDS:
        tell(
            f"{source}: label {words[0]!r} among integers is read as a class; leave cells empty for no label"
        )


def report_missing(
    name: str,
    missing: Sequence[int],
    rows: int,
    tell: Tell,
    *,
    needed: bool,
    reason: str = "no label",
    cure: str = "label the row or take it out",
) -> None:
    """Raise BadData naming the first row without a label, or tell how many there are.

    name: of a split with this many rows; missing: rows without a label, counted from 1.
    """
    if not needed:
        tell(f"{name}: rows without a label: {len(missing)} of {rows}")
        return
    raise BadData(f"{name}, row {missing[0]}: {reason}; {cure}")


def tell_lacking(source: str, names: Sequence[str], numbers: Mapping[str, np.ndarray], tell: Tell) -> None:
    """Report the classes that a split has no row of, one line for each split."""
    for split, labels in numbers.items():
        present = set(labels.tolist())
        lacking = [name for number, name in enumerate(names) if number not in present]
        if lacking and present != {NO_LABEL}:
            tell(f"{source}: {split} has no row of {len(lacking)} of {len(names)} classes: {listed(lacking)}")


def balanced_index(labels: np.ndarray) -> np.ndarray:
    """Row numbers in ascending order, repeated such that every label that occurs has as many rows [indices].

    labels: of the rows [rows], none of them NO_LABEL. Every row is there at least once; those of rarer labels
    are repeated as evenly as possible, the first ones of a label once more where that does not come out even.
    """
    counts = np.bincount(labels)
    order = np.argsort(labels, kind="stable")
    rank = np.empty_like(order)  # of a row among those of its label
    rank[order] = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[order]]
    times, extra = np.divmod(counts.max(), counts[labels])
    return np.repeat(np.arange(len(labels)), times + (rank < extra))


def listed(names: Sequence[str], longest: int = 10) -> str:
    """Names for a message, of many the first ones."""
    rest = f" and {len(names) - longest} more" if len(names) > longest else ""
    return ", ".join(names[:longest]) + rest
