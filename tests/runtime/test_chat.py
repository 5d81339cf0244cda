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
