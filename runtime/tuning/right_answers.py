"""The answers of rows in a form that can be compared, and their quality: what tuning knows of a task.

An answer is the number of a label (classification), whether each label is given (multi-label), the number of
the label of each word (tokens), a number (regression), or an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import (
    CLASSIFICATION,
    EMBEDDING,
    MULTI_LABEL,
    REGRESSION,
    TOKENS,
    WORD_STARTS,
    Manifest,
)
from offramp.runtime.errors import BadInput
from offramp.runtime.inputs.text import AnyRow, TextRow, items_to_rows, open_reader
from offramp.runtime.inputs.words import Word
from offramp.runtime.row_session import RowSession
from offramp.runtime.rules.entities import inner_labels, word_labels
from offramp.runtime.rules.quality import (
    AGREEMENT,
    Quality,
    embedding_quality,
    given_labels,
    given_quality,
    label_quality,
    token_quality,
    value_quality,
)
from offramp.runtime.tuning.labelled import LabelledRows
from offramp.runtime.walker import Inputs, Trace

Array = NDArray[Any]
Answers = NDArray[Any]  # [rows]: numbers, or an array for each row (dtype object)
ByExit = Sequence[Sequence[Any]]  # [rows][exits]: answers
Places = Sequence[Sequence[int] | NDArray[np.int64]]  # for each row, the tokens that begin a word


@dataclass(frozen=True)
class _Kind:
    """How answers of one kind of task are read and compared.

    output: the output of a graph from which answers are made. metric: the name of their quality. decide:
    answers from outputs of rows. quality: from answers, the right ones, and the name.
    """

    output: str
    metric: str
    decide: Callable[[Manifest, Iterable[Array], Places | None], Answers]
    quality: Callable[[Manifest, ByExit, Sequence[Any], str], Quality]


class AnswerReader:
    """Reads answers of a bundle's task from the outputs of graphs, and tells how good they are.

    output: the output that it reads. metric: the name of the quality against labels of the data.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._kind = _KINDS[manifest.kind]
        self.output = self._kind.output
        self.metric = self._kind.metric
        # Embeddings have no right answers but those of full depth.
        self.has_labels = manifest.kind != EMBEDDING
        self.reads_words = manifest.kind == TOKENS

    def decide(self, outputs: Iterable[Array], places: Places | None = None) -> Answers:
        """The answers that outputs of rows stand for; places: for token classification.

        Raises BadInput for a row whose output is not finite: it is no answer, and no figure may count it.
        """
        rows = outputs if isinstance(outputs, np.ndarray) else list(outputs)
        read = rows if places is None else [row[np.asarray(at)] for row, at in zip(rows, places, strict=True)]
        _require_finite(read)
        return self._kind.decide(self._manifest, rows, places)

    def places(self, batches: Sequence[tuple[NDArray[np.int64], Inputs]], rows: int) -> Places | None:
        """The tokens that begin a word in each row of some batches; None where the stem does not read them.

        batches: row numbers, and the stem's inputs.
        """
        if not self.reads_words:
            return None
        places = [np.zeros(0, np.int64)] * rows
        for ids, inputs in batches:
            for row, starts in zip(ids.tolist(), inputs[WORD_STARTS.name], strict=True):
                places[row] = np.flatnonzero(starts)
        return places

    def at_exits(self, trace: Trace, exits: NDArray[np.int64] | int, places: Places | None = None) -> Answers:
        """The answers of walked rows at their exits, 0-based: [rows], or one for all rows."""
        outputs = trace.logits if self.output == "logits" else trace.answers
        assert outputs is not None  # the manifest's checks see to it
        return self.decide(outputs[np.arange(len(outputs)), exits], places)

    def wanted(self, labels: Answers, rows: Sequence[AnyRow] = ()) -> Answers:
        """The right answers of rows by their labels, see LabelledRows; rows: as read, for words."""
        if not self.reads_words:
            return labels
        inner = inner_labels(self._manifest.labels)
        pairs = zip(rows, labels, strict=True)
        return _objects(
            np.array(word_labels([word.start for word in words_of(row)], words, inner), np.int64)
            for row, words in pairs
        )

    def quality(self, answers: ByExit, wanted: Sequence[Any] | Answers, name: str | None = None) -> Quality:
        """The quality of answers [rows][exits] against the right ones [rows]; name: None for the metric."""
        return self._kind.quality(self._manifest, answers, list(wanted), name or self.metric)


