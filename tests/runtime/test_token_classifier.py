"""Labelled words and the entities that they form: their characters, scores, windows, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_traces import trace_of
from tiny_bundles import TOKENS, texts

from offramp.runtime import Entity, LabelledWord, TokenClassifier, load
from offramp.runtime.bundle.files import Bundle, open_bundle
from offramp.runtime.inputs.text import TextReader, TextRow
from offramp.runtime.inputs.words import Word
from offramp.runtime.token_classifier import entities_of, word_places

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")  # of the tiny bundle
OUTSIDE, BEGIN_PER, PER, BEGIN_LOC, LOC = range(5)


@pytest.fixture(scope="module")
def session() -> Iterator[TokenClassifier]:
    with load(TOKENS, batch_size=4) as session:
        assert isinstance(session, TokenClassifier) and session.labels == TAGS
        yield session


@pytest.fixture(scope="module")
def windowed() -> Iterator[TokenClassifier]:
    with load(TOKENS, long_texts="windows", rule="never") as session:
        assert isinstance(session, TokenClassifier)
        yield session


def answer_of(session: TokenClassifier, text: str, labels: dict[int, int], odds: float = 9.0) -> Any:
    """The answer to a text if tokens have these labels (others: LOC), with this logit above other labels."""
    row = row_of(session, text)
    logits = np.zeros((row.length + 3, len(TAGS)), np.float32)  # three tokens of padding
    logits[np.arange(len(logits)), [labels.get(token, LOC) for token in range(len(logits))]] = odds
    return session._answer(trace_of(logits), 0, row)


def row_of(session: TokenClassifier, text: str) -> TextRow:
    (row,) = session._reader.read([text])
    assert isinstance(row, TextRow)
    return row


def words(*labels: str) -> list[LabelledWord]:
    """Words "w0 w1 …" with these labels."""
    return [LabelledWord(3 * at, 3 * at + 2, label, 0.5) for at, label in enumerate(labels)]


def spans(*labels: str) -> list[tuple[str, str]]:
    text = " ".join(f"w{at}" for at in range(len(labels)))
    return [(entity.entity_group, entity.word) for entity in entities_of(words(*labels), text)]


def test_a_word_has_the_label_of_its_first_token(session: TokenClassifier) -> None:
    text = "Films, warmly"
    assert list(row_of(session, text).words) == [
        Word(0, 1, 0, 5),
        Word(1, 3, 5, 6),
        Word(2, 4, 7, 13),
    ]
    answer = answer_of(session, text, {1: BEGIN_PER, 2: BEGIN_LOC, 3: OUTSIDE, 4: PER, 5: OUTSIDE})
    score = pytest.approx(float(np.exp(9) / (np.exp(9) + 4)))
    assert answer.tokens == (
        (0, 5, "B-PER", score),
        (5, 6, "O", score),
        (7, 13, "I-PER", score),
    )
    assert answer.entities == (("PER", score, "Films", 0, 5), ("PER", score, "warmly", 7, 13))


def test_entities_begin_at_b_and_where_the_kind_changes() -> None:
    assert spans("B-A", "I-A", "B-A", "O", "I-A", "I-B", "I-B") == [
        ("A", "w0 w1"),
        ("A", "w2"),
        ("A", "w4"),
        ("B", "w5 w6"),
    ]
    assert spans("O", "O") == [] == spans()


def test_labels_without_a_prefix_group_with_equal_neighbours() -> None:
    assert spans("A", "A", "O", "A", "B-C") == [("A", "w0 w1"), ("A", "w3"), ("C", "w4")]


def test_score_of_an_entity_is_the_mean_of_its_words() -> None:
    labelled = [LabelledWord(0, 3, "B-A", 0.5), LabelledWord(4, 6, "I-A", 1.0)]
    assert entities_of(labelled, "Ada L.") == (Entity("A", 0.75, "Ada L.", 0, 6),)


def test_text_without_words_has_no_entities(session: TokenClassifier) -> None:
    answer = session("")
    assert (answer.entities, answer.tokens) == ((), ()) and answer.as_json() == {"entities": []}


def test_json_is_that_of_transformers_pipeline(session: TokenClassifier) -> None:
    value = answer_of(session, "paris film", {1: BEGIN_LOC, 2: OUTSIDE}).as_json()
    assert value == {
        "entities": [{"entity_group": "LOC", "score": 0.999507, "word": "paris", "start": 0, "end": 5}]
    }


def test_stem_reads_where_words_begin(session: TokenClassifier) -> None:
    inputs = session.encode("films, warmly")
    assert inputs["word_starts"].tolist() == [[0, 1, 0, 1, 1, 0, 0]]
    rows = [row_of(session, "films"), row_of(session, ""), row_of(session, "film films film film films film")]
    ((_, batch),) = session.batches(rows, 3)
    assert batch["word_starts"].dtype == np.int64 and batch["word_starts"].shape == batch["input_ids"].shape
    assert batch["word_starts"].sum(1).tolist() == [0, 1, 6]
    assert not batch["word_starts"][batch["attention_mask"] == 0].any()


def test_characters_are_those_of_the_callers_text(tmp_path: Path) -> None:
    from dataclasses import replace

    bundle = open_bundle(TOKENS)
    facts = replace(bundle.manifest.input, prefix="the plot: ")
    reader = TextReader(Bundle(bundle.folder, replace(bundle.manifest, input=facts)))
    row, plain = reader.read(["ann"])[0], TextReader(bundle).read(["ann"])[0]
    assert isinstance(row, TextRow) and isinstance(plain, TextRow)
    assert row.words == (Word(3, 4, 0, 3),) and plain.words == (Word(0, 1, 0, 3),) and row.text == "ann"


def test_a_truncated_text_has_the_words_that_were_read(session: TokenClassifier) -> None:
    answer = session(" ".join(["film"] * 100))
    assert answer.truncated and len(answer.tokens) == session.manifest.input.longest - 2  # type: ignore[union-attr]


def test_words_of_white_space_are_left_out() -> None:
    row = TextRow([2, 5, 6, 3], [0] * 4, False, words=(Word(0, 1, 0, 1), Word(1, 2, 2, 2)), text="a  ")
    assert word_places([row]) == [(0, Word(0, 1, 0, 1))]


def window(length: int, *words: tuple[int, int, int, int]) -> TextRow:
    return TextRow([0] * length, [0] * length, False, words=tuple(Word(*word) for word in words))


def test_a_word_is_labelled_where_it_is_farthest_from_an_edge() -> None:
    first = window(8, (0, 1, 0, 2), (1, 4, 3, 5), (2, 5, 6, 8), (3, 6, 9, 11))
    second = window(8, (1, 1, 3, 5), (2, 2, 6, 8), (3, 3, 9, 11), (4, 6, 12, 14))
    places = word_places([first, second])
    assert [(number, word.number, word.token) for number, word in places] == [
        (0, 0, 1),
        (0, 1, 4),
        (0, 2, 5),  # as far from the edge in both windows: the first
        (1, 3, 3),
        (1, 4, 6),
    ]


def test_a_word_that_a_window_cuts_has_all_of_its_characters() -> None:
    cut_at_its_end, whole = window(8, (7, 6, 10, 12)), window(8, (7, 2, 10, 16))
    assert word_places([cut_at_its_end, whole]) == [(1, Word(7, 2, 10, 16))]
    begins, cut_at_its_start = window(8, (7, 4, 10, 14)), window(8, (7, 1, 12, 16))
    assert word_places([begins, cut_at_its_start]) == [(0, Word(7, 4, 10, 16))]


@pytest.mark.slow
def test_every_word_of_a_long_text_is_labelled_once(windowed: TokenClassifier) -> None:
    text = " ".join([*texts(12), "films warmly."] * 3)
    answer = windowed(text)
    assert answer.windows > 3
    labelled = [text[word.start : word.end] for word in answer.tokens]
    assert labelled == text.replace(".", " .").split()


def test_windows_are_walked_as_rows_of_their_own(windowed: TokenClassifier) -> None:
    """Each word has the label and score of its token in the window that is chosen."""
    text = " ".join(texts(12))
    row = row_of(windowed, text)
    answer, windows = windowed(text), (row, *row.rest)
    trace = windowed._trace(windows, 4, windowed._never(), 0)
    assert trace.answers is not None and answer.windows == len(windows)
    for labelled, (number, word) in zip(answer.tokens, word_places(windows), strict=True):
        logits = trace.answers[number, -1][word.token]
        assert labelled.label == TAGS[int(logits.argmax())]
        assert labelled.score == pytest.approx(float(np.exp(logits - logits.max()).sum() ** -1), abs=1e-4)
