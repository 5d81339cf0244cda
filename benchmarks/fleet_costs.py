"""What fleet_sim.py simulates with: costs of steps by length and batch, measured through the real engine.

measure_costs runs the walk of a bundle and its single graph on batches of every size and length, in turns.
check_scheduler lets the real scheduler answer requests at random times, and the simulation the same ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from offramp.benchmarks.fleet_sim import BALANCERS, Requests, capacity, network_from, simulate
from offramp.runtime import Classifier, load_classifier
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.inputs.text import LENGTH_STEP, AnyRow, Reader, Text, items_to_rows, open_reader
from offramp.runtime.rules import bind
from offramp.runtime.rules.base import Floats, Plan, Signals
from offramp.runtime.serving.scheduler import RowOptions, Scheduler
from offramp.runtime.tuning.baselines import MONOLITH, open_baseline, read_baselines
from offramp.runtime.tuning.labelled import read_rows
from offramp.runtime.tuning.report import machine_facts
from offramp.runtime.tuning.step_costs import KeepPlan
from offramp.runtime.tuning.timing import Candidate, take_turns
from offramp.runtime.walker import Inputs, Walk, empty_trace

BATCHES = (1, 2, 4, 8, 16, 32)
LENGTHS = 6  # of which costs are measured; others are between them
PERCENTILES = (50, 95, 99)
CHECK_SHARES = (0.3, 0.6, 0.9)  # of the capacity of one replica

Milliseconds = NDArray[np.float64]


@dataclass(frozen=True)
class _TimedRule(KeepPlan):
    """A rule that decides as another one and lets every row go on; splits: the first row leaves at once."""

    splits: bool = False

    def __call__(self, signals: Signals, memory: Floats, plan: Plan, segment: int) -> tuple[Plan, Floats]:
        plan, memory = super().__call__(signals, memory, plan, segment)
        if self.splits and segment == 0:
            plan = plan.copy()
            plan[0, 1:] = -1
        return plan, memory


def grid_of(tokens: Sequence[int], lengths: int = LENGTHS) -> list[int]:
    """Lengths at which costs are measured: multiples of LENGTH_STEP from the shortest row to the longest."""
    low, high = (-(-length // LENGTH_STEP) for length in (min(tokens), max(tokens)))
    steps = np.unique(np.linspace(low, high, min(lengths, high - low + 1)).round().astype(int))
    return [LENGTH_STEP * int(step) for step in steps]


def read_items(bundle: Path, data: Path, count: int) -> tuple[list[Text], list[AnyRow], list[int] | None]:
    """The first rows of a file of labelled texts: items, rows of token ids, and numbers of labels, if any."""
    opened = open_bundle(bundle)
    items, labels, _ = read_rows(data, opened.manifest.labels, count)
    rows = items_to_rows(open_reader(opened), items)
    return items, rows, None if labels is None else labels.tolist()


def measure_costs(
    bundle: Path,
    baselines: Path,
    data: Path,
    *,
    point: str,
    count: int,
    rounds: int,
    batches: Sequence[int] = BATCHES,
    threads: int | None = None,
    cpu_time: bool = False,
) -> dict[str, Any]:
    """Measure what the simulation needs of a bundle that classifies texts; medians over rounds, in ms.

    count: rows of the data whose exits and lengths are recorded. cpu_time: of the process, instead of the
    wall. The content of the result is described in docs/fleet.md.
    """
    items, rows, labels = read_items(bundle, data, count)
    options: dict[str, object] = {"batch_size": batches[-1], "global_pool": True, "threads": threads}
    with load_classifier(bundle, point=point, **options) as session:
        manifest, tokens = session.manifest, [row.length for row in rows]
        facts = [
            fact
            for fact in read_baselines(baselines, manifest).graphs
            if (fact.kind, fact.variant) == (MONOLITH, session.variant)
        ]
        if not facts:
            raise click.ClickException(
                f"{baselines}: no monolith in {session.variant}; write it with ee-split --baselines"
            )
        monolith = open_baseline(baselines, facts[0], manifest, threads=threads, threshold=None)
        answers = list(session.map(items))
        lengths = grid_of(tokens)
        session.warm_up(lengths)
        now = time.process_time if cpu_time else time.perf_counter
        timer = _Timer(session, open_reader(open_bundle(bundle)), monolith, now)
        measured = timer.measure(lengths, batches, rounds)
        about: dict[str, Any] = {"machine": machine_facts() | dict(session.engine.facts)}
        about |= {"bundle": bundle.name, "data": f"{data.parent.name}/{data.name}", "point": point}
        about |= {"variant": session.variant, "time": "cpu" if cpu_time else "wall"}
        about |= {"rounds": rounds, "batches": list(batches), "tokens": lengths}
        if labels is not None:
            full, _ = session.at_full_depth(items)
            at_point = [session.labels.index(answer.label) for answer in answers]
            about["accuracy"] = {
                "exits": round(100 * float(np.mean(np.array(at_point) == labels)), 2),
                "monolith": round(100 * float(np.mean(full.logits[:, -1].argmax(-1) == labels)), 2),
            }
        recorded = {"tokens": tokens, "exits": [answer.exit - 1 for answer in answers]}
        blocks = [segment.blocks[-1] for segment in manifest.segments]
        row_ms = timer.row_ms(rows, rounds)
    return about | measured | {"row": row_ms, "blocks": blocks, "rows": recorded}


class _Timer:
    """Times the steps of a session's walk, and its single graph; now: gives seconds."""

    def __init__(
        self, session: Classifier, reader: Reader[AnyRow], monolith: Candidate, now: Callable[[], float]
    ) -> None:
        self._now = now
        self._session, self._reader, self._monolith = session, reader, monolith
        self._segments, self._classes = len(session.manifest.segments), session.manifest.classes
        self._variant = session.manifest.variants.index(session.variant)
        size = session.manifest.answer_size
        self._rule = bind(session.rule, self._segments, session.manifest.costs, answer_size=size)

    def measure(self, lengths: Sequence[int], batches: Sequence[int], rounds: int) -> dict[str, Any]:
        """Medians in milliseconds: begin, monolith [lengths, batches]; steps [segments, lengths, batches];
        join, split [lengths], for each row.
        """
        shape = (rounds + 1, len(lengths), len(batches))  # one uncounted round
        walks = np.zeros((self._segments + 1, *shape))
        extra, graph = np.zeros((2, *shape)), np.zeros(shape)

        def time_cell(turn: int, at: int, column: int) -> None:
            length, batch = lengths[at], batches[column]
            ids, place = np.arange(batch), (turn, at, column)
            whole, each = self._reader.blank(batch, length), self._reader.blank(1, length)
            walks[:, turn, at, column] = self._walk([(ids, whole)], splits=False)
            if batch > 1:
                single = [(ids[row : row + 1], each) for row in range(batch)]
                once = self._walk([(ids, whole)], splits=False, segments=1)[1]
                extra[0][place] = (self._walk(single, splits=False, segments=1)[1] - once) / batch
                split = self._walk([(ids, whole)], splits=True, segments=1)[1]
                extra[1][place] = (split - once) / (batch - 1)
            started = self._now()
            self._monolith.run([(ids, whole)], batch, batch)()
            graph[place] = 1e3 * (self._now() - started)

        places = [(at, column) for at in range(len(lengths)) for column in range(len(batches))]
        with click.progressbar(length=(rounds + 1) * len(places), label="costs") as bar:
            for turn in range(rounds + 1):
                cells = {str(place): partial(time_cell, turn, *place) for place in places}
                for _ in take_turns(cells, 1, seed=turn):
                    bar.update(1)
        several = [column for column, batch in enumerate(batches) if batch > 1]
        median = np.median(walks[:, 1:], axis=1)
        more = np.maximum(np.median(extra[:, 1:][..., several], axis=(1, 3)), 0.0)  # [2, lengths]
        result = {"begin": median[0], "steps": median[1:], "monolith": np.median(graph[1:], axis=0)}
        result |= {"join": more[0], "split": more[1]}
        return {name: array.round(5).tolist() for name, array in result.items()}

    def row_ms(self, rows: Sequence[AnyRow], rounds: int, batch: int = 8) -> float:
        """Milliseconds of a row outside of the graphs: its share of a batch's arrays, and its answer."""
        session, trace = self._session, empty_trace(len(rows), self._segments, self._classes)
        trace.variants[:, 0] = self._variant
        number, _ = session.draw()
        seconds = []
        for _ in range(rounds + 1):
            started = self._now()
            for _ in session.batches(rows, batch):
                pass
            for at, row in enumerate(rows):
                session.finish(trace, at, row, number)
            seconds.append((self._now() - started) / len(rows))
        return round(1e3 * float(np.median(seconds[1:])), 5)

    def _walk(
        self, groups: Sequence[tuple[NDArray[np.int64], Inputs]], *, splits: bool, segments: int | None = None
    ) -> Milliseconds:
        """Walk groups of rows that are joined at the first segment; ms of all stems and of each segment.

        segments: how many are run.
        """
        segments = self._segments if segments is None else min(segments, self._segments)
        rows = sum(len(ids) for ids, _ in groups)
        trace = empty_trace(rows, self._segments, self._classes)
        with self._session.walking():
            engine = self._session.engine
            walk = Walk(engine, [_TimedRule(self._rule, splits)], trace, rows)
            stamps = [self._now()]
            for ids, inputs in groups:
                walk.begin(ids, inputs, self._variant, rules=np.zeros(len(ids), np.int64))
            stamps.append(self._now())
            while len(stamps) < segments + 2 and (key := walk.first_queue()) is not None:
                walk.run(key)
                stamps.append(self._now())
            walk.drop(walk.waiting())
        return 1e3 * np.diff(stamps)


