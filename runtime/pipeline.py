"""Divide a stream into chunks, and work on the next chunk in a thread while the caller uses one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Generic, TypeVar

from offramp.runtime.errors import SessionForked

A = TypeVar("A")
B = TypeVar("B")


def prefetch(items: Iterable[A], work: Callable[[A], B]) -> Iterator[B]:
    """Iterate over work(item) for all items; a thread works on the next while the caller uses a result.

    Items are read in the caller's thread, one item ahead of the result that is returned, so that a source
    needs no thread safety. Errors of the items or of the work are raised in order, after the results before
    them. The first result is computed without a thread, as the caller has to wait for it anyway, so a single
    item starts none. A thread works on one item: between two results there is at most one, and closing or
    dropping the iterator waits for it.
    """
    source = iter(items)
    try:
        first = next(source)
    except StopIteration:
        return
    results = [work(first)]  # a list, so that a result that was returned is not kept here too
    del first
    while True:
        problem: Exception | None = None
        task: BackgroundTask[A, B] | None = None
        try:
            task = BackgroundTask(work, next(source))
        except StopIteration:
            pass
        except Exception as raised:
            problem = raised
        try:
            yield results.pop()
        finally:
            if task is not None:
                task.join()
        if problem is not None:
            raise problem
        if task is None:
            return
        results.append(task.result())


def chunks(source: Iterator[A], size: int) -> Iterator[tuple[int, list[A]]]:
    """Divide items into chunks of `size`: (number of items before the chunk, items); the last may be shorter.

    If the source raises an error, the items before it come first.
    """
    done = 0
    while True:
        items: list[A] = []
        problem: Exception | None = None
        try:
            for item in islice(source, size):
                items.append(item)  # one by one: list() would lose the items before an error
        except Exception as raised:
            problem = raised
        if items:
            yield done, items
        if problem is not None:
            raise problem
        if not items:
            return
        done += len(items)


class BackgroundTask(Generic[A, B]):
    """Runs work(item) in its own thread, which starts at once."""

    def __init__(self, work: Callable[[A], B], item: A) -> None:
        self._result: list[B] = []
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work, item), name="offramp prefetch")
        self._thread.start()

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def result(self) -> B:
        """Wait for the work and return its result (once), or raise the error of the work."""
        self._thread.join()
        if self._problem is not None:
            raise self._problem
        if not self._result:
            raise SessionForked("the process was forked while a thread worked on this; call map again")
        return self._result.pop()

    def _run(self, work: Callable[[A], B], item: A) -> None:
        try:
            self._result.append(work(item))
        except BaseException as problem:  # raised by result()
            self._problem = problem
