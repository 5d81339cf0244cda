"""Make a prompt from chat messages with a bundle's chat templates (needs jinja2: extra `chat`)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
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

TEMPLATE = "chat_template.jinja"  # in a bundle: the template without another name
DEFAULT, TOOL_USE = "default", "tool_use"  # names of templates with a meaning of their own
TEMPLATE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,59}")  # of any template
_NAMED = re.compile(rf"chat_template_({TEMPLATE_NAME.pattern})\.jinja")
Message = Mapping[str, Any]  # role, content, and what else the template reads
# Limits on one prompt. Templates in use take some milliseconds and megabytes; a template of a hostile bundle,
# without a limit, as long as it likes and all memory, after which the system ends the process.
SECONDS, MEMORY = 10, 512 * 2**20
LARGEST_TEMPLATE = 2**20  # bytes
_LONGEST_REASON, _BYTES_PER_CHARACTER = 2**16, 12  # of an answer, as JSON in ASCII writes a character
# What apply_chat_template of transformers takes for itself: as an argument of a template it has no effect.
_NOT_FOR_TEMPLATES = {
    *("messages", "conversation", "chat_template", "tokenize", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    *("continue_final_message", "sanitize_control_tokens"),
}
_REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # keys of a message's reasoning, the usual one first


def template_file(name: str) -> str:
    """The file of a bundle that holds the chat template of this name; raises ValueError for other names."""
    if name == DEFAULT:
        return TEMPLATE
    if not TEMPLATE_NAME.fullmatch(name):
        raise ValueError(
            f"chat template {name[:60]!r}: a name has up to 60 letters, digits and the characters _ . -"
        )
    return f"chat_template_{name}.jinja"


def template_files(files: Iterable[str]) -> dict[str, str]:
    """The files of chat templates among those of a bundle, by the name of the template, the default first."""
    names = {DEFAULT: TEMPLATE} if TEMPLATE in files else {}
    return names | {named[1]: named[0] for file in sorted(files) if (named := _NAMED.fullmatch(file))}


class ChatTemplate:
    """A bundle's chat templates as a function from messages to a prompt.

    A template is a program that comes with the bundle. It runs in jinja2's sandbox, in a process of its own
    that is started by the first prompt and again after it was stopped; the process ends with this object. Any
    thread may call it. A process that was forked from one that used it starts its own.
    """

    def __init__(self, bundle: Bundle, *, seconds: int = SECONDS, memory: int = MEMORY) -> None:
        self._bundle, self._seconds, self._memory = bundle, seconds, memory
        facts = bundle.manifest.input
        assert isinstance(facts, TextInput)
        self._longest = CHARACTERS_PER_TOKEN * facts.longest  # characters of a prompt
        self._files = template_files(bundle.manifest.files)
        self._lock = threading.Lock()
        self._processes: dict[str, _Process] = {}  # by the name of the template

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the bundle's templates, "default" first if it has a default."""
        return tuple(self._files)

    def __call__(
        self,
        messages: Sequence[Message],
        *,
        template: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """Make the prompt, which ends at the beginning of the answer.

        messages: {role, content} and what else the template reads; content is a text or a list of parts
        {"type": "text", "text": ...}, which the template gets as they are. template: the name of a template;
        None is the default, or "tool_use" if there are tools and the bundle has a template of this name.
        arguments: further values for the template, such as tools, documents, add_generation_prompt (True
        unless it is given) and enable_thinking; they replace special tokens of the same name.

        Raises BadInput for values that are not messages or arguments, for a template that is not there, and
        for messages that the template refuses or for which it takes more than the limits; BadSetting if the
        bundle has no template, BadBundle if it cannot be compiled, EngineUnavailable without jinja2 or
        without a Python to start.
        """
        plain = [_plain_message(number, message) for number, message in enumerate(_checked(messages))]
        values = _checked_arguments({} if arguments is None else arguments)
        name = self._chosen(template, has_tools=values["tools"] is not None)
        values = {**self._special_tokens(), **values, "messages": plain}
        try:
            frame = chat_worker.frame_of(values)
        except RecursionError:
            raise BadInput("the messages are nested too deeply") from None
        except (TypeError, ValueError) as problem:
            raise BadInput(
                f"the messages or template arguments hold a value that JSON has not: {problem}"
            ) from problem
        with self._lock:
            process = self._running(name)
            try:
                answer = process.ask(frame, self._seconds, self._longest)
            except OSError as problem:
                raise self._failed(BadInput, name, problem) from problem
        if "refused" in answer:
            raise BadInput(f"the chat template refuses these messages: {answer['refused']}")
        prompt = str(answer["prompt"])
        if not is_unicode(prompt):
            raise BadInput("the chat template writes half of a surrogate pair, which is not Unicode text")
        for number, message in enumerate(plain):
            parts = message.get("content")
            if parts and isinstance(parts, list) and str(parts) in prompt:
                raise BadInput(
                    f"message {number}: the chat template takes no list of parts and would write the list "
                    "itself; give the content as one string"
                )
        return prompt

    def compile(self) -> None:
        """Compile every template of the bundle, as the first prompt of each would; see __call__."""
        self._special_tokens()
        with self._lock:
            for name in self._files:
                self._running(name)

    def close(self) -> None:
        """End the processes that run; a later call starts another."""
        with self._lock:
            for process in self._processes.values():
                process.end()
            self._processes.clear()

    def _chosen(self, template: str | None, *, has_tools: bool) -> str:
        """The name of the template for a prompt."""
        if not self._files:
            raise BadSetting("this bundle has no chat template: give the prompt as one text")
        if template is None:
            template = TOOL_USE if has_tools and TOOL_USE in self._files else DEFAULT
            if template not in self._files:
                raise BadInput(
                    f"this bundle has no default chat template; name one of {', '.join(self._files)}"
                )
        elif template not in self._files:
            raise BadInput(
                f"chat template {template!r:.60}: this bundle has {', '.join(self._files)}; name one of them"
            )
        return template

    def _special_tokens(self) -> dict[str, str]:
        """Special tokens by the names that templates have for them, such as bos_token."""
        tokens = self._bundle.manifest.provenance.get("special_tokens", {})
        if not isinstance(tokens, Mapping):
            raise BadBundle(f"{self._bundle.folder / 'manifest.json'}: special_tokens: expected an object")
        return {str(name): str(token) for name, token in tokens.items()}

    def _running(self, name: str) -> _Process:
        """The process of a template, started if none runs; call it with the lock held."""
        process = self._processes.get(name)
        if process is None or not process.usable:
            process = self._processes[name] = self._start(name)
        return process

    def _start(self, name: str) -> _Process:
        """Start a process and have it compile a template."""
        file = self._files[name]
        path = self._bundle.folder / file
        if self._bundle.manifest.files[file].bytes > LARGEST_TEMPLATE:
            raise BadBundle(f"{path}: more than {LARGEST_TEMPLATE} bytes, so it is no chat template")
        try:
            template = self._bundle.read(file).decode("utf-8")
        except UnicodeDecodeError as problem:
            raise BadBundle(f"{path}: not a chat template: {problem}") from problem
        if find_spec("jinja2") is None:
            raise EngineUnavailable(
                "chat templates need jinja2, which cannot be imported; pip install 'offramp[chat]'"
            )
        process = _Process()
        first = {
            "path": sys.path,
            "template": template,
            "memory": self._memory,
            "seconds": self._seconds + 1,  # it ends itself where nobody is left who would end it
            "longest": self._longest,
        }
        try:
            answer = process.ask(chat_worker.frame_of(first), self._seconds, self._longest)
        except OSError as problem:
            raise self._failed(BadBundle, name, problem) from problem
        if "refused" in answer:
            process.end()
            raise BadBundle(f"{path}: not a chat template: {answer['refused']}")
        return process

    def _failed(self, kind: type[Exception], name: str, problem: OSError) -> Exception:
        """The error for a process that gave no answer."""
        limits = f"{self._seconds} s and {self._memory // 2**20} MiB"
        path = self._bundle.folder / self._files[name]
        return kind(f"{path}: stopped: {problem}; a prompt may take {limits}")


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
    """A message as the template gets it; raises BadInput for a value that is no message, or no Unicode text.

    As in transformers, keys without a value are left out, and reasoning has the names that templates read. A
    message that calls tools needs no content.
    """
    plain = {} if not isinstance(message, Mapping) else {k: v for k, v in message.items() if v is not None}
    content = plain.get("content", "" if plain.get("tool_calls") else None)
    if not isinstance(plain.get("role"), str) or not isinstance(content, (str, list, tuple)):
        raise BadInput(f"message {number}: expected a role and a content, found {message!r:.60}")
    texts = {"role": plain["role"]}
    if isinstance(content, str):
        texts["content"] = content
    else:
        plain["content"] = [dict(_checked_part(number, *part)) for part in enumerate(content)]
        texts |= {f"content[{place}]": part["text"] for place, part in enumerate(plain["content"])}
    for key, text in texts.items():
        if not is_unicode(text):
            raise BadInput(f"message {number}: half of a surrogate pair in its {key}, not Unicode text")
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _checked_part(number: int, place: int, part: Any) -> Mapping[str, Any]:
    """A part of a message's content, if it is text; raises BadInput, which names other types."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text" and isinstance(kind, str):
        raise BadInput(
            f"message {number}: content[{place}] has the type {kind[:40]!r}; a bundle reads text alone"
        )
    if kind is None or not isinstance(part.get("text"), str):
        form = '{"type": "text", "text": ...}'
        raise BadInput(f"message {number}: content[{place}]: expected {form}, found {part!r:.60}")
    checked: Mapping[str, Any] = part
    return checked


def _checked_arguments(arguments: Any) -> dict[str, Any]:
    """The arguments of a template, with those that every template may read; raises BadInput."""
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise BadInput(f"template arguments: expected an object of names and values, found {arguments!r:.60}")
    if unfit := sorted(_NOT_FOR_TEMPLATES & arguments.keys()):
        raise BadInput(f"template argument {unfit[0]!r}: it is none of a template, and would have no effect")
    values: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": True, **arguments}
    for name, form in (("tools", "JSON schemas"), ("documents", "objects")):
        given = values[name]
        if given is None:
            continue
        if not isinstance(given, (list, tuple)):
            raise BadInput(f"{name}: expected a list of {form}, found {given!r:.60}")
        for place, value in enumerate(given):
            if not isinstance(value, Mapping):
                raise BadInput(f"{name}[{place}]: expected an object, found {value!r:.60}")
    if not isinstance(values["add_generation_prompt"], bool):
        raise BadInput(
            f"add_generation_prompt: expected true or false, found {values['add_generation_prompt']!r:.40}"
        )
    return values
