"""The walker: the only loop that runs rows, and tokens of a decoder, through the segments of their plans.

Rows that wait for the same (segment, variant, length) form one queue and are run together. After each step
the rule rewrites their plans: rows without remaining segments are done, the others join their next queue.
This mechanism does batching, compaction after exits and regrouping, for rows of one call and of many. A
single row, or the tokens of one sequence, is walked alone, without queues. The walker does not depend on
ONNX, text or tasks: it only passes states to the engine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.engines.base import Array, Engine, S
from offramp.runtime.rules.base import Floats, Plan, Rule, Signals, never_exits

QueueKey = tuple[int, int, int]  # segment, variant, length: equal for rows that are run together
# A row is late after this many times the steps that it needs alone at most; see Walk.largest_queue.
LATE_AFTER = 2
Inputs = Mapping[str, Array]
Batch = tuple[NDArray[np.int64], Inputs]  # row numbers, and the stem's inputs


class Step(NamedTuple):
    """One segment that was run: its number (0-based), variant, signals, end time (perf_counter seconds)."""

    segment: int
    variant: int
    signals: Signals
    ended: float


@dataclass
class Trace:
    """The record of a walk: for each row the segments that were run, their outputs, and the time.

    variants int8 [rows, segments] (-1: not run); logits [rows, segments, classes] and gates [rows, segments]
    (NaN: none) where a segment was run; seconds [rows] from the start of the stem to the last segment.
    answers [rows, segments]: a copy of each row's Signals.answer, as long as its batch was (None: not run);
    None if no segment gave answers.
    """

    variants: Plan
    logits: Floats
    gates: Floats
    seconds: NDArray[np.float64]
    answers: NDArray[Any] | None = None

    def clear(self, rows: slice) -> None:
        """Make rows as they are before a walk, for further ones."""
        self.variants[rows], self.gates[rows] = -1, math.nan
        if self.answers is not None:
            self.answers[rows] = None

    def keep_answers(self, ids: Sequence[int], segment: int, answers: Floats) -> None:
        """Copy the answers of some rows at a segment, [ids, ...], which the engine will overwrite."""
        if self.answers is None:
            self.answers = np.full(self.variants.shape, None, object)
        for row, answer in zip(ids, answers, strict=True):
            self.answers[row, segment] = answer.copy()


@dataclass
class _Group(Generic[S]):
    """Rows that are run together: their numbers in the trace, plans, memories, start times, and rules.

    rules: numbers of the rows' rules; None: the first for all. Of one walk all groups have them, or none.
    begun: number of steps of the walk before the first of the rows began.
    """

    state: S
    ids: NDArray[np.int64]
    plan: Plan
    memory: Floats
    started: NDArray[np.float64]
    rules: NDArray[np.int64] | None
    begun: int
    _plan_seen: Plan | None = None
    _common: list[int] | None = None

    @property
    def common_plan(self) -> list[int] | None:
        """The plan of every row, None if they differ; compared once for each array of plans."""
        if self._plan_seen is not self.plan:
            self._plan_seen, first = self.plan, self.plan[0]
            is_common = len(self.plan) == 1 or (self.plan == first).all()
            self._common = first.tolist() if is_common else None
        return self._common

    def take(self, state: S, rows: NDArray[np.int64]) -> _Group[S]:
        """The group of some of the rows; state: theirs."""
        rules = None if self.rules is None else self.rules[rows]
        return _Group(
            state, self.ids[rows], self.plan[rows], self.memory[rows], self.started[rows], rules, self.begun
        )


def walk_one(engine: Engine[S], rule: Rule, state: S, plan: Sequence[int]) -> list[Step]:
    """Walk one row, or the waiting tokens of one sequence, along a plan, and return the steps in order.

    plan: a variant number for each segment, -1 for segments that are skipped; the rule rewrites the rest of
    it after each segment. The caller drops the state.

    At batch 1 each microsecond between two segments matters: the interpreter's code is not in the cache then,
    so that one line takes several times as long as in a tight loop.
    """
    step, now, exit_test = engine.step, time.perf_counter, rule.exit_test
    ahead, steps = list(plan), list[Step]()
    last, end = _last_segment(ahead), len(ahead) - 1
    rows: Plan | None = None
    for segment in range(len(ahead)):
        if segment > last:
            break
        variant = ahead[segment]
        if variant < 0:
            engine.skip(segment, state)
            continue
        signals = step(segment, variant, state)
        steps.append(Step(segment, variant, signals, now()))
        if segment == end:
            break
        if exit_test is never_exits:  # a call less
            continue
        if exit_test is not None:
            if exit_test(signals, segment):
                break
            continue
        if rows is None:
            rows, memory = np.array([ahead], np.int8), np.zeros((1, rule.width), np.float32)
        new_rows, memory = rule(signals, memory, rows, segment)
        if new_rows is not rows:
            rows, ahead = new_rows, new_rows[0].tolist()
            last = _last_segment(ahead)
    return steps


def _last_segment(plan: Sequence[int]) -> int:
    """The last segment (0-based) that a plan runs, -1 for none."""
    last = len(plan) - 1
    while last >= 0 and plan[last] < 0:
        last -= 1
    return last


def walk(
    engine: Engine[S],
    rule: Rule,
    batches: Iterable[Batch],
    *,
    rows: int,
    segments: int,
    classes: int,
    variant: int = 0,
    limit: int = 32,
) -> Trace:
    """Walk all rows of some batches along their plans, and return the record of the walk.

    batches: (row numbers, stem inputs), begun in this order. variant: the number in which rows start. At most
    `limit` rows are joined for a step (a larger batch stays as it is). A full queue is run at once, the
    deepest first, as its rows are nearest to the end. Otherwise the next batch is begun; if there is none,
    queues are run from the first segment on, so that all rows that can join a queue have joined it. Every row
    is run in the end.
    """
    trace = empty_trace(rows, segments, classes)
    under_way, pending = Walk(engine, [rule], trace, limit), iter(batches)
    while True:
        key = under_way.full_queue()
        if key is None and (batch := next(pending, None)) is not None:
            if limit == 1 and len(batch[0]) == 1:
                _walk_row(engine, rule, int(batch[0][0]), batch[1], variant, trace)
            else:
                under_way.begin(*batch, variant)
            continue
        key = under_way.first_queue() if key is None else key
        if key is None:
            return trace
        under_way.run(key)


class Walk(Generic[S]):
    """Rows on their way through the segments; further rows can join at any time.

    rules: those that rows can have; a row's is given by its number in them. trace: what is written of every
    row. limit: most rows that are joined for a step. Whoever walks calls begin for new rows and run for one
    queue after the other. Not safe for several threads.
    """

    def __init__(self, engine: Engine[S], rules: Sequence[Rule], trace: Trace, limit: int) -> None:
        self._engine, self._rules, self._trace, self._limit = engine, rules, trace, limit
        self._queues: dict[QueueKey, list[_Group[S]]] = {}
        self._steps = 0  # that were run
        self._late_after = LATE_AFTER * trace.variants.shape[1]  # steps after which a row is late
        self._keeps_logits = trace.logits.shape[2] > 0

    def begin(
        self,
        ids: NDArray[np.int64],
        inputs: Inputs,
        variant: int = 0,
        *,
        plans: Plan | None = None,
        rules: NDArray[np.int64] | None = None,
    ) -> None:
        """Run the stem for a batch, and let its rows wait for their first segment.

        ids: row numbers. variant: that in which rows start; plans [rows, segments] takes its place. rules:
        numbers of the rows' rules [rows]; None: the first rule for all. Every plan must have a segment.
        """
        started = time.perf_counter()
        if plans is None:
            plans = np.repeat(self.first_plan(0, variant), len(ids), axis=0)
        self.enter(ids, self._engine.begin(inputs), plans, rules, started=started)

    def enter(
        self,
        ids: NDArray[np.int64],
        state: S,
        plans: Plan,
        rules: NDArray[np.int64] | None = None,
        *,
        started: float | None = None,
    ) -> None:
        """Let the rows of a state wait for their first segment; see begin, which makes the state itself.

        started: when they began (perf_counter seconds); None: now.
        """
        times = np.full(len(ids), time.perf_counter() if started is None else started)
        memory = np.zeros((len(ids), max([rule.width for rule in self._rules])), np.float32)
        group = _Group(state, ids, plans, memory, times, rules, self._steps)
        states = [state]
        try:
            self._queue(group, -1, state.length, states)
        finally:
            for left in states:
                self._engine.drop(left)

    def first_plan(self, rule: int, variant: int) -> Plan:
        """The plan [1, segments] with which a row of a rule starts in a variant; rule: its number."""
        return self._rules[rule].first_plan(self._trace.variants.shape[1], variant)

    def full_queue(self) -> QueueKey | None:
        """The deepest queue that has enough rows for a step, if any."""
        full = [key for key, queue in self._queues.items() if _length(queue) >= self._limit]
        return max(full) if full else None

    def first_queue(self) -> QueueKey | None:
        """The queue of the earliest segment, None if no row waits."""
        return min(self._queues, default=None)

    def oldest_queue(self) -> QueueKey | None:
        """The queue of the row that began first, None if no row waits."""
        begun = {key: min(group.started.min() for group in queue) for key, queue in self._queues.items()}
        return min(begun, key=begun.__getitem__, default=None)

    def late_queue(self, steps: int) -> QueueKey | None:
        """The queue of the row that began first, if more than `steps` steps were run since; else None."""
        begun = [(min([group.begun for group in queue]), key) for key, queue in self._queues.items()]
        first, key = min(begun, default=(self._steps, None))
        return key if first < self._steps - steps else None

    def largest_queue(self) -> QueueKey | None:
        """The queue with the most rows, of equal ones that of the earliest segment; None if no row waits.

        Rows that are late, as other queues were always larger, go first, the oldest of them before all.
        """
        late = self.late_queue(self._late_after)
        if late is not None:
            return late
        return min(self._queues, key=lambda key: (-_length(self._queues[key]), key[0]), default=None)

    def waiting(self) -> NDArray[np.int64]:
        """Numbers of the rows that wait for a segment, in no order."""
        groups = [group.ids for queue in self._queues.values() for group in queue]
        return np.concatenate(groups) if groups else np.zeros(0, np.int64)

    def drop(self, ids: NDArray[np.int64]) -> None:
        """Forget rows that wait; numbers of others are ignored."""
        for key, queue in list(self._queues.items()):
            kept = []
            for group in queue:
                stays = np.flatnonzero(~np.isin(group.ids, ids))
                if len(stays) == len(group.ids):
                    kept.append(group)
                    continue
                if len(stays):
                    kept.append(group.take(self._engine.take(group.state, stays), stays))
                self._engine.drop(group.state)
            if kept:
                self._queues[key] = kept
            else:
                del self._queues[key]

    def run(self, key: QueueKey) -> NDArray[np.int64]:
        """Run one segment for rows of a queue, up to the limit; returns the numbers of those that are done.

        If the engine or a rule raises an error, those of them that wait for no next segment are forgotten.
        """
        groups = _pop_groups(self._queues, key, self._limit)
        states = [group.state for group in groups]  # in no queue any more: dropped at the end, or by an error
        segment, variant, length = key
        trace = self._trace
        self._steps += 1
        try:
            group = groups[0] if len(groups) == 1 else self._join(groups, states)
            ids, signals = group.ids, self._engine.step(segment, variant, group.state)
            trace.variants[ids, segment] = variant
            if self._keeps_logits:  # the head of a decoder runs when its logits are read
                trace.logits[ids, segment] = signals.logits
            if signals.gate is not None:
                trace.gates[ids, segment] = signals.gate
            if signals.answer is not None:
                trace.keep_answers(ids.tolist(), segment, signals.answer)
            if segment + 1 == group.plan.shape[1]:
                trace.seconds[ids] = time.perf_counter() - group.started
                return ids
            self._apply_rules(group, signals, segment)
            return self._queue(group, segment, length, states)
        finally:
            for state in states:
                self._engine.drop(state)

    def _apply_rules(self, group: _Group[S], signals: Signals, segment: int) -> None:
        """Rewrite the plans and memories of a group after a segment."""
        if group.rules is None:
            group.plan, group.memory = self._rules[0](signals, group.memory, group.plan, segment)
            return
        plan, memory = group.plan.copy(), group.memory.copy()
        for number in np.unique(group.rules).tolist():
            rule, rows = self._rules[number], np.flatnonzero(group.rules == number)
            plan[rows], memory[rows, : rule.width] = rule(
                _RowsOfSignals(signals, rows), memory[rows, : rule.width], group.plan[rows], segment
            )
        group.plan, group.memory = plan, memory

    def _join(self, groups: Sequence[_Group[S]], states: list[S]) -> _Group[S]:
        """Join groups to one, whose state takes the place of theirs in `states`."""
        states.append(self._engine.join(states))
        rules = [group.rules for group in groups if group.rules is not None]
        width = max([group.memory.shape[1] for group in groups])
        joined = _Group(
            states[-1],
            np.concatenate([group.ids for group in groups]),
            np.concatenate([group.plan for group in groups]),
            np.concatenate([_widened(group.memory, width) for group in groups]),
            np.concatenate([group.started for group in groups]),
            np.concatenate(rules) if rules else None,
            min(group.begun for group in groups),
        )
        parts, states[:] = states[:-1], states[-1:]
        for state in parts:
            self._engine.drop(state)
        return joined

    def _queue(self, group: _Group[S], segment: int, length: int, states: list[S]) -> NDArray[np.int64]:
        """Let the rows of a group wait for their next segments after one; returns those that have none.

        states: those that the caller drops, that of the group alone; one that a queue gets is taken out.
        """
        ids = group.ids
        if (plan := group.common_plan) is not None:  # mostly so, and found without arrays
            next_segment = segment + 1
            while next_segment < len(plan) and plan[next_segment] < 0:
                next_segment += 1
            if next_segment == len(plan):
                self._trace.seconds[ids] = time.perf_counter() - group.started
                return ids
            for skipped in range(segment + 1, next_segment):
                self._engine.skip(skipped, group.state)
            key = (next_segment, plan[next_segment], length)
            self._queues.setdefault(key, []).append(group)
            states.clear()
            return ids[:0]
        ahead = group.plan[:, segment + 1 :] >= 0  # [rows, segments still ahead]
        next_segments = segment + 1 + ahead.argmax(axis=1)  # meaningless for rows that are done
        done = np.logical_not(ahead.any(axis=1))
        self._trace.seconds[ids[done]] = time.perf_counter() - group.started[done]
        # One number for (segment, variant): rows with the same next step are found at once; -1: done.
        next_variants = np.take_along_axis(group.plan, next_segments[:, None], axis=1)[:, 0]
        codes = np.where(done, -1, next_segments * 128 + next_variants)
        for code in np.unique(codes).tolist():
            if code < 0:
                continue
            next_segment, next_variant = divmod(code, 128)
            rows = np.flatnonzero(codes == code)
            is_whole = len(rows) == len(ids)
            if not is_whole:
                states.append(self._engine.take(group.state, rows))
            state = states[-1]
            for skipped in range(segment + 1, next_segment):
                self._engine.skip(skipped, state)
            rest = group if is_whole else group.take(state, rows)
            self._queues.setdefault((next_segment, next_variant, length), []).append(rest)
            states.pop()
        return ids[done]


class _RowsOfSignals:
    """The signals of some rows of a step, each read when a rule asks for it; implements rules.base.Signals.

    Logits of tokens are not there before: the head costs as much as several blocks.
    """

    __slots__ = ("_rows", "_signals")

    def __init__(self, signals: Signals, rows: NDArray[np.int64]) -> None:
        self._signals, self._rows = signals, rows

    @property
    def logits(self) -> Floats:
        """Logits of the exit [rows, classes]."""
        logits: Floats = self._signals.logits[self._rows]
        return logits

    @property
    def gate(self) -> Floats | None:
        """P(exit) of the policy [rows]."""
        return self._of(self._signals.gate)

    @property
    def forecast(self) -> Floats | None:
        """P(wrong) of an exit here and of every path ahead."""
        return self._of(self._signals.forecast)

    @property
    def hidden(self) -> Floats | None:
        """Hidden state after the segment [rows, hidden size]."""
        return self._of(self._signals.hidden)

    @property
    def answer(self) -> Floats | None:
        """All that the session's answer is made from [rows, ...]."""
        return self._of(self._signals.answer)

    @property
    def controller(self) -> Floats | None:
        """P(run) of the segments ahead [rows, segments ahead - 1]."""
        return self._of(self._signals.controller)

    def _of(self, part: Floats | None) -> Floats | None:
        return None if part is None else part[self._rows]