def percentiles(seconds: NDArray[np.float64]) -> dict[str, float]:
    """Mean and percentiles of times, in milliseconds."""
    values = dict(zip(PERCENTILES, np.percentile(1e3 * seconds, PERCENTILES).tolist(), strict=True))
    return {"mean_ms": 1e3 * float(seconds.mean())} | {f"p{name}_ms": ms for name, ms in values.items()}


def check_scheduler(
    bundle: Path, data: Path, costs: Mapping[str, Any], *, requests: int, threads: int | None = None
) -> dict[str, Any]:
    """Answer requests at random times with the real scheduler and with the simulation of one replica.

    The simulation gets the times at which the requests were really submitted, and the recorded exits. Gives
    for each share of the replica's capacity the times of both, and how many rows left at another exit.
    backlog: the time of both for requests that all come at once.
    """
    _, rows, _ = read_items(bundle, data, len(costs["rows"]["tokens"]))
    network = network_from(costs, "exits")
    tokens, exits = (np.array(costs["rows"][name]) for name in ("tokens", "exits"))
    full = capacity(network, tokens, exits)
    options: dict[str, object] = {"batch_size": network.limit, "global_pool": True, "threads": threads}
    lines = []
    with load_classifier(bundle, point=costs["point"], **options) as session:
        session.warm_up(costs["tokens"])
        drawn = np.random.default_rng(len(CHECK_SHARES)).integers(0, len(rows), requests)
        cpu = time.process_time()
        came, seconds, _ = _answer(session, [rows[row] for row in drawn], np.zeros(requests))
        backlog = {"requests": requests, "scheduler_seconds": float((came + seconds).max())}
        backlog["scheduler_cpu_seconds"] = time.process_time() - cpu
        asked = Requests(np.zeros(requests), tokens[drawn], exits[drawn])
        backlog["simulation_seconds"] = simulate(network, asked, 1).end
        for number, share in enumerate(CHECK_SHARES):
            random = np.random.default_rng(number)
            drawn = random.integers(0, len(rows), requests)
            pauses = random.exponential(1 / (share * full), requests)
            came, seconds, left = _answer(session, [rows[row] for row in drawn], pauses.cumsum())
            asked = Requests(came, tokens[drawn], exits[drawn])
            simulated = simulate(network, asked, 1, BALANCERS[1])
            line: dict[str, Any] = {"share": share, "requests": requests}
            line["other_exits"] = int((left != exits[drawn]).sum())
            line |= {"scheduler": rounded(percentiles(seconds))}
            line |= {"simulation": rounded(percentiles(simulated.seconds))}
            lines.append(line)
    about = {"machine": machine_facts(), "bundle": bundle.name, "point": costs["point"]}
    return {**about, "backlog": rounded(backlog), "lines": lines}


def rounded(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures with three decimals."""
    return {name: round(value, 3) for name, value in figures.items()}


def _answer(
    session: Classifier, rows: Sequence[AnyRow], arrivals: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Submit rows to a scheduler; gives when they really came, the seconds of their answers, and exits."""
    options = RowOptions(*session.draw())
    came, ended = np.zeros(len(rows)), np.zeros(len(rows))
    scheduler = Scheduler(session, queue=len(rows))
    futures = []

    def note_end(number: int) -> Callable[[Future[Any]], None]:
        def note(_: Future[Any]) -> None:
            ended[number] = time.perf_counter()

        return note

    begun = time.perf_counter()
    for number, (row, arrival) in enumerate(zip(rows, arrivals.tolist(), strict=True)):
        if (pause := begun + arrival - time.perf_counter()) > 0:
            time.sleep(pause)
        came[number] = time.perf_counter()
        future = scheduler.submit(row, options)
        future.add_done_callback(note_end(number))
        futures.append(future)
    wait(futures)
    scheduler.close()
    exits = np.array([future.result().exit - 1 for future in futures])
    return came - begun, ended - came, exits
