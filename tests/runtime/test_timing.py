"""The timer: whose turn it is, what is timed, and what a walk answers under it."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from offramp.runtime import load_classifier
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.decoding import Token
from offramp.runtime.inputs.text import items_to_rows, open_reader
from offramp.runtime.tuning.timing import (
    ROWS_PER_TURN,
    AnswersAndExits,
    Batches,
    Candidate,
    take_turns,
    time_answers,
    time_bulk,
    time_in_turns,
    time_ratio,
    time_rows,
    time_segments,
    walk_candidate,
)

TINY = Path(__file__).parents[1] / "data" / "tiny_bundle"
TEXTS = ["good film", "the plot was very bad", "a", "not at all warm and not good", "cold cold scene"]


def scripted(name: str, log: list[str], exit: int = 1) -> Candidate:
    def run(batches: Batches, rows: int, limit: int) -> Callable[[], AnswersAndExits]:
        log.append(name)
        return lambda: (np.zeros(rows, np.int64), np.full(rows, exit, np.int64))

    return Candidate(name, "walk", "fp32", 1, run)


def test_all_candidates_answer_the_same_rows_in_turns_of_a_few() -> None:
    log: list[str] = []
    timings = time_rows([scripted(name, log) for name in "abc"], [[]] * (ROWS_PER_TURN + 2), rounds=2)
    runs = [(name, len(list(group))) for name, group in groupby(log)]
    # One untimed run, then the rows. Two results of one candidate in a row look like one.
    assert sum(length for _, length in runs) == 3 * 2 * (ROWS_PER_TURN + 2 + 2)
    assert {name: log.count(name) for name in "abc"} == dict.fromkeys("abc", 2 * (ROWS_PER_TURN + 2 + 2))
    assert runs[0][1] == ROWS_PER_TURN + 1
    assert timings["b"].seconds.shape == (2, ROWS_PER_TURN + 2) and (timings["b"].seconds > 0).all()


def test_the_order_of_turns_is_drawn_anew() -> None:
    log: list[str] = []
    time_rows([scripted(name, log) for name in "abcd"], [[]] * (12 * ROWS_PER_TURN), rounds=1)
    each = len(log) // 12
    orders = {tuple(dict.fromkeys(log[at : at + each])) for at in range(0, len(log), each)}
    assert len(orders) > 6 and {order[0] for order in orders} == set("abcd")


def test_bulk_counts_all_rows_and_not_the_first_round() -> None:
    log: list[str] = []
    rates = time_bulk([scripted(name, log) for name in "ab"], [([], 7), ([], 2)], 4, rounds=3)
    assert set(rates) == {"a", "b"} and all(rate > 0 for rate in rates.values())
    assert log.count("a") == log.count("b") == 2 * (3 + 1)


@pytest.mark.parametrize("point", ["default", "fast"])
def test_a_walk_answers_what_its_session_answers(point: str) -> None:
    with load_classifier(TINY, point=point) as session:
        candidate = walk_candidate(session, point, "walk")
        answers = [session(text) for text in TEXTS]
        rows = items_to_rows(open_reader(open_bundle(TINY)), TEXTS)
        batches = list(session.batches(rows, 2))
        labels, exits = candidate.run(batches, len(rows), 2)()
        for text, answer in zip(TEXTS, answers, strict=True):
            single = [(np.zeros(1, np.int64), session.encode(text))]
            label, exit = candidate.run(single, 1, 1)()
            assert (session.labels[label[0]], exit[0]) == (answer.label, answer.exit)
    assert exits.tolist() == [answer.exit for answer in answers]
    assert [session.labels[label] for label in labels] == [answer.label for answer in answers]


def test_bytes_are_those_of_the_variant() -> None:
    with (
        load_classifier(TINY, rule="never") as whole,
        load_classifier(TINY, rule="never", variant="int8") as small,
    ):
        sizes = [walk_candidate(session, "x", "full").bytes for session in (whole, small)]
    names = ["stem.onnx", *(f"segment_{k:02d}.onnx" for k in range(3))]
    assert sizes[0] == sum((TINY / name).stat().st_size for name in names) > sizes[1]


def test_stages_are_timed_time_rows() -> None:
    with load_classifier(TINY, rule="never") as session:
        singles = [[(np.zeros(1, np.int64), session.encode(text))] for text in TEXTS]
        times = time_segments(session, singles)
    assert [name for name, _ in times] == ["stem", "segment_00", "segment_01", "segment_02"]
    assert all(ms > 0 for _, ms in times)


def test_callables_run_once_a_round_and_give_their_results() -> None:
    calls = {name: (lambda name=name: name * 2) for name in "abc"}
    results = list(take_turns(calls, 6))
    for at in range(0, len(results), 3):
        assert sorted(name for name, _, _ in results[at : at + 3]) == ["a", "b", "c"]
    assert all(result == name * 2 and seconds >= 0 for name, seconds, result in results)
    orders = {tuple(name for name, _, _ in results[at : at + 3]) for at in range(0, len(results), 3)}
    assert len(orders) > 1
    assert [name for name, _, _ in take_turns(calls, 6)] == [name for name, _, _ in results]  # seeded
    assert [name for name, _, _ in take_turns(calls, 6, seed=1)] != [name for name, _, _ in results]


@pytest.mark.slow
def test_seconds_are_those_of_the_callable_alone(capsys: pytest.CaptureFixture[str]) -> None:
    log: list[str] = []
    calls = {"slow": lambda: time.sleep(0.02), "fast": lambda: log.append("fast")}
    seconds = time_in_turns(calls, 3, warmup=2, before=lambda: time.sleep(0.03), progress="both")
    assert {name: len(values) for name, values in seconds.items()} == {"slow": 3, "fast": 3}
    assert len(log) == 5  # warm-up rounds run and are not counted
    assert min(seconds["slow"]) >= 0.02 and max(seconds["fast"]) < 0.02
    assert max(time_ratio(seconds["fast"], seconds["slow"])) < 1
    assert time_ratio(seconds["slow"], seconds["slow"]) == [1, 1, 1]


def test_answers_are_timed_token_by_token() -> None:
    def generator(depth: int) -> Callable[[Sequence[int]], Iterator[Token]]:
        return lambda ids: (Token(id, depth, depth) for id in ids)

    timings = time_answers({"deep": generator(3), "early": generator(1)}, [[7, 8], [9, 9, 9]], rounds=2)
    assert [[token.id for token in tokens] for tokens in timings["deep"].tokens] == 2 * [[7, 8], [9, 9, 9]]
    assert {token.depth for tokens in timings["early"].tokens for token in tokens} == {1}
    for timing in timings.values():
        assert all(stamps == sorted(stamps) for stamps in timing.stamps)
        assert (timing.after_first >= 0).all() and len(timing.after_first) == 4
