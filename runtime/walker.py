"""The walker: the one loop that takes rows along their plans.

Rows that wait for the same (segment, variant, length) sit in one waiting room and are run together; after
each step the rule rewrites the plans, rows that are done leave, the others move on to their next room.
Batching, compaction after exits and regrouping are this one mechanism. The walker knows no ONNX, no text and
no task: an engine's states are opaque to it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.engines.base import Engine, State
from offramp.runtime.rules import Floats, Plan, Rule, Signals

Key = tuple[int, int, int]  # segment, variant, length: what rows must share to be run together
Inputs = Mapping[str, NDArray[Any]]
Said = tuple[int, int, Signals]  # segment, variant, what it said
Leaves = Callable[[Signals, int], bool]  # see rules.ExitRule.leaves


@dataclass
class Trace:
    """What happened to each row: variants int8 [rows, segments] (-1: not run); logits [rows, segments,
    classes] and gates [rows, segments] (NaN: none) where it was run; seconds [rows] from the start of its
    stem until it left.
    """

    variants: Plan
    logits: Floats
    gates: Floats
    seconds: NDArray[np.float64]


@dataclass
class _Group:
    """Rows that travel together: numbers in the trace, plans and memories; started: clock at the stem."""

    state: State
    ids: NDArray[np.int64]
    plan: Plan
    memory: Floats
    started: NDArray[np.float64]


def walk(
    engine: Engine,
    rule: Rule,
    batches: Iterable[tuple[NDArray[np.int64], Inputs]],
    *,
    rows: int,
    segments: int,
    classes: int,
    variant: int = 0,
    limit: int = 32,
) -> Trace:
    """Walk all batches (row numbers, stem inputs), begun in the order given; each row starts with the whole
    plan in `variant`.

    At most `limit` rows are joined for a step (a batch that is larger stays as it is). A full room is run at
    once, the deepest
    first: its rows are nearest to leaving. Otherwise the next batch is begun; when there is none, rooms are
    emptied from the shallowest on, so that everybody who can still come to a room has come before it is run.
    No row waits for ever.
    """
    trace = _blank(rows, segments, classes)
    pending = iter(batches)
    rooms: dict[Key, list[_Group]] = {}
    while True:
        full = [key for key, room in rooms.items() if len(room[0].ids) >= limit or _waiting(room) >= limit]
        if full:
            key = max(full)
        elif (batch := next(pending, None)) is not None:
            if limit == 1 and len(batch[0]) == 1:
                _alone(engine, rule, int(batch[0][0]), batch[1], variant, trace)
                continue
            group = _begin(engine, rule, *batch, segments, variant)
            key = (0, variant, group.state.length)
            rooms.setdefault(key, []).append(group)
            continue
        elif rooms:
            key = min(rooms)
        else:
            return trace
        group = _call(engine, rooms, key, limit)
        for onward, part in _step(engine, rule, group, key, trace):
            rooms.setdefault(onward, []).append(part)


def _blank(rows: int, segments: int, classes: int) -> Trace:
    """Nothing has happened yet; fill() and not np.full, which is Python."""
    variants, gates = np.empty((rows, segments), np.int8), np.empty((rows, segments), np.float32)
    variants.fill(-1)
    gates.fill(math.nan)
    return Trace(variants, np.zeros((rows, segments, classes), np.float32), gates, np.zeros(rows))


def _alone(engine: Engine, rule: Rule, at: int, inputs: Inputs, variant: int, trace: Trace) -> None:
    """Walk one row, whom nobody joins: the same steps without rooms, since at batch 1 every microsecond
    shows.

    Between two segments the interpreter's own code is cold in the cache, so a line here costs several times
    what it costs in a tight loop.
    """
    started = time.perf_counter()
    segments = trace.variants.shape[1]
    state = engine.begin(inputs)
    leaves = getattr(rule, "leaves", None)
    said = (
        _planned(engine, rule, state, variant, segments)
        if leaves is None
        else _until(engine, leaves, state, variant, segments)
    )
    trace.seconds[at] = time.perf_counter() - started
    variants, logits, gates = trace.variants[at], trace.logits[at], trace.gates[at]
    for segment, number, signals in said:
        variants[segment] = number
        logits[segment] = signals.logits[0]
        if signals.gate is not None:
            gates[segment] = signals.gate[0]
    engine.drop(state)


def _until(engine: Engine, leaves: Leaves, state: State, variant: int, segments: int) -> list[Said]:
    """Run segments in turn until the rule says to leave: it does nothing else, and so needs no plan."""
    step, last, said = engine.step, segments - 1, []
    for segment in range(segments):
        signals = step(segment, variant, state)
        said.append((segment, variant, signals))
        if segment == last or leaves(signals, segment):
            break
    return said


def _planned(engine: Engine, rule: Rule, state: State, variant: int, segments: int) -> list[Said]:
    """Run the segments of the plan, which the rule rewrites after each."""
    plan = np.full((1, segments), variant, np.int8)
    memory = np.zeros((1, rule.width), np.float32)
    ahead = [variant] * segments  # the plan as Python's own numbers
    said: list[Said] = []
    segment = 0
    while segment < segments and (number := ahead[segment]) >= 0:
        signals = engine.step(segment, number, state)
        said.append((segment, number, signals))
        segment += 1
        if segment == segments:
            break
        new, memory = rule(signals, memory, plan, segment - 1)
        if new is not plan:
            plan, ahead = new, new[0].tolist()
        while ahead[segment] < 0 and segment + 1 < segments:  # skipped, or gone for good
            segment += 1
    return said


def _begin(
    engine: Engine, rule: Rule, ids: NDArray[np.int64], inputs: Inputs, segments: int, variant: int
) -> _Group:
    started = np.full(len(ids), time.perf_counter())
    plan = np.full((len(ids), segments), variant, np.int8)
    return _Group(engine.begin(inputs), ids, plan, np.zeros((len(ids), rule.width), np.float32), started)


def _waiting(room: list[_Group]) -> int:
    return sum(len(group.ids) for group in room)


def _call(engine: Engine, rooms: dict[Key, list[_Group]], key: Key, limit: int) -> _Group:
    """Take as many groups out of a room as fit into `limit`, the largest first, as one group."""
    room = rooms[key]
    if len(room) == 1:
        del rooms[key]
        return room[0]
    room.sort(key=lambda group: -len(group.ids))
    called, stay, rows = [room[0]], [], len(room[0].ids)
    for group in room[1:]:
        if rows + len(group.ids) <= limit:
            called.append(group)
            rows += len(group.ids)
        else:
            stay.append(group)
    if stay:
        rooms[key] = stay
    else:
        del rooms[key]
    if len(called) == 1:
        return called[0]
    joined = _Group(
        engine.join([group.state for group in called]),
        np.concatenate([group.ids for group in called]),
        np.concatenate([group.plan for group in called]),
        np.concatenate([group.memory for group in called]),
        np.concatenate([group.started for group in called]),
    )
    for group in called:
        engine.drop(group.state)
    return joined


def _step(engine: Engine, rule: Rule, group: _Group, key: Key, trace: Trace) -> list[tuple[Key, _Group]]:
    """Run one segment for a group and send its rows on; those that left are in the trace and gone."""
    segment, variant, length = key
    signals = engine.step(segment, variant, group.state)
    ids = group.ids
    trace.variants[ids, segment] = variant
    trace.logits[ids, segment] = signals.logits
    if signals.gate is not None:
        trace.gates[ids, segment] = signals.gate
    if segment + 1 == group.plan.shape[1]:
        trace.seconds[ids] = time.perf_counter() - group.started
        engine.drop(group.state)
        return []
    plan, memory = rule(signals, group.memory, group.plan, segment)
    ahead = plan[:, segment + 1 :] >= 0  # [rows, segments still ahead]
    steps = segment + 1 + ahead.argmax(axis=1)  # of rows that are done: meaningless
    leaves = np.logical_not(ahead.any(axis=1))
    trace.seconds[ids[leaves]] = time.perf_counter() - group.started[leaves]
    # One number for (segment, variant), so that rows with the same next step are found at once; -1: has left.
    codes = np.where(leaves, -1, steps * 128 + np.take_along_axis(plan, steps[:, None], axis=1)[:, 0])
    onward: list[tuple[Key, _Group]] = []
    for code in np.unique(codes):
        if code < 0:
            continue
        here = np.flatnonzero(codes == code)
        whole = len(here) == len(ids)
        state = group.state if whole else engine.take(group.state, here)
        part = _Group(state, ids[here], plan[here], memory[here], group.started[here])
        onward.append(((int(code) // 128, int(code) % 128, length), part))
        if whole:
            return onward
    engine.drop(group.state)
    return onward
