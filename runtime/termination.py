"""End a run at SIGTERM: what is being walked is finished and written, and no further line is read."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


class Terminated(BaseException):
    """SIGTERM came while the run waited for input, or before it began to read."""


class Termination:
    """Handles SIGTERM while it is entered, if that is in the main thread.

    requested: whether the signal has come. While `lines` waits for its source, and before and after it is
    read, the signal raises Terminated. While a line is being answered it only ends the lines.
    """

    def __init__(self) -> None:
        self.requested = False
        self._waits = True
        self._before: Any = None

    def lines(self, source: Iterator[T]) -> Iterator[T]:
        """The items of a source, until the signal comes."""
        while not self.requested:
            self._waits = True
            try:
                item = next(source)
            except (StopIteration, Terminated):
                return
            finally:
                self._waits = False
            yield item

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._waits:
            self._waits = False  # raised once
            raise Terminated
