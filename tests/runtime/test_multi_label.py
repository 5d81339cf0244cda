"""Labels that an item has several of: probabilities, thresholds, their order, and windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from scripted_traces import trace_of
from tiny_bundles import MULTI_LABEL, texts

from offramp.runtime import MultiLabelClassifier, load
from offramp.runtime.inputs.text import TextRow


@pytest.fixture
def session() -> Iterator[MultiLabelClassifier]:
    with load(MULTI_LABEL, batch_size=4) as session:
        assert isinstance(session, MultiLabelClassifier)
        session.manifest = replace(session.manifest, labels=("a", "b", "c"), thresholds=(0.5, 0.5, 0.9))
        yield session


ROW = TextRow([2, 3], [0, 0], False)


def test_scores_are_the_probabilities_of_all_labels_at_the_exit(session: MultiLabelClassifier) -> None:
    answer = session._answer(trace_of([0.0, 2.0, -800.0], exits=[1]), 0, ROW)
    assert list(answer.scores) == ["a", "b", "c"] and answer.exit == 2
    assert answer.scores == pytest.approx({"a": 0.5, "b": 1 / (1 + np.exp(-2)), "c": 0.0})


def test_labels_are_those_at_or_above_their_thresholds_the_likeliest_first(
    session: MultiLabelClassifier,
) -> None:
    assert session._answer(trace_of([0.0, 2.0, 2.0]), 0, ROW).labels == ("b", "a")
    assert session._answer(trace_of([3.0, 2.0, 4.0]), 0, ROW).labels == ("c", "a", "b")
    assert session._answer(trace_of([-0.1, -2.0, 2.0]), 0, ROW).labels == ()


def test_windows_are_answered_from_the_mean_of_their_logits(session: MultiLabelClassifier) -> None:
    row = replace(ROW, rest=(ROW, ROW))
    answer = session._answer(trace_of([3.0, -1, 0], [-1.0, 0, 0], [-1.0, 0, 0], exits=[2, 0, 1]), 0, row)
    assert answer.scores["a"] == pytest.approx(1 / (1 + np.exp(-1 / 3))) and answer.labels == ("a",)
    assert (answer.windows, answer.exit, answer.seconds) == (3, 3, 3.0)


def test_json_names_labels_and_all_scores(session: MultiLabelClassifier) -> None:
    value = session._answer(trace_of([0.0, 2.0, 0.0]), 0, ROW).as_json()
    assert value == {
        "labels": [{"label": "b", "score": 0.880797}, {"label": "a", "score": 0.5}],
        "scores": {"a": 0.5, "b": 0.880797, "c": 0.5},
    }


def test_a_rule_of_certainty_leaves_early_where_every_label_is_certain() -> None:
    thresholds = np.array([0.5, 0.4, 0.7])
    with load(MULTI_LABEL, rule="max_probability", threshold=0.8) as session:
        assert isinstance(session, MultiLabelClassifier)
        assert session.manifest.thresholds == pytest.approx(tuple(thresholds))
        answers = [session(text) for text in texts(40)]
        for answer in answers:
            chances = np.array(list(answer.scores.values()))
            odds = np.log(chances / (1 - chances)) - np.log(thresholds / (1 - thresholds))
            sure = 1 / (1 + np.exp(-np.abs(odds).min()))
            assert answer.exit == 3 or sure > 0.8 - 1e-4
        assert len({answer.exit for answer in answers}) > 1
