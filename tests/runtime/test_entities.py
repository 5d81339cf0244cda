"""Entities from labels of words, and labels of tokens from words of the data."""

from __future__ import annotations

import pytest

from offramp.runtime.rules.entities import UNLABELLED, entity_spans, entity_words, inner_labels, word_labels

NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


@pytest.mark.parametrize(  # the entities that seqeval 1.2.2's get_entities gives
    ("labels", "spans"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("I-PER I-PER B-PER I-LOC I-LOC O", [("PER", 0, 2), ("PER", 2, 3), ("LOC", 3, 5)]),
        ("O I-X B-X B-X I-Y", [("X", 1, 2), ("X", 2, 3), ("X", 3, 4), ("Y", 4, 5)]),
        ("B-a-b I-a-b", [("a-b", 0, 2)]),
        ("", []),
        ("O O", []),
    ],
)
def test_entities_are_those_of_seqeval(labels: str, spans: list[tuple[str, int, int]]) -> None:
    assert entity_spans(labels.split()) == spans


def test_equal_neighbours_without_a_prefix_are_one_entity() -> None:
    assert entity_spans(["NOUN", "NOUN", "VERB", "O", "VERB"]) == [
        ("NOUN", 0, 2),
        ("VERB", 2, 3),
        ("VERB", 4, 5),
    ]


def test_the_label_that_goes_on_with_a_word() -> None:
    assert inner_labels(NAMES) == [0, 2, 2, 4, 4]
    assert inner_labels(("B-X", "NOUN")) == [0, 1]


def test_the_first_token_in_a_word_has_its_label_and_later_ones_go_on() -> None:
    words = [(0, 3, 1), (4, 9, 3), (10, 11, UNLABELLED), (12, 15, 0)]
    starts = [0, 2, 4, 6, 8, 10, 12, 13, 20]
    assert word_labels(starts, words, inner_labels(NAMES)) == [1, 2, 3, 4, 4, -1, 0, 0, -1]


def test_a_token_between_words_has_no_label() -> None:
    assert word_labels([3, 4, 5], [(0, 3, 1), (5, 6, 1)], inner_labels(NAMES)) == [-1, -1, 1]


def test_entities_in_characters_are_words_of_their_own() -> None:
    text = "Ann went to New York."
    words = entity_words(text, [(12, 20, "LOC"), (0, 3, "PER")], NAMES)
    assert words == [(0, 3, 1), (3, 12, 0), (12, 20, 3), (20, 21, 0)]
    starts = [0, 4, 9, 12, 16, 20]
    labels = word_labels(starts, words, inner_labels(NAMES))
    assert [NAMES[label] for label in labels] == ["B-PER", "O", "O", "B-LOC", "I-LOC", "O"]


def test_labels_without_prefix_name_entities_too() -> None:
    assert entity_words("ab", [(0, 2, "PER")], ("O", "PER")) == [(0, 2, 1)]


@pytest.mark.parametrize(
    ("entities", "message"),
    [
        ([(0, 3, "ORG")], "entity 'ORG' is not one of: O, PER, LOC"),
        ([(0, 9, "PER")], "entity 0 to 9: the text has 8 characters"),
        ([(3, 3, "PER")], "entity 3 to 3: the text has"),
        ([(0, 3, "PER"), (2, 5, "LOC")], "entity 2 to 5: it overlaps the one before, which ends at 3"),
    ],
)
def test_an_entity_that_cannot_be_is_named(entities: list[tuple[int, int, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entity_words("Ann went", entities, NAMES)
