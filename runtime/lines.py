"""Lines of a file or pipe: plain text, or JSON objects with `text` and `text_b`; each becomes one Line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

FORMATS = ("auto", "text", "json")
LONGEST_LINE = (
    256 * 1024
)  # bytes; far beyond what any encoder reads, and a bound on memory for a file without line ends


@dataclass(frozen=True)
class Line:
    """One input line: its 1-based number, and what to answer or the problem; cut: over LONGEST_LINE."""

    number: int
    text: str = ""
    text_b: str | None = None
    problem: str | None = None
    cut: bool = False

    @property
    def item(self) -> str | tuple[str, str]:
        """What Session.map takes."""
        return self.text if self.text_b is None else (self.text, self.text_b)


def read_lines(stream: IO[bytes], form: str = "auto") -> Iterator[Line]:
    """Read lines as they come, holding one at a time.

    form "auto": JSON lines if the first line that is not empty begins with "{", else plain text. A line that
    is empty, not UTF-8, or (in JSON lines) not an object with a string `text` comes out with its problem;
    nothing is raised and no line is lost.
    """
    number = 0
    while raw := stream.readline(LONGEST_LINE):
        number += 1
        cut = not raw.endswith(b"\n") and len(raw) == LONGEST_LINE and _skip_rest(stream)
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        raw = raw.rstrip(b"\r\n")
        if form == "auto" and raw.strip():
            form = "json" if raw.lstrip().startswith(b"{") else "text"
        yield _line(number, raw, form, cut)


def _line(number: int, raw: bytes, form: str, cut: bool) -> Line:
    if not raw.strip():
        return Line(number, problem="empty line")
    if cut and form == "json":
        return Line(number, problem=f"a JSON line of more than {LONGEST_LINE} bytes", cut=True)
    try:
        # The cut may have gone through the middle of a character: only what is before it has to be UTF-8.
        text = codecs.getincrementaldecoder("utf-8")().decode(raw, final=not cut)
    except UnicodeDecodeError as problem:
        return Line(number, problem=f"not UTF-8 at byte {problem.start + 1}: {problem.reason}", cut=cut)
    if form == "json":
        return _json_line(number, text)
    return Line(number, text, cut=cut)


def _json_line(number: int, text: str) -> Line:
    hint = "if these are lines of plain text, say --format text"
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as problem:
        return Line(number, problem=f"not JSON: {problem}; {hint}")
    if not isinstance(value, dict):
        return Line(
            number, problem=f'expected a JSON object with "text", found {type(value).__name__}; {hint}'
        )
    first, second = value.get("text"), value.get("text_b")
    for name, found in (("text", first), ("text_b", second)):
        if not isinstance(found, str) and not (name == "text_b" and found is None):
            what = type(found).__name__ if name in value else "nothing"
            return Line(number, problem=f'"{name}": expected a string, found {what}')
        if isinstance(found, str) and not found.strip():
            return Line(number, problem=f'"{name}" is empty')
        if isinstance(found, str) and not _is_unicode(found):
            return Line(number, problem=f'"{name}": half of a surrogate pair, not Unicode text')
    return Line(number, str(first), second)


def _skip_rest(stream: IO[bytes]) -> bool:
    """Read to the end of a line that was cut; True if there was any more of it."""
    more = False
    while rest := stream.readline(LONGEST_LINE):
        more = more or bool(rest.rstrip(b"\r\n"))
        if rest.endswith(b"\n"):
            break
    return more


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
