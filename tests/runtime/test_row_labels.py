"""Labels of rows of every kind of task: what is read, and that errors name place and field."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from offramp.runtime.bundle.manifest import CLASSIFICATION, EMBEDDING, MULTI_LABEL, REGRESSION, TOKENS
from offramp.runtime.errors import BadInput
from offramp.runtime.tuning.row_labels import LABELS, joined_words, label_array

TAGS = ("O", "B-PER", "I-PER")
NAMES = {CLASSIFICATION: ("no", "yes"), MULTI_LABEL: ("a", "b", "c"), TOKENS: TAGS, REGRESSION: ()}


def read(kind: str, row: dict[str, Any]) -> Any:
    return LABELS[kind].read(row, NAMES.get(kind, ()), "here")


def test_labels_of_every_kind() -> None:
    assert read(CLASSIFICATION, {"label": "yes"}) == 1
    assert read(MULTI_LABEL, {"labels": ["c", 0]}).tolist() == [True, False, True]
    assert read(MULTI_LABEL, {"label": []}).tolist() == [False, False, False]
    assert read(REGRESSION, {"label": 3}) == 3.0
    assert read(EMBEDDING, {"label": 3}) is None
    words = [(0, 3, 1), (4, 6, 0), (7, 8, -1)]
    for field, tags in (
        ("ner_tags", [1, 0, -100]),
        ("tags", ["B-PER", "O", None]),
        ("labels", ["B-PER", 0, -100]),
    ):
        assert read(TOKENS, {"tokens": ["Ann", "is", "."], field: tags}) == words
    entities = [{"start": 0, "end": 3, "label": "PER"}]
    assert read(TOKENS, {"text": "Ann is", "entities": entities}) == [(0, 3, 1), (3, 6, 0)]


@pytest.mark.parametrize("kind", [CLASSIFICATION, MULTI_LABEL, TOKENS, REGRESSION])
def test_a_row_without_labels(kind: str) -> None:
    assert read(kind, {"text": "a", "tokens": ["a"]} if kind == TOKENS else {"text": "a"}) is None


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (MULTI_LABEL, {"labels": "a"}, "here: \"labels\" is not a list of labels: 'a'"),
        (MULTI_LABEL, {"labels": ["a", "z"]}, "here: \"labels\": label 'z' is not one of: a, b, c"),
        (REGRESSION, {"label": "3"}, "here: \"label\" is not a number: '3'"),
        (REGRESSION, {"label": True}, 'here: "label" is not a number'),
        (REGRESSION, {"label": float("nan")}, 'here: "label" is not a number'),
        (TOKENS, {"tokens": ["a", "b"], "tags": ["O"]}, 'here: "tags" has 1 labels for 2 tokens'),
        (TOKENS, {"tokens": ["a"], "tags": "O"}, 'here: "tags" is not a list of labels'),
        (TOKENS, {"tokens": ["a"], "tags": ["B-X"]}, "here: \"tags\": label 'B-X' is not one of: O, B-PER"),
        (TOKENS, {"text": "a", "entities": {}}, 'here: "entities" is not a list'),
        (TOKENS, {"text": "a", "entities": [{"start": 0}]}, "an object with start, end and label"),
        (
            TOKENS,
            {"text": "a", "entities": [{"start": 0, "end": 1, "label": "LOC"}]},
            "here: \"entities\": entity 'LOC' is not one of: O, PER",
        ),
        (TOKENS, {"text": "a", "text_b": "b", "entities": []}, '"text_b": token classification reads single'),
    ],
)
def test_a_bad_label_is_named(kind: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as error:
        read(kind, row)
    assert message in str(error.value) and str(error.value).startswith("here: ")


def test_words_are_joined_by_blanks() -> None:
    assert joined_words(["Ann", "is", "."], "here") == "Ann is ."
    for tokens in ("Ann", [], ["a", 3]):
        with pytest.raises(BadInput, match='here: "tokens" is not a list of words'):
            joined_words(tokens, "here")


def test_rows_are_one_array() -> None:
    given = label_array([np.array([True, False]), np.array([True, True])])
    assert given.shape == (2, 2) and given.dtype == bool
    words = label_array([[(0, 1, 0)], [(0, 1, 0)]])
    assert words.shape == (2,) and words[1] == [(0, 1, 0)]
    assert label_array([None, None]).tolist() == [-1, -1]
