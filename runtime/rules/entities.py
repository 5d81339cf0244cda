"""Entities: the spans of words that the labels B-X, I-X and O of a row form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

OUTSIDE = "O"
BEGIN, INSIDE = "B-", "I-"
UNLABELLED = -1  # the number of the label of a word that has none


class Span(NamedTuple):
    """One entity: its kind, its first word, and the word after its last."""

    kind: str
    start: int
    end: int


def split_label(label: str) -> tuple[bool, str]:
    """Whether a label always begins an entity, and the kind of its entity.

    A label without a prefix is a kind of its own; neighbours with the same one form one entity.
    """
    if label.startswith((BEGIN, INSIDE)):
        return label.startswith(BEGIN), label[2:]
    return False, label


def entity_spans(labels: Sequence[str]) -> list[Span]:
    """The entities of one row in their order, read from the labels of its words.

    As seqeval's default mode and transformers' pipeline read them: an I-X that follows no entity of its kind
    begins one.
    """
    spans: list[Span] = []
    start, kind_before = 0, OUTSIDE
    for number, label in enumerate([*labels, OUTSIDE]):
        begins, kind = split_label(label)
        if begins or kind != kind_before:
            if kind_before != OUTSIDE:
                spans.append(Span(kind_before, start, number))
            start, kind_before = number, kind
    return spans


def inner_labels(names: Sequence[str]) -> list[int]:
    """For each label, the number of that of a word which goes on with its entity: I-X of B-X, else itself."""
    numbers = {name: number for number, name in enumerate(names)}
    return [
        numbers.get(INSIDE + name.removeprefix(BEGIN), number) if name.startswith(BEGIN) else number
        for number, name in enumerate(names)
    ]


def word_labels(
    starts: Sequence[int], words: Sequence[tuple[int, int, int]], inner: Sequence[int]
) -> list[int]:
    """The labels of the tokens that begin a word, from those of the words of the data.

    starts: the first character of each token that is no white space, ascending. words: start, end and number
    of the label of each word of the data, in order (in characters; UNLABELLED without a label). inner: see
    inner_labels. The first token in a word has its label, later ones the label that goes on with it;
    UNLABELLED in no word.
    """
    labels = []
    number, used = 0, -1  # the word that is looked at, and the last one that gave a label
    for start in starts:
        while number < len(words) and words[number][1] <= start:
            number += 1
        if number == len(words) or start < words[number][0]:
            labels.append(UNLABELLED)
            continue
        label = words[number][2]
        labels.append(inner[label] if number == used and label != UNLABELLED else label)
        used = number
    return labels


def entity_words(
    text: str, entities: Sequence[tuple[int, int, str]], names: Sequence[str]
) -> list[tuple[int, int, int]]:
    """The words of a text whose entities are given by start, end and kind; see word_labels.

    Each entity is one word with its label B-X (or X, if names have no B-X), and what lies between two is one
    word with label O. Raises ValueError for an entity that is outside of the text or overlaps another, and
    for a kind without a label.
    """
    numbers = {name: number for number, name in enumerate(names)}
    outside = numbers.get(OUTSIDE, UNLABELLED)
    words: list[tuple[int, int, int]] = []
    end_before = 0
    for start, end, kind in sorted(entities):
        number = numbers.get(BEGIN + kind, numbers.get(kind))
        if number is None:
            kinds = dict.fromkeys(split_label(name)[1] for name in names)
            raise ValueError(f"entity {kind!r:.40} is not one of: {', '.join(kinds)}")
        if not 0 <= start < end <= len(text):
            raise ValueError(f"entity {start} to {end}: the text has {len(text)} characters")
        if start < end_before:
            raise ValueError(
                f"entity {start} to {end}: it overlaps the one before, which ends at {end_before}"
            )
        if end_before < start:
            words.append((end_before, start, outside))
        words.append((start, end, number))
        end_before = end
    if end_before < len(text):
        words.append((end_before, len(text), outside))
    return words
