"""One walk for the rows of all requests: a thread runs the steps, and rows join and leave it one by one."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from offramp.runtime.engines.base import State
from offramp.runtime.errors import BadSetting, OfframpError, SessionClosed
from offramp.runtime.inputs.text import LENGTH_STEP, MAX_WINDOWS, AnyRow
from offramp.runtime.row_session import ExitRecord, RowAnswer, RowSession
from offramp.runtime.rules.base import Plan
from offramp.runtime.serving.limits import LOG
from offramp.runtime.walker import QueueKey, Trace, Walk

A = TypeVar("A", bound=RowAnswer)
WORK = "walks rows"  # of the thread, for errors
QUEUE = 1024  # items that are accepted and not answered, at most
LEAST_ROWS = 1 + MAX_WINDOWS  # a long text is walked as that many rows
NEWEST = 0.05  # weight of the newest pause between two answers in their mean
# Background items, at most: those that wait, those under way while nobody waits for an answer, and those
# under way else, when each of their steps may delay an answer.
BACKGROUND_QUEUE, BACKGROUND_IDLE, BACKGROUND_BUSY = 64, 8, 1
# A row is late after this many times the steps in which all rows under way can be walked to the end. In an
# overload there are always full steps, and rows of a rare length, which fill none, would never go on.
# Such a row takes one step after this many full steps.
LATE_AFTER, FULL_STEPS = 2, 8


class QueueFull(OfframpError, RuntimeError):
    """Too many rows wait; retry_after: seconds after which there is probably room."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} rows wait already; try again in {retry_after:.1f} seconds")
        self.retry_after = retry_after


class DeadlinePassed(OfframpError, TimeoutError):
    """A row was not answered in time, or a text not begun or not finished; it is not walked further."""


class ThreadEnded(OfframpError, RuntimeError):
    """An error that belongs to no single row or text has ended the thread that answers all of a bundle."""

    def __init__(self, problem: BaseException, work: str) -> None:
        super().__init__(
            f"an error ({type(problem).__name__}) ended the thread that {work}; see the log of the server, "
            "and start it anew"
        )


@dataclass(frozen=True)
class RowOptions:
    """How a row is walked: the numbers of its rule and of its first variant, and most segments that are run.

    The numbers come from RowSession.draw and add_point. segments: None for all. ended: told once of the row
    and its answer, after whoever waits got it, or None if the row was refused or given up. on_exit: told of
    what each exit gave, of a long text those of its first window, before the answer.
    """

    rule: int
    variant: int
    segments: int | None = None
    ended: Callable[[AnyRow, Any | None], None] | None = None
    on_exit: Callable[[ExitRecord], None] | None = None


@dataclass(eq=False)
class _Item(Generic[A]):
    """A row and its windows. slots: its rows of the trace, once it is begun; left: how many are not done.

    background: whether nobody waits for its answer. reached: the last segment whose exit was reported;
    reported_at: when that was, or when its walk began (perf_counter seconds). problem: the error of on_exit,
    which the row gets in place of its answer.
    """

    row: AnyRow
    options: RowOptions
    deadline: float
    arrived: float
    background: bool = False
    future: Future[A] = field(default_factory=Future)
    slots: range = range(0)
    left: int = 0
    reached: int = -1
    reported_at: float = 0.0
    problem: Exception | None = None

    @property
    def rows(self) -> list[AnyRow]:
        """The row and its further windows."""
        return [self.row, *self.row.rest]

    def has_ended(self, now: float) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.deadline <= now or self.future.cancelled()


