"""Quality of the answers that rows give at the exits where they leave: one number in percent for each task.

Answers are right either by labels of the data or by what full depth of the default variant answers; then the
quality is an agreement.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.manifest import CLASSIFICATION, EMBEDDING, MULTI_LABEL, TOKENS
from offramp.runtime.rules.entities import UNLABELLED, entity_spans

Floats = NDArray[np.floating]
Ids = NDArray[np.int64]
Bools = NDArray[np.bool_]

AGREEMENT = "agreement"  # the name of every quality whose right answers are those of full depth


class Quality(ABC):
    """How good the answers of some rows are, for any choice of the exits at which the rows leave.

    name: of the number, as it stands in files and tables.
    """

    name: str

    @abstractmethod
    def score(self, exits: Ids) -> float:
        """The quality in percent if each row leaves at its exit; exits [rows], 0-based."""

    def interval(self, exits: Ids) -> tuple[float, float] | None:
        """The interval at 95 % of the quality in percent on rows like these; None if it is no share of rows.

        It is for the sampling of rows alone: of a setting that was chosen on the same rows it is too high.
        """
        return None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and exits."""

    @property
    def each(self) -> NDArray[np.float64]:
        """The quality in percent if all rows leave at one exit, for every exit [exits]."""
        rows, exits = self.shape
        return np.array([self.score(np.full(rows, exit)) for exit in range(exits)])


@dataclass(frozen=True)
class RightQuality(Quality):
    """The share of rows with a right answer: right [rows, exits]."""

    right: Bools
    name: str = "accuracy"

    @property
    def shape(self) -> tuple[int, int]:
        """See Quality."""
        rows, exits = self.right.shape
        return rows, exits

    def score(self, exits: Ids) -> float:
        """See Quality."""
        return 100 * float(self.right[np.arange(len(exits)), exits].mean())

    def interval(self, exits: Ids) -> tuple[float, float] | None:
        """See Quality."""
        low, high = share_interval(int(self.right[np.arange(len(exits)), exits].sum()), len(exits))
        return 100 * low, 100 * high


@dataclass(frozen=True)
class CountQuality(Quality):
    """F1 of the things that rows have several of, such as labels or entities, counted over all rows (micro).

    given [rows, exits]: how many an exit gives; hits [rows, exits]: how many of these are right; wanted
    [rows]: how many are right in all. If none is wanted and none is given, the quality is 100.
    """

    hits: Ids
    given: Ids
    wanted: Ids
    name: str = "f1"

    @property
    def shape(self) -> tuple[int, int]:
        """See Quality."""
        rows, exits = self.hits.shape
        return rows, exits

    def score(self, exits: Ids) -> float:
        """See Quality."""
        rows = np.arange(len(exits))
        both = int(self.given[rows, exits].sum() + self.wanted.sum())
        return 200 * int(self.hits[rows, exits].sum()) / both if both else 100.0


@dataclass(frozen=True)
class ValueQuality(Quality):
    """Spearman's correlation of values [rows, exits] with those that are wanted [rows].

    Equal values share the mean of their ranks. If all values or all wanted ones are equal, it is 0 unless the
    ranks of both are the same.
    """

    values: Floats
    wanted: Floats
    name: str = "spearman"

    @property
    def shape(self) -> tuple[int, int]:
        """See Quality."""
        rows, exits = self.values.shape
        return rows, exits

    def score(self, exits: Ids) -> float:
        """See Quality."""
        ranks = mean_ranks(self.values[np.arange(len(exits)), exits])
        wanted = mean_ranks(self.wanted)
        scale = float(np.sqrt(((ranks - ranks.mean()) ** 2).sum() * ((wanted - wanted.mean()) ** 2).sum()))
        if scale == 0:
            return 100.0 if np.array_equal(ranks, wanted) else 0.0
        return 100 * float(((ranks - ranks.mean()) * (wanted - wanted.mean())).sum()) / scale


@dataclass(frozen=True)
class MeanQuality(Quality):
    """The mean of a number that each row has at each exit, 1 at best: each_row [rows, exits]."""

    each_row: Floats
    name: str = "cosine"

    @property
    def shape(self) -> tuple[int, int]:
        """See Quality."""
        rows, exits = self.each_row.shape
        return rows, exits

    def score(self, exits: Ids) -> float:
        """See Quality."""
        return 100 * float(self.each_row[np.arange(len(exits)), exits].mean(dtype=np.float64))


