"""Tasks: what every exit of a network gives, and the certainty that its rule reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

CLASSIFICATION = "classification"
MULTI_LABEL = "multi-label-classification"
TOKENS = "token-classification"
REGRESSION = "regression"
EMBEDDING = "sentence-embedding"

SURE = 1e4  # certainty of what is not to be decided: far beyond that of any label, and a float16 number


@dataclass(frozen=True)
class Task:
    """What the exits of a network give for one row.

    outputs: (number of labels, hidden size) -> numbers that an exit gives for a row or, per_token, for a
    token. least_labels: names that it needs. certainty: (outputs, shared tensors of the stem, thresholds) ->
    certainty of the least certain decision of each row [batch], which rules read; None where they read the
    outputs themselves: the logits of classification, or what settles from exit to exit. decisions: (outputs,
    thresholds) -> the label, or for each label whether it is given; None for numbers.
    """

    name: str
    outputs: Callable[[int, int], int]
    least_labels: int
    per_token: bool = False
    certainty: Callable[[Tensor, Tensor | None, Tensor | None], Tensor] | None = None
    decisions: Callable[[Tensor, Tensor | None], Tensor] | None = None


def certainty_of_labels(logits: Tensor, words: Tensor | None, thresholds: Tensor | None) -> Tensor:
    """The distance of the logit of a row's least certain label from that of its threshold [batch].

    logits [batch, labels]; thresholds [labels]: as logits, None for a probability of a half.
    """
    distances = (logits if thresholds is None else logits - thresholds).abs()
    return distances.amin(-1)


def certainty_of_words(logits: Tensor, words: Tensor | None, thresholds: Tensor | None) -> Tensor:
    """The largest logit less the second one of a row's least certain word [batch].

    logits [batch, seq, labels]; words [batch, seq]: 0 where a word begins, else SURE.
    """
    assert words is not None
    return (top_margin(logits) + words).amin(-1)


def top_margin(logits: Tensor) -> Tensor:
    """The largest logit less the second one [...]; logits [..., labels]."""
    top = logits.topk(2, -1).values
    return top[..., 0] - top[..., 1]


def top_label(logits: Tensor, thresholds: Tensor | None) -> Tensor:
    """The number of the label with the largest logit [...]; logits [..., labels]."""
    return logits.argmax(-1)


def given_labels(logits: Tensor, thresholds: Tensor | None) -> Tensor:
    """Which labels reach their threshold [..., labels]; thresholds [labels] as logits, None for a half."""
    return logits >= (0 if thresholds is None else thresholds)


def _labels(labels: int, hidden: int) -> int:
    return labels


TASKS = {
    task.name: task
    for task in (
        Task(CLASSIFICATION, _labels, 2, decisions=top_label),
        Task(MULTI_LABEL, _labels, 1, certainty=certainty_of_labels, decisions=given_labels),
        Task(TOKENS, _labels, 2, True, certainty_of_words, top_label),
        Task(REGRESSION, lambda labels, hidden: 1, 0),
        Task(EMBEDDING, lambda labels, hidden: hidden, 0),
    )
}


def certainty_logits(certainty: Tensor) -> Tensor:
    """Certainties as logits [batch, 2] of a decision and of its nearest alternative."""
    return torch.stack([certainty, torch.zeros_like(certainty)], -1)


def words_mask(word_starts: Tensor) -> Tensor:
    """0 where a word begins, else SURE [batch, seq]; word_starts [batch, seq]: 1 or 0."""
    return (1 - word_starts.float()) * SURE


def threshold_logits(thresholds: Sequence[float]) -> Tensor | None:
    """Thresholds, which are probabilities, as logits [labels]; None if all are a half, or there are none."""
    if all(threshold == 0.5 for threshold in thresholds):
        return None
    return torch.tensor([math.log(threshold / (1 - threshold)) for threshold in thresholds])


def unit_length(vectors: Tensor) -> Tensor:
    """Vectors [..., size] of length one."""
    return functional.normalize(vectors, dim=-1)
