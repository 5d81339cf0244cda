"""Read JSON lines and files that are one JSON value, as json, pandas and jq write them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from offramp.training.data_open import WORDS, BadData, Columns, PlainTable, Table, Tell, open_text

SPACE = re.compile(r"\s*")
SPAN = {"start", "end"}  # keys of an entity of a row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("an object has the same key twice")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def read_json(file: Path, columns: Columns, tell: Tell) -> Table:
    """Read JSON lines, or a file that is one JSON value: a list of rows, or an object of rows or columns.

    A row is an object, or a text alone. Raises BadData naming the row.
    """
    values, problem = list[Any](), ""
    with open_text(file, "\n") as lines:  # U+2028 and the like do not end a line of JSON
        for number, line in enumerate(lines, 1):
            try:
                values += _json_values(line)
            except (ValueError, RecursionError) as wrong:
                problem = f"row {len(values) + 1} (line {number}): not JSON: {_json_reason(wrong)}"
                break
    if problem:  # unless a value spans lines
        with open_text(file, "\n") as lines:
            text = lines.read()
        try:
            values = list(_json_values(text))
        except (ValueError, RecursionError) as wrong:
            if not values:
                line_number = getattr(wrong, "lineno", 1)
                problem = f"row 1 (line {line_number}): not JSON: {_json_reason(wrong)}"
            raise BadData(f"{file}, {problem}") from wrong
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    elif len(values) == 1 and isinstance(values[0], dict):
        rows = _whole_table(file, values[0], columns)
        if isinstance(rows, dict):
            return PlainTable(rows)
        values = rows
    return _json_table(file, values, columns)


def _json_values(text: str) -> Iterator[Any]:
    """JSON values one after another, with any space between them."""
    place = 0
    while (start := SPACE.match(text, place).end()) < len(text):  # type: ignore[union-attr]
        value, place = DECODER.raw_decode(text, start)
        yield value


def _json_reason(problem: Exception) -> str:
    if isinstance(problem, json.JSONDecodeError):
        return f"{problem.msg} at column {problem.colno}"
    return str(problem)


def _whole_table(
    file: Path, value: dict[str, Any], columns: Columns
) -> list[dict[str, Any]] | dict[str, list[Any]]:
    """The rows of a file that is one object: a list of rows under a key, lists by column, or one row.

    Columns may be objects from row to value, as pandas writes them.
    """
    inputs = columns.names - {columns.label}
    if any(_is_column(name, value.get(name)) for name in (*inputs, WORDS)):
        lists = {
            name: list(column.values()) if isinstance(column, dict) else column
            for name, column in value.items()
        }
        if len({len(column) if isinstance(column, list) else -1 for column in lists.values()}) == 1:
            return lists
        raise BadData(f"{file}: an object of columns of unequal length; give one object for each row")
    keys = [
        key
        for key, rows in value.items()
        if isinstance(rows, list) and rows and isinstance(rows[0], dict)
        if {*columns.names, WORDS} & set(rows[0]) and not (columns.text in value and SPAN & set(rows[0]))
    ]
    if len(keys) > 1:
        raise BadData(
            f"{file}: it has lists of rows under {', '.join(keys)}; write each of them to a file of its own"
        )
    return cast(list[dict[str, Any]], value[keys[0]]) if keys else [value]


def _is_column(name: str, value: Any) -> bool:
    """Whether what stands under the name of a column is all of its rows, and not the words of one row."""
    if isinstance(value, list) and name == WORDS:
        return bool(value) and isinstance(value[0], list)
    return isinstance(value, (list, dict))


def _json_table(file: Path, rows: Sequence[Any], columns: Columns) -> PlainTable:
    if rows and all(isinstance(row, str) for row in rows):
        return PlainTable({columns.text: list(rows)})
    names: dict[str, None] = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise BadData(
                f"{file}, row {number}: expected a JSON object such as "
                f'{{"{columns.text}": "...", "{columns.label}": 0}}, found {row!r:.40}'
            )
        names.update(dict.fromkeys(row))
    if not rows:
        raise BadData(f"{file}: no rows in it")
    return PlainTable({name: [row.get(name) for row in rows] for name in names})
