"""What all sessions of one answer a row share, on a tiny bundle of each task."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_traces import SEGMENTS, trace_of
from tiny_bundles import CLASSIFIER, EMBEDDING, MULTI_LABEL, REGRESSION, TOKENS, texts

from offramp.runtime import BadInput, ItemError, RowSession, SessionClosed, WrongTask, load_row_session
from offramp.runtime.inputs.text import TextRow
from offramp.runtime.row_session import exit_answers, exits_of
from offramp.runtime.rules.exits import answer_change

BUNDLES = (CLASSIFIER, MULTI_LABEL, TOKENS, REGRESSION, EMBEDDING)
WALK = ("exit", "depth", "steps", "seconds", "truncated", "windows")
LONG = " ".join(texts(20))


@pytest.fixture(scope="module", params=BUNDLES, ids=lambda path: path.name)
def session(request: pytest.FixtureRequest) -> Iterator[RowSession[Any]]:
    threshold = middle_change(request.param) if request.param in (REGRESSION, EMBEDDING) else None
    with load_row_session(request.param, batch_size=4, threshold=threshold) as session:
        yield session


def middle_change(path: Path) -> float:
    """The threshold of rule settled with which half of the rows leave at the second exit."""
    with load_row_session(path) as session:
        trace, _ = session.at_full_depth(texts(40))
    assert trace.answers is not None
    first, second = (np.stack(trace.answers[:, segment].tolist()) for segment in range(2))
    return float(np.median(answer_change(second, first)))


@pytest.fixture(scope="module", params=BUNDLES, ids=lambda path: path.name)
def windowed(request: pytest.FixtureRequest) -> Iterator[RowSession[Any]]:
    with load_row_session(request.param, batch_size=4, long_texts="windows") as session:
        yield session


def numbers(value: Any) -> list[float]:
    """All numbers of an answer as JSON, in their order."""
    if isinstance(value, (dict, list)):
        return [n for part in (value.values() if isinstance(value, dict) else value) for n in numbers(part)]
    return [float(value)] if isinstance(value, (int, float)) else []


def names(value: Any) -> list[str]:
    """All strings and keys of an answer as JSON, in their order."""
    if isinstance(value, dict):
        return [name for key, part in value.items() for name in (key, *names(part))]
    if isinstance(value, list):
        return [name for part in value for name in names(part)]
    return [value] if isinstance(value, str) else []


def is_same(left: Any, right: Any) -> bool:
    """Equal but for seconds and rounding."""
    one, other = left.as_json(), right.as_json()
    if (left.exit, left.steps, names(one)) != (right.exit, right.steps, names(other)):
        return False
    return bool(np.allclose(numbers(one), numbers(other), atol=1e-4))


def test_fields_of_the_walk_agree(session: RowSession[Any]) -> None:
    answer = session("the film was good")
    assert answer.exit == answer.steps[-1][0] == len(answer.steps)
    assert answer.depth == session.manifest.segments[answer.exit - 1].blocks[-1]
    assert answer.seconds > 0 and not answer.truncated and answer.windows == 1


def test_an_answer_has_the_fields_of_its_walk_after_those_of_its_task(session: RowSession[Any]) -> None:
    fields = [field.name for field in dataclasses.fields(session("good"))]
    assert [name for name in fields if name in WALK] == list(WALK) and fields[-1] == "windows"
    assert set(session("good").as_json()).isdisjoint(WALK)


def test_an_answer_cannot_be_changed(session: RowSession[Any]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        session("good").exit = 1


@pytest.mark.parametrize("size", [1, 3, 64])
def test_map_equals_calls_in_order(session: RowSession[Any], size: int) -> None:
    items = texts(40)
    answers = list(session.map(items, batch_size=size))
    assert all(is_same(answer, session(item)) for answer, item in zip(answers, items, strict=True))
    assert len({answer.exit for answer in answers}) > 1, "a tiny bundle should use more than one exit"


@pytest.mark.parametrize("size", [1, 4])
def test_a_bad_item_keeps_its_place(session: RowSession[Any], size: int) -> None:
    good, error, also_good = session.answers(["good film", 7, "bad"], size)
    assert error == ItemError(1, "expected a string or a pair of strings, found 7")
    assert is_same(good, session("good film")) and is_same(also_good, session("bad"))


def test_text_without_words_is_answered(session: RowSession[Any]) -> None:
    assert session("").exit >= 1


@pytest.mark.parametrize("item", [("good",), ("a", "b", "c"), (), b"good"], ids=str)
def test_an_item_that_is_no_text_is_refused(session: RowSession[Any], item: object) -> None:
    with pytest.raises(BadInput, match=r"item 0: expected a string or a pair of strings"):
        session(item)


def test_a_pair_is_answered_or_refused_by_name(session: RowSession[Any]) -> None:
    if session.manifest.task in ("token-classification", "sentence-embedding"):
        with pytest.raises(BadInput, match=rf"item 0: {session.manifest.task} reads one text, not a pair"):
            session("good", "film")
    else:
        assert is_same(session("good", "film"), next(session.map([("good", "film")])))


def test_long_text_is_cut_and_marked(session: RowSession[Any]) -> None:
    assert session(LONG).truncated and session(LONG).windows == 1


def test_at_full_depth_has_every_exit_of_every_item(session: RowSession[Any]) -> None:
    trace, lengths = session.at_full_depth(texts(10))
    assert (trace.variants == 0).all() and trace.logits.shape == (10, SEGMENTS, session.manifest.classes)
    assert (trace.answers is None) == (session.manifest.kind == "classification")
    assert lengths.tolist() == [session.encode(text)["input_ids"].shape[1] for text in texts(10)]


def test_a_session_names_its_labels(session: RowSession[Any]) -> None:
    assert session.labels == session.manifest.labels
    assert bool(session.labels) == (session.manifest.kind not in ("regression", "sentence-embedding"))


def test_a_method_that_the_session_lacks_is_refused_by_name(session: RowSession[Any]) -> None:
    with pytest.raises(WrongTask, match=r"generate: this bundle .*: call the session, or map"):
        session.generate("a film")  # type: ignore[attr-defined]


def test_warm_up_runs_every_segment(session: RowSession[Any]) -> None:
    session.warm_up((1, 5, 1000), batch=2)


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.name)
def test_closed_session_is_refused(path: Path) -> None:
    session = load_row_session(path)
    session.close()
    with pytest.raises(SessionClosed):
        session("good")


def test_windows_of_a_long_text_are_one_answer(windowed: RowSession[Any]) -> None:
    answer = windowed(LONG)
    assert answer.windows > 2 and not answer.truncated
    (row,) = windowed._reader.read([LONG])
    assert not isinstance(row, ItemError)
    trace = windowed._trace([row, *row.rest], 4, windowed._bound_rule, windowed._variant_number)
    assert answer.exit == int(exits_of(trace, 0, answer.windows).max()) + 1
    assert answer.depth == windowed.manifest.segments[answer.exit - 1].blocks[-1]


def test_windowed_answers_keep_their_places(windowed: RowSession[Any]) -> None:
    items = ["good film", LONG, "bad plot", 7, LONG[:300], "warm"]
    answers = list(windowed.answers(items))
    assert isinstance(answers[3], ItemError)
    for item, answer in zip(items, answers, strict=True):
        assert isinstance(answer, ItemError) or is_same(answer, windowed(item))


def test_exit_answers_are_those_of_the_exit_of_each_window() -> None:
    trace = trace_of([9.0], [1.0], [2.0], [3.0], exits=[0, 2, 0, 1])
    assert exits_of(trace, 1, 3).tolist() == [2, 0, 1]
    row = TextRow([2, 3], [0, 0], False)
    answers = exit_answers(trace, 1, replace(row, rest=(row, row)))
    assert [answer.tolist() for answer in answers] == [[1], [2], [3]]
