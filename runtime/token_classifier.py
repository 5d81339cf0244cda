"""TokenClassifier, the session of a bundle that labels the words of texts, and entities, which words form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.inputs.text import AnyRow, TextRow
from offramp.runtime.inputs.words import Word
from offramp.runtime.row_session import RowAnswer, RowSession, exit_answers, not_finite
from offramp.runtime.rules.base import softmax
from offramp.runtime.rules.entities import entity_spans
from offramp.runtime.walker import Trace


class LabelledWord(NamedTuple):
    """A word, as the characters from start to before end, its label, and the label's probability."""

    start: int
    end: int
    label: str
    score: float


class Entity(NamedTuple):
    """Words that form one entity; its fields are named as by transformers' pipeline.

    entity_group: its kind, the label without B- or I-. score: mean probability of its words' labels. word:
    its text, from character `start` to before `end`.
    """

    entity_group: str
    score: float
    word: str
    start: int
    end: int


@dataclass(frozen=True)
class TokenAnswer:
    """The entities of one text, and the steps that were run for it.

    entities: in their order, as transformers' pipeline forms them with aggregation_strategy="first": a word
    has the label of its first token; words with label O belong to no entity. tokens: every word with its
    label. Characters are those of the caller's text. In a text of several windows, a word is labelled in the
    window in which its first token is farthest from an edge. The other fields are those of RowAnswer.
    """

    entities: tuple[Entity, ...]
    tokens: tuple[LabelledWord, ...]
    exit: int
    depth: int
    steps: tuple[tuple[int, str], ...]
    seconds: float
    truncated: bool = False
    windows: int = 1

    def as_json(self) -> dict[str, object]:
        """See RowAnswer."""
        return {
            "entities": [entity._asdict() | {"score": round(entity.score, 6)} for entity in self.entities]
        }


class TokenClassifier(RowSession[TokenAnswer]):
    """A session that labels the words of texts; load() returns it. It has no pairs of texts."""

    usage = "this bundle labels words: call the session, or map"

    def _decision(self, answer: RowAnswer) -> NDArray[np.generic]:
        """See RowSession."""
        assert isinstance(answer, TokenAnswer)
        return np.array([self.manifest.labels.index(word.label) for word in answer.tokens], np.int64)

    def _answer(self, trace: Trace, first: int, item: AnyRow, rule: int = 0) -> TokenAnswer:
        _, _, walked = self._walked(trace, first, item)
        row = cast(TextRow, item)
        answers = exit_answers(trace, first, item)
        places = word_places((row, *row.rest))
        words: tuple[LabelledWord, ...] = ()
        if places:
            probabilities = softmax(np.stack([answers[window][word.token] for window, word in places]))
            if np.isnan(probabilities).any():
                raise not_finite(walked[0])
            best = probabilities.argmax(-1).tolist()  # [words]
            words = tuple(
                LabelledWord(word.start, word.end, self.manifest.labels[label], float(of_labels[label]))
                for (_, word), label, of_labels in zip(places, best, probabilities, strict=True)
            )
        return TokenAnswer(entities_of(words, row.text), words, *walked)


def word_places(windows: Sequence[TextRow]) -> list[tuple[int, Word]]:
    """For each word of a text the number of the window that labels it, and the word as it is in that window.

    That is the window in which the word's first token is farthest from an edge; the first of several. The
    words have all of their characters, of which a window may have cut some. Words of white space are left
    out.
    """
    places: dict[int, tuple[int, int, Word]] = {}  # by the word's number: distance, window, word
    for window, row in enumerate(windows):
        for word in row.words:
            place = (min(word.token, row.length - 1 - word.token), window, word)
            known = places.get(word.number)
            if known is not None:
                start, end = min(known[2].start, word.start), max(known[2].end, word.end)
                distance, number, better = place if place[0] > known[0] else known
                place = (distance, number, better._replace(start=start, end=end))
            places[word.number] = place
    return [(window, word) for _, window, word in places.values() if word.start < word.end]


def entities_of(words: Sequence[LabelledWord], text: str) -> tuple[Entity, ...]:
    """The entities that labelled words of a text form, in their order."""
    entities = []
    for kind, first, after in entity_spans([word.label for word in words]):
        inside = words[first:after]
        start, end = inside[0].start, inside[-1].end
        score = sum(word.score for word in inside) / len(inside)
        entities.append(Entity(kind, score, text[start:end], start, end))
    return tuple(entities)
