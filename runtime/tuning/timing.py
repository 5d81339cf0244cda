"""Contenders take turns of a few rows each, in an order drawn anew each time: nobody always runs first or
after the same one, and slow moments of the machine hit all alike.

A few rows and not one: a process that serves finds its own code in the cache, not a rival's. With one row
each in a fixed order, a walk after a single graph took 7 % longer than the same walk after another walk.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from offramp.runtime import rules
from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.classifier import Session
from offramp.runtime.walker import Inputs, Trace, walk

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
Batches = Sequence[tuple[Ids, Inputs]]  # numbers of rows and the stem's inputs for them
TOGETHER = 8  # rows of a turn
Found = tuple[Ids, Ids]  # label and 1-based exit of every row


@dataclass(frozen=True)
class Contender:
    """Who answers rows: run(batches, rows, limit) is timed; read makes labels and exits of what it gave.

    bulk: takes batches of more than one row. rule: of a walk. bytes: of the graph files that it needs.
    """

    name: str
    kind: str
    variant: str
    bytes: int
    run: Callable[[Batches, int, int], Any]
    read: Callable[[Any], Found]
    bulk: bool = True
    rule: RuleSpec | None = None


@dataclass(frozen=True)
class Turns:
    """Of one contender, all [turns, rows]: seconds, label numbers, 1-based exits."""

    seconds: Floats
    labels: Ids
    exits: Ids


def walking(session: Session, name: str, kind: str, rule: rules.Rule | None = None) -> Contender:
    """The walk of a session, under its own rule or another; texts are encoded beforehand."""
    manifest = session.manifest
    sizes = {"segments": len(manifest.segments), "classes": len(manifest.labels)}
    sizes["variant"] = manifest.variants.index(session.variant)
    bound = rules.bind(session.rule, sizes["segments"]) if rule is None else rule
    stem = manifest.stem.variants.get(session.variant) or manifest.stem.variants[manifest.variants[0]]
    files = {stem.file, *(segment.variants[session.variant].file for segment in manifest.segments)}

    def run(batches: Batches, rows: int, limit: int) -> Trace:
        return walk(session.engine, bound, batches, rows=rows, limit=limit, **sizes)

    def read(trace: Trace) -> Found:
        segments = trace.variants.shape[1]
        last = segments - 1 - (trace.variants[:, ::-1] >= 0).argmax(axis=1)
        labels = trace.logits[np.arange(len(last)), last].argmax(axis=-1)
        return labels.astype(np.int64), last.astype(np.int64) + 1

    size = sum(manifest.files[file].bytes for file in files)
    return Contender(name, kind, session.variant, size, run, read, rule=session.rule)


def one_by_one(contenders: Sequence[Contender], singles: Sequence[Batches], turns: int) -> dict[str, Turns]:
    """Every contender answers every row alone, `turns` times; they change after each TOGETHER rows.

    Before its rows each answers the first of them once untimed, to be back in the cache.
    """
    rows, draw = len(singles), np.random.default_rng(0)
    shape = (turns, rows)
    found = {
        c.name: Turns(np.zeros(shape), np.zeros(shape, np.int64), np.zeros(shape, np.int64))
        for c in contenders
    }
    with click.progressbar(length=turns * rows, label="one by one", file=sys.stderr) as bar:
        for turn in range(turns):
            for start in range(0, rows, TOGETHER):
                numbers = range(start, min(start + TOGETHER, rows))
                for at in draw.permutation(len(contenders)):
                    contender = contenders[at]
                    run, mine = contender.run, found[contender.name]
                    run(singles[start], 1, 1)
                    for row in numbers:
                        started = time.perf_counter()
                        raw = run(singles[row], 1, 1)
                        mine.seconds[turn, row] = time.perf_counter() - started
                        labels, exits = contender.read(raw)
                        mine.labels[turn, row], mine.exits[turn, row] = labels[0], exits[0]
                bar.update(len(numbers))
    return found


def in_bulk(
    contenders: Sequence[Contender], windows: Sequence[tuple[Batches, int]], limit: int, turns: int
) -> dict[str, float]:
    """Rows per second, median of `turns` rounds after one that is not counted.

    windows: batches of like lengths and how many rows they hold; limit: rows joined for a step at most.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    with click.progressbar(length=(turns + 1) * len(contenders), label="in bulk   ", file=sys.stderr) as bar:
        for turn in range(turns + 1):
            for at in range(len(contenders)):
                contender = contenders[(turn + at) % len(contenders)]
                started = time.perf_counter()
                for batches, rows in windows:
                    contender.run(batches, rows, limit)
                seconds[contender.name].append(time.perf_counter() - started)
                bar.update(1)
    total = sum(rows for _, rows in windows)
    return {name: total / float(np.median(values[1:])) for name, values in seconds.items()}


