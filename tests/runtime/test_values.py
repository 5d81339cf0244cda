"""Answers that are numbers: a value, or an embedding, and what several windows give."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from scripted_traces import trace_of
from tiny_bundles import EMBEDDING, REGRESSION, texts

from offramp.runtime import Embedder, Regressor, load
from offramp.runtime.inputs.text import TextRow

ROW = TextRow([2, 3], [0, 0], False)
LONGER = TextRow([2, 4, 5, 6, 7, 3], [0] * 6, False)


@pytest.fixture(scope="module")
def regressor() -> Iterator[Regressor]:
    with load(REGRESSION) as session:
        assert isinstance(session, Regressor)
        yield session


@pytest.fixture(scope="module")
def embedder() -> Iterator[Embedder]:
    with load(EMBEDDING) as session:
        assert isinstance(session, Embedder)
        yield session


def test_value_is_that_of_the_exit(regressor: Regressor) -> None:
    answer = regressor._answer(trace_of([3.25], exits=[1]), 0, ROW)
    assert answer.value == 3.25 and answer.exit == 2 and isinstance(answer.value, float)


def test_value_of_windows_is_their_mean(regressor: Regressor) -> None:
    answer = regressor._answer(trace_of([9.0], [1.0], [4.0], exits=[0, 2, 1]), 1, replace(ROW, rest=(ROW,)))
    assert answer.value == 2.5 and answer.windows == 2


@pytest.mark.parametrize(
    ("value", "written"), [(3.2, "3.2"), (1e-9, "1e-09"), (123456.789, "123456.8"), (-0.1, "-0.1")]
)
def test_value_is_written_with_the_digits_of_a_float32(
    regressor: Regressor, value: float, written: str
) -> None:
    answer = regressor._answer(trace_of([value]), 0, ROW)
    assert json.dumps(answer.as_json()) == f'{{"value": {written}}}'


def test_embedding_is_that_of_the_exit(embedder: Embedder) -> None:
    answer = embedder._answer(trace_of([0.6, 0.8], exits=[0]), 0, ROW)
    assert answer.embedding.dtype == np.float32 and answer.embedding.tolist() == pytest.approx([0.6, 0.8])
    assert answer.as_json() == {"embedding": [0.6, 0.8]}


def test_embeddings_of_windows_weigh_as_many_as_their_tokens(embedder: Embedder) -> None:
    answer = embedder._answer(trace_of([4.0, 0.0], [0.0, 4.0]), 0, replace(LONGER, rest=(ROW,)))
    assert answer.embedding.tolist() == pytest.approx([3.0, 1.0])


def test_embedding_of_windows_has_unit_length_if_theirs_have(embedder: Embedder) -> None:
    answer = embedder._answer(trace_of([1.0, 0.0], [0.0, 1.0]), 0, replace(LONGER, rest=(ROW,)))
    assert answer.embedding.tolist() == pytest.approx((np.array([3, 1]) / np.sqrt(10)).tolist())
    assert answer.embedding.dtype == np.float32


def test_opposite_windows_have_no_direction(embedder: Embedder) -> None:
    answer = embedder._answer(trace_of([1.0, 0.0], [-1.0, 0.0]), 0, replace(ROW, rest=(ROW,)))
    assert answer.embedding.tolist() == [0, 0]


def test_embedding_is_kept_when_its_buffers_are_used_again(embedder: Embedder) -> None:
    first = embedder("good film")
    before = first.embedding.copy()
    list(embedder.map(texts(20)))
    embedder("bad film")
    assert np.array_equal(first.embedding, before)


def test_rows_leave_where_their_answers_have_settled() -> None:
    for path in (REGRESSION, EMBEDDING):
        with load(path, rule="settled", threshold=1e6) as session:
            assert isinstance(session, (Regressor, Embedder))
            assert {answer.exit for answer in session.map(texts(10))} == {2}