def share_interval(count: int, rows: int) -> tuple[float, float]:
    """Wilson's interval at 95 % of a share of which `count` of `rows` rows were seen."""
    square = 1.959964**2
    centre = (count + square / 2) / (rows + square)
    half = float(np.sqrt(square * (count * (rows - count) / rows + square / 4))) / (rows + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def label_quality(labels: Ids, wanted: Ids, *, name: str = "accuracy") -> Quality:
    """The share of right labels: labels [rows, exits] and wanted [rows] are numbers of labels."""
    return RightQuality(labels == wanted[:, None], name)


def given_labels(logits: Floats, thresholds: Floats | Sequence[float]) -> Bools:
    """Which labels count as given: logits [..., labels], probabilities from which they count [labels]."""
    given: Bools = sigmoid(logits) >= np.asarray(thresholds, np.float64)
    return given


def sigmoid(logits: Floats) -> NDArray[np.float64]:
    """Probabilities of logits, each for itself [...]."""
    odds = np.exp(-np.abs(logits.astype(np.float64)))  # at most 1: it does not overflow
    probabilities: NDArray[np.float64] = np.where(logits >= 0, 1, odds) / (1 + odds)
    return probabilities


def multi_label_quality(
    answers: Floats, wanted: Bools, thresholds: Floats | Sequence[float], *, name: str = "f1"
) -> Quality:
    """Micro F1 of labels; see given_labels.

    answers [rows, exits, labels]: logits; wanted [rows, labels].
    """
    return given_quality(given_labels(answers, thresholds), wanted, name=name)


def given_quality(given: Bools, wanted: Bools, *, name: str = "f1") -> Quality:
    """Micro F1 of labels that are given [rows, exits, labels] and wanted [rows, labels]."""
    hits = (given & wanted[:, None]).sum(-1)
    return CountQuality(hits, given.sum(-1), wanted.sum(-1), name)


def token_quality(
    numbers: Sequence[Ids], wanted: Sequence[Ids], names: Sequence[str], *, name: str = "f1"
) -> Quality:
    """Micro F1 of entities, see entity_spans.

    numbers: for each row, numbers of the labels of its words at every exit [exits, words]; wanted: for each
    row, numbers of its words' labels [words], UNLABELLED for words that are left out. names: of the labels.
    """
    hits, given, right = list[list[int]](), list[list[int]](), list[int]()
    for each_exit, labels in zip(numbers, wanted, strict=True):
        counted = labels != UNLABELLED
        spans = set(entity_spans([names[number] for number in labels[counted]]))
        at_exits = [set(entity_spans([names[number] for number in row[counted]])) for row in each_exit]
        hits.append([len(entities & spans) for entities in at_exits])
        given.append([len(entities) for entities in at_exits])
        right.append(len(spans))
    return CountQuality(np.array(hits), np.array(given), np.array(right), name)


def value_quality(answers: Floats, wanted: Floats, *, name: str = "spearman") -> Quality:
    """Spearman's correlation: answers [rows, exits, 1] or [rows, exits], wanted [rows]."""
    return ValueQuality(answers.reshape(answers.shape[:2]), wanted, name)


def embedding_quality(answers: Floats, full: Floats, *, name: str = "cosine") -> Quality:
    """Mean cosine with the embeddings of full depth: answers [rows, exits, size], full [rows, size]."""
    lengths = np.linalg.norm(answers, axis=-1) * np.linalg.norm(full, axis=-1)[:, None]
    products = np.einsum("res,rs->re", answers, full)
    return MeanQuality(products / np.maximum(lengths, 1e-12), name)


def _cosine_loss(answer: Floats, full: Floats) -> float:
    lengths = float(np.linalg.norm(answer) * np.linalg.norm(full))
    return float(np.clip(1 - float(answer @ full) / max(lengths, 1e-12), 0, 1))


# How much the answer of one row differs from that of full depth, in 0..1, by kind of task; answers as
# tuning.right_answers has them. Labels: 1 if it is another one, or if any of several is; words: the share of
# them whose label is another one; embeddings: 1 minus the cosine, at most 1. A number has none: it nearly
# always differs a little, and in a unit of its own.
DISAGREEMENTS: Mapping[str, Callable[[NDArray[np.generic], NDArray[np.generic]], float]] = {
    CLASSIFICATION: lambda answer, full: float(answer != full),
    MULTI_LABEL: lambda answer, full: float(np.any(answer != full)),
    TOKENS: lambda answer, full: float(np.mean(answer != full)) if full.size else 0.0,
    EMBEDDING: lambda answer, full: _cosine_loss(answer.astype(np.float64), full.astype(np.float64)),
}


def mean_ranks(values: Floats) -> NDArray[np.float64]:
    """The rank of each value from 1 [rows]; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (counts.cumsum() - (counts - 1) / 2)[place]
    return ranks
