"""Texts for language models: rows of token ids, and which of their tokens are learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.training.data import read_splits
from offramp.training.rows import BadData

IGNORED = -100  # the label of a token that is not learned, as cross_entropy has it


@dataclass(frozen=True)
class Texts:
    """One split: token ids a row, and the first token of each that is learned (1 or later)."""

    ids: list[list[int]]
    starts: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row [rows]."""
        return np.array([len(row) for row in self.ids])

    def batch(
        self, index: Sequence[int] | np.ndarray, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Ids [batch, seq], padded at the end with 0, and what is to be said at each place [batch, seq]: the
        id that comes next, or IGNORED.
        """
        longest = max(len(self.ids[i]) for i in index)
        ids = np.zeros((len(index), longest), np.int64)
        following = np.full((len(index), longest), IGNORED, np.int64)
        for row, i in enumerate(index):
            tokens, start = self.ids[i], self.starts[i]
            ids[row, : len(tokens)] = tokens
            following[row, start - 1 : len(tokens) - 1] = tokens[start:]
        return torch.from_numpy(ids).to(device), torch.from_numpy(following).to(device)


def load_texts(source: str, tokenizer: Any, longest: int, *, text: str = "text") -> dict[str, Texts]:
    """Splits by name, of rows {prompt, completion}, of which completions are learned, or {text}.

    Texts stand one after another, an end-of-text token between them, cut into rows of `longest` tokens. Of a
    pair that is too long the beginning of the prompt is cut off. Raises BadData naming file and row.
    """
    found = {}
    for split, (table, name) in read_splits(source).items():
        if {"prompt", "completion"} <= set(table.column_names):
            found[split] = _pairs(table, name, tokenizer, longest)
        elif text in table.column_names:
            found[split] = _windows(_strings(table, text, name), name, tokenizer, longest)
        else:
            have = ", ".join(table.column_names)
            raise BadData(f"{name}: it has neither {text!r} nor prompt and completion, but {have}")
    return found


def _pairs(table: Any, name: str, tokenizer: Any, longest: int) -> Texts:
    ids, starts = [], []
    prompts, completions = _strings(table, "prompt", name), _strings(table, "completion", name)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), 1):
        before = tokenizer(prompt, add_special_tokens=False).input_ids
        after = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        room = longest - len(after)
        if room < 1:
            raise BadData(f"{name}, row {row}: the completion has {len(after)} tokens, rows {longest}")
        before = before[-room:]
        ids.append(before + after)
        starts.append(max(1, len(before)))
    return Texts(ids, starts)


def _windows(texts: list[str], name: str, tokenizer: Any, longest: int) -> Texts:
    stream: list[int] = []
    for encoded in tokenizer(texts, add_special_tokens=False).input_ids:
        stream += [*encoded, tokenizer.eos_token_id]
    rows = [stream[at : at + longest] for at in range(0, len(stream), longest)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise BadData(f"{name}: no text in it")
    return Texts(rows, [1] * len(rows))


def _strings(table: Any, column: str, name: str) -> list[str]:
    values = list(table[column])
    for row, value in enumerate(values, 1):
        if not isinstance(value, str):
            raise BadData(f"{name}, row {row}: column {column!r} must be a text, found {value!r:.60}")
    if not values:
        raise BadData(f"{name}: no rows")
    return values


def source_name(source: str) -> str:
    """What training.json calls the data: no path of this machine."""
    return Path(source).name
