"""Files of a bulk job: chunks of Parquet and JSON lines, their rows, and the folder of the answers."""

from __future__ import annotations

import glob
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from offramp.runtime.errors import BadSetting, OutputFailed
from offramp.runtime.inputs.lines import Line, is_unicode, read_lines

if TYPE_CHECKING:  # of the extra ray: imported where they are used
    import pyarrow as pa
    import pyarrow.parquet as pq

PARQUET, JSON_LINES = ".parquet", (".jsonl", ".ndjson", ".json")
SECOND_TEXT = "text_b"
TEXT_HINT = "if these are lines of plain text, say --format text"  # of read_lines
KEYS = ("file", "row")  # of a row in its input
JOB, COMPLETE = "_job.json", "_complete.json"  # readers of a folder of Parquet files skip names with "_"
_ERROR = b'{"error": '  # how a line begins that holds an error and no answer
_BLOCK = 1 << 20  # bytes of a file that are searched for ends of lines at once


class ChunkOptions(Protocol):
    """What decides how files are cut into chunks."""

    @property
    def rows_per_file(self) -> int:
        """Most rows of a chunk."""
        ...

    @property
    def format(self) -> str:
        """What is written: json or parquet."""
        ...


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one input file, which become one file of answers.

    first: number of the first row, counted from 1. offset: byte where it begins in a file of JSON lines.
    name: of the file of answers.
    """

    source: str
    first: int
    rows: int
    offset: int
    name: str


@dataclass(frozen=True)
class KeptColumns:
    """Values of columns that go from the input to the output. schema: None if they are of JSON lines."""

    rows: Sequence[Mapping[str, object]]
    schema: pa.Schema | None = None

    def row(self, number: int) -> Mapping[str, object]:
        """The values of a row of the chunk, counted from 0."""
        return self.rows[number] if self.rows else {}


def input_files(sources: Iterable[str], out: str | None = None) -> list[str]:
    """Parquet and JSON-lines files of sources, each a file or a folder; those of a folder in order of names.

    Hidden files, names that begin with "_", and the folder `out` of the answers are left out of folders;
    links to folders are followed. Raises BadSetting for other files, files named twice and folders without
    such files, OSError for missing ones and for folders that cannot be read.
    """
    files: list[str] = []
    for source in sources:
        if not os.path.isdir(source):
            os.stat(source)  # a missing file is an error before anything is answered
            if not _is_input(source):
                raise BadSetting(
                    f"{source}: expected a name that ends with {PARQUET}, {', '.join(JSON_LINES)}"
                )
            files.append(source)
            continue
        left_out = set() if out is None else {os.path.realpath(out)}  # answers of this job are no input
        inside = sorted(_inside(source, left_out))
        if not inside:
            raise BadSetting(f"{source}: this folder has no file {PARQUET}, {', '.join(JSON_LINES)}")
        files += inside
    for file in files:
        if not is_unicode(file):
            raise BadSetting(f"{os.fsencode(file)!r}: the name is not UTF-8; rename the file")
    seen: set[str] = set()
    for path in map(os.path.realpath, files):
        if path in seen:
            raise BadSetting(f"{path}: this file is named twice; its rows would be answered twice")
        seen.add(path)
    return files


def _inside(source: str, visited: set[str]) -> Iterator[str]:
    """The input files of a folder and of those in it; visited: real paths of folders that are left out."""
    folders, links = [source], list[str]()
    while folders or links:  # a folder that has a link, too, is read under its own name
        folder = folders.pop() if folders else links.pop()
        if (real := os.path.realpath(folder)) in visited:  # of a link to a folder that holds it, say
            continue
        visited.add(real)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith((".", "_")):
                    continue
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(entry.path)
                elif _is_input(entry.name):
                    yield entry.path


def _is_input(name: str) -> bool:
    return name.lower().endswith((PARQUET, *JSON_LINES))


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(PARQUET)


def check_inputs(
    files: Sequence[str], column: str, keep: Sequence[str], names: Sequence[str], *, one_type: bool
) -> None:
    """Raise BadSetting if a Parquet file lacks a column or has no texts in it, or if a name is taken.

    names: fields of an answer. one_type: whether what is kept must have the same types in all files.
    """
    for name in keep:
        if name in (*KEYS, *names) or keep.count(name) > 1:
            raise BadSetting(f"--keep {name}: a row of the output has that name already; leave it out")
    import pyarrow as pa

    for file in filter(_is_parquet, files):
        schema = _parquet(file).schema_arrow
        for name in (column, *keep):
            if name not in schema.names:
                option = "--column" if name == column else "--keep"
                raise BadSetting(
                    f"{file}: no column {name!r}; its columns: {', '.join(schema.names)}; name one: {option}"
                )
        for name in (column, SECOND_TEXT, *keep):
            if schema.names.count(name) > 1:
                raise BadSetting(f"{file}: it has several columns {name!r}; rename all but one")
        kind = schema.field(column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
        if not any(check(kind) for check in is_text):
            raise BadSetting(f"{file}: column {column!r} has values of type {kind}, not texts; name another")
    if keep and one_type:
        types = {file: _types(file, keep) for file in files}
        for file in files[1:]:
            if types[file] != types[files[0]]:
                raise BadSetting(
                    f"{file}: the columns of --keep have other types than in {files[0]}; write "
                    "--format json, or give these files to two jobs"
                )


def _types(file: str, names: Sequence[str]) -> list[str]:
    """The types of columns in the output; values of JSON lines are text there."""
    if not _is_parquet(file):
        return ["string"] * len(names)
    schema = _parquet(file).schema_arrow
    return [str(schema.field(name).type) for name in names]


def _parquet(file: str) -> pq.ParquetFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except pa.ArrowException as problem:
        raise BadSetting(f"{file}: it cannot be read as Parquet: {problem}") from problem


def chunks_of(number: int, file: str, options: ChunkOptions) -> Iterator[Chunk]:
    """The chunks of an input file; number: of the file in its job, counted from 0."""
    size, ending = options.rows_per_file, PARQUET if options.format == "parquet" else JSON_LINES[0]
    if _is_parquet(file):
        with _parquet(file) as opened:
            rows = opened.metadata.num_rows
        offsets = [0] * -(-rows // size)
    else:
        rows, offsets = _lines_of(file, size)
    for index, offset in enumerate(offsets):
        first = index * size + 1
        name = f"{number:05d}-{first:012d}{ending}"
        yield Chunk(file, first, min(size, rows - first + 1), offset, name)


def _lines_of(file: str, size: int) -> tuple[int, list[int]]:
    """The number of lines of a file, and where every size-th of them begins, the first included."""
    lines, position, offsets, is_open = 0, 0, list[int](), False
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK):
            if position == 0:
                offsets.append(0)
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))  # [lines]
            # An end of line k*size, counted from 1 in the file, stands before the first line of a chunk.
            begins = np.arange(-lines % size or size, len(ends) + 1, size) - 1
            offsets += (position + ends[begins] + 1).tolist()
            lines, position, is_open = lines + len(ends), position + len(block), block[-1:] != b"\n"
    if offsets and offsets[-1] == position:  # nothing stands behind the last line
        offsets.pop()
    return lines + is_open, offsets


def chunk_lines(chunk: Chunk, base: str, column: str, keep: Sequence[str]) -> tuple[list[Line], KeptColumns]:
    """The rows of a chunk as lines, and what is kept of each; base: folder at which relative paths start."""
    path = os.path.join(base, chunk.source)
    if _is_parquet(path):
        return _parquet_lines(path, chunk, column, keep)
    names = (column, SECOND_TEXT)
    with open(path, "rb") as stream:
        stream.seek(chunk.offset)
        lines = [_without_hint(line) for line in islice(read_lines(stream, "json", names), chunk.rows)]
    if len(lines) != chunk.rows:
        raise BadSetting(f"{path}: it has become shorter since the job was started")
    if not keep:
        return lines, KeptColumns([])
    kept = []
    with open(path, "rb") as stream:
        stream.seek(chunk.offset)
        for _, raw in zip(lines, stream, strict=False):
            value = _json_object(raw)
            kept.append({name: value.get(name) for name in keep})
    return lines, KeptColumns(kept)


def _without_hint(line: Line) -> Line:
    """A line whose problem names no option that only ee-run without --ray has."""
    return (
        line if line.problem is None else replace(line, problem=line.problem.removesuffix(f"; {TEXT_HINT}"))
    )


def _json_object(raw: bytes) -> Mapping[str, object]:
    """The object of a JSON line; empty if it is none: then the line has a problem, too."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _parquet_lines(
    path: str, chunk: Chunk, column: str, keep: Sequence[str]
) -> tuple[list[Line], KeptColumns]:
    import pyarrow as pa

    before, groups, start = 0, list[int](), chunk.first - 1
    with _parquet(path) as file:
        skip = 0
        for number in range(file.num_row_groups):
            rows = file.metadata.row_group(number).num_rows
            if before + rows > start and before < start + chunk.rows:
                if not groups:
                    skip = start - before
                groups.append(number)
            before += rows
        names = [
            name for name in dict.fromkeys((column, SECOND_TEXT, *keep)) if name in file.schema_arrow.names
        ]
        parts, left = list[pa.RecordBatch](), chunk.rows
        for batch in file.iter_batches(row_groups=groups, columns=names):
            if skip >= batch.num_rows:
                skip -= batch.num_rows
                continue
            parts.append(batch.slice(skip, left))
            skip, left = 0, left - parts[-1].num_rows
            if not left:
                break
    if left:
        raise BadSetting(f"{path}: it has become shorter since the job was started")
    table = pa.Table.from_batches(parts)
    kept = table.select(list(keep))
    return table_lines(table, column), KeptColumns(kept.to_pylist() if keep else [], kept.schema)


