"""Labels of a data set as numbers: names, integers, booleans, rows without labels; rows balanced by label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from offramp.training.data_csv import INTEGER
from offramp.training.data_open import BadData, Table, Tell

NO_LABEL = -1  # in public test sets
# More integers than this, each in fewer than two rows on average, are numbers to predict and no classes.
MANY_CLASSES = 100
MISSING_WORDS = {"na", "n/a", "nan", "null", "none"}

Label = str | int | None


@dataclass(frozen=True)
class LabelColumn:
    """The labels of one split as they are in its file; None where a row has none.

    name: of the split in messages. class_names: of integer labels, if the file has them; texts: the column
    label_text, likewise.
    """

    name: str
    values: list[Label]
    class_names: tuple[str, ...] | None = None
    texts: Sequence[Any] | None = None

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
    values = [_label(value, f"{name}, row {row}") for row, value in enumerate(raw, 1)]
    spaced = [row for row, value in enumerate(values) if isinstance(value, str) and value != raw[row]]
    if spaced:
        tell(
            f"{name}: rows whose label has space around it, which is taken off: {len(spaced)}, first row "
            f"{spaced[0] + 1}: {raw[spaced[0]]!r}"
        )
    feature = table.features.get(column)
    class_names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    texts = table["label_text"] if "label_text" in table.column_names else None
    return LabelColumn(name, values, class_names, texts)


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
        for row, value in enumerate(column.values):
            number = classes.numbers.get(value) if value is not None else None
            if number is None and value is not None and value != NO_LABEL:
                raise BadData(
                    f"{column.name}, row {row + 1}: label {value!r} is not one of {list(classes.names)[:20]}"
                )
            if number is None:
                missing.append(row)
            else:
                numbers[split][row] = number
        if missing and column.labelled:
            _report_missing(column, missing, from_zero, tell, needed=needed)
    return classes.names, numbers


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
            f"{place}: label {value} is a fraction: regression is not supported by this recipe; give classes "
            "by name or whole number"
        )
    if isinstance(value, (list, tuple)):
        raise BadData(
            f"{place}: label {value!r:.60} is a list: several labels for a row are not supported; give one"
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
    if len(integers) > MANY_CLASSES and rows < 2 * len(integers):
        raise BadData(
            f"{first.name}: {len(integers)} different whole numbers as labels of {rows} rows: regression is "
            "not supported by this recipe; give classes"
        )
    tell(
        f"{source}: integer labels {_listed([str(value) for value in integers])} are numbered 0 to "
        f"{len(integers) - 1} in ascending order; the classes keep the integers as names"
    )


def _tell_similar(source: str, names: Sequence[str], tell: Tell) -> None:
    """Report names that differ only by case, and a word for "missing" among integers."""
    folded: dict[str, list[str]] = {}
    for name in names:
        folded.setdefault(name.casefold(), []).append(name)
    for same in folded.values():
        if len(same) > 1:
            tell(f"{source}: labels {_listed(same)} differ only by case; they are separate classes")
    words = [name for name in names if not INTEGER.fullmatch(name)]
    if len(words) == 1 and len(names) > 1 and words[0].casefold() in MISSING_WORDS:
        tell(
            f"{source}: label {words[0]!r} among integers is read as a class; leave cells empty for no label"
        )


def _report_missing(
    column: LabelColumn, missing: Sequence[int], from_zero: LabelColumn | None, tell: Tell, *, needed: bool
) -> None:
    """Raise BadData naming the first row without a label, or tell how many there are."""
    if not needed:
        tell(f"{column.name}: rows without a label: {len(missing)} of {len(column.values)}")
        return
    reason = "no label"
    if column.values[missing[0]] == NO_LABEL and from_zero is not None:
        reason = f"label -1 stands for no label, since those of {from_zero.name} run from 0"
    raise BadData(f"{column.name}, row {missing[0] + 1}: {reason}; label the row or take it out")


def tell_lacking(source: str, names: Sequence[str], numbers: Mapping[str, np.ndarray], tell: Tell) -> None:
    """Report the classes that a split has no row of, one line for each split."""
    for split, labels in numbers.items():
        present = set(labels.tolist())
        lacking = [name for number, name in enumerate(names) if number not in present]
        if lacking and present != {NO_LABEL}:
            tell(
                f"{source}: {split} has no row of {len(lacking)} of {len(names)} classes: {_listed(lacking)}"
            )


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


def _listed(names: Sequence[str], longest: int = 10) -> str:
    rest = f" and {len(names) - longest} more" if len(names) > longest else ""
    return ", ".join(names[:longest]) + rest
