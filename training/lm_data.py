"""Training data of language models: rows of token ids, and which of their tokens are learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from offramp.training.data import BadData, read_splits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the target of a token that is not learned, as cross_entropy defines it


@dataclass(frozen=True)
class TokenRows:
    """The rows of one split as token ids, with the index of each row's first learned token (1 or later)."""

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
        """Ids and targets [batch, seq] of the rows at `index`.

        Ids are padded at the end with 0. A target is the next id, or IGNORED where none is learned.
        """
        longest = max(len(self.ids[i]) for i in index)
        ids = np.zeros((len(index), longest), np.int64)
        targets = np.full((len(index), longest), IGNORED, np.int64)
        for row, i in enumerate(index):
            tokens, start = self.ids[i], self.starts[i]
            ids[row, : len(tokens)] = tokens
            targets[row, start - 1 : len(tokens) - 1] = tokens[start:]
        return torch.from_numpy(ids).to(device), torch.from_numpy(targets).to(device)


def load_token_rows(
    source: str, tokenizer: PreTrainedTokenizerBase, longest: int, *, text: str = "text"
) -> dict[str, TokenRows]:
    """Read and tokenize the splits of a language model's data, by name.

    source: rows {prompt, completion}, of which completions are learned, or {text}; see data.load_data. Texts
    are concatenated with an end-of-text token between them and divided into rows of `longest` tokens. If a
    pair is too long, the beginning of the prompt is cut off. Raises BadData naming file and row.
    """
    splits = {}
    for split, (table, name) in read_splits(source).items():
        if {"prompt", "completion"} <= set(table.column_names):
            splits[split] = _pairs(table, name, tokenizer, longest)
        elif text in table.column_names:
            splits[split] = _windows(_strings(table, text, name), name, tokenizer, longest)
        else:
            existing = ", ".join(table.column_names)
            raise BadData(f"{name}: it has neither {text!r} nor prompt and completion, but {existing}")
    return splits


def _pairs(table: Any, name: str, tokenizer: PreTrainedTokenizerBase, longest: int) -> TokenRows:
    ids, starts = [], []
    prompts, completions = _strings(table, "prompt", name), _strings(table, "completion", name)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), 1):
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        completion_ids = [
            *tokenizer(completion, add_special_tokens=False).input_ids,
            tokenizer.eos_token_id,
        ]
        room = longest - len(completion_ids)
        if room < 1:
            raise BadData(
                f"{name}, row {row}: the completion has {len(completion_ids)} tokens, rows {longest}"
            )
        prompt_ids = prompt_ids[-room:]
        ids.append(prompt_ids + completion_ids)
        starts.append(max(1, len(prompt_ids)))
    return TokenRows(ids, starts)


def _windows(texts: list[str], name: str, tokenizer: PreTrainedTokenizerBase, longest: int) -> TokenRows:
    stream: list[int] = []
    for encoded in tokenizer(texts, add_special_tokens=False).input_ids:
        stream += [*encoded, tokenizer.eos_token_id]
    rows = [stream[start : start + longest] for start in range(0, len(stream), longest)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise BadData(f"{name}: no text in it")
    return TokenRows(rows, [1] * len(rows))


def _strings(table: Any, column: str, name: str) -> list[str]:
    values = list(table[column])
    for row, value in enumerate(values, 1):
        if not isinstance(value, str):
            raise BadData(f"{name}, row {row}: column {column!r} must be a text, found {value!r:.60}")
    if not values:
        raise BadData(f"{name}: no rows")
    return values
