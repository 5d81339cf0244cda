"""Messages to a prompt by a bundle's chat template."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_bundles import GENERATOR

from offramp.runtime.bundle.files import Bundle, open_bundle
from offramp.runtime.bundle.manifest import FileFact
from offramp.runtime.errors import BadBundle, BadInput, BadSetting, EngineUnavailable
from offramp.runtime.inputs.chat import TEMPLATE, ChatTemplate

MESSAGES = [{"role": "user", "content": "the film"}, {"role": "user", "content": "was good"}]


def bundle_with(folder: Path, template: bytes | None, **provenance: Any) -> Bundle:
    """The tiny generator's manifest in a folder that holds no file but a template."""
    manifest = open_bundle(GENERATOR).manifest
    files = {name: fact for name, fact in manifest.files.items() if name != TEMPLATE}
    if template is not None:
        (folder / TEMPLATE).write_bytes(template)
        files[TEMPLATE] = FileFact(hashlib.sha256(template).hexdigest(), len(template))
    return Bundle(folder, dataclasses.replace(manifest, files=files, provenance=provenance))


@pytest.mark.slow
def test_prompt_of_the_tiny_generator() -> None:
    pytest.importorskip("jinja2")
    assert ChatTemplate(open_bundle(GENERATOR))(MESSAGES) == "the film was good the"


def test_template_may_use_special_tokens_and_the_generation_prompt(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    template = b"{{ bos_token }}{{ messages|length }}{% if add_generation_prompt %}!{% endif %}"
    bundle = bundle_with(tmp_path, template, special_tokens={"bos_token": "<s>"})
    assert ChatTemplate(bundle)(MESSAGES) == "<s>2!"


def test_template_refuses_messages(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    bundle = bundle_with(tmp_path, b"{{ raise_exception('no ' + messages[0]['role']) }}")
    with pytest.raises(BadInput, match="the chat template refuses these messages: no user"):
        ChatTemplate(bundle)(MESSAGES)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "expected messages, found none"),
        ([{"role": "user"}], r"message 0: expected a role and a content, found \{'role': 'user'\}"),
        ([MESSAGES[0], {"role": "user", "content": 3}], "message 1: expected a role and a content"),
        ([MESSAGES[0], "hello"], "message 1: expected a role and a content"),
        (7, "expected a string or messages, found 7"),
        (b"hello", "expected a string or messages, found b'hello'"),
    ],
)
def test_other_objects_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ChatTemplate(open_bundle(GENERATOR))(messages)


def prompt_of(folder: Path, template: str, messages: Any = MESSAGES, **options: Any) -> str:
    """The prompt that a template makes."""
    pytest.importorskip("jinja2")
    chat = ChatTemplate(bundle_with(folder, template.encode()))
    try:
        return chat(messages, **options)
    finally:
        chat.close()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
            "the film",
        ),
        (
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
            "was good",
        ),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "the film!"),
        ("{{ {'b': '<é&>', 'a': none} | tojson }}", '{"b": "<é&>", "a": null}'),
        ("{{ {'b': [1], 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": [\n  1\n ]\n}'),
        ("{{ 'é' | tojson(ensure_ascii=true, separators=(',', ':')) }}", '"\\u00e9"'),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ dict(a=1) | tojson }}{{ dict.fromkeys(['x'], 0) | tojson }}", '{"a": 1}{"x": 0}'),
        (
            "{% set n = namespace(a=1) %}{% for m in messages %}{% set n.a = n.a + 1 %}{% endfor %}{{ n.a }}",
            "3",
        ),
        ("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}", "TrueTrueTrue"),
    ],
    ids=[
        "break",
        "continue",
        "generation",
        "tojson",
        "indent",
        "ascii",
        "date",
        "dict",
        "namespace",
        "defaults",
    ],
)
def test_templates_use_what_transformers_allows(template: str, expected: str, tmp_path: Path) -> None:
    assert prompt_of(tmp_path, template) == expected


