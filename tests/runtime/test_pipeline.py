"""One item ahead: order, errors in their turn, what is read, and no thread left behind."""

import gc
import threading
from collections.abc import Iterator

import pytest

from offramp.runtime.pipeline import BackgroundTask, chunks, prefetch


def others() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "offramp ahead"}


def failing(count: int) -> Iterator[int]:
    yield from range(count)
    raise OSError("the source broke")


def test_results_come_in_order() -> None:
    assert list(prefetch(range(50), str)) == [str(number) for number in range(50)]
    assert list(prefetch([], str)) == []


def test_the_next_item_is_worked_on_while_a_result_is_used() -> None:
    begun = [threading.Event() for _ in range(3)]
    results = prefetch(range(3), lambda number: begun[number].set())
    next(results)
    assert begun[1].wait(5) and not begun[2].is_set()
    assert len(list(results)) == 2


def test_work_is_in_another_thread_except_for_the_first() -> None:
    found = list(prefetch(range(4), lambda _: threading.current_thread()))
    main = threading.current_thread()
    assert found[0] is main and main not in found[1:]


def test_the_source_is_read_in_the_callers_thread() -> None:
    def source() -> Iterator[threading.Thread]:
        for _ in range(4):
            yield threading.current_thread()

    assert set(prefetch(source(), lambda thread: thread)) == {threading.current_thread()}


def test_one_item_is_read_beyond_the_result() -> None:
    read = []

    def source() -> Iterator[int]:
        for number in range(9):
            read.append(number)
            yield number

    results = prefetch(source(), str)
    assert read == []
    for number, _ in enumerate(results):
        assert len(read) == min(number + 2, 9)


def test_a_single_item_needs_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "Thread", None)
    assert list(prefetch([1], str)) == ["1"]


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_an_error_of_the_work_comes_in_its_turn(bad: int) -> None:
    found = []
    with pytest.raises(ZeroDivisionError):
        for result in prefetch(range(5), lambda number: 1 / (number - bad)):
            found.append(result)
    assert len(found) == bad and not others()


@pytest.mark.parametrize("good", [0, 1, 3])
def test_an_error_of_the_source_comes_in_its_turn(good: int) -> None:
    found = []
    with pytest.raises(OSError, match="the source broke"):
        for result in prefetch(failing(good), str):
            found.append(result)
    assert len(found) == good and not others()


def slow(number: int) -> int:
    threading.Event().wait(0.05)
    return number


def test_closing_leaves_no_thread() -> None:
    results = prefetch(range(9), slow)
    next(results)
    assert others()
    results.close()
    assert not others()


def test_dropping_leaves_no_thread() -> None:
    results = prefetch(range(9), slow)
    next(results)
    assert others()
    del results
    gc.collect()
    assert not others()


def test_waiting_leaves_no_thread_either() -> None:
    results = prefetch(range(9), slow)
    next(results)
    (thread,) = others()
    thread.join(5)
    assert not others() and next(results) == 1


def test_results_are_not_held() -> None:
    class Large:
        pass

    import weakref

    results = prefetch(range(3), lambda _: Large())
    one = next(results)
    gone = weakref.ref(one)
    del one
    assert gone() is None


def test_chunks_count_what_is_before_them() -> None:
    assert list(chunks(iter("abcde"), 2)) == [(0, ["a", "b"]), (2, ["c", "d"]), (4, ["e"])]
    assert list(chunks(iter("abcd"), 2)) == [(0, ["a", "b"]), (2, ["c", "d"])]
    assert list(chunks(iter(""), 2)) == []


def test_chunks_give_what_came_before_an_error() -> None:
    found = chunks(failing(3), 2)
    assert [next(found), next(found)] == [(0, [0, 1]), (2, [2])]
    with pytest.raises(OSError, match="the source broke"):
        next(found)


def test_a_task_raises_where_it_is_asked() -> None:
    task = BackgroundTask(lambda number: 1 / number, 0)
    task.join()
    with pytest.raises(ZeroDivisionError):
        task.result()
