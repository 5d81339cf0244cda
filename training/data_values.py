"""Numbers to predict: one for each row, as numbers or texts of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from offramp.training.data_csv import NUMBER
from offramp.training.data_labels import MISSING_WORDS, NO_LABEL, RowLabels, report_missing
from offramp.training.data_open import BadData, SplitTable, Tell

LARGEST = float(np.finfo(np.float32).max)


def read_values(
    source: str, splits: Mapping[str, SplitTable], tell: Tell, *, needed: bool
) -> tuple[tuple[str, ...], dict[str, RowLabels]]:
    """No names, and by split the number to predict for every row [rows] float32, NaN in rows without one.

    Texts are read as numbers; nothing, NaN and words for it stand for none, as does -1 in all rows of a
    split. needed: a split with numbers has to have one in every row. Raises BadData naming file and row.
    """
    labels: dict[str, RowLabels] = {}
    for split, table in splits.items():
        raw: Sequence[Any] = [None] * len(table)
        if table.columns.label in table.column_names:
            raw = table.table[table.columns.label]
        values = np.array([_value(value, f"{table.name}, row {row}") for row, value in enumerate(raw, 1)])
        missing = np.flatnonzero(np.isnan(values)) + 1
        if (values == NO_LABEL).all():
            values[:] = math.nan
        elif 0 < len(missing) < len(values):
            report_missing(table.name, missing.tolist(), len(values), tell, needed=needed)
        labels[split] = RowLabels(values.astype(np.float32))
    return (), labels


def same_value(labels: RowLabels, names: Sequence[str]) -> str:
    """Why nothing can be learned from values that are the same in all rows; empty if they are not."""
    if (labels.label != labels.label[0]).any():
        return ""
    return f"every row has the value {labels.label[0]:g}; a regression needs rows that differ"


def holds_fractions(values: Sequence[Any]) -> bool:
    """Whether all values are numbers, or missing, and any of them is not whole."""
    if not all(value is None or isinstance(value, (int, float)) for value in values):
        return False
    floats = (value for value in values if isinstance(value, float))
    return any(not value.is_integer() and not math.isnan(value) for value in floats)


def _value(value: Any, place: str) -> float:
    """The number of a row; NaN for none."""
    if isinstance(value, str):
        value = _number(value.strip(), place)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadData(f"{place}: label {value!r:.60} is no number to predict; give one such as 3.5")
    if abs(value) > LARGEST:  # infinity, too
        raise BadData(f"{place}: label {value} is beyond the numbers of float32; scale the values")
    return float(value)


def _number(text: str, place: str) -> float | None:
    if not text or text.casefold() in MISSING_WORDS:
        return None
    if NUMBER.fullmatch(text):
        return float(text)
    with_point = text.replace(",", ".")
    cure = f"write {with_point}" if NUMBER.fullmatch(with_point) else "give one such as 3.5"
    raise BadData(f"{place}: label {text!r:.60} is no number to predict; {cure}, or nothing for no label")