def table_lines(table: pa.Table, column: str) -> list[Line]:
    """The texts of a table as lines; a value that is no text is the problem of its line.

    A column "text_b" has second texts. Raises BadSetting if there is no such column.
    """
    if column not in table.column_names:
        raise BadSetting(f"no column {column!r}; the columns are {', '.join(table.column_names)}")
    texts = table.column(column).to_pylist()
    has_pairs = SECOND_TEXT in table.column_names and column != SECOND_TEXT
    seconds = table.column(SECOND_TEXT).to_pylist() if has_pairs else [None] * len(texts)
    lines = []
    for number, (text, second) in enumerate(zip(texts, seconds, strict=True), 1):
        problem = _problem(column, text) or (None if second is None else _problem(SECOND_TEXT, second))
        lines.append(Line(number, problem=problem) if problem else Line(number, text, second))
    return lines


def _problem(name: str, text: object) -> str | None:
    """Why a value is no text, in the words of ee-run."""
    if not isinstance(text, str):
        return f'"{name}": expected a string, found {type(text).__name__}'
    return None if text.strip() else f'"{name}" is empty'


def write_rows(
    path: str, rows: Sequence[Mapping[str, object]], answer: pa.Schema, kept: pa.Schema | None
) -> None:
    """Write rows as a file that appears when it is complete; its ending decides the format.

    answer, kept: types of the columns in Parquet; values kept from JSON lines become JSON text there. Raises
    OutputFailed.
    """
    import pyarrow.parquet as pq

    with _completed(path) as partial:
        if _is_parquet(path):
            pq.write_table(_table(rows, answer, kept), partial)
        else:
            with open(partial, "wb") as stream:
                for row in rows:
                    stream.write(_json_text(row).encode() + b"\n")


