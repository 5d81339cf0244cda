"""Timing of callables in turns: each is called once a round, in an order that is drawn for every round.

So slow moments of the machine affect all of them equally, and none always runs first or after the same other
one. A turn has several rows and not one: in a process that serves, the processor's cache contains the code of
the walk, not that of another candidate. With one row a turn in a fixed order, a walk after a single graph
took 7 % longer than the same walk after another walk.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import click
import numpy as np
from numpy.typing import NDArray

from offramp.runtime import rules
from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.decoding import Token
from offramp.runtime.row_session import RowSession
from offramp.runtime.tuning.right_answers import AnswerReader, Answers
from offramp.runtime.walker import Inputs, walk, walk_one

Result = TypeVar("Result")
Ids = NDArray[np.int64]
Seconds = NDArray[np.float64]
Batches = Sequence[tuple[Ids, Inputs]]  # row numbers and the stem's inputs for these rows
AnswersAndExits = tuple[Answers, Ids]  # answer and 1-based exit of every row
ROWS_PER_TURN = 8


def take_turns(
    callables: Mapping[str, Callable[[], Result]],
    rounds: int,
    *,
    seed: int | np.random.Generator = 0,
    before: Callable[[], object] | None = None,
) -> Iterator[tuple[str, float, Result]]:
    """Call every callable once a round; yields its name, its seconds and its result.

    seed: of the order; a generator is used in its present state. before: called before every callable and not
    timed, for callables whose weights would otherwise be in the cache after another's turn.
    """
    order, names = np.random.default_rng(seed), list(callables)
    for _ in range(rounds):
        for at in order.permutation(len(names)):
            call = callables[names[at]]
            if before is not None:
                before()
            started = time.perf_counter()
            result = call()
            seconds = time.perf_counter() - started
            yield names[at], seconds, result


def time_in_turns(
    callables: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    seed: int | np.random.Generator = 0,
    warmup: int = 0,
    before: Callable[[], object] | None = None,
    progress: str | None = None,
) -> dict[str, list[float]]:
    """Time callables in turns; gives by name the seconds of each round; see take_turns.

    warmup: earlier rounds that are not counted. progress: label of a progress bar on standard error.
    """
    seconds: dict[str, list[float]] = {name: [] for name in callables}
    steps = (warmup + rounds) * len(callables)
    with _bar(progress, steps) as advance:
        for name, taken, _ in take_turns(callables, warmup + rounds, seed=seed, before=before):
            seconds[name].append(taken)
            advance(1)
    return {name: values[warmup:] for name, values in seconds.items()}


def time_ratio(seconds: Sequence[float] | Seconds, reference: Sequence[float] | Seconds) -> list[float]:
    """The ratio of seconds to the reference's of the same round and row: median, 5th and 95th percentile.

    Both arrays have one shape. Pairs are close in time, so that slow moments of the machine cancel.
    """
    pairs = np.asarray(seconds) / np.maximum(np.asarray(reference), 1e-9)
    return [float(value) for value in np.percentile(pairs, [50, 5, 95])]


@dataclass(frozen=True)
class Candidate:
    """A network that answers rows in a benchmark: a walk at an operating point, or a baseline.

    run(batches, rows, limit) answers the rows and is timed; at most `limit` rows are joined for a step. It
    returns a function, called outside of the timed part, that reads answers and exits from the outputs.
    bytes: size of its graph files. bulk: whether it takes batches of more than one row. rule: a walk's.
    """

    name: str
    kind: str
    variant: str
    bytes: int
    run: Callable[[Batches, int, int], Callable[[], AnswersAndExits]]
    bulk: bool = True
    rule: RuleSpec | None = None


def walk_candidate(
    session: RowSession[Any], name: str, kind: str, rule: rules.Rule | None = None
) -> Candidate:
    """The walk of a session as a candidate, under the session's rule or under `rule`; without tokenizing."""
    manifest, reader = session.manifest, AnswerReader(session.manifest)
    segments, classes = len(manifest.segments), manifest.classes
    variant = manifest.variants.index(session.variant)
    size = manifest.answer_size
    bound = rules.bind(session.rule, segments, manifest.costs, answer_size=size) if rule is None else rule
    stem = manifest.stem.variants.get(session.variant) or manifest.stem.first_graph
    graphs = [graph for segment in manifest.segments for graph in segment.variants[session.variant].graphs]
    files = {graph.file for graph in (stem, *graphs)}

    def run(batches: Batches, rows: int, limit: int) -> Callable[[], AnswersAndExits]:
        trace = walk(
            session.engine,
            bound,
            batches,
            rows=rows,
            segments=segments,
            classes=classes,
            variant=variant,
            limit=limit,
        )

        def read() -> AnswersAndExits:
            last = segments - 1 - (trace.variants[:, ::-1] >= 0).argmax(axis=1)  # [rows]
            answers = reader.at_exits(trace, last, reader.places(batches, rows))
            return answers, last.astype(np.int64) + 1

        return read

    total = sum(manifest.files[file].bytes for file in files)
    return Candidate(name, kind, session.variant, total, run, rule=session.rule)


@dataclass(frozen=True)
class RowTimings:
    """The timed answers of one candidate: seconds, answers and exits (1-based), each [rounds, rows].

    answers: see AnswerReader (dtype object).
    """

    seconds: Seconds
    answers: Answers
    exits: Ids


