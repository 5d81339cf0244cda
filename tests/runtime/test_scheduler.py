"""The scheduler: rows of all requests share one walk, and each gets the answer that it gets alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from concurrent.futures import wait as wait_for
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_bundles import CLASSIFIER, EMBEDDING, TOKENS, bundle_with_points, texts

from offramp.runtime import Classifier, load_classifier
from offramp.runtime.errors import BadInput, BadSetting, SessionClosed
from offramp.runtime.inputs.text import items_to_rows
from offramp.runtime.loading import load_row_session
from offramp.runtime.serving import scheduler as scheduling
from offramp.runtime.serving.scheduler import LEAST_ROWS, DeadlinePassed, QueueFull, RowOptions, Scheduler

TEXTS = texts(120, seed=3)


@pytest.fixture
def session() -> Iterator[Classifier]:
    with load_classifier(CLASSIFIER) as opened:
        yield opened


class Gate:
    """Holds the engine of a session between two steps, until it is opened."""

    def __init__(self, session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open, step = threading.Event(), session.engine.step
        self.rows: list[int] = []  # of each step

        def held(segment: int, variant: int, state: Any) -> Any:
            self.rows.append(state.rows)
            assert self._open.wait(10)
            return step(segment, variant, state)

        monkeypatch.setattr(session.engine, "step", held)

    @property
    def steps(self) -> int:
        return len(self.rows)

    def open(self) -> None:
        self._open.set()

    def wait_for_steps(self, steps: int) -> None:
        end = time.monotonic() + 10
        while self.steps < steps and time.monotonic() < end:
            time.sleep(0.001)
        assert self.steps >= steps


def rows_of(session: Any, items: list[Any]) -> list[Any]:
    return items_to_rows(session._reader, items)


def options(session: Any) -> RowOptions:
    return RowOptions(*session.draw())


def submit(scheduler: Scheduler[Any], session: Any, items: list[Any], **more: Any) -> list[Future[Any]]:
    return [scheduler.submit(row, options(session), **more) for row in rows_of(session, items)]


def assert_close(value: Any, right: Any) -> None:
    """The same JSON but for the last digits of numbers, which depend on the rows of a step."""
    if isinstance(right, float):
        assert value == pytest.approx(right, abs=1e-4)
    elif isinstance(right, (list, dict)):
        keys = list(right) if isinstance(right, dict) else list(range(len(right)))
        assert len(value) == len(keys)
        for key in keys:
            assert_close(value[key], right[key])
    else:
        assert value == right


def without_time(answer: Any) -> Any:
    return replace(answer, seconds=0.0)


@pytest.mark.parametrize("limit", [1, 4, 32])
def test_answers_are_those_of_the_session(session: Classifier, limit: int) -> None:
    expected = [without_time(session(text)) for text in TEXTS]
    scheduler = Scheduler(session, limit=limit)
    futures = submit(scheduler, session, TEXTS)
    answers = [without_time(future.result(10)) for future in futures]
    scheduler.close()
    assert [(a.label, a.exit, a.steps) for a in answers] == [(e.label, e.exit, e.steps) for e in expected]
    assert max(abs(a.score - e.score) for a, e in zip(answers, expected, strict=True)) < 1e-5


@pytest.mark.slow
def test_rows_of_many_callers_get_their_own_answers(session: Classifier) -> None:
    expected = {text: session(text).label for text in TEXTS}
    scheduler, replies = Scheduler(session), dict[str, str]()

    def call(mine: list[str]) -> None:
        for text in mine:
            (future,) = submit(scheduler, session, [text])
            replies[text] = future.result(10).label

    callers = [threading.Thread(target=call, args=(TEXTS[start::8],)) for start in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    scheduler.close()
    assert replies == expected


def test_rows_that_wait_together_share_steps(session: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(session, monkeypatch)
    scheduler = Scheduler(session, limit=8)
    first = submit(scheduler, session, ["good film"])
    gate.wait_for_steps(1)
    others = submit(scheduler, session, ["bad film"] * 8)
    gate.open()
    wait_for([*first, *others], 10)
    scheduler.close()
    segments = len(session.manifest.segments)
    assert gate.steps <= 2 * segments < 9 * segments


def test_a_row_of_a_rare_length_goes_on_while_steps_are_full(session: Classifier) -> None:
    segments, limit, rows = len(session.manifest.segments), 4, 3000
    scheduler = Scheduler(session, rows=LEAST_ROWS, limit=limit)
    (row,), answered, is_over = rows_of(session, ["good film"]), list[Any](), threading.Event()

    def again(*_: Any) -> None:  # as many rows are under way as fill a step in front of some segment
        answered.append(None)
        if len(answered) < rows and not rare.done():
            scheduler.submit(row, replace(options(session), ended=again))
        else:
            is_over.set()

    (rare,) = submit(scheduler, session, [" ".join(["good film"] * 12)])
    for _ in range(limit * segments):
        scheduler.submit(row, replace(options(session), ended=again))
    assert is_over.wait(60)
    scheduler.close()
    assert rare.result().label and len(answered) < rows


def test_full_steps_go_on_while_all_rows_are_late(
    session: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "LATE_AFTER", 0)
    gate, limit = Gate(session, monkeypatch), 4
    scheduler = Scheduler(session, limit=limit)
    rows = rows_of(session, [" ".join(["good film"] * 12), *["bad film"] * limit * scheduling.FULL_STEPS])
    at_full_depth = RowOptions(session._full_number, 0)
    futures = [scheduler.submit(rows[0], at_full_depth)]
    gate.wait_for_steps(1)
    futures += [scheduler.submit(row, at_full_depth) for row in rows[1:]]
    gate.open()
    wait_for(futures, 10)
    scheduler.close()
    assert gate.rows[1 : 1 + scheduling.FULL_STEPS] == [limit] * scheduling.FULL_STEPS


@pytest.mark.parametrize("path", [TOKENS, EMBEDDING], ids=["tokens", "embedding"])
def test_other_tasks_are_answered_as_by_the_session(path: Path) -> None:
    with load_row_session(path) as session:
        expected = [session(text).as_json() for text in TEXTS[:20]]
        scheduler = Scheduler(session)
        answers = [future.result(10).as_json() for future in submit(scheduler, session, TEXTS[:20])]
        scheduler.close()
    for answer, right in zip(answers, expected, strict=True):
        assert_close(answer, right)


def test_a_long_text_is_walked_in_windows() -> None:
    long = " ".join(texts(40, seed=5))
    with load_classifier(CLASSIFIER, long_texts="windows") as session:
        expected = session(long)
        scheduler = Scheduler(session, limit=4)
        (future, other) = submit(scheduler, session, [long, "good film"])
        answer = future.result(10)
        assert other.result(10).windows == 1
        scheduler.close()
    assert (answer.windows, answer.label, answer.exit) == (expected.windows, expected.label, expected.exit)
    assert answer.windows > 4


@pytest.mark.slow
def test_each_row_is_walked_at_its_own_point(tmp_path: Path) -> None:
    bundle = bundle_with_points(tmp_path)
    expected = {}
    for point in ("gate-1", "gate-3"):
        with load_classifier(bundle, point=point) as session:
            expected[point] = [session(text).exit for text in TEXTS]
    with load_classifier(bundle, rule="never") as session:
        scheduler = Scheduler(session)
        rows = rows_of(session, TEXTS)
        futures = {
            point: [scheduler.submit(row, RowOptions(*session.add_point(point))) for row in rows]
            for point in expected
        }
        exits = {point: [future.result(10).exit for future in replies] for point, replies in futures.items()}
        full = {future.result(10).exit for future in submit(scheduler, session, TEXTS[:5])}
        scheduler.close()
    assert exits == expected and exits["gate-1"] != exits["gate-3"]
    assert full == {len(session.manifest.segments)}


def test_most_segments_of_a_row_end_its_walk(session: Classifier) -> None:
    scheduler = Scheduler(session)
    (row,) = rows_of(session, ["good film"])
    rule, variant = session.draw()
    exits = [scheduler.submit(row, RowOptions(rule, variant, limit)).result(10).exit for limit in (1, 2, 9)]
    scheduler.close()
    assert exits[0] == 1 and exits[1] <= 2 and exits[2] == session("good film").exit


def test_a_full_queue_refuses_and_says_when_to_come_again(
    session: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(session, monkeypatch)
    scheduler = Scheduler(session, queue=3)
    futures = submit(scheduler, session, TEXTS[:3])
    with pytest.raises(QueueFull, match="3 rows wait already; try again in") as problem:
        submit(scheduler, session, TEXTS[:1])
    assert problem.value.retry_after >= 0.1
    gate.open()
    wait_for(futures, 10)
    assert submit(scheduler, session, TEXTS[:1])[0].result(10).label
    scheduler.close()


def test_a_row_that_is_late_is_given_up(session: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(session, monkeypatch)
    scheduler = Scheduler(session, limit=1)
    patient = submit(scheduler, session, TEXTS[:1])
    gate.wait_for_steps(1)
    late = submit(scheduler, session, TEXTS[1:3], timeout=0.001)
    time.sleep(0.01)
    gate.open()
    for future in late:
        with pytest.raises(DeadlinePassed):
            future.result(10)
    assert patient[0].result(10).label
    scheduler.close()
    assert scheduler.accepted == scheduler.under_way == 0


def test_a_row_under_way_is_given_up_between_two_steps(
    session: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(session, monkeypatch)
    scheduler = Scheduler(session)
    rule, variant = session._full_number, 0
    (row,) = rows_of(session, TEXTS[:1])
    future = scheduler.submit(row, RowOptions(rule, variant), timeout=0.05)
    gate.wait_for_steps(1)
    time.sleep(0.06)
    gate.open()
    with pytest.raises(DeadlinePassed):
        future.result(10)
    scheduler.close()
    assert gate.steps == 1


def test_a_cancelled_row_frees_its_place(session: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(session, monkeypatch)
    scheduler = Scheduler(session, queue=2)
    first = submit(scheduler, session, TEXTS[:1])[0]
    gate.wait_for_steps(1)
    second = submit(scheduler, session, TEXTS[1:2])[0]
    assert first.cancel() and second.cancel()
    gate.open()
    end = time.monotonic() + 10
    while scheduler.accepted and time.monotonic() < end:
        time.sleep(0.001)
    assert submit(scheduler, session, TEXTS[:1])[0].result(10).label
    scheduler.close()


def test_an_error_of_the_engine_reaches_its_rows_alone(
    session: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, step, failed = Scheduler(session), session.engine.step, list[int]()

    def fails_once(segment: int, variant: int, state: Any) -> Any:
        if segment == 1 and not failed:
            failed.append(segment)
            raise RuntimeError("the step failed")
        return step(segment, variant, state)

    monkeypatch.setattr(session.engine, "step", fails_once)
    rule, variant = session._full_number, 0
    rows = rows_of(session, ["good film"] * 2 + [" ".join(["good"] * 20)] * 2)
    futures = [scheduler.submit(row, RowOptions(rule, variant)) for row in rows]
    wait_for(futures, 10)
    problems = [future.exception() for future in futures]
    scheduler.close()
    assert 1 <= sum(isinstance(problem, RuntimeError) for problem in problems) < 4
    assert scheduler.accepted == 0
    assert all(future.result().exit for future in futures if future.exception() is None)


def test_an_answer_that_is_no_number_is_an_error_of_its_row(
    session: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(session)
    with monkeypatch.context() as patched:
        patched.setattr(session, "finish", lambda *_: (_ for _ in ()).throw(BadInput("no number")))
        with pytest.raises(BadInput, match="no number"):
            submit(scheduler, session, TEXTS[:1])[0].result(10)
    assert submit(scheduler, session, TEXTS[:1])[0].result(10).label
    scheduler.close()


def test_close_answers_what_was_accepted_and_refuses_the_rest(
    session: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(session, monkeypatch)
    scheduler = Scheduler(session)
    futures = submit(scheduler, session, TEXTS[:5])
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    time.sleep(0.01)
    with pytest.raises(SessionClosed, match="no further rows"):
        submit(scheduler, session, TEXTS[:1])
    gate.open()
    closing.join()
    assert all(future.result(0).label for future in futures)


def test_close_can_give_up_what_was_accepted(session: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(session, monkeypatch)
    scheduler = Scheduler(session)
    futures = submit(scheduler, session, TEXTS[:5])
    closing = threading.Thread(target=lambda: scheduler.close(finish=False))
    closing.start()
    time.sleep(0.01)
    gate.open()
    closing.join()
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(0)


def test_closing_the_session_ends_every_row(session: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(session, monkeypatch)
    scheduler = Scheduler(session, limit=1)
    futures = submit(scheduler, session, TEXTS[:5])
    gate.wait_for_steps(1)
    closing = threading.Thread(target=session.close)
    closing.start()
    time.sleep(0.01)
    gate.open()
    closing.join()
    done, waiting = wait_for(futures, 10)
    assert len(done) == 5 and not waiting
    # A row that was done before the session closed has its answer.
    assert all(isinstance(future.exception(), (SessionClosed, type(None))) for future in futures)
    scheduler.close()


def test_rows_of_a_closed_session_get_its_error(session: Classifier) -> None:
    scheduler = Scheduler(session)
    rows = rows_of(session, TEXTS[:2])
    wanted = options(session)
    session.close()
    with pytest.raises(SessionClosed, match="the session is closed"):
        scheduler.submit(rows[0], wanted).result(10)
    with pytest.raises(SessionClosed):
        scheduler.submit(rows[1], wanted).result(10)
    scheduler.close()


@pytest.mark.slow
def test_a_budget_draws_the_rule_of_each_row_and_counts_its_answer(tmp_path: Path) -> None:
    with load_classifier(bundle_with_points(tmp_path), budget_depth=0.7, budget_window=50) as session:
        scheduler = Scheduler(session)
        wait_for(submit(scheduler, session, TEXTS), 10)
        scheduler.close()
        assert session.budget_report().rows == len(TEXTS)


def test_observer_is_told_every_answer_and_its_time(session: Classifier) -> None:
    observed = list[tuple[str, float]]()
    scheduler = Scheduler(session, observe=lambda answer, seconds: observed.append((answer.label, seconds)))
    futures = submit(scheduler, session, TEXTS[:9])
    scheduler.close()
    assert len(observed) == len(futures) == 9 and all(seconds > 0 for _, seconds in observed)


@pytest.mark.parametrize(("name", "size"), [("rows", 64), ("queue", 0), ("limit", 0)])
def test_sizes_out_of_range_are_refused(session: Classifier, name: str, size: int) -> None:
    with pytest.raises(BadSetting, match=f"{name} {size}: expected"):
        Scheduler(session, **{name: size})  # type: ignore[arg-type]
