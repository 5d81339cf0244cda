"""Prompts whose answers repeat them: summaries of articles and dialogues, and texts with a word replaced."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click

from offramp.runtime import TextGenerator

SUMMARY_TASKS = ("cnn_dailymail", "samsum")  # at the beginnings of the tasks' names
EDITED_LETTERS = 400  # of a text at most, up to the end of a sentence
REPLACEMENTS = ("garden", "morning", "engine", "river", "picture", "harbour")


def read_repeated_prompts(
    session: TextGenerator, kind: str, file: Path, count: int, tokens: int
) -> list[list[int]]:
    """Token ids of the first `count` prompts of a file that leave room for an answer of so many tokens.

    kind: "summaries", of rows {prompt, task}, or "edits", of rows {text} or {prompt}. A bundle with a chat
    template gets them as messages.
    """
    texts = summary_prompts(file) if kind == "summaries" else edit_prompts(file)
    prompts: list[list[int]] = []
    for text in texts:
        if len(prompts) == count:
            break
        chat = [{"role": "user", "content": text}]
        ids = session.encode_prompt(chat if session.templates else text)
        if len(ids) + tokens <= session.longest:
            prompts.append(ids)
    if len(prompts) < count:
        raise click.ClickException(f"{file}: {len(prompts)} prompts of kind {kind}, expected {count}")
    return prompts


def summary_prompts(file: Path) -> Iterator[str]:
    """The prompts of a file {prompt, task} whose task is to summarize an article or a dialogue."""
    for row in _rows(file):
        if row.get("task", "").startswith(SUMMARY_TASKS):
            yield row["prompt"]


def edit_prompts(file: Path) -> Iterator[str]:
    """For each text of a file, {text} or {prompt}: repeat it with its most frequent long word replaced."""
    for number, row in enumerate(_rows(file)):
        text = _beginning(row.get("text", row.get("prompt", "")))
        words = Counter(re.findall(r"[A-Za-z]{5,}", text))
        if words:
            word, new = words.most_common(1)[0][0], REPLACEMENTS[number % len(REPLACEMENTS)]
            yield f'Repeat the text with the word "{word}" replaced by "{new}":\n\n{text}\n'


def _beginning(text: str) -> str:
    """The first sentences of a text, EDITED_LETTERS letters at most; a longer first sentence is cut."""
    text = " ".join(text.split())
    if len(text) <= EDITED_LETTERS:
        return text
    text = text[:EDITED_LETTERS]
    end = max(text.rfind(mark) for mark in (". ", "! ", "? "))
    return text[: end + 1] if end > 0 else text


def _rows(file: Path) -> Iterator[dict[str, str]]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