def time_rows(
    candidates: Sequence[Candidate], singles: Sequence[Batches], rounds: int
) -> dict[str, RowTimings]:
    """Time every candidate on every row at batch 1, once a round, in turns of ROWS_PER_TURN rows.

    singles: for each row a batch of this row alone. Before its turn a candidate answers the turn's first row
    once untimed, so that its code is in the cache.
    """
    rows, order = len(singles), np.random.default_rng(0)
    shape = (rounds, rows)
    timings = {
        candidate.name: RowTimings(np.zeros(shape), np.empty(shape, object), np.zeros(shape, np.int64))
        for candidate in candidates
    }

    def answer(candidate: Candidate, turn: int, numbers: range) -> None:
        run, timing = candidate.run, timings[candidate.name]
        run(singles[numbers[0]], 1, 1)
        for row in numbers:
            started = time.perf_counter()
            read = run(singles[row], 1, 1)
            timing.seconds[turn, row] = time.perf_counter() - started
            answers, exits = read()
            timing.answers[turn, row], timing.exits[turn, row] = answers[0], exits[0]

    with _bar("one by one", rounds * rows) as advance:
        for number in range(rounds):
            for start in range(0, rows, ROWS_PER_TURN):
                numbers = range(start, min(start + ROWS_PER_TURN, rows))
                calls = {c.name: partial(answer, c, number, numbers) for c in candidates}
                for _ in take_turns(calls, 1, seed=order):
                    pass
                advance(len(numbers))
    return timings


def time_bulk(
    candidates: Sequence[Candidate], windows: Sequence[tuple[Batches, int]], limit: int, rounds: int
) -> dict[str, float]:
    """Measure rows per second of every candidate in bulk: median of `rounds` rounds after one uncounted
    round.

    windows: batches of rows of similar length, and how many rows they hold. limit: most rows joined for a
    step.
    """

    def answer(candidate: Candidate) -> None:
        for batches, rows in windows:
            candidate.run(batches, rows, limit)

    calls = {candidate.name: partial(answer, candidate) for candidate in candidates}
    seconds = time_in_turns(calls, rounds, warmup=1, progress="in bulk   ")
    total = sum(rows for _, rows in windows)
    return {name: total / float(np.median(values)) for name, values in seconds.items()}


@dataclass
class AnswerTimings:
    """The timed answers of a text generator: tokens, and seconds from the start of the answer to each."""

    tokens: list[list[Token]] = field(default_factory=list)
    stamps: list[list[float]] = field(default_factory=list)

    @property
    def after_first(self) -> Seconds:
        """The seconds from the first token of each answer to its last [answers]."""
        return np.array([stamps[-1] - stamps[0] for stamps in self.stamps])


def time_answers(
    generators: Mapping[str, Callable[[Sequence[int]], Iterator[Token]]],
    prompts: Sequence[Sequence[int]],
    rounds: int,
) -> dict[str, AnswerTimings]:
    """Time every generator on every prompt, once a round; a turn is one answer.

    generators: functions from token ids of a prompt to the tokens of its answer. All should generate the same
    number of tokens.
    """
    timings = {name: AnswerTimings() for name in generators}
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for ids in prompts:
            calls = {name: partial(time_one_answer, answer, ids) for name, answer in generators.items()}
            for name, _, (tokens, stamps) in take_turns(calls, 1, seed=order):
                timings[name].tokens.append(tokens)
                timings[name].stamps.append(stamps)
    return timings


def time_one_answer(
    generator: Callable[[Sequence[int]], Iterator[Token]], ids: Sequence[int]
) -> tuple[list[Token], list[float]]:
    """Generate one answer; gives its tokens, and the seconds from its start to each of them."""
    tokens: list[Token] = []
    stamps: list[float] = []
    started = time.perf_counter()
    for token in generator(ids):
        tokens.append(token)
        stamps.append(time.perf_counter() - started)
    return tokens, stamps


def time_segments(session: RowSession[Any], singles: Sequence[Batches]) -> list[tuple[str, float]]:
    """Measure the stem and every segment at full depth; gives names and median milliseconds over rows."""
    manifest, engine = session.manifest, session.engine
    never = rules.bind(RuleSpec("never", {}), len(manifest.segments))
    plan = [manifest.variants.index(session.variant)] * len(manifest.segments)
    stamps = np.zeros((len(singles), len(plan) + 2))
    for row, single in enumerate(singles):
        started = time.perf_counter()
        state = engine.begin(single[0][1])
        begun = time.perf_counter()
        stamps[row] = [started, begun, *(step.ended for step in walk_one(engine, never, state, plan))]
        engine.drop(state)
    medians = 1e3 * np.median(np.diff(stamps, axis=1), axis=0)
    graphs = (manifest.stem, *manifest.segments)
    return [(graph.name, float(ms)) for graph, ms in zip(graphs, medians, strict=True)]


@contextmanager
def _bar(label: str | None, steps: int) -> Iterator[Callable[[int], object]]:
    """A context with a function that advances a progress bar on standard error; no bar without a label."""
    if label is None:
        yield lambda steps: None
        return
    with click.progressbar(length=steps, label=label, file=sys.stderr) as bar:
        yield bar.update
