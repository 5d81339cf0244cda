"""POST /v1/walk: its text is a row of the scheduler like any other, with the limits of all rows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from serving import CLASSIFY, Server, futures_of, hold_engine, serving, wait_until
from tiny_bundles import CLASSIFIER, texts

from offramp.runtime import load, load_classifier
from offramp.runtime.bundle.manifest import TextInput
from offramp.runtime.inputs.text import items_to_rows
from offramp.runtime.row_session import ExitRecord
from offramp.runtime.serving.scheduler import RowOptions, Scheduler

WALK, TEXT = "/v1/walk", "a warm and good film"


@contextmanager
def held(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hold the engine of the first model before its next step."""
    go_on = hold_engine(server, monkeypatch)
    try:
        yield
    finally:
        go_on.set()


def accepted(server: Server) -> int:
    return server.models.rows(None).accepted


@pytest.mark.slow
def test_a_walk_counts_as_a_row_that_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(CLASSIFIER) as server, ThreadPoolExecutor(1) as pool:
        with held(server, monkeypatch):
            asked = pool.submit(server.ask, WALK, {"input": TEXT})
            wait_until(lambda: accepted(server) == 1)
        assert asked.result()[0] == 200
        assert accepted(server) == 0


@pytest.mark.slow
def test_a_walk_beside_a_full_queue_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(CLASSIFIER, scheduling={"queue": 2}) as server, ThreadPoolExecutor(1) as pool:
        with held(server, monkeypatch):
            asked = pool.submit(server.results, {"input": [TEXT] * 2})
            wait_until(lambda: accepted(server) == 2)
            status, answer, headers = server.ask(WALK, {"input": TEXT})
        assert len(asked.result()) == 2
    assert status == 429 and answer["error"]["type"] == "queue_full" and int(headers["retry-after"]) >= 1


@pytest.mark.slow
def test_a_walk_that_is_late_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(CLASSIFIER, timeout=0.1) as server:
        with held(server, monkeypatch):
            status, answer, _ = server.ask(WALK, {"input": TEXT})
        wait_until(lambda: accepted(server) == 0)
    assert status == 504 and answer["error"]["type"] == "deadline_passed"


@pytest.mark.slow
def test_walks_that_wait_stop_no_other_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the threads in which an application runs what would block it."""
    count, long = 45, " ".join(["film"] * 5000)  # read in such a thread
    with serving(CLASSIFIER) as server, ThreadPoolExecutor(count + 1) as pool:
        with held(server, monkeypatch):
            walks = [pool.submit(server.ask, WALK, {"input": TEXT}) for _ in range(count)]
            wait_until(lambda: accepted(server) == count)
            other = pool.submit(server.ask, CLASSIFY, {"input": long})
            wait_until(lambda: accepted(server) == count + 1)
        assert {asked.result()[0] for asked in (*walks, other)} == {200}


@pytest.mark.slow
def test_a_walk_of_a_caller_that_goes_away_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(CLASSIFIER) as server:
        futures = futures_of(server, monkeypatch)
        with held(server, monkeypatch):
            with server.send(WALK, {"input": TEXT}):
                wait_until(lambda: accepted(server) == 1)
            wait_until(lambda: [future.cancelled() for future in futures] == [True])
        wait_until(lambda: accepted(server) == 0)
        assert "offramp_answers_total{" not in server.ask("/metrics")[1]


@pytest.mark.slow
def test_walks_are_counted_as_answers() -> None:
    with serving(CLASSIFIER) as server:
        exit = server.ask(WALK, {"input": TEXT})[1]["steps"][-1]["segment"]
        figures = server.ask("/metrics")[1]
    assert f'offramp_answers_total{{exit="{exit}",model="tiny_bundle"}} 1.0' in figures


@pytest.mark.slow
def test_of_a_long_text_the_first_window_alone_is_walked() -> None:
    text = " ".join(["good film"] * 200)
    with serving(CLASSIFIER, options={"long_texts": "windows"}) as server:
        (whole,) = server.results({"input": text})
        answer = server.ask(WALK, {"input": text})[1]
        reads = server.models.rows(None).manifest.input
    assert isinstance(reads, TextInput)
    assert whole["windows"] > 1 and answer["tokens"] == reads.longest


# the scheduler


def exits_of(items: list[str]) -> list[list[ExitRecord]]:
    """What rows that are walked together are told of their exits, at full depth."""
    with load_classifier(CLASSIFIER) as session:
        scheduler = Scheduler(session, limit=4)
        records: list[list[ExitRecord]] = [[] for _ in items]
        numbers = session.full_depth("fp32")
        futures = [
            scheduler.submit(row, RowOptions(*numbers, on_exit=record.append))
            for row, record in zip(items_to_rows(session._reader, items), records, strict=True)
        ]
        for future in futures:
            future.result(10)
        scheduler.close()
    return records


def test_each_exit_of_a_row_is_told_once_and_in_order() -> None:
    with load(CLASSIFIER) as session:
        segments = [*range(1, 1 + len(session.manifest.segments))]
    assert [[record.segment for record in records] for records in exits_of(texts(20))] == [segments] * 20


def test_what_is_told_of_an_exit_is_what_the_session_gives() -> None:
    items = texts(6)
    with load(CLASSIFIER) as session:
        trace, _ = session.at_full_depth(items)
    for row, records in enumerate(exits_of(items)):
        np.testing.assert_allclose([record.logits for record in records], trace.logits[row], atol=1e-4)
        assert [record.gate is None for record in records] == np.isnan(trace.gates[row]).tolist()


def test_the_times_of_exits_make_up_the_time_of_the_walk() -> None:
    with load_classifier(CLASSIFIER) as session:
        scheduler, records = Scheduler(session), list[ExitRecord]()
        (row,) = items_to_rows(session._reader, [TEXT])
        begun = time.perf_counter()
        answer = scheduler.submit(row, RowOptions(*session.draw(), on_exit=records.append)).result(10)
        seconds = time.perf_counter() - begun
        scheduler.close()
    assert 1e3 * answer.seconds <= sum(record.ms for record in records) <= 1e3 * seconds
