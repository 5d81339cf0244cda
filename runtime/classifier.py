"""Classifier, the session of a bundle that classifies texts or images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import Calibration, Manifest, RuleSpec
from offramp.runtime.engines.base import Engine, State
from offramp.runtime.errors import BadInput, BadSetting, ItemError
from offramp.runtime.inputs.text import AnyRow, Item, Reader, items_to_rows
from offramp.runtime.pipeline import chunks, prefetch
from offramp.runtime.rules.base import Floats, Rule, softmax
from offramp.runtime.rules.registry import bind
from offramp.runtime.session import Session
from offramp.runtime.walker import Inputs, Trace, walk

WINDOW = 8  # batches that map reads at once, to sort their rows by length


@dataclass(frozen=True)
class Answer:
    """The predicted label of one item, and the steps that were run for it.

    score: probability (0..1) of the label at the exit where the walk ended. exit: that exit, 1-based. depth:
    blocks run. steps: (1-based segment, variant) of each step. signals: for each step, the probability of the
    final label at its exit, and P(exit) of its policy or None. seconds: wall time from the start of the row's
    stem to its exit, including waiting for other rows and excluding tokenizing. truncated: the text was
    longer than the network can read. At an operating point that ee-calibrate --coverage measured, calibrated:
    the probability of the label at the temperature of its exit, and label_set: the labels, the likeliest
    first, of a set that contains the right one with that coverage (it may be empty); else None.

    windows: how many windows of a long text were walked (load option long_texts). With several, label and
    score come from the mean of their logits, exit, depth, steps and signals are those of the deepest one,
    seconds is the longest time, and nothing is calibrated.
    """

    label: str
    score: float
    exit: int
    depth: int
    steps: tuple[tuple[int, str], ...]
    signals: tuple[tuple[float, float | None], ...]
    seconds: float
    truncated: bool = False
    calibrated: float | None = None
    label_set: tuple[str, ...] | None = None
    windows: int = 1


class Classifier(Session[State]):
    """A session that classifies texts or images; load() returns it.

    An image is a path, the bytes of a file, a PIL image, or an array uint8 [height, width, 3] in RGB.
    batch_size: most rows that map walks together. calibration: that of the operating point at which the
    session walks, or None.
    """

    usage = "this bundle classifies: call the session, or map"

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine[State],
        reader: Reader[AnyRow],
        rule: Rule,
        variant: str,
        batch_size: int,
    ) -> None:
        super().__init__(bundle, engine, rule, variant)
        self.batch_size = batch_size
        self._reader = reader
        self.calibration = find_calibration(self.manifest, self.rule, variant)
        self._depths = np.array([len(segment.blocks) for segment in self.manifest.segments])

    def __call__(self, text: Item, text_b: str | None = None) -> Answer:
        """Classify one text (or pair) or image.

        Raises BadInput for anything else, SessionClosed after close().
        """
        (row,) = items_to_rows(self._reader, [text if text_b is None else (text, text_b)])
        size = self.batch_size if row.rest else 1
        trace = self._trace([row, *row.rest], size, self._bound_rule, self._variant_number)
        return self._answer(trace, 0, row)

    def map(self, items: Iterable[Item], batch_size: int | None = None) -> Iterator[Answer]:
        """Classify many items (texts, pairs, images) and iterate over their answers, in the order of `items`.

        Items are read on demand, in windows of 8 batches, at most two: while one is walked, a thread
        tokenizes the next. A million items need the memory of a few hundred. `items` is read in the caller's
        thread; when the iterator is closed or dropped, no thread remains. batch_size 1 reads one item,
        answers it, and only then reads the next, without a thread. An item that cannot be answered raises
        BadInput after the answers before it; errors of `items` itself are also raised after them. See
        `answers` for a walk that goes on after a bad item.
        """
        for answer in self.answers(items, batch_size):
            if isinstance(answer, ItemError):
                raise BadInput(f"item {answer.index}: {answer.message}")
            yield answer

    def answers(self, items: Iterable[Item], batch_size: int | None = None) -> Iterator[Answer | ItemError]:
        """Classify many items as map does, but give an ItemError for each item that cannot be answered."""
        size = self.batch_size if batch_size is None else checked_batch_size(batch_size)
        return self._answers(iter(items), size)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, in the order of the logits."""
        return self.manifest.labels

    def encode(self, text: Item, text_b: str | None = None) -> Inputs:
        """Convert one text (or pair) or image to the stem's inputs: int64 [1, seq], or float32 pixels."""
        item = text if text_b is None else (text, text_b)
        return self._reader.arrays(items_to_rows(self._reader, [item]))

    def warm_up(self, lengths: Sequence[int] = (16, 32, 64, 128), batch: int = 1) -> None:
        """Open every segment and run it once at these lengths (tokens), so that no later call pays for it.

        batch: rows of the runs. Lengths beyond the longest input of the network are cut to it. Needed
        after load(lazy=True), and useful before times are measured. Raises BadSetting for sizes under 1,
        BadBundle if a file differs from the manifest, SessionClosed.
        """
        if bad := [length for length in lengths if length < 1]:
            raise BadSetting(f"length {bad[0]}: expected 1 or more")
        ids = np.arange(checked_batch_size(batch))
        with self._lock:
            self._check_open()
            self.engine.prepare(self._variant_number, range(len(self.manifest.segments)))
        batches = [(ids, self._reader.blank(batch, length)) for length in lengths]
        self._walk(batches, batch, batch, self._never(), self._variant_number)

    def at_full_depth(
        self, items: Sequence[Item], variant: str | None = None
    ) -> tuple[Trace, NDArray[np.int64]]:
        """Run every segment for all items; returns the outputs of every exit, and lengths in tokens [rows].

        variant: the precision of the walk (None: the session's own). Raises the errors of a call.
        """
        rows = items_to_rows(self._reader, items)
        number = self._variant_number if variant is None else self.manifest.variants.index(variant)
        trace = self._trace(rows, self.batch_size, self._never(), number)
        return trace, np.array([row.length for row in rows], np.int64)

    def batches(self, rows: Sequence[AnyRow], size: int) -> Iterator[tuple[NDArray[np.int64], Inputs]]:
        """Batches of rows of similar length, the shortest first: row numbers, and the stem's inputs."""
        order = np.argsort([row.length for row in rows], kind="stable")
        for start in range(0, len(rows), size):
            ids = order[start : start + size]
            yield ids, self._reader.arrays([rows[number] for number in ids])

    def _answers(self, source: Iterator[Item], size: int) -> Iterator[Answer | ItemError]:
        items = chunks(source, size * WINDOW if size > 1 else 1)
        # The built-in map reads an item only when its result is needed, and works in this thread.
        windows = prefetch(items, self._read_window) if size > 1 else map(self._read_window, items)
        for window in windows:
            rows = [part for row in window if not isinstance(row, ItemError) for part in (row, *row.rest)]
            trace = self._trace(rows, size, self._bound_rule, self._variant_number)
            number = 0
            for row in window:
                if isinstance(row, ItemError):
                    yield row
                    continue
                yield self._answer(trace, number, row)
                number += 1 + len(row.rest)

    def _read_window(self, chunk: tuple[int, list[Item]]) -> list[AnyRow | ItemError]:
        """A row or an error for each item; chunk: the number of items before these, and the items."""
        before, items = chunk
        rows = self._reader.read(items)
        return [replace(row, index=before + row.index) if isinstance(row, ItemError) else row for row in rows]

    def _trace(self, rows: Sequence[AnyRow], size: int, rule: Rule, variant: int) -> Trace:
        return self._walk(self.batches(rows, size), len(rows), size, rule, variant)

    def _walk(
        self,
        batches: Iterable[tuple[NDArray[np.int64], Inputs]],
        rows: int,
        limit: int,
        rule: Rule,
        variant: int,
    ) -> Trace:
        with self._lock:
            self._check_open()
            return walk(
                self.engine,
                rule,
                batches,
                rows=rows,
                segments=len(self.manifest.segments),
                classes=len(self.manifest.labels),
                variant=variant,
                limit=limit,
            )

    def _never(self) -> Rule:
        return bind(RuleSpec("never", {}), len(self.manifest.segments))

    def _answer(self, trace: Trace, first: int, item: AnyRow) -> Answer:
        """The answer to an item whose row, and windows if there are more, begin at row `first` of a trace."""
        windows = 1 + len(item.rest)
        row = first if windows == 1 else _deepest_row(trace, first, windows)
        segments = np.flatnonzero(trace.variants[row] >= 0)
        probabilities = softmax(trace.logits[row, segments])  # [steps, classes]
        last = probabilities[-1] if windows == 1 else softmax(_mean_logits(trace, first, windows))
        seconds = trace.seconds[row] if windows == 1 else trace.seconds[first : first + windows].max()
        label = int(last.argmax())
        scores = probabilities[:, label].tolist()
        gates = trace.gates[row, segments].tolist()
        numbers = segments.tolist()
        names, variants = self.manifest.variants, trace.variants[row, segments].tolist()
        calibrated, label_set = None, None
        if windows == 1:
            calibrated, label_set = self._calibrated(trace.logits[row, numbers[-1]], numbers[-1], label)
        return Answer(
            label=self.manifest.labels[label],
            score=float(last[label]),
            exit=numbers[-1] + 1,
            depth=int(self._depths[segments].sum()),
            steps=tuple((s + 1, names[v]) for s, v in zip(numbers, variants, strict=True)),
            signals=tuple((p, None if math.isnan(g) else g) for p, g in zip(scores, gates, strict=True)),
            seconds=float(seconds),
            truncated=item.truncated,
            calibrated=calibrated,
            label_set=label_set,
            windows=windows,
        )

    def _calibrated(
        self, logits: Floats, segment: int, label: int
    ) -> tuple[float | None, tuple[str, ...] | None]:
        """The calibrated probability of a label, and the set of labels; logits [classes] of the exit."""
        if self.calibration is None:
            return None, None
        probabilities = softmax(logits / np.float32(self.calibration.temperatures[segment]))
        inside = 1.0 - probabilities <= self.calibration.quantiles[segment]
        order = np.argsort(-probabilities, kind="stable").tolist()
        names = tuple(self.manifest.labels[number] for number in order if inside[number])
        return float(probabilities[label]), names


