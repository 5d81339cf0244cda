"""Chat templates and special tokens of a language model's folder, as transformers reads them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.runtime.inputs.chat import DEFAULT, template_file
from offramp.runtime.inputs.tokenizer_checks import tokenizer_reason

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

LEGACY_TEMPLATE = "chat_template.json"  # of processors; AutoTokenizer does not read it
# Texts on which the tokenizer of transformers is compared with tokenizer.json.
SAMPLES = (
    "The film wasn't good, 10 of 10.",
    "  Zwei Zeilen\n\n\tüber 電影 😀 ",
    "a<b> [x] _y_ ",
    "It is n't , or is it ?",
)


@dataclass(frozen=True)
class ChatFacts:
    """Chat templates by their names ("default" is the one without a name), and special tokens by theirs.

    special_tokens: as templates read them, such as bos_token. notes: lines for the user about what does not
    fit.
    """

    templates: Mapping[str, str] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the templates in a bundle; raises ValueError for a name that no file can have."""
        return {template_file(name): self.templates[name].encode("utf-8") for name in sorted(self.templates)}


def read_chat(folder: Path, tokenizer: Tokenizer, left_out: Collection[str] = ()) -> ChatFacts:
    """Read the chat templates and special tokens of a model's folder.

    They are those of transformers' AutoTokenizer: chat_template.jinja with the files of
    additional_chat_templates, or what tokenizer_config.json holds; if there are none, chat_template.json.
    tokenizer: of the folder's tokenizer.json. left_out: added tokens that it has no longer, which are not
    compared. Raises ValueError for files that cannot be read.
    """
    with _quiet_transformers():
        try:
            loaded = _load(folder)
        except (
            BaseException
        ) as problem:  # files that do not fit raise nearly anything, a panic is no Exception
            raise ValueError(f"its tokenizer cannot be loaded: {tokenizer_reason(problem)}") from problem
        try:
            notes = _differences(loaded, tokenizer, left_out)
        except BaseException as problem:
            raise ValueError(f"its tokenizer fails at a text: {tokenizer_reason(problem)}") from problem
    templates = _templates(loaded.chat_template)
    if not templates and (legacy := folder / LEGACY_TEMPLATE).is_file():
        try:
            templates = _templates(json.loads(legacy.read_text("utf-8"))["chat_template"])
        except (ValueError, KeyError, TypeError, RecursionError) as problem:
            raise ValueError(f"{LEGACY_TEMPLATE}: no chat template in it: {problem!r:.200}") from problem
    for name, text in templates.items():
        template_file(name)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as problem:
            raise ValueError(f"chat template {name}: not Unicode text: {problem}") from problem
    return ChatFacts(templates, {str(k): str(v) for k, v in loaded.special_tokens_map.items()}, notes)


def _load(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    return loaded


def _templates(value: Any) -> dict[str, str]:
    """Templates by name from a text, from {name: text}, or from [{"name": name, "template": text}]."""
    if value is None:
        return {}
    if isinstance(value, list):
        value = {entry["name"]: entry["template"] for entry in value}
    if isinstance(value, str):
        value = {DEFAULT: value}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"chat_template: expected a text, or texts by name, found {value!r:.60}")
    return {str(name): text for name, text in value.items()}


def _differences(
    loaded: PreTrainedTokenizerBase, tokenizer: Tokenizer, left_out: Collection[str]
) -> tuple[str, ...]:
    """Notes if transformers makes other ids of a text, or another text of ids, than the bundle's file does.

    Compared are texts, and every token that one of the two adds to the vocabulary.
    """
    if getattr(loaded, "split_special_tokens", False):
        return (
            "tokenizer_config.json sets split_special_tokens, by which transformers reads the names of "
            "special tokens in a text letter by letter; the bundle reads them as these tokens. Set it to "
            "false to have the same ids",
        )
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    added |= {token.content for token in getattr(loaded, "added_tokens_decoder", {}).values()}
    samples = [*SAMPLES, *(f"a {token} b" for token in sorted(added - set(left_out)))]
    kind, notes = f"{type(loaded).__name__} of transformers", list[str]()
    for text, special in [*((text, True) for text in SAMPLES), *((text, False) for text in samples)]:
        right = list(loaded(text, add_special_tokens=special)["input_ids"])
        if right != tokenizer.encode(text, add_special_tokens=special).ids:
            notes.append(
                f"tokenizer.json makes other ids of {text!r} than {kind}, and the bundle gets "
                "tokenizer.json; if those of transformers are right, save the tokenizer again with "
                "AutoTokenizer's save_pretrained"
            )
            break
    for text in samples:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        own, other = tokenizer.decode(ids), str(loaded.decode(ids, skip_special_tokens=True))
        if own != other:
            notes.append(
                f"tokenizer.json writes the tokens of {text!r} as {own!r}, and {kind} as {other!r}, as "
                "tokenizer_config.json says (clean_up_tokenization_spaces, special tokens); ee-run writes "
                "them as tokenizer.json does"
            )
            break
    return tuple(notes)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' own notes from stderr, where they would hide those for the user."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
