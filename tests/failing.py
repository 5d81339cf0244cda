"""Functions that raise, as doubles in tests of errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def failing(problem: BaseException) -> Callable[..., Any]:
    """A function that raises at each call."""

    def fail(*_: Any, **__: Any) -> Any:
        raise problem

    return fail


def failing_once(work: Callable[..., Any], problem: Exception) -> Callable[..., Any]:
    """The function `work`, whose next call raises."""
    left = [problem]

    def run(*arguments: Any) -> Any:
        if left:
            raise left.pop()
        return work(*arguments)

    return run
