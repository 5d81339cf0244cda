"""The process in which a chat template runs, so that the time and memory that it takes have a limit.

chat.py starts this file as a script with no other code of the project: messages in on standard input, prompts
out on standard output, each as a frame: 8 bytes with the length of the JSON that follows. The first frame in
is what ChatTemplate.start sends; an answer is an object with "prompt", or with "refused" and the reason.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
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


def compile_template(text: str, tokens: Mapping[str, str]) -> Any:
    """Compile a template in jinja2's sandbox, with the settings and functions that transformers gives it."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def date(form: str) -> str:
        if len(form) > LONGEST_DATE:
            raise TemplateError(f"a date in a format of {len(form)} characters")
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"raise_exception": refuse, "strftime_now": date, **tokens}
    return environment.from_string(text)


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
        template = compile_template(start["template"], start["tokens"])
    except Exception as problem:  # jinja2 raises errors of the parser and of Python's compiler
        write_frame(out, frame_of({"refused": reason(problem)}))
        return
    write_frame(out, frame_of({"prompt": ""}))
    while True:
        stop_after(0)
        messages = read_frame(source, sys.maxsize)
        if messages is None:
            return
        stop_after(seconds)
        try:
            prompt = template.render(messages=messages, add_generation_prompt=True)
            if len(prompt) > longest:
                answer = {"refused": f"it makes a prompt of {len(prompt)} characters, over {longest}"}
            else:
                answer = {"prompt": prompt}
            write_frame(out, frame_of(answer))
        except Exception as problem:  # a template can raise any error
            write_frame(out, frame_of({"refused": reason(problem)}))


if __name__ == "__main__":
    main()
