"""The walker: the only loop that runs rows, and tokens of a decoder, through the segments of their plans.

Rows that wait for the same (segment, variant, length) form one queue and are run together. After each step
the rule rewrites their plans: rows without remaining segments are done, the others join their next queue.
This mechanism does batching, compaction after exits and regrouping. A single row, or the tokens of one
sequence, is walked alone, without queues. The walker does not depend on ONNX, text or tasks: it only passes
states to the engine.
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
Inputs = Mapping[str, Array]


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

    def keep_answers(self, ids: Sequence[int], segment: int, answers: Floats) -> None:
        """Copy the answers of some rows at a segment, [ids, ...], which the engine will overwrite."""
        if self.answers is None:
            self.answers = np.full(self.variants.shape, None, object)
        for row, answer in zip(ids, answers, strict=True):
            self.answers[row, segment] = answer.copy()


@dataclass
class _Group(Generic[S]):
    """Rows that are run together: their numbers in the trace, plans, memories, and start times."""

    state: S
    ids: NDArray[np.int64]
    plan: Plan
    memory: Floats
    started: NDArray[np.float64]


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
    batches: Iterable[tuple[NDArray[np.int64], Inputs]],
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
    trace = _empty_trace(rows, segments, classes)
    pending = iter(batches)
    queues: dict[QueueKey, list[_Group[S]]] = {}
    while True:
        full = [key for key, queue in queues.items() if len(queue[0].ids) >= limit or _length(queue) >= limit]
        if full:
            key = max(full)
        elif (batch := next(pending, None)) is not None:
            if limit == 1 and len(batch[0]) == 1:
                _walk_row(engine, rule, int(batch[0][0]), batch[1], variant, trace)
                continue
            group = _begin(engine, rule, *batch, segments, variant)
            key = (0, variant, group.state.length)
            queues.setdefault(key, []).append(group)
            continue
        elif queues:
            key = min(queues)
        else:
            return trace
        group = _pop_group(engine, queues, key, limit)
        for next_key, next_group in _run_group(engine, rule, group, key, trace):
            queues.setdefault(next_key, []).append(next_group)


def _empty_trace(rows: int, segments: int, classes: int) -> Trace:
    """A trace before any step; uses fill() because np.full is slower."""
    variants, gates = np.empty((rows, segments), np.int8), np.empty((rows, segments), np.float32)
    variants.fill(-1)
    gates.fill(math.nan)
    return Trace(variants, np.zeros((rows, segments, classes), np.float32), gates, np.zeros(rows))


def _walk_row(engine: Engine[S], rule: Rule, row: int, inputs: Inputs, variant: int, trace: Trace) -> None:
    """Walk one row from its stem to its end, and write it into the trace."""
    started = time.perf_counter()
    state = engine.begin(inputs)
    steps = walk_one(engine, rule, state, (variant,) * trace.variants.shape[1])
    trace.seconds[row] = time.perf_counter() - started
    variants, logits, gates = trace.variants[row], trace.logits[row], trace.gates[row]
    for segment, number, signals, _ in steps:
        variants[segment] = number
        logits[segment] = signals.logits[0]
        if (gate := signals.gate) is not None:
            gates[segment] = gate[0]
    if steps and steps[0].signals.answer is not None:  # asked once a row, as most bundles have none
        for segment, _, signals, _ in steps:
            assert signals.answer is not None  # every segment of a bundle gives one, or none does
            trace.keep_answers([row], segment, signals.answer)
    engine.drop(state)


def _begin(
    engine: Engine[S], rule: Rule, ids: NDArray[np.int64], inputs: Inputs, segments: int, variant: int
) -> _Group[S]:
    """Run the stem of a batch."""
    started = np.full(len(ids), time.perf_counter())
    plan = np.repeat(rule.first_plan(segments, variant), len(ids), axis=0)
    return _Group(engine.begin(inputs), ids, plan, np.zeros((len(ids), rule.width), np.float32), started)


def _length(queue: list[_Group[S]]) -> int:
    """Rows in a queue."""
    return sum(len(group.ids) for group in queue)


def _pop_group(
    engine: Engine[S], queues: dict[QueueKey, list[_Group[S]]], key: QueueKey, limit: int
) -> _Group[S]:
    """Remove groups from a queue, the largest first, up to `limit` rows, and join them to one group."""
    queue = queues[key]
    if len(queue) == 1:
        del queues[key]
        return queue[0]
    queue.sort(key=lambda group: -len(group.ids))
    chosen, remaining, rows = [queue[0]], [], len(queue[0].ids)
    for group in queue[1:]:
        if rows + len(group.ids) <= limit:
            chosen.append(group)
            rows += len(group.ids)
        else:
            remaining.append(group)
    if remaining:
        queues[key] = remaining
    else:
        del queues[key]
    if len(chosen) == 1:
        return chosen[0]
    joined = _Group(
        engine.join([group.state for group in chosen]),
        np.concatenate([group.ids for group in chosen]),
        np.concatenate([group.plan for group in chosen]),
        np.concatenate([group.memory for group in chosen]),
        np.concatenate([group.started for group in chosen]),
    )
    for group in chosen:
        engine.drop(group.state)
    return joined


def _run_group(
    engine: Engine[S], rule: Rule, group: _Group[S], key: QueueKey, trace: Trace
) -> list[tuple[QueueKey, _Group[S]]]:
    """Run one segment for a group; returns groups of the rows that go on, with the keys of their queues."""
    segment, variant, length = key
    signals = engine.step(segment, variant, group.state)
    ids = group.ids
    trace.variants[ids, segment] = variant
    trace.logits[ids, segment] = signals.logits
    if signals.gate is not None:
        trace.gates[ids, segment] = signals.gate
    if signals.answer is not None:
        trace.keep_answers(ids.tolist(), segment, signals.answer)
    if segment + 1 == group.plan.shape[1]:
        trace.seconds[ids] = time.perf_counter() - group.started
        engine.drop(group.state)
        return []
    plan, memory = rule(signals, group.memory, group.plan, segment)
    ahead = plan[:, segment + 1 :] >= 0  # [rows, segments still ahead]
    next_segments = segment + 1 + ahead.argmax(axis=1)  # meaningless for rows that are done
    done = np.logical_not(ahead.any(axis=1))
    trace.seconds[ids[done]] = time.perf_counter() - group.started[done]
    # One number for (segment, variant), so that rows with the same next step are found at once; -1: done.
    next_variants = np.take_along_axis(plan, next_segments[:, None], axis=1)[:, 0]
    codes = np.where(done, -1, next_segments * 128 + next_variants)
    onward: list[tuple[QueueKey, _Group[S]]] = []
    for code in np.unique(codes).tolist():
        if code < 0:
            continue
        next_segment, next_variant = divmod(code, 128)
        kept_rows = np.flatnonzero(codes == code)
        is_whole = len(kept_rows) == len(ids)
        state = group.state if is_whole else engine.take(group.state, kept_rows)
        for skipped in range(segment + 1, next_segment):
            engine.skip(skipped, state)
        rest = _Group(state, ids[kept_rows], plan[kept_rows], memory[kept_rows], group.started[kept_rows])
        onward.append(((next_segment, next_variant, length), rest))
        if is_whole:
            return onward
    engine.drop(group.state)
    return onward
