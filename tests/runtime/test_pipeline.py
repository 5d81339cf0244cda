"""Work in the background: order, errors, what is read when, and no thread that stays."""

import gc
import threading
from collections.abc import Iterator

import pytest

from offramp.runtime.pipeline import BackgroundTask, chunks, prefetch


def prefetch_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "offramp prefetch"}


def failing(count: int) -> Iterator[int]:
    yield from range(count)
    raise OSError("the source broke")


def test_prefetch_keeps_order() -> None:
    assert list(prefetch(range(50), str)) == [str(number) for number in range(50)]
    assert list(prefetch([], str)) == []


def test_prefetch_works_on_the_next_item_in_the_background() -> None:
    started = [threading.Event() for _ in range(3)]
    results = prefetch(range(3), lambda number: started[number].set())
    next(results)
    assert started[1].wait(5) and not started[2].is_set()
    assert len(list(results)) == 2


def test_prefetch_works_in_a_thread_except_for_the_first_item() -> None:
    threads = list(prefetch(range(4), lambda _: threading.current_thread()))
    main = threading.current_thread()
    assert threads[0] is main and main not in threads[1:]


def test_prefetch_reads_the_source_in_the_callers_thread() -> None:
    def source() -> Iterator[threading.Thread]:
        for _ in range(4):
            yield threading.current_thread()

    assert set(prefetch(source(), lambda thread: thread)) == {threading.current_thread()}


def test_prefetch_reads_one_item_beyond_the_result() -> None:
    read = []

    def source() -> Iterator[int]:
        for number in range(9):
            read.append(number)
            yield number

    results = prefetch(source(), str)
    assert read == []
    for number, _ in enumerate(results):
        assert len(read) == min(number + 2, 9)


def test_prefetch_of_one_item_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "Thread", None)
    assert list(prefetch([1], str)) == ["1"]


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_prefetch_raises_work_errors_after_earlier_results(bad: int) -> None:
    results = []
    with pytest.raises(ZeroDivisionError):
        for result in prefetch(range(5), lambda number: 1 / (number - bad)):
            results.append(result)
    assert len(results) == bad and not prefetch_threads()


@pytest.mark.parametrize("good", [0, 1, 3])
def test_prefetch_raises_source_errors_after_earlier_results(good: int) -> None:
    results = []
    with pytest.raises(OSError, match="the source broke"):
        for result in prefetch(failing(good), str):
            results.append(result)
    assert len(results) == good and not prefetch_threads()


def slow(number: int) -> int:
    threading.Event().wait(0.05)
    return number


def test_prefetch_leaves_no_thread_when_closed() -> None:
    results = prefetch(range(9), slow)
    next(results)
    assert prefetch_threads()
    results.close()
    assert not prefetch_threads()


@pytest.mark.slow
def test_prefetch_leaves_no_thread_when_dropped() -> None:
    results = prefetch(range(9), slow)
    next(results)
    assert prefetch_threads()
    del results
    gc.collect()
    assert not prefetch_threads()


@pytest.mark.slow
def test_prefetch_leaves_no_thread_when_idle() -> None:
    results = prefetch(range(9), slow)
    next(results)
    (thread,) = prefetch_threads()
    thread.join(5)
    assert not prefetch_threads() and next(results) == 1


def test_prefetch_keeps_no_result_alive() -> None:
    class Large:
        pass

    import weakref

    results = prefetch(range(3), lambda _: Large())
    result = next(results)
    reference = weakref.ref(result)
    del result
    assert reference() is None


def test_chunks_count_the_items_before() -> None:
    assert list(chunks(iter("abcde"), 2)) == [(0, ["a", "b"]), (2, ["c", "d"]), (4, ["e"])]
    assert list(chunks(iter("abcd"), 2)) == [(0, ["a", "b"]), (2, ["c", "d"])]
    assert list(chunks(iter(""), 2)) == []


def test_chunks_yield_items_before_an_error() -> None:
    parts = chunks(failing(3), 2)
    assert [next(parts), next(parts)] == [(0, [0, 1]), (2, [2])]
    with pytest.raises(OSError, match="the source broke"):
        next(parts)


def test_background_task_raises_at_result() -> None:
    task = BackgroundTask(lambda number: 1 / number, 0)
    task.join()
    with pytest.raises(ZeroDivisionError):
        task.result()
