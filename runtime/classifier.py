"""A session: a bundle opened on an engine, ready to answer."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from offramp.runtime import rules
from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import Manifest, RuleSpec
from offramp.runtime.engines.base import Engine
from offramp.runtime.errors import BadInput, BadSetting, SessionClosed
from offramp.runtime.inputs.text import AnyRow, Item, Reader
from offramp.runtime.pipeline import ahead, chunks
from offramp.runtime.walker import Inputs, Trace, walk

if TYPE_CHECKING:
    from offramp.runtime.generator import Piece
    from offramp.runtime.inputs.chat import Message

WINDOW = 8  # batches in a window: what map reads at once, to sort rows by length

# Rows of a window, and what is wrong with the item after them.
Window = tuple[Sequence[AnyRow], BadInput | None]


@dataclass(frozen=True)
class Answer:
    """What a walk found.

    score: probability (0..1) of the label at the exit where the row left. exit: that exit, 1-based. depth:
    blocks run.
    steps: (1-based segment, variant) of each step. signals: for each step, the probability that its exit gave
    to the final label, and P(exit) of its policy or None. seconds: wall time from the start of the row's stem
    until it left, waiting for the rows beside it included, tokenizing not. truncated: the text was longer
    than the network can read.
    """

    label: str
    score: float
    exit: int
    depth: int
    steps: tuple[tuple[int, str], ...]
    signals: tuple[tuple[float, float | None], ...]
    seconds: float
    truncated: bool = False


class Session:
    """Answers texts, or images; made by load(). Any thread may call it: walks take turns behind one lock.

    An image is a path, the bytes of a file, a PIL image, or an array uint8 [height, width, 3] in RGB.

    engine: what really runs (name, device, facts). rule: the spec that decides. variant: the precision in
    which rows start.
    """

    def __init__(
        self, bundle: Bundle, engine: Engine, encoder: Reader, rule: RuleSpec, variant: str, batch_size: int
    ) -> None:
        self.manifest: Manifest = bundle.manifest
        self.engine = engine
        self.rule = rule
        self.variant = variant
        self.batch_size = batch_size
        self._encode = encoder
        self._lock = threading.Lock()
        self._closed = False
        self._rule = rules.bind(rule, len(self.manifest.segments), self.manifest.costs)
        self._number = self.manifest.variants.index(variant)
        self._depths = np.array([len(segment.blocks) for segment in self.manifest.segments])

    def __call__(self, text: Any, text_b: str | None = None) -> Answer:
        """Answer one text (or pair) or image; BadInput for what is neither, SessionClosed after close()."""
        rows = self._encode([text if text_b is None else (text, text_b)])
        return self._walk(rows, 1)[0]

    def map(self, items: Iterable[Any], batch_size: int | None = None) -> Iterator[Answer]:
        """Answers in the order of `items` (texts, pairs, images), read and answered as they are asked for.

        Reads windows of 8 batches, two at most: while one is walked, a thread tokenizes the next. So a
        million items need the memory of a few hundred. `items` is read in the thread that asks for the
        answers; closing or dropping the iterator leaves no thread behind. batch_size 1 reads one item,
        answers it, and only then reads the next, without a thread. An item that is no text raises BadInput
        after the answers before it, and so does what `items` itself raises.
        """
        size = self.batch_size if batch_size is None else checked_size(batch_size)
        return self._map(iter(items), size)

    def generate(
        self, prompt: str | Sequence[Message], max_new_tokens: int = 64, stop: Sequence[str] = ()
    ) -> Iterator[Piece]:
        """Of bundles that generate text: see offramp.runtime.writer.Writer. BadSetting for others."""
        raise BadSetting("this bundle classifies: call the session, or map")

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the logits."""
        return self.manifest.labels

    def encode(self, text: Any, text_b: str | None = None) -> Inputs:
        """The stem's inputs for one text (or pair) int64 [1, seq], or one image: what a call would run on."""
        return self._encode.arrays(self._encode([text if text_b is None else (text, text_b)]))

    def warm_up(self, lengths: Sequence[int] = (16, 32, 64, 128), batch: int = 1) -> None:
        """Open every segment and run it once at these lengths (tokens), so that no later call pays for it.

        batch: rows of the runs. Lengths beyond what the network reads are cut to that. Needed after
        load(lazy=True), and useful before times are taken. Raises BadSetting for sizes under 1, BadBundle
        where a file is not what the manifest says, SessionClosed.
        """
        if bad := [length for length in lengths if length < 1]:
            raise BadSetting(f"length {bad[0]}: expected 1 or more")
        checked_size(batch)
        segments = range(len(self.manifest.segments))
        with self._lock:
            self._check_open()
            self.engine.prepare(self._number, segments)
            for length in lengths:
                state = self.engine.begin(self._encode.blank(batch, length))
                for segment in segments:
                    self.engine.step(segment, self._number, state)
                self.engine.drop(state)

    def at_full_depth(
        self, items: Sequence[Item], variant: str | None = None
    ) -> tuple[Trace, NDArray[np.int64]]:
        """What every exit says of every item, whatever the rule; and the items' lengths in tokens [rows].

        variant: the precision of the walk, None: the session's own. Raises as a call does.
        """
        rows = self._encode(list(items))
        number = self._number if variant is None else self.manifest.variants.index(variant)
        never = rules.bind(RuleSpec("never", {}), len(self.manifest.segments))
        trace = self._trace(rows, self.batch_size, never, number)
        return trace, np.array([row.length for row in rows], np.int64)

    def close(self) -> None:
        """Free the engine; calling twice is fine."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.engine.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _map(self, source: Iterator[Any], size: int) -> Iterator[Answer]:
        chunked = chunks(source, size * WINDOW if size > 1 else 1)
        # The built-in map reads an item when it is asked for, not sooner, and works in this thread.
        windows = ahead(chunked, self._window) if size > 1 else map(self._window, chunked)
        for rows, problem in windows:
            yield from self._walk(rows, size)
            if problem is not None:
                raise problem

    def _window(self, chunk: tuple[int, list[Any]]) -> Window:
        done, items = chunk
        try:
            return self._encode(items), None
        except BadInput:
            # One item is no text: find it, answer those before it, and name it by its place in the whole.
            return self._good(items, done)

    def _good(self, chunk: Sequence[Any], done: int) -> Window:
        rows: list[AnyRow] = []
        for at, item in enumerate(chunk):
            try:
                rows += self._encode([item])
            except BadInput as problem:
                return rows, BadInput(str(problem).replace("item 0", f"item {done + at}", 1))
        return rows, None

    def _walk(self, rows: Sequence[AnyRow], size: int) -> list[Answer]:
        if not rows:
            return []
        trace = self._trace(rows, size, self._rule, self._number)
        return [self._answer(trace, at, row.truncated) for at, row in enumerate(rows)]

    def _trace(self, rows: Sequence[AnyRow], size: int, rule: rules.Rule, variant: int) -> Trace:
        with self._lock:
            self._check_open()
            return walk(
                self.engine,
                rule,
                self._batches(rows, size),
                rows=len(rows),
                segments=len(self.manifest.segments),
                classes=len(self.manifest.labels),
                variant=variant,
                limit=size,
            )

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosed("the session is closed; load() another")

    def _batches(self, rows: Sequence[AnyRow], size: int) -> Iterator[tuple[NDArray[np.int64], Inputs]]:
        """Rows of like length together, the shortest first."""
        order = np.argsort([row.length for row in rows], kind="stable")
        for start in range(0, len(rows), size):
            ids = order[start : start + size]
            yield ids, self._encode.arrays([rows[at] for at in ids])

    def _answer(self, trace: Trace, at: int, truncated: bool) -> Answer:
        ran = np.flatnonzero(trace.variants[at] >= 0)
        probabilities = rules.softmax(trace.logits[at, ran])  # [steps, classes]
        label = int(probabilities[-1].argmax())
        column = probabilities[:, label].tolist()
        gates = trace.gates[at, ran].tolist()
        segments = ran.tolist()
        names = self.manifest.variants
        return Answer(
            label=self.manifest.labels[label],
            score=column[-1],
            exit=segments[-1] + 1,
            depth=int(self._depths[ran].sum()),
            steps=tuple(
                (s + 1, names[v]) for s, v in zip(segments, trace.variants[at, ran].tolist(), strict=True)
            ),
            signals=tuple((p, None if math.isnan(g) else g) for p, g in zip(column, gates, strict=True)),
            seconds=float(trace.seconds[at]),
            truncated=truncated,
        )


def checked_size(size: int) -> int:
    """The batch size, 1 or more."""
    if size < 1:
        raise BadSetting(f"batch size {size}: expected 1 or more")
    return size
