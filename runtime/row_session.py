"""RowSession, the base of all sessions that give one answer for each text or image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.engines.base import Engine, State
from offramp.runtime.errors import BadInput, BadSetting, ItemError
from offramp.runtime.inputs.text import AnyRow, Item, Reader, items_to_rows
from offramp.runtime.pipeline import chunks, prefetch
from offramp.runtime.rules.base import Floats, Rule
from offramp.runtime.rules.quality import DISAGREEMENTS
from offramp.runtime.rules.registry import bind
from offramp.runtime.rules.resolve import bind_for_bundle, resolve_rule
from offramp.runtime.session import Session
from offramp.runtime.walker import Batch, Inputs, Trace, Walk, empty_trace, walk

if TYPE_CHECKING:  # sessions without them do not need the modules
    from offramp.runtime.audit import Audit, AuditPlan, AuditReport
    from offramp.runtime.budget import Budget, BudgetReport

MAX_BATCH = 1 << 20  # rows that may be walked together
WINDOW = 8  # batches that map reads at once, to sort their rows by length


class RowAnswer(Protocol):
    """What the answers of all tasks have in common: the steps that were run for one item."""

    @property
    def exit(self) -> int:
        """The exit where the walk ended, 1-based."""
        ...

    @property
    def depth(self) -> int:
        """Blocks run."""
        ...

    @property
    def steps(self) -> tuple[tuple[int, str], ...]:
        """(1-based segment, variant) of each step."""
        ...

    @property
    def seconds(self) -> float:
        """Wall time from the start of the stem to the exit; waiting for other rows counts, tokenizing not."""
        ...

    @property
    def truncated(self) -> bool:
        """Whether the text was longer than the network can read."""
        ...

    @property
    def windows(self) -> int:
        """How many windows of a long text were walked (load option long_texts).

        With several, exit, depth and steps are those of the deepest one, and seconds is the longest time.
        """
        ...

    def as_json(self) -> dict[str, object]:
        """The fields of this task as ee-run writes them; those of the walk are not among them."""
        ...


# How an item was walked: exit, depth, steps, seconds, truncated and windows, the last fields of an answer. A
# plain tuple, as a walk of one row must not cost more microseconds.
Walked = tuple[int, int, tuple[tuple[int, str], ...], float, bool, int]
A_co = TypeVar("A_co", bound=RowAnswer, covariant=True)


class ExitRecord(NamedTuple):
    """What an exit gave: segment (1-based), logits, P(exit) or None.

    ms: since the exit before, or since the walk began; with waiting for other rows.
    """

    segment: int
    variant: str
    logits: tuple[float, ...]
    gate: float | None
    ms: float


class RowSession(Session[State], Generic[A_co]):
    """A session that gives one answer for each text or image; load() returns one of its kinds.

    An image is a path, the bytes of a file, a PIL image, or an array uint8 [height, width, 3] in RGB.
    batch_size: most rows that map walks together. budget: what draws the rule of each row, if there is a
    budget; rule is then that of its first point. audit: what the answers are compared with, if they are.
    """

    # For a process that forks while the session is opened.
    _budget: Budget | None = None
    _audit: Audit[tuple[AnyRow, RowAnswer]] | None = None

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine[State],
        reader: Reader[AnyRow],
        rule: Rule,
        variant: str,
        batch_size: int,
        budget: Budget | None = None,
        audit: AuditPlan | None = None,
    ) -> None:
        super().__init__(bundle, engine, rule, variant)
        self.batch_size = batch_size
        self._bundle = bundle
        self._reader = reader
        self._points: dict[str, tuple[int, int]] = {}  # of add_point
        self._rules: list[Rule] = []  # all rules by which rows may be walked
        first = [rule] if budget is None else [bind_for_bundle(bundle, p.rule) for p in budget.points]
        for bound in first:
            self._add_rule(bound, variant)
        self._full_number = self._add_rule(self._full_depth(), variant)
        self._number = 0  # of the rule without a budget
        self._budget = budget
        self._audit = None if audit is None else self._open_audit(audit)
        self._is_watched = budget is not None or audit is not None
        self._depths = np.array([len(segment.blocks) for segment in self.manifest.segments])
        self._classes = self.manifest.classes

    def __call__(self, text: Item, text_b: str | None = None) -> A_co:
        """Answer one text (or pair) or image.

        Raises BadInput for anything else and if the network gives no number (NaN), SessionClosed after
        close().
        """
        (row,) = items_to_rows(self._reader, [text if text_b is None else (text, text_b)])
        size = self.batch_size if row.rest else 1
        number, _ = self.draw()
        trace = self._trace([row, *row.rest], size, self._rules[number], self._variant_number)
        return self.finish(trace, 0, row, number)

    def map(self, items: Iterable[Item], batch_size: int | None = None) -> Iterator[A_co]:
        """Answer many items (texts, pairs, images): an iterator over the answers, in the order of `items`.

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

    def answers(self, items: Iterable[Item], batch_size: int | None = None) -> Iterator[A_co | ItemError]:
        """Answer many items as map does, but give an ItemError for each item that cannot be answered."""
        size = self.batch_size if batch_size is None else checked_batch_size(batch_size)
        return self._answers(iter(items), size)

    def budget_report(self) -> BudgetReport:
        """What the budget held so far; raises BadSetting for a session without one."""
        if self._budget is None:
            raise BadSetting("budget_report: there is no budget; load() with budget_ms or budget_depth")
        return self._budget.report()

    def audit_report(self) -> AuditReport:
        """What the audit knows so far, after the audits of all rows drawn for it are finished.

        Raises BadSetting for a session without an audit. Audits that wait when the session is closed are
        dropped; ask before.
        """
        if self._audit is None:
            raise BadSetting("audit_report: there is no audit; load() with audit, a share of the rows")
        return self._audit.report()

    def reports(self) -> dict[str, str]:
        """The reports of budget and audit as text by name, for users; none of what the session lacks."""
        reports = {}
        if self._budget is not None:
            reports["budget"] = str(self._budget.report())
        if self._audit is not None:
            reports["audit"] = str(self._audit.report())
        return reports

    def close(self) -> None:
        """Close the session and free its engine; a second call does nothing. Audits that wait are dropped."""
        if self._audit is not None:
            self._audit.close()
        super().close()

    def after_fork(self) -> None:
        """See Session; audits that wait are left to the parent process."""
        if self._audit is not None:
            self._audit.after_fork()
        if self._budget is not None:
            self._budget.after_fork()
        super().after_fork()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, in the order in which an exit gives them; none for tasks without labels."""
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

    def read(self, items: Sequence[Item]) -> list[AnyRow | ItemError]:
        """Convert each item to a row, or to an ItemError if it cannot be read."""
        return self._reader.read(items)

    def add_point(self, point: str) -> tuple[int, int]:
        """Let single rows be walked at an operating point; gives the numbers of its rule and its variant.

        The numbers are for a Scheduler. Raises BadSetting if the bundle has no such point.
        """
        if point not in self._points:
            spec, variant = resolve_rule(self.manifest, point=point)
            number = self._add_rule(bind_for_bundle(self._bundle, spec), variant)
            self._points[point] = number, self.manifest.variants.index(variant)
        return self._points[point]

    def full_depth(self, variant: str) -> tuple[int, int]:
        """The numbers of the rule that runs every segment in a variant; see add_point."""
        name = f"full depth in {variant}"  # no point has a name with blanks
        if name not in self._points:
            rule = self._add_rule(self._never(), variant)
            self._points[name] = rule, self.manifest.variants.index(variant)
        return self._points[name]

    def draw(self) -> tuple[int, int]:
        """The numbers of the rule and the variant by which the next row is walked; see add_point."""
        number = self._number if self._budget is None else self._budget.draw()[0]
        return number, self._variant_number

    def open_walk(self, rows: int, limit: int) -> tuple[Walk[State], Trace]:
        """A walk that rows can join at any time, and its record of `rows` rows; limit: most rows of a step.

        Both are used inside `walking` alone.
        """
        trace = empty_trace(rows, len(self.manifest.segments), self._classes)
        return Walk(self.engine, self._rules, trace, limit), trace

    @contextmanager
    def walking(self) -> Iterator[None]:
        """Context in which the engine is the caller's alone; raises SessionClosed after close()."""
        with self._lock:
            self._check_open()
            yield

    def finish(self, trace: Trace, first: int, row: AnyRow, rule: int) -> A_co:
        """The answer to a row, whose windows begin at row `first` of a trace; budget and audit count it.

        rule: the number of the rule by which it was walked. Raises BadInput if the network gives no number.
        """
        answer = self._answer(trace, first, row, rule)
        if self._is_watched:
            self._watch(row, answer)
        return answer

    def batches(self, rows: Sequence[AnyRow], size: int, pad_alone: bool = False) -> Iterator[Batch]:
        """Batches of similar length, the shortest first: row numbers, stem inputs; see Reader.arrays."""
        order = np.argsort([row.length for row in rows], kind="stable")
        for start in range(0, len(rows), size):
            ids = order[start : start + size]
            yield ids, self._reader.arrays([rows[number] for number in ids], pad_alone)

    def _answers(self, source: Iterator[Item], size: int) -> Iterator[A_co | ItemError]:
        chunk = size * WINDOW if size > 1 else 1
        if self._budget is not None:  # many decisions in each of its windows, but no smaller batches
            chunk = min(chunk, max(size, self._budget.window // 32))
        items = chunks(source, chunk)
        # The built-in map reads an item only when its result is needed, and works in this thread.
        windows = prefetch(items, self._read_window) if size > 1 else map(self._read_window, items)
        index = -1
        for window in windows:
            good = [row for row in window if not isinstance(row, ItemError)]
            if self._budget is None:
                walked = self._walk_items(good, size, self._number)
            else:
                walked = self._walk_drawn(good, size, self._budget)
            for row in window:
                index += 1
                if isinstance(row, ItemError):
                    yield row
                    continue
                walk_of_row = next(walked)
                try:
                    answer = self.finish(*walk_of_row)
                except BadInput as problem:  # see not_finite
                    yield ItemError(index, str(problem))
                    continue
                yield answer

    def _walk_items(
        self, items: list[AnyRow], size: int, rule: int
    ) -> Iterator[tuple[Trace, int, AnyRow, int]]:
        """Walk items by one rule (its number in _rules); gives the arguments of _answer for each."""
        rows = [part for item in items for part in (item, *item.rest)]
        trace = self._trace(rows, size, self._rules[rule], self._variant_number)
        first = 0
        for item in items:
            yield trace, first, item, rule
            first += 1 + len(item.rest)

    def _walk_drawn(
        self, items: list[AnyRow], size: int, budget: Budget
    ) -> Iterator[tuple[Trace, int, AnyRow, int]]:
        """Walk items by the rules that a budget draws, those of each rule together; see _walk_items."""
        numbers = budget.draw(len(items))
        drawn = {
            rule: self._walk_items([i for i, n in zip(items, numbers, strict=True) if n == rule], size, rule)
            for rule in set(numbers)
        }
        return (next(drawn[number]) for number in numbers)

    def _read_window(self, chunk: tuple[int, list[Item]]) -> list[AnyRow | ItemError]:
        """A row or an error for each item; chunk: the number of items before these, and the items."""
        before, items = chunk
        rows = self._reader.read(items)
        return [replace(row, index=before + row.index) if isinstance(row, ItemError) else row for row in rows]

    def _trace(self, rows: Sequence[AnyRow], size: int, rule: Rule, variant: int) -> Trace:
        return self._walk(self.batches(rows, size), len(rows), size, rule, variant)

    def _walk(
        self,
        batches: Iterable[Batch],
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
                classes=self._classes,
                variant=variant,
                limit=limit,
            )

    def _add_rule(self, rule: Rule, variant: str) -> int:
        """Add a rule by which rows are walked that start in a variant; gives its number."""
        self._rules.append(rule)
        return len(self._rules) - 1

    def _never(self) -> Rule:
        return bind(RuleSpec("never", {}), len(self.manifest.segments))

    def _full_depth(self) -> Rule:
        """The rule that runs every segment, as points of this variant have it."""
        points = self.manifest.points
        specs = (p.rule for p in points if (p.rule.name, p.variant) == ("never", self.variant))
        spec = next(specs, None)
        return self._never() if spec is None else bind(spec, len(self.manifest.segments))

    def _watch(self, row: AnyRow, answer: RowAnswer) -> None:
        """Let budget and audit count an answer."""
        if self._budget is not None:
            self._budget.observe(answer.seconds, answer.depth)
        if self._audit is not None:
            self._audit.observe((row, answer), answer.exit, answer.windows)

    def _open_audit(self, plan: AuditPlan) -> Audit[tuple[AnyRow, RowAnswer]]:
        from offramp.runtime.audit import Audit  # here: sessions without one do not need it

        return Audit(plan, self._audited_loss, self._stay_at_full_depth)

    def _audited_loss(self, audited: tuple[AnyRow, RowAnswer]) -> float:
        """The disagreement (0..1) of an answer with full depth of the default variant."""
        row, answer = audited
        names, segments = self.manifest.variants, len(self.manifest.segments)
        if answer.windows == 1 and answer.steps == tuple((s + 1, names[0]) for s in range(segments)):
            return 0.0
        trace = self._trace([row, *row.rest], self.batch_size if row.rest else 1, self._never(), 0)
        full = self._answer(trace, 0, row, self._full_number)
        disagreement = DISAGREEMENTS[self.manifest.kind]
        return disagreement(self._decision(answer), self._decision(full))

    def _stay_at_full_depth(self) -> None:
        """Walk rows to the end from here on."""
        self._number = self._full_number
        if self._budget is not None:
            self._budget.release(self._number)

    @abstractmethod
    def _answer(self, trace: Trace, first: int, item: AnyRow, rule: int = 0) -> A_co:
        """The answer to an item whose row, and windows if there are more, begin at row `first` of a trace.

        rule: the number, in _rules, of the rule by which it was walked.
        """

    @abstractmethod
    def _decision(self, answer: RowAnswer) -> NDArray[np.generic]:
        """What DISAGREEMENTS compares of an answer."""

    def _walked(self, trace: Trace, first: int, item: AnyRow) -> tuple[int, NDArray[np.int64], Walked]:
        """The row of the window that left last, the segments (0-based) it ran, and the walk of the item."""
        windows = 1 + len(item.rest)
        row = first if windows == 1 else first + int(exits_of(trace, first, windows).argmax())
        seconds = trace.seconds[row] if windows == 1 else trace.seconds[first : first + windows].max()
        variants = trace.variants[row]
        segments = np.flatnonzero(variants >= 0)
        numbers, names = segments.tolist(), self.manifest.variants
        walked = (
            numbers[-1] + 1,
            int(self._depths[segments].sum()),
            tuple((s + 1, names[v]) for s, v in zip(numbers, variants[segments].tolist(), strict=True)),
            float(seconds),
            item.truncated,
            windows,
        )
        return row, segments, walked


def exits_of(trace: Trace, first: int, windows: int) -> NDArray[np.int64]:
    """The segment (0-based) after which each of the rows from `first` on left [windows]."""
    ran = trace.variants[first : first + windows] >= 0
    last: NDArray[np.int64] = ran.shape[1] - 1 - ran[:, ::-1].argmax(1)
    return last


def exit_answers(trace: Trace, first: int, item: AnyRow) -> list[Floats]:
    """The answer of each window of an item, rows from `first` on, at the exit that it took; see Trace."""
    assert trace.answers is not None  # the manifest's checks see to it
    exits = exits_of(trace, first, 1 + len(item.rest)).tolist()
    return [trace.answers[first + number, exit] for number, exit in enumerate(exits)]


def not_finite(exit: int) -> BadInput:
    """The error for an item for which the network computes NaN or infinity; exit: where it left, 1-based."""
    return BadInput(f"the network's output at exit {exit} is not finite (NaN or infinite): it is no answer")


def checked_batch_size(size: int) -> int:
    """Return the batch size; raises BadSetting if it is under 1 or beyond MAX_BATCH."""
    if size < 1:
        raise BadSetting(f"batch size {size}: expected 1 or more")
    if size > MAX_BATCH:
        raise BadSetting(f"batch size: expected {MAX_BATCH} or fewer")  # it may have millions of digits
    return size
