"""Make a prompt from chat messages with the tokenizer's chat template (needs jinja2: extra `chat`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.errors import BadBundle, BadInput, BadSetting, EngineUnavailable

TEMPLATE = "chat_template.jinja"  # in a bundle
Message = Mapping[str, str]  # role, content


def chat_prompt_function(bundle: Bundle) -> Callable[[Sequence[Message]], str]:
    """Return a function that makes a prompt from messages; its first call reads and compiles the template.

    The prompt ends at the beginning of the answer. The function raises BadSetting if the bundle has no
    template, EngineUnavailable without jinja2, BadInput for values that are not messages, and for messages
    that the template refuses.
    """
    compiled: list[Any] = []

    def prompt_of(messages: Sequence[Message]) -> str:
        _check(messages)
        if TEMPLATE not in bundle.manifest.files:
            raise BadSetting(f"{bundle.folder} has no chat template: give the prompt as one text")
        if not compiled:
            compiled.append(_compiled(bundle))
        try:
            prompt: str = compiled[0].render(messages=list(messages), add_generation_prompt=True)
        except Exception as problem:  # a template can raise any error
            raise BadInput(f"the chat template refuses these messages: {problem}") from problem
        return prompt

    return prompt_of


def _check(messages: Any) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, (bytes, bytearray)):
        raise BadInput(f"expected a string or messages, found {messages!r:.60}")
    if not messages:
        raise BadInput("expected messages, found none")
    for number, message in enumerate(messages):
        fits = isinstance(message, Mapping) and all(
            isinstance(message.get(key), str) for key in ("role", "content")
        )
        if not fits:
            raise BadInput(f"message {number}: expected a role and a content, found {message!r:.60}")


def _compiled(bundle: Bundle) -> Any:
    try:
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as problem:
        raise EngineUnavailable(
            f"chat templates need jinja2, which cannot be imported ({problem}); pip install 'offramp[chat]'"
        ) from problem

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    # The same settings as in transformers; in a sandbox, as bundles can come from untrusted sources.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    tokens = bundle.manifest.provenance.get("special_tokens", {})
    environment.globals |= {name: str(token) for name, token in dict(tokens).items()}
    try:
        return environment.from_string(bundle.read(TEMPLATE).decode("utf-8"))
    except (TemplateError, UnicodeDecodeError) as problem:
        raise BadBundle(f"{bundle.folder / TEMPLATE}: not a chat template: {problem}") from problem
