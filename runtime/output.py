"""Where ee-run writes its answers: standard output, or a file that an interrupted run can continue."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import ModuleType, TracebackType
from typing import IO, TYPE_CHECKING, Any

from offramp.runtime.errors import BadSetting, OutputFailed
from offramp.runtime.summary import can_write, may_colour

if TYPE_CHECKING:
    from typing_extensions import Self

    from offramp.runtime.inputs.lines import Line

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows, where two runs into one file are not noticed
    fcntl = None

_ERROR = b'{"error": '  # how a line begins that holds an error and no answer
_BAR = 12  # characters of the bar of a terminal
_CELLS, _ASCII_CELLS = ("━", "─"), ("#", "-")  # of blocks that were run, and that were saved
_GREEN, _DIM, _RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


class Output:
    """Writes JSON lines and text to a stream of bytes; errors of the system become OutputFailed.

    stream: buffered. name: names it in messages. A reader that closes a pipe raises BrokenPipeError.
    """

    def __init__(self, stream: IO[bytes], name: str = "standard output") -> None:
        self._stream, self.name = stream, name
        self.kept = self.failed = 0  # lines of earlier runs, and those of them that hold errors

    def write(self, value: Mapping[str, Any], *, flush: bool = False) -> None:
        """Write an object as one JSON line, in UTF-8 whatever the encoding of the terminal."""
        self.write_text(json.dumps(value, ensure_ascii=False) + "\n", flush=flush)

    def write_answer(self, value: Mapping[str, Any], depth: float, *, flush: bool = False) -> None:
        """Write the object of an answer as write() does; depth: the share of the blocks that it needed, 0..1,
        or 0 for an error. A terminal shows it, too.
        """
        self.write(value, flush=flush)

    def write_text(self, text: str, *, flush: bool = False) -> None:
        """Write text as UTF-8."""
        try:
            self._stream.write(text.encode("utf-8"))
            if flush:
                self._stream.flush()
        except (OSError, ValueError) as problem:  # ValueError: closed by the application
            raise self._failed(problem) from problem

    def flush(self) -> None:
        """Hand all that was written to the system."""
        self.write_text("", flush=True)

    def skip(self, lines: Iterator[Line], window: int) -> Iterator[Line]:
        """The input lines that are still to be answered; window: lines that are answered together."""
        return lines

    def complete(self) -> None:
        """All lines are answered and written."""
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Hand on what was answered before an error."""
        with suppress(OutputFailed, BrokenPipeError):
            self.flush()

    def _failed(self, problem: Exception) -> Exception:
        if isinstance(problem, BrokenPipeError):
            return problem
        reason = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
        return OutputFailed(f"{self.name}: the answers cannot be written: {reason}")


class TerminalOutput(Output):
    """Writes to a terminal, and before each answer a bar of the blocks that it needed.

    colour: draw the bar in colour. ascii_only: draw it with # and - for terminals without UTF-8.
    """

    def __init__(self, stream: IO[bytes], *, colour: bool, ascii_only: bool) -> None:
        super().__init__(stream)
        self._colour, self._cells = colour, _ASCII_CELLS if ascii_only else _CELLS

    def write_answer(self, value: Mapping[str, Any], depth: float, *, flush: bool = False) -> None:
        """Write a bar and the object of an answer; before an error stand blanks in place of the bar."""
        run, saved = self._cells
        count = min(_BAR, math.ceil(_BAR * depth - 1e-9))
        bar, rest = run * count, saved * (_BAR - count)
        if depth <= 0:
            bar, rest = "", " " * _BAR
        elif self._colour:
            bar, rest = f"{_GREEN}{bar}{_RESET}", f"{_DIM}{rest}{_RESET}" if rest else ""
        self.write_text(f"{bar}{rest} ")
        self.write(value, flush=flush)


def standard_output() -> Output:
    """Standard output; raises OutputFailed if the process was started without one."""
    if sys.stdout is None:
        raise OutputFailed("standard output is closed: give a place for the answers, as in > answers.jsonl")
    if not sys.stdout.isatty():
        return Output(sys.stdout.buffer)
    # Bytes are written without click, which translates colours for old consoles of Windows.
    colour = may_colour(sys.stdout) and sys.platform != "win32"
    return TerminalOutput(
        sys.stdout.buffer, colour=colour, ascii_only=not can_write("".join(_CELLS), sys.stdout)
    )


def discard_standard_output() -> None:
    """Drop what standard output has buffered, which the interpreter could not write when it ends."""
    if sys.stdout is not None:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class FileOutput(Output):
    """Writes to PATH.<job>.partial, which becomes PATH when all is written; a context manager.

    job: a short hash of all that decides the answers. resume: continue the partial file of an earlier run of
    the same job, if there is one; else it must not exist. Raises BadSetting if PATH or a partial file stands
    in the way, or another process writes it, and OutputFailed if it cannot be opened.

    A run may have been killed at any moment, so the last line may be cut: it is removed. Lines are answered
    in windows; of the last window all answers are removed if some are missing, so that the rows that are
    answered together, and thus the answers, are those of a run that was not interrupted.
    """

    def __init__(self, path: str, job: str, *, resume: bool) -> None:
        self.path, self.partial = path, f"{path}.{job}.partial"
        if os.path.exists(path):
            raise BadSetting(f"--out {path}: it exists already; remove it, or name another file")
        for other in glob.glob(f"{glob.escape(path)}.*.partial"):
            if other != self.partial:
                raise BadSetting(
                    f"--out {path}: {other} is of a run with another bundle, input or options; repeat that "
                    "one with --resume, or remove the file"
                )
        if not resume and os.path.exists(self.partial):
            raise BadSetting(
                f"--out {path}: {self.partial} is of an interrupted run; add --resume to continue it, or "
                "remove the file"
            )
        try:
            stream = open(self.partial, "a+b")  # noqa: SIM115  # closed by __exit__
        except OSError as problem:
            raise OutputFailed(f"{self.partial}: it cannot be opened: {problem.strerror}") from problem
        super().__init__(stream, self.partial)
        if fcntl is not None:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as problem:
                stream.close()
                raise BadSetting(f"--out {path}: another run writes {self.partial} just now") from problem
            except OSError:  # a file system without locks
                pass

    def skip(self, lines: Iterator[Line], window: int) -> Iterator[Line]:
        """Skip input lines that earlier runs have answered; raises BadSetting if there are fewer lines."""
        size = self._keep_windows(window)
        for number in range(self.kept):
            if next(lines, None) is None:
                raise BadSetting(
                    f"--resume: {self.partial} has answers to {self.kept} lines, and the input has {number}: "
                    "give the same input"
                )
        self._stream.truncate(size)
        return lines

    def _keep_windows(self, window: int) -> int:
        """Count the answers to keep; returns the bytes that they take."""
        self._stream.seek(0)
        size = position = lines = failed = 0
        for line in self._stream:
            if not line.endswith(b"\n"):
                break
            lines, position, failed = lines + 1, position + len(line), failed + line.startswith(_ERROR)
            if lines % window == 0:
                size, self.kept, self.failed = position, lines, failed
        return size

    def complete(self) -> None:
        """Give the file its name, once the disk has all of it."""
        self.flush()
        try:
            os.fsync(self._stream.fileno())
            os.replace(self.partial, self.path)
        except OSError as problem:
            raise self._failed(problem) from problem

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Hand on what was answered before an error, and close the file."""
        super().__exit__(kind, problem, trace)
        with suppress(OSError):  # what cannot be written is dropped
            self._stream.close()


def job_name(facts: object) -> str:
    """A short name of a job: a hash of all that decides its answers; facts: JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:8]
