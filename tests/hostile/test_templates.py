"""Chat templates of hostile bundles: bounded in time and memory, inside the sandbox, and refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_bundles import GENERATOR

from offramp.runtime.bundle.files import Bundle, open_bundle
from offramp.runtime.bundle.manifest import FileFact
from offramp.runtime.errors import BadBundle, BadInput, EngineUnavailable
from offramp.runtime.inputs import chat
from offramp.runtime.inputs.chat import TEMPLATE, ChatTemplate

pytest.importorskip("jinja2")
linux = pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is that of Linux")
MESSAGES = [{"role": "user", "content": "film"}]
MEMORY = 192 * 2**20


def template(
    folder: Path, text: str | bytes, *, seconds: int = 2, tokens: object = None, memory: int = MEMORY
) -> ChatTemplate:
    """The template of a bundle of the tiny generator with this text."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    (folder / TEMPLATE).write_bytes(data)
    manifest = open_bundle(GENERATOR).manifest
    files = {**manifest.files, TEMPLATE: FileFact(hashlib.sha256(data).hexdigest(), len(data))}
    provenance: dict[str, Any] = {} if tokens is None else {"special_tokens": tokens}
    bundle = Bundle(folder, dataclasses.replace(manifest, files=files, provenance=provenance))
    return ChatTemplate(bundle, seconds=seconds, memory=memory)


