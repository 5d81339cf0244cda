"""Answers that are read from a walk's outputs, and the right ones beside them, for every kind of task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bundles

from offramp.runtime.loading import load_row_session
from offramp.runtime.rules.quality import AGREEMENT
from offramp.runtime.tuning.labelled import LabelledRows
from offramp.runtime.tuning.right_answers import AnswerReader, right_answers
from offramp.runtime.tuning.row_labels import label_array

TEXTS = ("the films was lovelyly", "ann", "a good plot at paris .", "very bad and cold")
METRICS = {
    tiny_bundles.CLASSIFIER: "accuracy",
    tiny_bundles.MULTI_LABEL: "f1",
    tiny_bundles.TOKENS: "f1",
    tiny_bundles.REGRESSION: "spearman",
    tiny_bundles.EMBEDDING: "cosine",
}


def of_session(answer: Any) -> Any:
    """An answer of a session in the form of AnswerReader, labels by name."""
    for name in ("label", "labels", "tokens", "value", "embedding"):
        if hasattr(answer, name):
            value = getattr(answer, name)
            return [token.label for token in value] if name == "tokens" else value
    raise AssertionError(answer)


def by_name(answer: Any, names: tuple[str, ...]) -> Any:
    """An answer of AnswerReader with labels by name."""
    if isinstance(answer, np.ndarray) and answer.dtype == bool:
        return {name for name, given in zip(names, answer, strict=True) if given}
    if isinstance(answer, np.ndarray) and answer.dtype.kind == "i":
        return [names[number] for number in answer]
    return names[answer] if names else answer


@pytest.mark.parametrize("folder", METRICS, ids=lambda folder: folder.name)
def test_answers_are_those_of_the_session(folder: Path) -> None:
    with load_row_session(folder, rule="never") as session:
        rows = LabelledRows("dev", TEXTS, np.full(len(TEXTS), -1))
        right = right_answers(session, rows, agreement=True)
        assert right.reader.metric == METRICS[folder] and right.name == AGREEMENT
        for text, wanted in zip(TEXTS, right.wanted, strict=True):
            expected, answer = of_session(session(text)), by_name(wanted, session.labels)
            if session.labels:
                assert answer == (set(expected) if isinstance(answer, set) else expected)
            else:
                assert answer == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("folder", METRICS, ids=lambda folder: folder.name)
def test_full_depth_agrees_with_itself_and_early_exits_less(folder: Path) -> None:
    with load_row_session(folder, rule="never") as session:
        rows = LabelledRows("dev", TEXTS * 2, np.full(2 * len(TEXTS), -1))
        right = right_answers(session, rows, agreement=True)
        trace, _ = session.at_full_depth(rows.items)
        quality = right.quality(trace)
    assert quality.each[-1] == pytest.approx(100) and quality.each[0] < 100
    exits = np.array([0, 2] * len(TEXTS))
    assert right.score(trace, exits) == pytest.approx(quality.score(exits))
    assert quality.name == AGREEMENT


def test_labels_of_words_stand_at_the_tokens_that_begin_a_word() -> None:
    words = [[(0, 3, 1), (4, 9, 3), (10, 13, 0), (14, 22, 0)], [(0, 3, -1)]]
    with load_row_session(tiny_bundles.TOKENS, rule="never") as session:
        rows = LabelledRows("dev", TEXTS[:2], label_array(words))
        right = right_answers(session, rows)
        assert [row.tolist() for row in right.wanted] == [[1, 3, 0, 0], [-1]]
        assert right.places is not None and [len(row) for row in right.places] == [4, 1]
        starts = np.flatnonzero(session.encode(TEXTS[0])["word_starts"][0])
    assert right.name == "f1" and list(right.places[0]) == starts.tolist()


def test_words_of_batches_are_found_in_the_stems_inputs() -> None:
    with load_row_session(tiny_bundles.TOKENS, rule="never") as session:
        reader = AnswerReader(session.manifest)
        batches = [
            (np.array([1]), session.encode(TEXTS[0])),
            (np.array([0]), session.encode(TEXTS[1])),
        ]
        places = reader.places(batches, 2)
        assert places is not None and [len(row) for row in places] == [1, 4]
    with load_row_session(tiny_bundles.REGRESSION) as session:
        assert AnswerReader(session.manifest).places(batches, 2) is None