def test_arguments_are_values_of_the_template(tmp_path: Path) -> None:
    template = (
        "{{ enable_thinking }} {{ tools[0].name }} {{ documents | length }} {{ add_generation_prompt }}"
    )
    arguments = {
        "enable_thinking": False,
        "tools": [{"name": "t"}],
        "documents": [{}],
        "add_generation_prompt": False,
    }
    assert prompt_of(tmp_path, template, arguments=arguments) == "False t 1 False"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([1], r"template arguments: expected an object of names and values, found \[1\]"),
        ({"messages": []}, "template argument 'messages': it is none of a template"),
        ({"continue_final_message": True}, "template argument 'continue_final_message': it is none"),
        ({"tools": "weather"}, "tools: expected a list of JSON schemas, found 'weather'"),
        ({"tools": [print]}, r"tools\[0\]: expected an object, found <built-in function print>"),
        ({"documents": ["a"]}, r"documents\[0\]: expected an object, found 'a'"),
        ({"add_generation_prompt": 1}, "add_generation_prompt: expected true or false, found 1"),
        ({"x": {1j}}, "the messages or template arguments hold a value that JSON has not"),
    ],
    ids=str,
)
def test_arguments_that_are_none_are_refused(arguments: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        prompt_of(tmp_path, "film", arguments=arguments)


PARTS = [{"role": "user", "content": [{"type": "text", "text": "the"}, {"type": "text", "text": "film"}]}]


def test_parts_of_text_are_given_to_the_template_as_they_are(tmp_path: Path) -> None:
    template = "{% for part in messages[0].content %}{{ part.type }}:{{ part.text }} {% endfor %}"
    assert prompt_of(tmp_path, template, PARTS) == "text:the text:film "


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "{{ 'a' + messages[0].content }}"])
def test_template_that_takes_no_parts_is_named(template: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"takes no list of parts|can only concatenate str"):
        prompt_of(tmp_path, template, PARTS)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"type": "image_url", "image_url": {}},
            r"content\[1\] has the type 'image_url'; a bundle reads text alone",
        ),
        ({"type": "text"}, r'content\[1\]: expected \{"type": "text", "text": ...\}, found'),
        ("text", r"content\[1\]: expected"),
        ({"type": "text", "text": "\ud800"}, r"half of a surrogate pair in its content\[1\]"),
    ],
    ids=["image", "no text", "no object", "surrogate"],
)
def test_other_parts_are_refused_by_name(part: Any, message: str) -> None:
    content = [{"type": "text", "text": "a"}, part]
    with pytest.raises(BadInput, match=r"message 0: .*" + message):
        ChatTemplate(open_bundle(GENERATOR))([{"role": "user", "content": content}])


def test_a_message_that_calls_tools_needs_no_content(tmp_path: Path) -> None:
    messages = [{"role": "assistant", "content": None, "tool_calls": [{"name": "t"}], "reasoning": "why"}]
    template = (
        "{{ messages[0].content is defined }} {{ messages[0].reasoning_content }} {{ messages[0].thinking }}"
    )
    assert prompt_of(tmp_path, template, messages) == "False why why"


@pytest.mark.slow
def test_named_templates_are_chosen_by_name_or_for_tools(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    bundle = bundle_with(tmp_path, b"plain")
    data = b"with tools"
    (tmp_path / "chat_template_tool_use.jinja").write_bytes(data)
    fact = FileFact(hashlib.sha256(data).hexdigest(), len(data))
    files = {**bundle.manifest.files, "chat_template_tool_use.jinja": fact}
    chat = ChatTemplate(Bundle(tmp_path, dataclasses.replace(bundle.manifest, files=files)))
    assert chat.names == ("default", "tool_use")
    tools = {"tools": [{"name": "t"}]}
    assert chat(MESSAGES) == "plain" and chat(MESSAGES, template="tool_use") == "with tools"
    assert chat(MESSAGES, arguments=tools) == "with tools"
    assert chat(MESSAGES, template="default", arguments=tools) == "plain"
    with pytest.raises(
        BadInput, match="chat template 'rag': this bundle has default, tool_use; name one of them"
    ):
        chat(MESSAGES, template="rag")
    chat.close()


def test_bundle_without_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="has no chat template: give the prompt as one text"):
        ChatTemplate(bundle_with(tmp_path, None))(MESSAGES)


@pytest.mark.parametrize("template", [b"{% if %}", b"\xff"])
def test_damaged_template_is_refused(tmp_path: Path, template: bytes) -> None:
    pytest.importorskip("jinja2")
    with pytest.raises(BadBundle, match=r"chat_template\.jinja: not a chat template"):
        ChatTemplate(bundle_with(tmp_path, template))(MESSAGES)


def test_missing_jinja2_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(EngineUnavailable, match=r"pip install 'offramp\[chat\]'"):
        ChatTemplate(open_bundle(GENERATOR))(MESSAGES)