@dataclass(frozen=True)
class RightAnswers:
    """The right answers of some rows: by the labels of the data or, agreement, those of full depth.

    wanted: see AnswerReader.quality. places: see AnswerReader.decide.
    """

    reader: AnswerReader
    wanted: Answers
    agreement: bool
    places: Places | None

    @property
    def name(self) -> str:
        """The name of the quality of answers beside these."""
        return AGREEMENT if self.agreement else self.reader.metric

    def score(self, trace: Trace, exits: NDArray[np.int64]) -> float:
        """The quality in percent of the answers of walked rows at their exits [rows], 0-based."""
        answers = self.reader.at_exits(trace, exits, self.places)
        quality = self.reader.quality([[answer] for answer in answers], self.wanted, self.name)
        return float(quality.each[0])

    def quality(self, trace: Trace) -> Quality:
        """The quality of the answers of all exits of rows that walked to the end."""
        exits = range(trace.variants.shape[1])
        answers = [self.reader.at_exits(trace, exit, self.places) for exit in exits]  # [exits][rows]
        return self.reader.quality(list(zip(*answers, strict=True)), self.wanted, self.name)


def right_answers(session: RowSession[Any], rows: LabelledRows, *, agreement: bool = False) -> RightAnswers:
    """The right answers of rows; agreement: those of full depth of the default variant.

    Answers of a task without labels are right by full depth in any case.
    """
    manifest, reader = session.manifest, AnswerReader(session.manifest)
    encoded: list[AnyRow] = []
    places: Places | None = None
    if reader.reads_words:
        encoded = items_to_rows(open_reader(Bundle(session.folder, manifest)), rows.items)
        places = [[word.token for word in words_of(row)] for row in encoded]
    agreement = agreement or not reader.has_labels
    if agreement:
        trace, _ = session.at_full_depth(rows.items, manifest.variants[0])
        wanted = reader.at_exits(trace, -1, places)
    else:
        wanted = reader.wanted(rows.labels, encoded)
    return RightAnswers(reader, wanted, agreement, places)


def words_of(row: AnyRow) -> Sequence[Word]:
    """The words of a row of text that a bundle for token classification reads."""
    return cast(TextRow, row).words


def _require_finite(outputs: Sequence[Array] | Array) -> None:
    if isinstance(outputs, np.ndarray) and outputs.dtype != object and np.isfinite(outputs).all():
        return
    for number, output in enumerate(outputs, 1):
        if not np.isfinite(output).all():
            row = f" for row {number}" if len(outputs) > 1 else ""
            raise BadInput(
                f"the network's output{row} is not finite (NaN or infinite): nothing can be measured on it; "
                "repair the network, or take the row out"
            )


def _objects(values: Iterable[Any]) -> Answers:
    """An array that holds one object for each row, arrays of equal shapes too."""
    rows = list(values)
    array = np.empty(len(rows), object)
    for number, value in enumerate(rows):
        array[number] = value
    return array


def _decide_label(manifest: Manifest, outputs: Iterable[Array], places: Places | None) -> Answers:
    labels: Answers = np.asarray(outputs).argmax(-1).astype(np.int64)
    return labels


def _decide_given(manifest: Manifest, outputs: Iterable[Array], places: Places | None) -> Answers:
    return _objects(given_labels(logits, manifest.thresholds) for logits in outputs)


def _decide_words(manifest: Manifest, outputs: Iterable[Array], places: Places | None) -> Answers:
    assert places is not None  # the stem of every bundle for this task reads them
    pairs = zip(outputs, places, strict=True)
    return _objects(logits[np.asarray(row, np.int64)].argmax(-1) for logits, row in pairs)


def _decide_value(manifest: Manifest, outputs: Iterable[Array], places: Places | None) -> Answers:
    return np.array([value.item() for value in outputs])


def _decide_embedding(manifest: Manifest, outputs: Iterable[Array], places: Places | None) -> Answers:
    return _objects(outputs)


def _label_quality(manifest: Manifest, answers: ByExit, wanted: Sequence[Any], name: str) -> Quality:
    return label_quality(np.array(answers), np.array(wanted), name=name)


def _given_quality(manifest: Manifest, answers: ByExit, wanted: Sequence[Any], name: str) -> Quality:
    return given_quality(np.array(answers), np.array(wanted), name=name)


def _word_quality(manifest: Manifest, answers: ByExit, wanted: Sequence[Any], name: str) -> Quality:
    return token_quality([np.stack(row) for row in answers], wanted, manifest.labels, name=name)


def _value_quality(manifest: Manifest, answers: ByExit, wanted: Sequence[Any], name: str) -> Quality:
    return value_quality(np.array(answers), np.array(wanted), name=name)


def _embedding_quality(manifest: Manifest, answers: ByExit, wanted: Sequence[Any], name: str) -> Quality:
    return embedding_quality(np.array(answers), np.array(wanted), name=name)


_KINDS = {
    CLASSIFICATION: _Kind("logits", "accuracy", _decide_label, _label_quality),
    MULTI_LABEL: _Kind("answer", "f1", _decide_given, _given_quality),
    TOKENS: _Kind("answer", "f1", _decide_words, _word_quality),
    REGRESSION: _Kind("answer", "spearman", _decide_value, _value_quality),
    EMBEDDING: _Kind("answer", "cosine", _decide_embedding, _embedding_quality),
}
