"""Read lines of a file or pipe, plain text or JSON objects, and lists of image files, as Line objects."""

from __future__ import annotations

import codecs
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

from offramp.runtime.errors import BadSetting

FORMATS = ("auto", "text", "json")
# Keys of a JSON line; the first is required.
TEXTS, IMAGES, PROMPTS = ("text", "text_b"), ("image",), ("prompt",)
LISTS = (".txt", ".lst", ".jsonl")  # endings of files that name images, one a line; others are images
LONGEST_LINE = (
    256 * 1024
)  # bytes; far more than any encoder reads, and a limit on memory for a file without line ends


@dataclass(frozen=True)
class Line:
    """One input line: its 1-based number, and its text, or the problem if it cannot be read.

    cut: whether it was longer than LONGEST_LINE. folder: the folder of the list that names an image. others:
    the other keys of a JSON line with a prompt; "messages" may take the place of the prompt.
    """

    number: int
    text: str = ""
    text_b: str | None = None
    problem: str | None = None
    cut: bool = False
    folder: str | None = None
    others: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """The path of an image; a relative path starts at the folder of its list."""
        return os.path.join(self.folder, self.text) if self.folder and self.text else self.text

    @property
    def shown_name(self) -> str:
        """The path of an image for an answer: bytes that are not UTF-8 are written as in a\\xff.jpg."""
        return os.fsencode(self.name).decode("utf-8", "backslashreplace")

    @property
    def item(self) -> str | tuple[str, str]:
        """The line as an item for Classifier.answers: a text, a pair of texts, or the path of an image."""
        return self.name if self.text_b is None else (self.text, self.text_b)


def standard_input() -> IO[bytes]:
    """Standard input as bytes; raises BadSetting if the process was started without one."""
    if sys.stdin is None:
        raise BadSetting("standard input is closed: name a file of lines")
    return sys.stdin.buffer


def read_images(sources: Sequence[str], form: str = "auto") -> Iterator[Line]:
    """Iterate over the images of all sources, one Line for each.

    A source is an image file, or a list: "-" or a file name with an ending of LISTS. A list has plain paths
    or JSON lines with "image"; form: see read_lines. Relative paths start at the folder of the list, or at
    the current folder for standard input. Raises OSError if a list cannot be opened; images are not opened
    here.
    """
    for source in sources:
        if source.lower().endswith(LISTS):
            os.stat(source)  # a missing list is an error before the first answer
    return _images(sources, form)


def _images(sources: Sequence[str], form: str) -> Iterator[Line]:
    for number, source in enumerate(sources, 1):
        if source == "-":
            yield from read_lines(standard_input(), form, IMAGES)
        elif source.lower().endswith(LISTS):
            with open(source, "rb") as stream:
                for line in read_lines(stream, form, IMAGES):
                    yield replace(line, folder=os.path.dirname(source))
        else:
            yield Line(number, source)


def read_lines(stream: IO[bytes], form: str = "auto", names: Sequence[str] = TEXTS) -> Iterator[Line]:
    """Read lines of a stream one at a time, as soon as they arrive.

    names: the keys of a JSON line: TEXTS, IMAGES or PROMPTS. form "auto": JSON lines if the first line that
    is not empty begins with "{", else plain text. A line that is empty, not UTF-8, or (in JSON lines) not an
    object with a string `text` gets its problem as a field; nothing is raised and no line is lost.
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
        yield _line(number, raw, form, cut, names)


def _line(number: int, raw: bytes, form: str, cut: bool, names: Sequence[str]) -> Line:
    if not raw.strip():
        return Line(number, problem="empty line")
    if cut and form == "json":
        return Line(number, problem=f"a JSON line of more than {LONGEST_LINE} bytes", cut=True)
    try:
        # The cut may have split a character: only the bytes before that character have to be UTF-8.
        text = codecs.getincrementaldecoder("utf-8")().decode(raw, final=not cut)
    except UnicodeDecodeError as problem:
        return Line(number, problem=f"not UTF-8 at byte {problem.start + 1}: {problem.reason}", cut=cut)
    if form == "json":
        return _json_line(number, text, names)
    return Line(number, text, cut=cut)


def _json_line(number: int, text: str, names: Sequence[str]) -> Line:
    hint = "if these are lines of plain text, say --format text"
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as problem:
        return Line(number, problem=f"not JSON: {problem}; {hint}")
    if not isinstance(value, dict):
        return Line(
            number, problem=f'expected a JSON object with "{names[0]}", found {type(value).__name__}; {hint}'
        )
    if names == PROMPTS and "messages" in value and "prompt" not in value:
        return Line(number, others=value)  # the session checks the messages
    strings: list[Any] = [value.get(name) for name in names]
    for name, string in zip(names, strings, strict=True):
        if not isinstance(string, str) and not (name == "text_b" and string is None):
            what = type(string).__name__ if name in value else "nothing"
            return Line(number, problem=f'"{name}": expected a string, found {what}')
        if isinstance(string, str) and not string.strip():
            return Line(number, problem=f'"{name}" is empty')
        if isinstance(string, str) and not is_unicode(string):
            return Line(number, problem=f'"{name}": half of a surrogate pair, not Unicode text')
    if names == PROMPTS:
        return Line(number, strings[0], others={key: value[key] for key in value if key not in names})
    return Line(number, strings[0], strings[1] if len(strings) > 1 else None)


def _skip_rest(stream: IO[bytes]) -> bool:
    """Read to the end of a line that was cut; returns whether the line had more characters."""
    more = False
    while rest := stream.readline(LONGEST_LINE):
        more = more or bool(rest.rstrip(b"\r\n"))
        if rest.endswith(b"\n"):
            break
    return more


def is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, with which it cannot be encoded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
