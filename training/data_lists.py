"""Several labels for each row: lists of names or numbers as files hold them, as 0 and 1 for each label."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from offramp.training.data_labels import (
    NO_LABEL,
    LabelColumn,
    RowLabels,
    class_names,
    clean_labels,
    number_labels,
    report_missing,
)
from offramp.training.data_open import BadData, SplitTable, Table, Tell

SEPARATORS = ("|", ";", ",")  # of names in one text; the first that occurs is that of the data set
LIST = re.compile(r"\s*\[.*\]\s*", re.DOTALL)
WITHOUT_COMMAS = re.compile(r"""['"]\s+['"]""")  # as numpy prints an array of texts, which Python would join
ZERO_OR_ONE = {0, 1, *("0", "1", "0.0", "1.0", "False", "True", "FALSE", "TRUE", "false", "true")}
LABEL_CURE = "label the row, with [] if it has none of the labels, or take it out"


def read_label_lists(
    source: str, splits: Mapping[str, SplitTable], tell: Tell, *, needed: bool
) -> tuple[tuple[str, ...], dict[str, RowLabels]]:
    """Names of the labels, and by split 1 for each label that a row has, else 0; -1 in rows without labels.

    A row holds a list of names or numbers, which is empty for none of the labels, or nothing: it is without
    labels then. A single name is a list of it. If no row of the data set holds a list, texts are split at
    the first of SEPARATORS that occurs. needed: a split with labels has to have them in every row. Raises
    BadData naming file and row.
    """
    cells = {split: read_cells(table, table.columns.label) for split, table in splits.items()}
    for split, table in splits.items():
        if holds_zeros_and_ones(cells[split]):
            raise BadData(
                f"{table.name}: column {table.columns.label!r} holds 0 or 1 in every row; write one column "
                "that lists the names of the labels that a row has"
            )
    separator = _separator(list(chain.from_iterable(cells.values())))
    if separator:
        tell(
            f'{source}: labels are split at {separator!r}; write a list such as ["a", "b"] where it is part '
            "of a name"
        )
    lists = {split: _lists(cells[split], table.name, separator, tell) for split, table in splits.items()}
    columns = {split: _in_one_column(lists[split], table, tell) for split, table in splits.items()}
    names, numbers = number_labels(source, columns, tell, needed=True)
    labels: dict[str, RowLabels] = {}
    for split, table in splits.items():
        given = np.full((len(lists[split]), len(names)), NO_LABEL, np.float32)
        given[[values is not None for values in lists[split]]] = 0
        rows = np.array(columns[split].rows, np.int64) - 1
        known = numbers[split] != NO_LABEL  # unknown in all rows of public test sets
        given[rows[known], numbers[split][known]] = 1
        given[rows[~known]] = NO_LABEL
        labels[split] = RowLabels(given)
        missing = np.flatnonzero(~labels[split].present) + 1
        if 0 < len(missing) < len(given):
            report_missing(table.name, missing.tolist(), len(given), tell, needed=needed, cure=LABEL_CURE)
    return names, labels


def same_labels(labels: RowLabels, names: Sequence[str]) -> str:
    """Why nothing can be learned from labels that are the same in all rows; empty if they are not."""
    if (labels.label != labels.label[0]).any():
        return ""
    given = [name for name, label in zip(names, labels.label[0], strict=True) if label > 0]
    return f"every row has the labels {given}; a classifier needs rows that differ"


def read_cells(split: SplitTable, column: str) -> list[Any]:
    """The values of a column, with a list for each text that is a list, as in CSV, and None for NaN.

    Texts may be lists as JSON or Python writes them. Without such a column, all values are None. Raises
    BadData naming the row of a text that is no such list.
    """
    if column not in split.column_names:
        return [None] * len(split)
    values = [_cell(value) for value in split.table[column]]
    for row, value in enumerate(values, 1):
        if isinstance(value, str) and LIST.fullmatch(value):
            raise BadData(
                f"{split.name}, row {row}: {column} {value!r:.60} is no list that JSON or Python reads; "
                'write one such as ["a", "b"]'
            )
    return values


