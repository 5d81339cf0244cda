"""Sessions of bundles that answer with numbers: Regressor with one, Embedder with a vector."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.inputs.text import AnyRow
from offramp.runtime.row_session import RowAnswer, RowSession, exit_answers, not_finite
from offramp.runtime.rules.base import Floats
from offramp.runtime.walker import Trace

_UNIT = 1e-3  # how far from one the length of an embedding of unit length may be, in float16 too


@dataclass(frozen=True)
class RegressionAnswer:
    """The value of one item, and the steps that were run for it.

    value: in the units of the data; of several windows, the mean of their values. The other fields are those
    of RowAnswer.
    """

    value: float
    exit: int
    depth: int
    steps: tuple[tuple[int, str], ...]
    seconds: float
    truncated: bool = False
    windows: int = 1

    def as_json(self) -> dict[str, object]:
        """See RowAnswer; the value with the seven digits that a float32 has."""
        return {"value": float(f"{self.value:.7g}")}


@dataclass(frozen=True, eq=False)
class EmbeddingAnswer:
    """The embedding of one text, and the steps that were run for it.

    embedding: float32 [size]; of several windows, the mean of theirs, weighted by their tokens, and of unit
    length if theirs are. The other fields are those of RowAnswer. Two answers are equal if they are one.
    """

    embedding: Floats
    exit: int
    depth: int
    steps: tuple[tuple[int, str], ...]
    seconds: float
    truncated: bool = False
    windows: int = 1

    def as_json(self) -> dict[str, object]:
        """See RowAnswer; the embedding rounded to six digits after the point."""
        return {"embedding": [round(value, 6) for value in self.embedding.tolist()]}


class Regressor(RowSession[RegressionAnswer]):
    """A session that gives each text or image a number; load() returns it."""

    usage = "this bundle gives a number: call the session, or map"

    def _decision(self, answer: RowAnswer) -> NDArray[np.generic]:
        """See RowSession."""
        assert isinstance(answer, RegressionAnswer)
        return np.array(answer.value)

    def _answer(self, trace: Trace, first: int, item: AnyRow, rule: int = 0) -> RegressionAnswer:
        _, _, walked = self._walked(trace, first, item)
        value = float(np.mean(exit_answers(trace, first, item)))
        if not math.isfinite(value):
            raise not_finite(walked[0])
        return RegressionAnswer(value, *walked)


class Embedder(RowSession[EmbeddingAnswer]):
    """A session that gives each text an embedding; load() returns it. It has no pairs of texts."""

    usage = "this bundle embeds texts: call the session, or map"

    def _decision(self, answer: RowAnswer) -> NDArray[np.generic]:
        """See RowSession."""
        assert isinstance(answer, EmbeddingAnswer)
        return answer.embedding

    def _answer(self, trace: Trace, first: int, item: AnyRow, rule: int = 0) -> EmbeddingAnswer:
        _, _, walked = self._walked(trace, first, item)
        embeddings = exit_answers(trace, first, item)
        if not all(np.isfinite(embedding).all() for embedding in embeddings):
            raise not_finite(walked[0])
        if len(embeddings) == 1:
            return EmbeddingAnswer(embeddings[0], *walked)
        weights = np.array([part.length for part in (item, *item.rest)], np.float32)
        return EmbeddingAnswer(_mean_embedding(np.stack(embeddings), weights), *walked)


def _mean_embedding(embeddings: Floats, weights: Floats) -> Floats:
    """The weighted mean of embeddings [windows, size], of unit length if each of them is."""
    mean: Floats = (embeddings * (weights / weights.sum())[:, None]).sum(0)
    if (np.abs(np.linalg.norm(embeddings, axis=1) - 1) < _UNIT).all():
        mean /= max(float(np.linalg.norm(mean)), 1e-12)
    return mean