def empty_trace(rows: int, segments: int, classes: int) -> Trace:
    """A trace before any step; uses fill() because np.full is slower."""
    variants, gates = np.empty((rows, segments), np.int8), np.empty((rows, segments), np.float32)
    variants.fill(-1)
    gates.fill(math.nan)
    return Trace(variants, np.zeros((rows, segments, classes), np.float32), gates, np.zeros(rows))


def _walk_row(engine: Engine[S], rule: Rule, row: int, inputs: Inputs, variant: int, trace: Trace) -> None:
    """Walk one row from its stem to its end, and write it into the trace."""
    started = time.perf_counter()
    state = engine.begin(inputs)
    try:
        steps = walk_one(engine, rule, state, (variant,) * trace.variants.shape[1])
        trace.seconds[row] = time.perf_counter() - started
        variants, logits, gates = trace.variants[row], trace.logits[row], trace.gates[row]
        for segment, number, signals, _ in steps:
            variants[segment] = number
            logits[segment] = signals.logits[0]
            if (gate := signals.gate) is not None:
                gates[segment] = gate[0]
            if signals.answer is not None:
                trace.keep_answers([row], segment, signals.answer)
    finally:
        engine.drop(state)


def _length(queue: list[_Group[S]]) -> int:
    """Rows in a queue."""
    return sum(len(group.ids) for group in queue)


def _widened(memory: Floats, width: int) -> Floats:
    """Memories with zeros up to `width` numbers a row: a rule that was added later may need more."""
    return memory if memory.shape[1] == width else np.pad(memory, ((0, 0), (0, width - memory.shape[1])))


def _pop_groups(queues: dict[QueueKey, list[_Group[S]]], key: QueueKey, limit: int) -> list[_Group[S]]:
    """Remove groups from a queue, the largest first, up to `limit` rows."""
    chosen, remaining, rows = list[_Group[S]](), list[_Group[S]](), 0
    for group in sorted(queues[key], key=lambda group: -len(group.ids)):
        if chosen and rows + len(group.ids) > limit:
            remaining.append(group)
            continue
        chosen.append(group)
        rows += len(group.ids)
    queues[key] = remaining
    if not remaining:
        del queues[key]
    return chosen