# Some of them take all of their time, so one alone is run in every run of the tests.
ENDLESS = {
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}"
    "{% endmacro %}{{ f(40) }}",
    "list that grows": "{% set n = namespace(x=[]) %}{% for i in range(99999) %}{% set n.x = n.x + [i] %}"
    "{% endfor %}",
    "power of a variable": "{% set n = messages|length + 8 %}{{ (n**(n**n))|string|length }}",
    "power that the compiler computes": "{{ 9**(9**9) }}",
}
LARGE = {
    "text times 10^8": "{{ 'film ' * (10**8 * messages|length) }}",
    "text times 10^10": "{{ 'a' * (10**10 * messages|length) }}",
    "width in a format": "{{ '%1000000000s' % messages[0].role }}",
    "width in a method": "{{ '{:1000000000}'.format(messages[0].role) }}",
    "centred": "{{ messages[0].role.center(10**10) }}",
    "centred by a filter": "{{ messages[0].role|center(10**10) }}",
    "indent of JSON": "{{ messages | tojson(indent=10**9) }}",
    "doubled": "{% set n = namespace(x='film') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}",
}
ESCAPES = {
    "globals of a class": "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "globals of a function": "{{ lipsum.__globals__['os'].system('true') }}",
    "attribute in a format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "format by a filter": "{{ ('{0.__class__.__mro__}'|attr('format'))(raise_exception) }}",
    "a file of the system": "{% include '/etc/hostname' %}",
    "a change of the messages": "{{ messages.append(1) }}",
    "a name with underscores in a namespace": "{% set n = namespace(__class__=1) %}",
    "a name with underscores set later": "{% set n = namespace() %}{% set n.__dict__ = {} %}",
    "globals of the dictionary": "{{ dict.__call__.__globals__.sys }}",
    "subclasses of a dictionary": "{{ dict().__class__.__mro__ }}",
}
REFUSED = {
    "macro without an end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "range of 10^12": "{% for i in range(10**12) %}x{% endfor %}",
    "refusal of its own": "{{ raise_exception('no') }}",
    "message that is not there": "{{ messages[5].content.x }}",
    "date in a long format": "{{ strftime_now('%Y' * 10000000)|length }}",
    "prompt that the network cannot read": "{{ 'film ' * 10000 }}",
    "division by nothing": "{{ 1 // (messages|length - 1) }}",
}
BROKEN = {
    "parentheses 10^5 deep": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "conditions 3000 deep": "{% if 1 %}" * 3000 + "film" + "{% endif %}" * 3000,
    "loops 25 deep": "".join(f"{{% for a{i} in [1] %}}" for i in range(25)) + "film" + "{% endfor %}" * 25,
    "lists 5000 deep": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "bytes that are not UTF-8": b"\xff\xfe{{ 1 }}",
    "no expression": "{{ messages[ }}",
    "import": "{% import %}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDLESS)
def test_template_without_an_end_is_stopped(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        (BadInput, BadBundle), match=r"runs for more than 1 s|too much memory|Exceeds the limit"
    ):
        template(tmp_path, ENDLESS[name], seconds=1)(MESSAGES)


@pytest.mark.slow
@linux
@pytest.mark.parametrize("name", LARGE)
def test_template_of_large_memory_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the template takes too much memory"):
        template(tmp_path, LARGE[name], seconds=20)(MESSAGES)


@pytest.mark.parametrize("name", ESCAPES)
def test_template_stays_in_the_sandbox(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"unsafe|no loader|undefined|security|underscore"):
        template(tmp_path, ESCAPES[name], seconds=20)(MESSAGES)


@pytest.mark.parametrize("name", REFUSED)
def test_template_that_fails_is_an_error_of_the_messages(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the chat template refuses these messages: ") as caught:
        template(tmp_path, REFUSED[name], seconds=20)(MESSAGES)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", BROKEN)
def test_template_that_cannot_be_compiled_is_a_bad_bundle(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadBundle, match=r"chat_template\.jinja: not a chat template: ") as caught:
        template(tmp_path, BROKEN[name], seconds=20)(MESSAGES)
    assert len(str(caught.value).splitlines()) == 1


def test_template_larger_than_any_is_not_read(tmp_path: Path) -> None:
    prompt = template(tmp_path, " " * (chat.LARGEST_TEMPLATE + 1))
    with pytest.raises(BadBundle, match="more than 1048576 bytes"):
        prompt(MESSAGES)


@pytest.mark.slow
def test_the_next_messages_are_answered_after_a_template_was_stopped(tmp_path: Path) -> None:
    text = "{% if messages|length > 1 %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    prompt = template(tmp_path, text + "{% endfor %}{% endif %}film", seconds=1)
    assert prompt(MESSAGES) == "film"
    with pytest.raises(BadInput, match="more than 1 s"):
        prompt(MESSAGES * 2)
    assert prompt(MESSAGES) == "film"


@pytest.mark.slow
def test_answer_that_was_not_waited_for_is_not_that_of_the_next_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = template(tmp_path, "{{ messages[0].content }}")
    prompt(MESSAGES)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat.chat_worker, "read_frame", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prompt([{"role": "user", "content": "one"}])
    assert prompt([{"role": "user", "content": "two"}]) == "two"


@pytest.mark.slow
def test_the_process_ends_with_the_template(tmp_path: Path) -> None:
    prompt = template(tmp_path, "film")
    prompt(MESSAGES)
    running = prompt._processes["default"]
    assert running.usable
    prompt.close()
    assert not running.usable
    assert prompt(MESSAGES) == "film"  # closed by its owner, and used again


def test_the_process_is_not_shared_with_a_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = template(tmp_path, "film")
    prompt(MESSAGES)
    process = prompt._processes["default"]
    monkeypatch.setattr(process, "_owner", os.getpid() + 1)  # as a child of this process sees it
    assert not process.usable


@pytest.mark.parametrize("tokens", [["a"], "abc", 5, [["a", "b"]]], ids=repr)
def test_special_tokens_of_another_type_are_a_bad_bundle(tokens: object, tmp_path: Path) -> None:
    with pytest.raises(BadBundle, match=r"manifest\.json: special_tokens: expected an object"):
        template(tmp_path, "film", tokens=tokens)(MESSAGES)


def test_special_tokens_replace_nothing_that_limits(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="too much memory"):
        template(tmp_path, LARGE["text times 10^10"], tokens={"range": "x", "raise_exception": "y"})(MESSAGES)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user", "content": "\ud800"}, "message 0: half of a surrogate pair in its content"),
        ({"role": "\udcff", "content": "a"}, "message 0: half of a surrogate pair in its role"),
        ({"role": "user", "content": "a", "x": object()}, "JSON has not"),
        ({"role": "user", "content": "a", "x": float}, "JSON has not"),
    ],
    ids=["surrogate in the content", "surrogate in the role", "object", "type"],
)
def test_messages_that_cannot_be_written_are_refused(
    message: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    prompt = template(tmp_path, "film")
    with pytest.raises(BadInput, match=reason):
        prompt([message])
    assert prompt(MESSAGES) == "film"


@pytest.mark.slow
def test_messages_nested_deeply_are_refused(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    prompt = template(tmp_path, "film")
    with pytest.raises(BadInput, match="nested too deeply"):
        prompt([{"role": "user", "content": "a", "x": deep}])  # type: ignore[dict-item]
    assert prompt(MESSAGES) == "film"
    while deep:  # freed one by one, as the test has no right to a deep stack either
        deep = deep[0]


def test_template_that_writes_half_of_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="half of a surrogate pair"):
        template(tmp_path, "{{ '\\ud800' }}film")(MESSAGES)


def test_python_that_cannot_be_started_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(EngineUnavailable, match="runs in a process of its own"):
        template(tmp_path, "film")(MESSAGES)
