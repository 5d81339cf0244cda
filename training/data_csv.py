"""Read CSV files: delimiters, headers, quotes, and labels that are numbers."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from offramp.training.data_open import BadData, Columns, PlainTable, Table, Tell, form_of, open_text

DELIMITERS = (",", ";", "\t", "|")
LONGEST_CELL = 2**31 - 1
FILE_END = "\ue000end of file\ue000"  # a line after the last one: a quote that is still open contains it
INTEGER = re.compile(r"\s*[+-]?\d+\s*", re.ASCII)
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
BOOLEANS = {"True": True, "TRUE": True, "true": True, "False": False, "FALSE": False, "false": False}


def read_csv(file: Path, columns: Columns, tell: Tell) -> Table:
    """Read a CSV or TSV file whose delimiter is any of DELIMITERS.

    Cells are texts as they stand there, "NA" too, and None where they are empty; those of the label column
    are numbers or booleans if all of them are. Raises BadData naming the row.
    """
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        delimiter = _delimiter(file, columns)
        with open_text(file, "") as lines:
            return _csv_table(file, _csv_rows(file, lines, delimiter, tell), delimiter, columns)
    finally:
        csv.field_size_limit(limit)


def _delimiter(file: Path, columns: Columns) -> str:
    """The delimiter that gives a header with most of the columns that are looked for.

    If none gives one of them: that of the file's ending, or the one that gives most columns if that is alone.
    """
    usual = "\t" if form_of(file) == ".tsv" else ","
    headers: dict[str, list[str]] = {}
    for delimiter in dict.fromkeys((usual, *DELIMITERS)):
        with open_text(file, "") as lines:
            _, cells = next(_csv_rows(file, lines, delimiter), (0, []))
        headers[delimiter] = cells
    names = columns.names
    hits = {delimiter: len(names & {*cells, *map(str.strip, cells)}) for delimiter, cells in headers.items()}
    if any(hits.values()):
        return max(hits, key=lambda delimiter: hits[delimiter])
    if len(headers[usual]) > 1:
        return usual
    return max(headers, key=lambda delimiter: len(headers[delimiter]))


def _csv_rows(
    file: Path, lines: TextIO, delimiter: str, tell: Tell | None = None
) -> Iterator[tuple[int, list[str]]]:
    """First line and cells of the header and of every row; rows of blank lines are left out.

    tell: takes a line about rows of a TSV file that span lines.
    """
    reader = csv.reader(chain(lines, [FILE_END]), delimiter=delimiter)
    row, start, spanning = -1, 1, list[int]()
    try:
        for cells in reader:
            if cells == [FILE_END]:
                break
            if cells and (len(cells) > 1 or not cells[0] or cells[0].strip()):
                row += 1
                if cells[-1].endswith(FILE_END):
                    place = f"row {row}" if row else "header"
                    raise BadData(
                        f"{file}, {place} (line {start}): a quote is not closed; close it, and double "
                        "quotes that are part of a text"
                    )
                if reader.line_num > start:
                    spanning.append(row)
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as problem:
        raise BadData(f"{file}, row {row + 1} (line {start}): {problem}") from problem
    if spanning and tell is not None and form_of(file) == ".tsv":
        tell(
            f"{file}: rows that span several lines: {len(spanning)}, first row {spanning[0]}: a cell that "
            "begins with a quote goes on to the next quote"
        )


def _csv_table(
    file: Path, rows: Iterator[tuple[int, list[str]]], delimiter: str, columns: Columns
) -> PlainTable:
    _, header = next(rows, (0, []))
    if not header:
        raise BadData(f"{file}: it holds blank lines alone; it needs a header and rows")
    names = _column_names(file, header, columns)
    values: list[list[str | None]] = [[] for _ in names]
    for row, (line, cells) in enumerate(rows, 1):
        if any(cell.strip() for cell in cells[len(names) :]):
            raise BadData(
                f"{file}, row {row} (line {line}): {len(cells)} cells, the header has {len(names)}; put a "
                f"text that contains {delimiter!r} between double quotes"
            )
        cells += [""] * (len(names) - len(cells))
        for column, cell in zip(values, cells, strict=False):
            column.append(cell or None)
    table: dict[str, list[Any]] = dict(zip(names, values, strict=True))
    if columns.label in table:
        table[columns.label] = _numbers(table[columns.label])
    return PlainTable(table)


def _column_names(file: Path, header: Sequence[str], columns: Columns) -> list[str]:
    """Names without space around them; a cell without a name and a repeated name are numbered."""
    names: list[str] = []
    for number, cell in enumerate(header):
        name = cell if cell in columns.names else cell.strip() or f"Unnamed: {number}"
        if name in names:
            if name in columns.names:
                raise BadData(f"{file}: the header names {name!r} twice; rename one of the two columns")
            name = f"{name}.{number}"
        names.append(name)
    return names


def _numbers(cells: list[str | None]) -> list[Any]:
    """Cells as integers, booleans or floats if all that are not empty are, else as they are."""
    present = [cell for cell in cells if cell is not None]
    convert: Callable[[str], int | float | str] = str
    if all(INTEGER.fullmatch(cell) for cell in present):
        convert = int
    elif all(NUMBER.fullmatch(cell) for cell in present):
        convert = float
    elif all(cell.strip() in BOOLEANS for cell in present):
        convert = _boolean
    return [None if cell is None else convert(cell) for cell in cells]


def _boolean(cell: str) -> bool:
    return BOOLEANS[cell.strip()]