class Scheduler(Generic[A]):
    """Walks the rows of all requests in one thread.

    Rows that wait for the same segment share a step, whichever request they belong to. Full steps go first, a
    row that is late after FULL_STEPS of them, and otherwise the row that began first. rows: most rows,
    windows included, that are under way at once. queue: most items that are accepted and not answered. limit:
    most rows of a step; None: the session's batch size. observe: called in the thread with each answer and
    the seconds since its row was submitted. Raises BadSetting for sizes out of range.
    """

    def __init__(
        self,
        session: RowSession[A],
        *,
        rows: int = 256,
        queue: int = QUEUE,
        limit: int | None = None,
        observe: Callable[[A, float], None] | None = None,
    ) -> None:
        limit = session.batch_size if limit is None else limit
        for name, size, least in (("rows", rows, LEAST_ROWS), ("queue", queue, 1), ("limit", limit, 1)):
            if size < least:
                raise BadSetting(f"{name} {size}: expected {least} or more")
        self._session, self._queue, self._limit, self._observe = session, queue, limit, observe
        walk, trace = session.open_walk(rows, limit)
        self._walk: Walk[State] = walk
        self._trace: Trace = trace
        self._full_steps = 0  # since a row that is late was looked for
        self._late_after = LATE_AFTER * trace.variants.shape[1] * -(-rows // limit)
        self._owners: list[_Item[A] | None] = [None] * rows  # of each row of the trace
        self._changed = threading.Condition()
        self._arrived: deque[_Item[A]] = deque()
        self._background: deque[_Item[A]] = deque()
        self._background_under_way = 0
        self._accepted = 0  # items that are not answered
        self._closing = False
        self._ended_by: BaseException | None = None  # the error that ended the thread
        self._under_way: set[_Item[A]] = set()
        self._reporting: set[_Item[A]] = set()  # of them, those that are told of their exits
        self._pause, self._last_answer = 0.0, math.nan
        self._thread = threading.Thread(target=self._run, name="offramp walker", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread walks rows; False after close(), or if an error ended it."""
        return self._thread.is_alive()

    @property
    def queue(self) -> int:
        """Most items that are accepted and not answered."""
        return self._queue

    @property
    def accepted(self) -> int:
        """Items that are accepted and not answered yet."""
        return self._accepted

    @property
    def under_way(self) -> int:
        """Items whose walk has begun, without those of the background."""
        return len(self._under_way) - self._background_under_way

    def submit(self, row: AnyRow, options: RowOptions, timeout: float | None = None) -> Future[A]:
        """Let a row join the walk; its answer is the result of the future.

        timeout: seconds after which the row is given up with DeadlinePassed. A future that is cancelled frees
        its place. The future raises BadInput if the network gives no number, and the errors of the engine.
        Raises QueueFull, SessionClosed after close(), and ThreadEnded.
        """
        now = time.perf_counter()
        item = _Item[A](row, options, math.inf if timeout is None else now + timeout, now)
        try:
            with self._changed:
                if self._ended_by is not None:
                    raise ThreadEnded(self._ended_by, WORK)
                if self._closing:
                    raise SessionClosed("the scheduler is closed: no further rows are accepted")
                self.require_room()
                self._accepted += 1
                self._arrived.append(item)
                self._changed.notify()
        except OfframpError:
            if options.ended is not None:
                options.ended(row, None)
            raise
        return item.future

    def require_room(self, count: int = 1) -> None:
        """Raise QueueFull if so many items would not all be accepted now.

        Callers ask before they read items, too, since reading costs time.
        """
        waiting = self._accepted
        if waiting + count > self._queue:
            raise QueueFull(waiting, max(0.1, waiting * self._pause))

    def submit_background(self, row: AnyRow, options: RowOptions) -> Future[A] | None:
        """Let a row join the walk whenever no row of a caller waits to be begun; None if too many wait.

        It counts neither as accepted nor for `observe`. close() cancels its future.
        """
        item = _Item[A](row, options, math.inf, time.perf_counter(), background=True)
        with self._changed:
            if self._closing or len(self._background) >= BACKGROUND_QUEUE:
                return None
            self._background.append(item)
            self._changed.notify()
        return item.future

    def close(self, *, finish: bool = True) -> None:
        """Refuse further rows, and wait until those that were accepted are answered, or given up.

        finish: whether they are answered; else their futures are cancelled, as those of the background are.
        """
        with self._changed:
            self._closing = True
            items = [*self._arrived, *self._background, *self._under_way]
            self._changed.notify()
        for item in items:  # without the lock, as callbacks of a future may submit rows
            if item.background or not finish:
                item.future.cancel()
        self._thread.join()

    def _run(self) -> None:
        """What the thread does: walk rows until the scheduler is closed. An error of the walk ends all."""
        try:
            self._walk_rows()
        except BaseException as problem:
            LOG.error("an error ended the thread that walks rows: all of them get it", exc_info=problem)
            with self._changed:
                self._ended_by, self._closing = problem, True
            for item in [*self._under_way, *self._take_arrived()]:
                self._end(item, ThreadEnded(problem, WORK))
            self._under_way.clear()
            self._background_under_way = 0

    def _walk_rows(self) -> None:
        """Begin rows that came, run a step, and give answers, until the scheduler is closed."""
        while self._wait():
            try:
                with self._session.walking():
                    self._give_up()
                    self._begin()
                    key = self._next_queue()
                    done = [] if key is None else self._walk.run(key).tolist()
                    if key is not None and self._reporting:
                        self._tell_exits(key[0])
            except Exception as problem:
                self._fail(problem)
            else:
                self._finish(done)

    def _tell_exits(self, segment: int) -> None:
        """Tell the items of a step that was run of what its exit gave."""
        trace, now = self._trace, time.perf_counter()
        for item in self._reporting:
            row = item.slots.start
            variant, gate = int(trace.variants[row, segment]), float(trace.gates[row, segment])
            if item.problem is not None or variant < 0 or segment <= item.reached:
                continue  # the segment has not run, or not in this step
            record = ExitRecord(
                segment + 1,
                self._session.manifest.variants[variant],
                tuple(trace.logits[row, segment].tolist()),
                None if math.isnan(gate) else gate,
                1e3 * (now - item.reported_at),
            )
            item.reached, item.reported_at = segment, now
            assert item.options.on_exit is not None
            try:
                item.options.on_exit(record)
            except Exception as problem:
                LOG.error("on_exit of a row raised an error: the row gets it", exc_info=problem)
                item.problem = problem

    def _next_queue(self) -> QueueKey | None:
        """The queue whose step comes next: a full one, or after FULL_STEPS of them one with a late row.

        If there is no full one, that of the oldest row. If late rows went first always, a backlog, in which
        all rows are late, would end full steps, which are the only ones that work it off.
        """
        full = self._walk.full_queue()
        if full is None:
            return self._walk.oldest_queue()
        self._full_steps += 1
        if self._full_steps > FULL_STEPS:
            self._full_steps = 0
            return self._walk.late_queue(self._late_after) or full
        return full

    def _wait(self) -> bool:
        """Wait until there is something to do; False once the scheduler is closed and all is done."""
        with self._changed:
            while not self._arrived and not self._under_way and not self._background:
                if self._closing:
                    return False
                self._last_answer = math.nan  # a pause in which nobody asked tells nothing
                self._changed.wait()
        return True

    def _give_up(self) -> None:
        """Forget rows for which nobody waits."""
        now = time.perf_counter()
        for item in [item for item in self._under_way if item.has_ended(now)]:
            self._walk.drop(np.array(item.slots))
            self._free(item)
            self._end(item, DeadlinePassed("the row was not answered in time"))

    def _begin(self) -> None:
        """Run the stem for rows that came, as far as there is room, those of one length together."""
        now = time.perf_counter()
        same_length: dict[int, list[_Item[A]]] = {}
        while self._arrived:
            item = self._arrived[0]
            if item.has_ended(now):
                self._arrived.popleft()
                self._end(item, DeadlinePassed("the row was not begun in time"))
                continue
            if not self._allocate(item):
                break
            self._arrived.popleft()
            length = -(-max(row.length for row in item.rows) // LENGTH_STEP)
            same_length.setdefault(length, []).append(item)
            if sum(len(item.slots) for item in same_length[length]) >= self._limit:
                self._begin_rows(same_length.pop(length))
        for items in same_length.values():
            self._begin_rows(items)
        if not self._arrived:
            self._begin_background()

    def _begin_background(self) -> None:
        """Run the stem for rows for which nobody waits, as far as they may hold rows of the trace."""
        while self._background:
            item = self._background[0]
            if item.future.cancelled():
                self._background.popleft()
                self._end(item, None)
                continue
            limit = BACKGROUND_BUSY if self.under_way else BACKGROUND_IDLE
            if self._background_under_way >= limit or not self._allocate(item):
                return
            self._background.popleft()
            self._begin_rows([item])

    def _begin_rows(self, items: list[_Item[A]]) -> None:
        now = time.perf_counter()
        for item in items:
            if item.options.on_exit is not None:
                item.reported_at = now
                self._reporting.add(item)
        rows = [row for item in items for row in item.rows]
        slots = np.concatenate([np.array(item.slots) for item in items])
        plans = np.concatenate([self._plan(item.options, len(item.slots)) for item in items])
        rules = np.repeat([item.options.rule for item in items], [len(item.slots) for item in items])
        others = self._walk.first_queue() is not None  # without them a row alone has nobody to join
        for ids, inputs in self._session.batches(rows, self._limit, others):
            self._walk.begin(slots[ids], inputs, plans=plans[ids], rules=rules[ids])

    def _plan(self, options: RowOptions, rows: int) -> Plan:
        """The plan with which the rows of an item start [rows, segments]."""
        plan = self._walk.first_plan(options.rule, options.variant)
        if options.segments is not None:
            plan = plan.copy()
            plan[:, options.segments :] = -1
        return np.repeat(plan, rows, axis=0)

    def _allocate(self, item: _Item[A]) -> bool:
        """Give an item rows of the trace, one behind the other; False if there is no such place now."""
        count, free = len(item.rows), 0
        for slot, owner in enumerate(self._owners):
            free = free + 1 if owner is None else 0
            if free == count:
                item.slots, item.left = range(slot - count + 1, slot + 1), count
                self._owners[item.slots.start : item.slots.stop] = [item] * count
                self._under_way.add(item)
                self._background_under_way += item.background
                return True
        return False

    def _free(self, item: _Item[A]) -> None:
        """Take the rows of an item out of the trace."""
        rows = slice(item.slots.start, item.slots.stop)
        self._owners[rows] = [None] * len(item.slots)
        self._trace.clear(rows)
        self._under_way.discard(item)
        self._reporting.discard(item)
        self._background_under_way -= item.background

    def _finish(self, slots: Iterable[int]) -> None:
        """Answer the items whose last rows are done."""
        for slot in slots:
            item = self._owners[slot]
            assert item is not None
            item.left -= 1
            if item.left:
                continue
            problem, answer = item.problem, None
            try:
                if problem is None:
                    answer = self._session.finish(self._trace, item.slots.start, item.row, item.options.rule)
            except Exception as raised:  # BadInput: no number
                problem = raised
            self._free(item)
            self._end(item, problem, answer)

    def _fail(self, problem: Exception) -> None:
        """Give an error to the items whose rows were lost by it, and to all if the session is closed.

        If no row was lost, the walk itself failed, and would fail again: then all items under way get the
        error, and if there are none, those that wait to be begun.
        """
        waiting = set(self._walk.waiting().tolist())
        under_way, is_closed = list(self._under_way), isinstance(problem, SessionClosed)
        lost = [item for item in under_way if len(waiting.intersection(item.slots)) < item.left]
        for item in under_way if is_closed or not lost else lost:
            self._walk.drop(np.array(item.slots))
            self._free(item)
            self._end(item, problem)
        if is_closed:
            with self._changed:
                self._closing = True
        if is_closed or not under_way:
            for item in self._take_arrived():
                self._end(item, problem)

    def _take_arrived(self) -> list[_Item[A]]:
        """The items that wait to be begun, which do not wait any more."""
        with self._changed:
            arrived = [*self._arrived, *self._background]
            self._arrived.clear()
            self._background.clear()
        return arrived

    def _end(self, item: _Item[A], problem: Exception | None, answer: A | None = None) -> None:
        """Give an item's answer, or its error, to whoever waits for it.

        An error of the observer takes the place of the answer. It and an error of `ended` are logged.
        """
        now = time.perf_counter()
        if not item.background:
            with self._changed:
                self._accepted -= 1
            if self._last_answer == self._last_answer:
                self._pause += NEWEST * (now - self._last_answer - self._pause)
            self._last_answer = now
        is_wanted = item.future.set_running_or_notify_cancel()
        if is_wanted and answer is not None and self._observe is not None and not item.background:
            try:
                self._observe(answer, now - item.arrived)
            except Exception as raised:
                LOG.error("the observer of answers raised an error: the row gets it", exc_info=raised)
                problem, answer = raised, None
        if is_wanted and answer is None:
            item.future.set_exception(problem)
        elif is_wanted and answer is not None:
            item.future.set_result(answer)
        if item.options.ended is not None:
            try:
                item.options.ended(item.row, answer if is_wanted else None)
            except Exception as raised:
                LOG.error("the function that is called after an answer raised an error", exc_info=raised)
