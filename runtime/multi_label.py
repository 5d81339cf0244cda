"""MultiLabelClassifier, the session of a bundle that gives each text or image any number of labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.inputs.text import AnyRow
from offramp.runtime.row_session import RowAnswer, RowSession, exit_answers, not_finite
from offramp.runtime.rules.quality import given_labels, sigmoid
from offramp.runtime.walker import Trace


@dataclass(frozen=True)
class MultiLabelAnswer:
    """The labels of one item, and the steps that were run for it.

    labels: those whose probability is at or above the threshold that the bundle has for them, the likeliest
    first; there may be none. scores: the probability (0..1) of every label, in the order of the manifest; of
    several windows, that of the mean of their logits. The other fields are those of RowAnswer.
    """

    labels: tuple[str, ...]
    scores: dict[str, float]
    exit: int
    depth: int
    steps: tuple[tuple[int, str], ...]
    seconds: float
    truncated: bool = False
    windows: int = 1

    def as_json(self) -> dict[str, object]:
        """See RowAnswer."""
        scores = {name: round(score, 6) for name, score in self.scores.items()}
        return {"labels": [{"label": name, "score": scores[name]} for name in self.labels], "scores": scores}


class MultiLabelClassifier(RowSession[MultiLabelAnswer]):
    """A session that gives each text or image the labels that it finds likely enough; load() returns it."""

    usage = "this bundle gives several labels: call the session, or map"

    def _decision(self, answer: RowAnswer) -> NDArray[np.generic]:
        """See RowSession."""
        assert isinstance(answer, MultiLabelAnswer)
        return np.array([name in answer.labels for name in self.manifest.labels])

    def _answer(self, trace: Trace, first: int, item: AnyRow, rule: int = 0) -> MultiLabelAnswer:
        _, _, walked = self._walked(trace, first, item)
        logits = np.mean(exit_answers(trace, first, item), axis=0)  # [labels]
        if not np.isfinite(logits).all():
            raise not_finite(walked[0])
        scores, given = sigmoid(logits), given_labels(logits, self.manifest.thresholds)
        names = self.manifest.labels
        order = np.argsort(-scores, kind="stable").tolist()
        labels = tuple(names[number] for number in order if given[number])
        return MultiLabelAnswer(labels, dict(zip(names, scores.tolist(), strict=True)), *walked)