def first_list(table: Table, column: str) -> list[Any] | None:
    """The first list in a column of lists, if possible one that is not empty; None for other columns."""
    first: list[Any] | None = None
    for value in table[column] if column in table.column_names else ():
        cell = _cell(value)
        if cell is None or cell == "":
            continue
        if not isinstance(cell, list):
            return None
        first = cell
        if cell:
            break
    return first


def _cell(value: Any) -> Any:
    if isinstance(value, str) and LIST.fullmatch(value):
        return _parsed(value)
    if isinstance(value, (tuple, np.ndarray)):
        return list(value)
    if isinstance(value, dict) and value and all(isinstance(inner, list) for inner in value.values()):
        # The hub gives a list of structs as a struct of lists.
        return [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    return None if isinstance(value, float) and np.isnan(value) else value


def _parsed(text: str) -> Any:
    """The list that a text is; the text itself if it is none."""
    readers: list[Callable[[str], Any]] = [json.loads]
    if not WITHOUT_COMMAS.search(text):
        readers.append(ast.literal_eval)
    for read in readers:
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        return value if isinstance(value, list) else text
    return text


def _separator(cells: Sequence[Any]) -> str:
    """What the texts of a data set are split at; empty if they are not."""
    if any(isinstance(cell, list) for cell in cells):
        return ""
    texts = [cell for cell in cells if isinstance(cell, str)]
    return next((mark for mark in SEPARATORS if any(mark in text for text in texts)), "")


def _lists(cells: Sequence[Any], name: str, separator: str, tell: Tell) -> list[list[Any] | None]:
    """The labels of each row as a list without repetitions; None in rows without labels."""
    lists: list[list[Any] | None] = []
    for row, cell in enumerate(cells, 1):
        if isinstance(cell, str):
            parts = cell.split(separator) if separator else [cell]
            cell = [part for part in parts if part.strip()] or None
        elif cell is not None and not isinstance(cell, list):
            cell = [cell]
        for label in cell or ():
            if not (isinstance(label, int) or _is_name(label) or _is_whole(label)):
                raise BadData(
                    f"{name}, row {row}: {label!r:.60} among the labels is no name or whole number; give a "
                    "list of the labels that the row has"
                )
        lists.append(cell)
    once = [None if labels is None else list(dict.fromkeys(labels)) for labels in lists]
    repeated = [row for row, labels in enumerate(lists) if labels is not None and labels != once[row]]
    if repeated:
        _refuse_zeros_and_ones(lists, repeated[0], name)
        tell(
            f"{name}: rows that have a label twice, which counts once: {len(repeated)}, first row "
            f"{repeated[0] + 1}: {lists[repeated[0]]!r:.60}"
        )
    return once


def _is_name(label: Any) -> bool:
    return isinstance(label, str) and bool(label.strip())


def _is_whole(label: Any) -> bool:
    return isinstance(label, float) and label.is_integer()


def _refuse_zeros_and_ones(lists: Sequence[list[Any] | None], row: int, name: str) -> None:
    """Raise BadData if lists hold a 0 or 1 for each label and not labels; row: one that has a value twice."""
    present = [labels for labels in lists if labels is not None]
    if len({len(labels) for labels in present}) > 1 or not {0, 1}.issuperset(chain.from_iterable(present)):
        return
    given = [number for number, value in enumerate(lists[row] or ()) if value]
    raise BadData(
        f"{name}, row {row + 1}: the labels {lists[row]!r:.60} are a 0 or 1 for each label; give a list of "
        f"the names or numbers of those that are 1, here {given}"
    )


def _in_one_column(lists: Sequence[list[Any] | None], split: SplitTable, tell: Tell) -> LabelColumn:
    """The labels of all rows of a split one after another."""
    raw = [label for labels in lists for label in labels or ()]
    rows = [row for row, labels in enumerate(lists, 1) for _ in labels or ()]
    feature = split.table.features.get(split.columns.label)
    values = clean_labels(split.name, raw, rows, tell)
    return LabelColumn(split.name, values, rows, class_names(feature), in_lists=True)


def holds_zeros_and_ones(values: Iterable[Any]) -> bool:
    """Whether a column holds nothing but 0 and 1, as numbers, booleans or texts: one for each label does."""
    return all(isinstance(value, (int, float, str)) and value in ZERO_OR_ONE for value in values)