def _exits(trace: Trace, first: int, windows: int) -> NDArray[np.int64]:
    """The segment (0-based) after which each of these rows left [windows]."""
    ran = trace.variants[first : first + windows] >= 0
    last: NDArray[np.int64] = ran.shape[1] - 1 - ran[:, ::-1].argmax(1)
    return last


def _deepest_row(trace: Trace, first: int, windows: int) -> int:
    """The row of the window that left last; the first of several."""
    return first + int(_exits(trace, first, windows).argmax())


def _mean_logits(trace: Trace, first: int, windows: int) -> Floats:
    """The mean over windows of the logits at the exits that they took [classes]."""
    logits: Floats = trace.logits[np.arange(first, first + windows), _exits(trace, first, windows)].mean(0)
    return logits


def find_calibration(manifest: Manifest, rule: RuleSpec, variant: str) -> Calibration | None:
    """The calibration of the operating point with this rule and variant; None if there is none.

    Sets hold for the answers of that rule alone: another threshold sends other rows to an exit.
    """
    same = (point for point in manifest.points if (point.rule, point.variant) == (rule, variant))
    return next((point.calibration for point in same if point.calibration is not None), None)


def checked_batch_size(size: int) -> int:
    """Return the batch size; raises BadSetting if it is under 1."""
    if size < 1:
        raise BadSetting(f"batch size {size}: expected 1 or more")
    return size
