"""The scheduler when something else than a step fails: the walk itself, and who is told of rows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from typing import Any

import pytest
from failing import failing
from tiny_bundles import CLASSIFIER, texts

from offramp.runtime import Classifier, load_classifier
from offramp.runtime.inputs.text import items_to_rows
from offramp.runtime.serving.scheduler import RowOptions, Scheduler, ThreadEnded
from offramp.runtime.walker import Walk

TEXTS = texts(8, seed=3)


class SteppedEngine:
    """The engine of a session, which waits before a step for go_on, and then raises a problem, if any."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.go_on, self.begun = engine, threading.Event(), threading.Event()
        self.problem: Exception | None = None
        self.go_on.set()

    def step(self, *arguments: Any) -> Any:
        """Run a step when go_on is set."""
        self.begun.set()
        assert self.go_on.wait(20)
        if self.problem is not None:
            raise self.problem
        return self._engine.step(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@pytest.fixture
def session() -> Iterator[Classifier]:
    with load_classifier(CLASSIFIER) as opened:
        yield opened


@pytest.fixture
def engine(session: Classifier, monkeypatch: pytest.MonkeyPatch) -> SteppedEngine:
    double = SteppedEngine(session.engine)
    monkeypatch.setattr(session, "engine", double)
    return double


def submit(scheduler: Scheduler[Any], session: Any, items: list[str], **more: Any) -> list[Future[Any]]:
    """Submit texts, which are walked to the end."""
    rows = items_to_rows(session._reader, items)
    return [scheduler.submit(row, RowOptions(session._full_number, 0, **more)) for row in rows]


def under_way(scheduler: Scheduler[Any], session: Any, engine: SteppedEngine) -> list[Future[Any]]:
    """Texts that wait for a segment, while the engine is in a step of the first of them."""
    engine.go_on.clear()
    first = submit(scheduler, session, TEXTS[:1])
    assert engine.begun.wait(10)
    return first


# the walk


def test_a_walk_that_cannot_choose_a_step_ends_its_rows(
    session: Classifier, engine: SteppedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, problem = Scheduler(session), RuntimeError("the walk failed")
    futures = under_way(scheduler, session, engine)
    monkeypatch.setattr(Walk, "oldest_queue", failing(problem))
    engine.go_on.set()
    done, _ = wait_for(futures, 10)
    monkeypatch.undo()
    scheduler.close()
    assert [future.exception() for future in done] == [problem] and scheduler.accepted == 0


def test_rows_are_answered_after_a_walk_that_failed(
    session: Classifier, engine: SteppedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(session)
    with monkeypatch.context() as patched:
        futures = under_way(scheduler, session, engine)
        patched.setattr(Walk, "oldest_queue", failing(RuntimeError("the walk failed")))
        engine.go_on.set()
        assert not wait_for(futures, 10).not_done
    (future,) = submit(scheduler, session, TEXTS[:1])
    assert future.result(10).label
    scheduler.close()


def test_an_error_before_any_row_is_begun_ends_those_that_wait(
    session: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, problem = Scheduler(session), RuntimeError("no place")
    monkeypatch.setattr(scheduler, "_allocate", failing(problem))
    done, _ = wait_for(submit(scheduler, session, TEXTS[:1]), 10)
    monkeypatch.undo()
    scheduler.close()
    assert [future.exception() for future in done] == [problem]


# who is told


def test_an_observer_that_fails_ends_its_row_with_the_error(session: Classifier) -> None:
    problem = KeyError("a wrong name")
    scheduler = Scheduler(session, observe=failing(problem))
    (future,) = submit(scheduler, session, TEXTS[:1])
    assert future.exception(10) is problem
    scheduler.close()


def test_rows_are_answered_after_an_observer_that_failed(session: Classifier) -> None:
    problems = [KeyError("a wrong name")]

    def observe(*_: Any) -> None:
        if problems:
            raise problems.pop()

    scheduler = Scheduler(session, observe=observe)
    for text in TEXTS[:2]:
        (future,) = submit(scheduler, session, [text])
        wait_for([future], 10)
    assert future.done() and future.result().label and scheduler.is_alive
    scheduler.close()


def test_the_log_has_the_traceback_of_an_observer_that_failed(
    session: Classifier, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = Scheduler(session, observe=failing(KeyError("a wrong name")))
    wait_for(submit(scheduler, session, TEXTS[:1]), 10)
    scheduler.close()
    (record,) = (record for record in caplog.records if record.name == "offramp.serve")
    assert record.exc_info is not None and "KeyError: 'a wrong name'" in caplog.text


def test_an_error_after_an_answer_leaves_the_answer(session: Classifier) -> None:
    scheduler = Scheduler(session)
    futures = [
        *submit(scheduler, session, TEXTS[:1], ended=failing(KeyError("a wrong name"))),
        *submit(scheduler, session, TEXTS[1:2]),
    ]
    done, waiting = wait_for(futures, 10)
    assert not waiting and all(future.result().label for future in done) and scheduler.is_alive
    scheduler.close()


def test_a_row_that_fails_when_it_is_told_of_an_exit_fails_alone(
    session: Classifier, engine: SteppedEngine
) -> None:
    scheduler, problem = Scheduler(session), KeyError("a wrong name")
    first = under_way(scheduler, session, engine)
    bad = submit(scheduler, session, TEXTS[1:2], on_exit=failing(problem))
    others = submit(scheduler, session, TEXTS[2:6])
    engine.go_on.set()
    wait_for([*first, *bad, *others], 10)
    scheduler.close()
    assert bad[0].exception() is problem
    assert all(future.result().label for future in (*first, *others))


# the end of the thread


def end_thread(scheduler: Scheduler[Any], session: Any, engine: SteppedEngine) -> list[Future[Any]]:
    """Texts that wait when an error ends the thread: a step fails, and its rows cannot be forgotten."""
    futures = under_way(scheduler, session, engine)
    futures += submit(scheduler, session, TEXTS[1:3])
    scheduler._walk.drop = failing(OSError("the cache is gone"))  # type: ignore[method-assign]
    engine.problem = RuntimeError("the step failed")
    engine.go_on.set()
    return futures


def test_rows_that_wait_when_the_thread_ends_get_the_reason(
    session: Classifier, engine: SteppedEngine
) -> None:
    scheduler = Scheduler(session)
    done, waiting = wait_for(end_thread(scheduler, session, engine), 10)
    assert not waiting and {type(future.exception()) for future in done} == {ThreadEnded}
    assert "an error (OSError) ended the thread that walks rows" in str(done.pop().exception())
    assert scheduler.accepted == 0


def test_rows_after_the_end_of_the_thread_are_refused_with_the_reason(
    session: Classifier, engine: SteppedEngine
) -> None:
    scheduler = Scheduler(session)
    wait_for(end_thread(scheduler, session, engine), 10)
    with pytest.raises(ThreadEnded, match="see the log of the server"):
        submit(scheduler, session, TEXTS[:1])
    scheduler.close()
    assert not scheduler.is_alive


def test_no_row_is_under_way_after_the_end_of_the_thread(session: Classifier, engine: SteppedEngine) -> None:
    scheduler, (row,) = Scheduler(session), items_to_rows(session._reader, TEXTS[:1])
    engine.go_on.clear()
    background = scheduler.submit_background(row, RowOptions(session._full_number, 0))
    assert background is not None and engine.begun.wait(10)
    wait_for([background, *end_thread(scheduler, session, engine)], 10)
    scheduler.close()
    assert isinstance(background.exception(), ThreadEnded)
    assert scheduler.under_way == scheduler.accepted == 0
