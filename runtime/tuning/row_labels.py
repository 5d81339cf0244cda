"""The labels of a row of data, read from its JSON object: one reader for each kind of task.

classification   "label": a name or number
multi-label      "labels" (or "label"): a list of names or numbers, which may be empty
tokens           "tokens" and, for each, a name or number in "ner_tags", "tags" or "labels"; or "text" and
                 "entities": objects with "start", "end" (in characters) and "label"
regression       "label": a number
embedding        none
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.manifest import CLASSIFICATION, EMBEDDING, MULTI_LABEL, REGRESSION, TOKENS
from offramp.runtime.errors import BadInput
from offramp.runtime.rules.entities import UNLABELLED, entity_words

TAGS = ("ner_tags", "tags", "labels")  # fields of the labels of tokens; the first that is there
IGNORED = (None, -100)  # tags of tokens without a label
Row = Mapping[str, Any]
Words = list[tuple[int, int, int]]  # start and end in characters, number of the label


@dataclass(frozen=True)
class RowLabels:
    """How labels of one kind of task are read.

    fields: that may hold them, the usual one first. read: (row, names of the labels, place for errors) -> the
    label, or None if the row has none of the fields. Raises BadInput naming the place and the field.
    """

    fields: tuple[str, ...]
    read: Callable[[Row, Sequence[str], str], Any]


def label_number(label: object, names: Sequence[str], place: str) -> int:
    """The number of a label that is given by name or number; raises BadInput naming the place otherwise."""
    # A number may be a name: labels from 1 to 5 are named so.
    name = str(label).lower() if isinstance(label, bool) else str(label)
    if isinstance(label, (str, int)) and name in names:
        return names.index(name)
    numbered = not all(known.lstrip("-").isdigit() for known in names)
    if numbered and isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return label
    if label is None:
        raise BadInput(f'{place}: no "label"; every row needs one')
    known = ", ".join(names[:20]) + (f" (or a number below {len(names)})" if numbered else "")
    raise BadInput(f"{place}: label {label!r:.40} is not one of: {known}")


def joined_words(tokens: object, place: str) -> str:
    """The text of a row that is given as words: the words with a blank between; raises BadInput."""
    if not (isinstance(tokens, list) and tokens and all(isinstance(token, str) for token in tokens)):
        raise BadInput(f'{place}: "tokens" is not a list of words: {tokens!r:.40}')
    return " ".join(tokens)


def label_array(labels: Sequence[Any]) -> NDArray[Any]:
    """The labels of all rows as an array [rows, ...]: of tokens lists; -1 for tasks without any."""
    if labels[0] is None:
        return np.full(len(labels), UNLABELLED)
    if not isinstance(labels[0], list):
        return np.array(labels)
    array = np.empty(len(labels), object)
    for number, words in enumerate(labels):
        array[number] = words
    return array


def _single_label(row: Row, names: Sequence[str], place: str) -> int | None:
    label = row.get("label")
    return None if label is None else label_number(label, names, place)


def _several_labels(row: Row, names: Sequence[str], place: str) -> NDArray[np.bool_] | None:
    """Whether each label is given [labels]."""
    field = _first_field(row, LABELS[MULTI_LABEL].fields)
    if field is None:
        return None
    if not isinstance(row[field], list):
        raise BadInput(f'{place}: "{field}" is not a list of labels: {row[field]!r:.40}')
    given = np.zeros(len(names), bool)
    given[[label_number(label, names, f'{place}: "{field}"') for label in row[field]]] = True
    return given


def _value(row: Row, names: Sequence[str], place: str) -> float | None:
    label = row.get("label")
    if label is None:
        return None
    if isinstance(label, bool) or not isinstance(label, (int, float)) or not math.isfinite(label):
        raise BadInput(f'{place}: "label" is not a number: {label!r:.40}')
    return float(label)


def _word_labels(row: Row, names: Sequence[str], place: str) -> Words | None:
    if row.get("text_b") is not None:
        raise BadInput(f'{place}: "text_b": token classification reads single texts')
    if "tokens" not in row:
        return None if row.get("entities") is None else _labels_of_entities(row, names, place)
    field = _first_field(row, TAGS)
    if field is None:
        return None
    tags, tokens = row[field], row["tokens"]
    if not isinstance(tags, list):
        raise BadInput(f'{place}: "{field}" is not a list of labels: {tags!r:.40}')
    if len(tags) != len(tokens):
        raise BadInput(f'{place}: "{field}" has {len(tags)} labels for {len(tokens)} tokens')
    words, start = Words(), 0
    for token, tag in zip(tokens, tags, strict=True):
        number = UNLABELLED if tag in IGNORED else label_number(tag, names, f'{place}: "{field}"')
        words.append((start, start + len(token), number))
        start += len(token) + 1
    return words


def _labels_of_entities(row: Row, names: Sequence[str], place: str) -> Words:
    entities = row["entities"]
    if not isinstance(entities, list):
        raise BadInput(f'{place}: "entities" is not a list: {entities!r:.40}')
    spans = []
    for entity in entities:
        kinds = {"start": int, "end": int, "label": str}
        if not (isinstance(entity, dict) and all(type(entity.get(key)) is kinds[key] for key in kinds)):
            raise BadInput(
                f'{place}: "entities": expected an object with start, end and label, found {entity!r:.60}'
            )
        spans.append((entity["start"], entity["end"], entity["label"]))
    try:
        return entity_words(row["text"], spans, names)
    except ValueError as problem:
        raise BadInput(f'{place}: "entities": {problem}') from None


def _first_field(row: Row, fields: Sequence[str]) -> str | None:
    return next((field for field in fields if row.get(field) is not None), None)


LABELS: Mapping[str, RowLabels] = {
    CLASSIFICATION: RowLabels(("label",), _single_label),
    MULTI_LABEL: RowLabels(("labels", "label"), _several_labels),
    TOKENS: RowLabels((*TAGS, "entities"), _word_labels),
    REGRESSION: RowLabels(("label",), _value),
    EMBEDDING: RowLabels((), lambda row, names, place: None),
}
