"""How commands end: a summary of what was made, its main figures, and the command that comes next.

On a terminal it is a panel, elsewhere plain text, with --json one JSON object.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click

from offramp.runtime import progress

F = TypeVar("F", bound=Callable[..., Any])
TYPED = "Next, to answer the lines that you type:"  # title of ee-run without a file
MAX_WIDTH, MIN_WIDTH = 80, 24
_LINES = "╭─╮│╰╯"  # corners and sides of a panel
_ASCII = "+-+|++"


@dataclass(frozen=True)
class Summary:
    """What a command made.

    title: in a few words. rows: (name, value) of its main figures. facts: the JSON object of --json.
    next_command: words of the command to type next, or none. next_title: what stands above it.
    """

    title: str
    rows: Sequence[tuple[str, str]]
    facts: Mapping[str, object]
    next_command: Sequence[str] = ()
    next_title: str = "Next:"

    def as_json(self) -> dict[str, object]:
        """The facts and, if there is one, the next command as "next"."""
        return {**self.facts, **({"next": command_line(self.next_command)} if self.next_command else {})}

    def plain(self) -> str:
        """The summary as lines of text without colour: for pipes and logs."""
        names = max((_columns(name) for name, _ in self.rows), default=0)
        lines = [_printable(self.title)]
        lines += [f"  {_pad(_printable(name), names)}  {_printable(value)}" for name, value in self.rows]
        if self.next_command:
            lines.append(f"{self.next_title} {command_line(self.next_command)}")
        return "\n".join(lines)

    def panel(self, columns: int = MAX_WIDTH, *, colour: bool = False, ascii_only: bool = False) -> str:
        """The summary as a box of at most `columns` characters, with the next command below it.

        The command is outside of the box and never broken, so that it can be copied. colour: mark title and
        command by ANSI codes. ascii_only: draw with + - | for terminals without UTF-8.
        """
        left, across, right, side, low_left, low_right = tuple(_ASCII if ascii_only else _LINES)
        title = _printable(self.title)
        names = max((_columns(name) for name, _ in self.rows), default=0)
        widest = max(
            [_columns(title) + 4, *(names + 2 + _columns(_printable(value)) for _, value in self.rows)]
        )
        inner = max(MIN_WIDTH, min(widest, min(columns, MAX_WIDTH) - 4))
        space = max(8, inner - names - 2)
        title = _wrap(title, inner - 2)[0]
        bold: Callable[[str], str] = (lambda text: click.style(text, bold=True)) if colour else str
        dim: Callable[[str], str] = (lambda text: click.style(text, dim=True)) if colour else str
        lines = [f"{left}{across} {bold(title)} {across * (inner - 1 - _columns(title))}{right}"]
        for name, value in self.rows:
            for number, part in enumerate(_wrap(_printable(value), space)):
                shown = _pad("" if number else _printable(name), names)
                lines.append(f"{side} {dim(shown)}  {_pad(part, inner - names - 2)} {side}")
        lines.append(low_left + across * (inner + 2) + low_right)
        if self.next_command:
            lines += [self.next_title, "", f"    {bold(command_line(self.next_command))}", ""]
        return "\n".join(lines)


@dataclass(frozen=True)
class CommandOutput:
    """What a command writes by its options --quiet and --json; see output_options.

    Standard output is the result, standard error is progress, notes and problems.
    """

    quiet: bool = False
    as_json: bool = False

    def progress(self) -> AbstractContextManager[None]:
        """A context in which progress is shown unless --quiet was given."""
        return progress.quiet(self.quiet)

    def table(self, text: str) -> None:
        """Write a part of the result, such as a table, on standard output."""
        if not self.quiet and not self.as_json:
            click.echo(text)

    def finish(self, summary: Summary, line: str | None = None) -> None:
        """Write the end of the result.

        With --json one JSON object. Else on a terminal the panel. Else `line`, which programs may read, on
        standard output, and the summary on standard error.
        """
        if self.as_json:
            click.echo(json.dumps(summary.as_json()))
        elif self.quiet:
            return
        elif _is_terminal(sys.stdout):
            show(summary, sys.stdout)
        else:
            if line is not None:
                click.echo(line)
            show(summary, sys.stderr)


def output_options(command: F) -> F:
    """Add options --quiet and --json to a command, which gets them as keywords `quiet` and `as_json`."""
    command = click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Write the summary as one JSON object, and nothing else, to stdout.",
    )(command)
    return click.option("--quiet", is_flag=True, help="Write nothing but errors and warnings.")(command)


def show(summary: Summary, stream: TextIO | None) -> None:
    """Write a summary to standard output or standard error: a panel if it is a terminal, else plain text."""
    if stream is None:
        return
    if not _is_terminal(stream):
        text = summary.plain()
    else:
        columns = shutil.get_terminal_size().columns
        text = summary.panel(columns, colour=may_colour(stream), ascii_only=not can_write(_LINES, stream))
    encoding = stream.encoding or "utf-8"
    click.echo(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def may_colour(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal that shows colours, and the user wants them (NO_COLOR is not set)."""
    return _is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def can_write(text: str, stream: TextIO) -> bool:
    """Whether the encoding of a stream has all characters of a text."""
    try:
        text.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def command_line(words: Sequence[str]) -> str:
    """Words as a line for a shell, quoted where needed.

    A command of ours that is not on PATH is named by its place beside this Python, as in .venv/bin/ee-run.
    """
    program, *others = words
    beside = Path(sys.executable).parent / program
    if program.startswith("ee-") and shutil.which(program) is None and beside.exists():
        program = os.path.relpath(beside)
    line = [program, *others]
    return subprocess.list2cmdline(line) if sys.platform == "win32" else shlex.join(line)


def free_path(path: Path) -> Path:
    """The path itself if nothing is there, else the first of its name with -2, -3 ... where nothing is."""
    others = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(place for place in chain([path], others) if not place.exists())


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _printable(text: str) -> str:
    """Text with control characters, such as those that move a terminal's cursor, as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _columns(text: str) -> int:
    """The columns that text takes on a terminal: wide characters two, combining ones none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def _pad(text: str, columns: int) -> str:
    return text + " " * (columns - _columns(text))


def _wrap(text: str, columns: int) -> list[str]:
    """Lines of at most so many columns, broken at blanks where possible."""
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if _columns(joined) <= columns:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if _columns(lines[-1] + character) > columns:
                lines.append("")
            lines[-1] += character
    return lines
