"""Make a prompt from chat messages with the tokenizer's chat template (needs jinja2: extra `chat`)."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import TextInput
from offramp.runtime.errors import BadBundle, BadInput, BadSetting, EngineUnavailable
from offramp.runtime.inputs import chat_worker
from offramp.runtime.inputs.lines import is_unicode
from offramp.runtime.inputs.text import CHARACTERS_PER_TOKEN

TEMPLATE = "chat_template.jinja"  # in a bundle
Message = Mapping[str, str]  # role, content
# Limits on one prompt. Templates in use take some milliseconds and megabytes; a template of a hostile bundle,
# without a limit, as long as it likes and all memory, after which the system ends the process.
SECONDS, MEMORY = 10, 512 * 2**20
LARGEST_TEMPLATE = 2**20  # bytes
_LONGEST_REASON, _BYTES_PER_CHARACTER = 2**16, 12  # of an answer, as JSON in ASCII writes a character


class ChatTemplate:
    """A bundle's chat template as a function from messages to a prompt.

    The template is a program that comes with the bundle. It runs in jinja2's sandbox, in a process of its own
    that is started by the first prompt and again after it was stopped; the process ends with this object. Any
    thread may call it. A process that was forked from one that used it starts its own.
    """

    def __init__(self, bundle: Bundle, *, seconds: int = SECONDS, memory: int = MEMORY) -> None:
        self._bundle, self._seconds, self._memory = bundle, seconds, memory
        facts = bundle.manifest.input
        assert isinstance(facts, TextInput)
        self._longest = CHARACTERS_PER_TOKEN * facts.longest  # characters of a prompt
        self._lock = threading.Lock()
        self._process: _Process | None = None

    def __call__(self, messages: Sequence[Message]) -> str:
        """Make the prompt, which ends at the beginning of the answer.

        Raises BadInput for values that are not messages, and for messages that the template refuses or for
        which it takes more than the limits; BadSetting if the bundle has no template, BadBundle if it cannot
        be compiled, EngineUnavailable without jinja2 or without a Python to start.
        """
        plain = [_plain_message(number, message) for number, message in enumerate(_checked(messages))]
        if TEMPLATE not in self._bundle.manifest.files:
            raise BadSetting(f"{self._bundle.folder} has no chat template: give the prompt as one text")
        try:
            frame = chat_worker.frame_of(plain)
        except RecursionError:
            raise BadInput("the messages are nested too deeply") from None
        except (TypeError, ValueError) as problem:
            raise BadInput(f"the messages hold a value that JSON has not: {problem}") from problem
        with self._lock:
            process = self._process
            if process is None or not process.usable:
                process = self._process = self._start()
            try:
                answer = process.ask(frame, self._seconds, self._longest)
            except OSError as problem:
                raise self._failed(BadInput, problem) from problem
        if "refused" in answer:
            raise BadInput(f"the chat template refuses these messages: {answer['refused']}")
        prompt = str(answer["prompt"])
        if not is_unicode(prompt):
            raise BadInput("the chat template writes half of a surrogate pair, which is not Unicode text")
        return prompt

    def close(self) -> None:
        """End the process, if one runs; a later call starts another."""
        with self._lock:
            if self._process is not None:
                self._process.end()
                self._process = None

    def _start(self) -> _Process:
        """Start the process and have it compile the template."""
        path = self._bundle.folder / TEMPLATE
        if self._bundle.manifest.files[TEMPLATE].bytes > LARGEST_TEMPLATE:
            raise BadBundle(f"{path}: more than {LARGEST_TEMPLATE} bytes, so it is no chat template")
        try:
            template = self._bundle.read(TEMPLATE).decode("utf-8")
        except UnicodeDecodeError as problem:
            raise BadBundle(f"{path}: not a chat template: {problem}") from problem
        tokens = self._bundle.manifest.provenance.get("special_tokens", {})
        if not isinstance(tokens, Mapping):
            raise BadBundle(f"{path.with_name('manifest.json')}: special_tokens: expected an object")
        if find_spec("jinja2") is None:
            raise EngineUnavailable(
                "chat templates need jinja2, which cannot be imported; pip install 'offramp[chat]'"
            )
        process = _Process()
        first = {
            "path": sys.path,
            "template": template,
            "tokens": {str(name): str(token) for name, token in tokens.items()},
            "memory": self._memory,
            "seconds": self._seconds + 1,  # it ends itself where nobody is left who would end it
            "longest": self._longest,
        }
        try:
            answer = process.ask(chat_worker.frame_of(first), self._seconds, self._longest)
        except OSError as problem:
            raise self._failed(BadBundle, problem) from problem
        if "refused" in answer:
            process.end()
            raise BadBundle(f"{path}: not a chat template: {answer['refused']}")
        return process

    def _failed(self, kind: type[Exception], problem: OSError) -> Exception:
        """The error for a process that gave no answer."""
        limits = f"{self._seconds} s and {self._memory // 2**20} MiB"
        return kind(f"{self._bundle.folder / TEMPLATE}: stopped: {problem}; a prompt may take {limits}")


class _Process:
    """One process of chat_worker.py, with a pipe in each direction."""

    def __init__(self) -> None:
        # Isolated: nothing of the environment or of the current folder is imported.
        command = [sys.executable, "-I", "-S", str(Path(chat_worker.__file__))]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the process that asks, which then ends this one
            )
        except (OSError, ValueError) as problem:
            raise EngineUnavailable(
                f"a chat template runs in a process of its own, and {sys.executable!r} cannot be started: "
                f"{problem}; give the prompt as one text"
            ) from problem
        self._owner = os.getpid()
        self._end = weakref.finalize(self, _end_process, self._process, self._owner)

    @property
    def usable(self) -> bool:
        """Whether it runs and belongs to this process, not to the one from which this was forked."""
        return self._owner == os.getpid() and self._end.alive and self._process.poll() is None

    def ask(self, frame: bytes, seconds: int, longest: int) -> Mapping[str, str]:
        """Send one frame and wait for the answer, a prompt of at most `longest` characters or a reason.

        Raises OSError if none comes within some seconds. After any error the process is ended, so that its
        answer is not taken for that to the next frame.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            chat_worker.write_frame(self._process.stdin, frame)
            answer = chat_worker.read_frame(
                self._process.stdout, _LONGEST_REASON + _BYTES_PER_CHARACTER * longest
            )
            if not isinstance(answer, dict):
                raise BrokenPipeError("its process ended")
            return answer
        except BaseException as problem:
            self.end()
            if late.is_set():
                raise TimeoutError(f"it runs for more than {seconds} s") from problem
            raise
        finally:
            timer.cancel()

    def end(self) -> None:
        """End the process, if it is this process that started it."""
        self._end()


def _end_process(process: subprocess.Popen[bytes], owner: int) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):  # the rest of a frame that nobody reads any more
                stream.close()
    if owner == os.getpid():
        process.kill()
        process.wait()
    else:
        process.returncode = 0  # it is the child of another process: not to be waited for here


def _checked(messages: Any) -> Sequence[Any]:
    if not isinstance(messages, Sequence) or isinstance(messages, (bytes, bytearray)):
        raise BadInput(f"expected a string or messages, found {messages!r:.60}")
    if not messages:
        raise BadInput("expected messages, found none")
    return messages


def _plain_message(number: int, message: Any) -> dict[str, Any]:
    """A message as a dict; raises BadInput for a value that is no message, or no Unicode text."""
    fits = isinstance(message, Mapping) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )
    if not fits:
        raise BadInput(f"message {number}: expected a role and a content, found {message!r:.60}")
    for key in ("role", "content"):
        if not is_unicode(message[key]):
            raise BadInput(f"message {number}: half of a surrogate pair in its {key}, not Unicode text")
    return dict(message)
