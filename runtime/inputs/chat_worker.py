"""The process in which a chat template runs, so that the time and memory that it takes have a limit.

chat.py starts this file as a script with no other code of the project: values for the template in on standard
input, prompts out on standard output, each as a frame: 8 bytes with the length of the JSON that follows. The
first frame in is what ChatTemplate sends when it starts the process; an answer is an object with "prompt", or
with "refused" and the reason.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import suppress
from datetime import datetime
from typing import IO, Any, NoReturn

LENGTH = 8  # bytes of the length of a frame
LONGEST_DATE = 200  # characters of the format of a date in a template


def read_frame(stream: IO[bytes], longest: int) -> Any:
    """Read one frame; None at the end of the stream. Raises OSError for one of more bytes than `longest`."""
    head = stream.read(LENGTH)
    if len(head) < LENGTH:
        return None
    size = int.from_bytes(head, "big")
    if size > longest:
        raise OSError(f"an answer of {size} bytes")
    body = stream.read(size)
    return json.loads(body) if len(body) == size else None


def frame_of(value: Any) -> bytes:
    """A value as a frame, in ASCII, so that half of a surrogate pair can be sent, too.

    Raises TypeError, ValueError or RecursionError for a value that JSON has not.
    """
    body = json.dumps(value).encode("ascii")
    return len(body).to_bytes(LENGTH, "big") + body


def write_frame(stream: IO[bytes], frame: bytes) -> None:
    """Write one frame and hand it on."""
    stream.write(frame)
    stream.flush()


def limit_process(memory: int) -> None:
    """Limit the address space of this process to `memory` bytes where the system can; allow no files."""
    try:
        import resource
    except ImportError:  # Windows: the limit of time is the only one
        return
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # macOS has no limit on the address space
            resource.setrlimit(kind, (limit, limit))


def stop_after(seconds: int) -> None:
    """End this process after some seconds, even if the process that started it is gone; 0: do not end it."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


def compile_template(text: str) -> Any:
    """Compile a template in jinja2's sandbox, with the settings and functions that transformers gives it.

    These are break and continue, {% generation %} (which changes nothing in the text), raise_exception,
    strftime_now, a tojson that leaves characters as they are, a dict that is no class, and a namespace
    without names that begin with an underscore.
    """
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """The block that marks what a model wrote, for training."""

        tags = {"generation"}  # noqa: RUF012  jinja2's own form

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return Scope(body).set_lineno(line)

    class PlainNamespace(Namespace):
        """A namespace of a template: names with an underscore first would reach Python's own attributes."""

        def __init__(*args: Any, **names: Any) -> None:
            values = dict(*args[1:], **names)
            for name in values:
                check_name(name)
            Namespace.__init__(args[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            super().__setitem__(name, value)

    def check_name(name: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(
                f"a namespace with the name {str(name)[:60]!r}, which begins with an underscore"
            )

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def date(form: str) -> str:
        if len(form) > LONGEST_DATE:
            raise TemplateError(f"a date in a format of {len(form)} characters")
        return datetime.now().strftime(form)

    def as_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": date,
        "dict": _Dictionaries(),
        "namespace": PlainNamespace,
    }
    return environment.from_string(text)


class _Dictionaries:
    """What templates call as dict: it makes dictionaries and has no other attribute of the class."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        """A dictionary with the same value for every key."""
        return dict.fromkeys(keys, value)


def reason(problem: Exception) -> str:
    """An error in one line; a message is the template's own, so it is cut."""
    if isinstance(problem, MemoryError):
        return "the template takes too much memory"
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text[:300]


def main() -> None:
    """Compile the template of the first frame, then answer frame after frame until the input ends."""
    source, out = sys.stdin.buffer, sys.stdout.buffer
    start = read_frame(source, sys.maxsize)
    if start is None:
        return
    sys.path[:] = start["path"]
    longest, seconds = int(start["longest"]), int(start["seconds"])
    stop_after(seconds)
    try:
        import jinja2.sandbox  # noqa: F401  before the limit: libraries take address space

        limit_process(start["memory"])
        template = compile_template(start["template"])
    except Exception as problem:  # jinja2 raises errors of the parser and of Python's compiler
        write_frame(out, frame_of({"refused": reason(problem)}))
        return
    write_frame(out, frame_of({"prompt": ""}))
    while True:
        stop_after(0)
        values = read_frame(source, sys.maxsize)
        if values is None:
            return
        stop_after(seconds)
        try:
            prompt = template.render(values)
            if len(prompt) > longest:
                answer = {"refused": f"it makes a prompt of {len(prompt)} characters, over {longest}"}
            else:
                answer = {"prompt": prompt}
            write_frame(out, frame_of(answer))
        except Exception as problem:  # a template can raise any error
            write_frame(out, frame_of({"refused": reason(problem)}))


if __name__ == "__main__":
    main()