def by_segment(session: Session, singles: Sequence[Batches]) -> list[dict[str, Any]]:
    """Median milliseconds of the stem and of every segment, over rows that go to the last exit."""
    manifest, engine = session.manifest, session.engine
    number = manifest.variants.index(session.variant)
    clock = np.zeros((len(singles), len(manifest.segments) + 2))
    for row, single in enumerate(singles):
        clock[row, 0] = time.perf_counter()
        state = engine.begin(single[0][1])
        clock[row, 1] = time.perf_counter()
        for segment in range(len(manifest.segments)):
            engine.step(segment, number, state)
            clock[row, segment + 2] = time.perf_counter()
        engine.drop(state)
    medians = 1e3 * np.median(np.diff(clock, axis=1), axis=0)
    stages = (manifest.stem, *manifest.segments)
    return [{"name": stage.name, "ms": short(ms)} for stage, ms in zip(stages, medians, strict=True)]


def summary(mine: Turns, reference: Turns, macs: Floats, budget: float) -> dict[str, Any]:
    """What the turns of a contender come to, beside the reference's; budget in seconds.

    macs [rows, segments]: multiply-accumulates of each row up to each exit. The time saved is of all rows and
    turns together, as the computing is: a median over rows would hide the shallow ones or the deep ones.
    """
    turns = len(mine.seconds)
    pairs = np.percentile(mine.seconds / reference.seconds, [50, 5, 95])
    times = 1e3 * np.percentile(mine.seconds, range(101))
    counts = np.bincount(mine.exits.ravel() - 1, minlength=macs.shape[1]) / turns
    share = macs_share(mine.exits, macs)
    time_share = float(mine.seconds.sum() / reference.seconds.sum())
    return {
        "p50_ms": short(times[50]),
        "p95_ms": short(times[95]),
        "p99_ms": short(times[99]),
        "mean_ms": short(1e3 * mine.seconds.mean()),
        "percentiles_ms": [short(value) for value in times],
        "ratio": short(pairs[0]),
        "ratio_p5": short(pairs[1]),
        "ratio_p95": short(pairs[2]),
        "mean_exit": short(mine.exits.mean()),
        "exits": [short(value) for value in counts],
        "goodput": short((mine.seconds <= budget).mean()),
        "time_share": short(time_share),
        "macs_share": short(share),
        "realised": realised(time_share, share),
    }


def macs_share(exits: Ids, macs: Floats) -> float:
    """Multiply-accumulates of rows that left at exits [turns, rows] over those of full depth; macs [rows,
    segments]: of each row up to each exit.
    """
    whole = float(len(exits) * macs[:, -1].sum()) or 1.0  # a bundle that does not say: then no share is saved
    return 1 - float((macs[:, -1] - macs[np.arange(len(macs)), exits - 1]).sum()) / whole


def realised(time_share: float, share: float) -> float | None:
    """Share of the time saved over share of the multiply-accumulates saved.

    None where hardly anything is left out: there is nothing to realise, and the quotient is noise.
    """
    return short((1 - time_share) / (1 - share)) if share < 0.99 else None


def accuracy(mine: Turns, truth: Ids | None) -> float | None:
    """Percent of rows and turns answered right; None without labels."""
    return None if truth is None else short(100 * (mine.labels == truth).mean())


def weigh(found: Mapping[str, Turns], name: str) -> float:
    """Median seconds of a contender over rows and turns."""
    return float(np.median(found[name].seconds))


def short(value: float) -> float:
    """Six digits: more would be noise."""
    return float(f"{float(value):.6g}")
