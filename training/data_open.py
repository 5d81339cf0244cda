"""Open a data file as text, decompressed and decoded; the columns that are read, and tables of them."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, TextIO, cast

# Endings of compressed files, and their first bytes.
COMPRESSED = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0"}
OPENERS: dict[bytes, Callable[[Path], Any]] = {
    COMPRESSED[".gz"]: gzip.open,
    COMPRESSED[".bz2"]: bz2.open,
    COMPRESSED[".xz"]: lzma.open,
}
# UTF-32 before UTF-16, whose mark is the beginning of it.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
PAIR = ("prompt", "completion")  # columns of language models' data
WORDS = "tokens"  # lists of words, where the text column holds none

Tell = Callable[[str], None]  # takes one line for the user


class BadData(ValueError):
    """Error for data that cannot be used; the message names the file, the row and the cure."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read; text_b is optional, image is read if there is no text column."""

    text: str = "text"
    text_b: str = "text_b"
    label: str = "label"
    image: str = "image"

    @property
    def names(self) -> set[str]:
        """Every column that some reader of data looks for."""
        return {self.text, self.text_b, self.label, self.image, *PAIR}


class Table(Protocol):
    """Rows by column, as `datasets.Dataset` has them; features: types of columns, where the file has them."""

    @property
    def column_names(self) -> list[str]: ...

    @property
    def features(self) -> Mapping[str, Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, column: str, /) -> Sequence[Any]: ...


@dataclass
class PlainTable:
    """Columns as lists of equal length; a missing value is None."""

    columns: dict[str, list[Any]]
    features: Mapping[str, Any] = field(default_factory=dict)

    @property
    def column_names(self) -> list[str]:
        """Names of the columns in the order of the file."""
        return list(self.columns)

    def __len__(self) -> int:
        return max(map(len, self.columns.values()), default=0)

    def __getitem__(self, column: str, /) -> Sequence[Any]:
        return self.columns[column]


@dataclass(frozen=True)
class SplitTable:
    """The table of one split, its name in messages, and the names of the columns that are read of it."""

    table: Table
    name: str
    columns: Columns

    def __len__(self) -> int:
        return len(self.table)

    @property
    def column_names(self) -> list[str]:
        """Names of all columns of the table."""
        return self.table.column_names

    @property
    def has_images(self) -> bool:
        """Whether the rows are images: there is an image column and no text column."""
        return self.columns.text not in self.column_names and self.columns.image in self.column_names

    @property
    def input(self) -> str:
        """The name of the column of texts or images."""
        return self.columns.image if self.has_images else self.columns.text


def check_text(value: Any, place: str, column: str) -> None:
    """Raise BadData for a value of the text column that is no text or blank; place: file and row."""
    if not isinstance(value, str) or not value.strip():
        raise BadData(f"{place}: column {column!r} must be a non-empty text, found {value!r:.60}")


def form_of(file: Path) -> str:
    """The ending that says how to read a file, in lower case and without that of a compressed file."""
    return _without_compressed(file).suffix


def stem_of(file: Path) -> str:
    """The name of a file in lower case, without the endings for its form and compression."""
    return _without_compressed(file).stem


def is_compressed(file: Path) -> bool:
    """Whether the name ends as that of a compressed file."""
    return file.suffix.lower() in COMPRESSED


def _without_compressed(file: Path) -> Path:
    name = Path(file.name.lower())
    return Path(name.stem) if is_compressed(file) else name


@contextmanager
def open_text(file: Path, newline: str | None) -> Iterator[TextIO]:
    """The decompressed, decoded lines of a file; raises BadData if it is not what it has to be."""
    encoding = "utf-8"
    try:
        with _open_bytes(file) as stream:
            start = stream.read(4)
        encoding = next((MARKS[mark] for mark in MARKS if start.startswith(mark)), "utf-8")
        if encoding == "utf-8" and b"\0" in start:
            order = "be" if start[0] == 0 else "le"
            raise BadData(
                f"{file}: it looks like UTF-16 without its mark; convert it with iconv -f utf-16{order} "
                "-t utf-8"
            )
        with _open_bytes(file) as stream, io.TextIOWrapper(stream, encoding, newline=newline) as lines:
            yield lines
    except UnicodeDecodeError as problem:
        if encoding.startswith("utf-8"):
            raise BadData(_first_not_utf8(file)) from problem
        raise BadData(f"{file}: it begins as {encoding} and is not: {problem.reason}") from problem
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as problem:
        raise BadData(f"{file}: cannot be decompressed: {problem}; compress it again") from problem
    except OSError as problem:
        raise BadData(f"{file}: cannot be read: {problem}") from problem


def _open_bytes(file: Path) -> IO[bytes]:
    """The decompressed bytes of a file, by its first bytes: some programs decompress and keep the name."""
    with file.open("rb") as stream:
        start = stream.read(6)
    if start.startswith(b"PK\x03\x04"):
        raise BadData(f"{file}: a zip archive or a spreadsheet; unpack it, or save it as CSV")
    opener = next((OPENERS[magic] for magic in OPENERS if start.startswith(magic)), None)
    return file.open("rb") if opener is None else cast(IO[bytes], opener(file))


def _first_not_utf8(file: Path) -> str:
    with _open_bytes(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as problem:
                return (
                    f"{file}, line {number}: not UTF-8: byte 0x{line[problem.start]:02x}; convert the file, "
                    "if it is Western European with iconv -f latin1 -t utf-8"
                )
    return f"{file}: not UTF-8; convert it with iconv"