@contextmanager
def _completed(path: str) -> Iterator[str]:
    """Context manager that gives a hidden file's path, and gives that file its own name `path` at the end.

    A run that is killed leaves only the hidden file. Raises OutputFailed if it cannot be written.
    """
    folder, name = os.path.split(path)
    partial = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.partial")
    try:
        try:
            yield partial
            with open(partial, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(partial, path)
        except FileNotFoundError:
            # Another run of this job has written the file, completed the job and removed what was left.
            if not os.path.exists(path):
                raise
        except BaseException:
            with suppress(OSError):
                os.remove(partial)
            raise
    except OSError as problem:
        raise OutputFailed(f"{path}: it cannot be written: {problem.strerror or problem}") from problem


def _table(rows: Sequence[Mapping[str, object]], answer: pa.Schema, kept: pa.Schema | None) -> pa.Table:
    import pyarrow as pa

    keys = [pa.field("file", pa.string()), pa.field("row", pa.int64())]
    if kept is None:
        known = {*answer.names, *KEYS}
        names = list(dict.fromkeys(name for row in rows for name in row if name not in known))
        kept = pa.schema([(name, pa.string()) for name in names])
        rows = [{**row, **{name: _json_text(row.get(name)) for name in names}} for row in rows]
    return pa.Table.from_pylist(list(rows), schema=pa.schema([*keys, *kept, *answer]))


def _json_text(value: object) -> str:
    """A value as JSON text that can be encoded: half of a surrogate pair is written as in \\ud800.

    Infinity and NaN, which JSON does not have, become null, and bytes the text that they are in UTF-8.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, default=_as_text, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, default=_as_text)
    return text if is_unicode(text) else json.dumps(json.loads(text))


def _as_text(value: object) -> str:
    """A value of a type that JSON does not have."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _finite(value: object) -> object:
    """A value with None in place of the numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def failed_rows(path: str) -> int:
    """The number of rows of a file of answers that hold errors."""
    if _is_parquet(path):
        import pyarrow.parquet as pq

        column = pq.read_table(path, columns=["error"]).column("error")
        return len(column) - int(column.null_count)
    with open(path, "rb") as stream:
        return sum(line.startswith(_ERROR) for line in stream)


class Job:
    """The folder of a job's answers: what the job is, which files are there, and whether all are.

    facts: all that decides the answers, as JSON. Raises BadSetting if the folder is of another job, or holds
    something else, and OutputFailed if it cannot be written.
    """

    def __init__(self, folder: str, files: Sequence[str], facts: Mapping[str, object]) -> None:
        self.folder = folder
        inputs = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
        facts = json.loads(json.dumps({**facts, "inputs": inputs}, default=str))
        try:
            os.makedirs(folder, exist_ok=True)
            held = [name for name in os.listdir(folder) if not name.startswith(".")]
            before = self._read(JOB)  # afterwards: another run may begin the same job just now
            if before is None and held:
                raise BadSetting(
                    f"--out {folder}: it is not empty, and not of ee-run --ray; name another folder"
                )
            if before is None:
                self._write(JOB, facts)
        except OSError as problem:
            reason = problem.strerror or problem
            raise OutputFailed(f"--out {folder}: the folder cannot be written: {reason}") from problem
        if before is not None and before != facts:
            names = (name for name in facts if before.get(name) != facts[name])
            raise BadSetting(
                f"--out {folder}: it is of a job with other {', '.join(names)}; name another folder, or "
                "repeat the command of that job"
            )

    def counts(self) -> tuple[int, int] | None:
        """The numbers of rows and of errors of a complete job."""
        mark = self._read(COMPLETE)
        return None if mark is None else (mark["rows"], mark["failed"])

    def split(self, chunks: Iterable[Chunk]) -> tuple[list[Chunk], int, int]:
        """The chunks that are not answered; and of those that are, the numbers of rows and of errors."""
        left, rows, failed = list[Chunk](), 0, 0
        for chunk in chunks:
            path = os.path.join(self.folder, chunk.name)
            if os.path.exists(path):
                rows, failed = rows + chunk.rows, failed + failed_rows(path)
            else:
                left.append(chunk)
        return left, rows, failed

    def complete(self, chunks: Sequence[Chunk], rows: int, failed: int) -> None:
        """Mark the job as complete, and remove what workers that died have left.

        Raises OutputFailed if a file of answers is missing.
        """
        for chunk in chunks:
            if not os.path.exists(os.path.join(self.folder, chunk.name)):
                raise OutputFailed(f"{self.folder}: {chunk.name} is missing; run the same command again")
        for partial in glob.glob(os.path.join(glob.escape(self.folder), ".*.partial")):
            with suppress(OSError):
                os.remove(partial)
        self._write(COMPLETE, {"rows": rows, "failed": failed, "files": len(chunks)})

    def _read(self, name: str) -> dict[str, Any] | None:
        path = os.path.join(self.folder, name)
        if not os.path.exists(path):
            return None
        try:
            with open(path, encoding="utf-8") as stream:
                value: dict[str, Any] = json.load(stream)
        except ValueError as problem:
            raise BadSetting(f"{path}: it is not JSON: {problem}; name another folder for --out") from problem
        return value

    def _write(self, name: str, value: Mapping[str, object]) -> None:
        """Write a file of the job; hidden until it is complete, as a run may be killed here, too."""
        with (
            _completed(os.path.join(self.folder, name)) as partial,
            open(partial, "w", encoding="utf-8") as stream,
        ):
            json.dump(value, stream, ensure_ascii=False, indent=1)
