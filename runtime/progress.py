"""Progress of phases that take long, on standard error: bars on a terminal, elsewhere one line a phase."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import click

T = TypeVar("T")
_REDRAW = 0.1  # seconds between two drawings of a bar at least
_BAR = 36  # characters of a bar at most
_BESIDE = 34  # characters of counts, time and note beside it
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


class _Nesting:
    """How many phases are open: a phase inside another one shows nothing, as both would write to one line."""

    depth = 0


@contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """A context in which neither bars, lines of phases nor notes are written; on: whether it is in force."""
    token = _quiet.set(on or _quiet.get())
    try:
        yield
    finally:
        _quiet.reset(token)


def note(text: str) -> None:
    """Write a line on standard error that is neither an error nor a warning; nothing within quiet()."""
    if not _quiet.get():
        click.echo(text, err=True)


@contextmanager
def announce(label: str) -> Iterator[None]:
    """A context for a phase whose steps are not counted: a line, on a terminal before it, elsewhere after."""
    terminal, started = _is_terminal(), time.monotonic()
    if terminal:
        note(f"{label} ...")
    yield
    if not terminal:
        note(f"{label}: {format_seconds(time.monotonic() - started)}")


class Phase:
    """A phase that is under way; see progress().

    note: a short text beside the bar, such as "loss 0.52", and at the end of the phase's line.
    """

    def __init__(self, draw: Callable[[int, str], None] | None) -> None:
        self.note, self._draw = "", draw
        self.done = self._pending = 0
        self._drawn = 0.0

    def advance(self, steps: int = 1) -> None:
        """Count further steps as done."""
        self.done, self._pending = self.done + steps, self._pending + steps
        if self._draw is not None and time.monotonic() - self._drawn > _REDRAW:
            self.flush()

    def flush(self) -> None:
        """Draw the steps that were counted and are not drawn yet."""
        if self._draw is not None:
            self._draw(self._pending, self.note)
            self._pending, self._drawn = 0, time.monotonic()


@contextmanager
def progress(
    label: str, total: int, *, unit: str = "step", done: int = 0, shown: bool = True
) -> Iterator[Phase]:
    """A context for a phase of `total` steps; the caller advances the Phase.

    unit: what a step is, in the singular. done: steps of an earlier run. shown: False shows nothing, as for
    all processes but one. Nothing is shown within another phase and within quiet().
    """
    hidden = not shown or _quiet.get() or _Nesting.depth > 0
    _Nesting.depth += 1
    started = time.monotonic()
    try:
        if hidden:
            yield Phase(None)
        elif not _is_terminal():
            phase = Phase(None)
            yield phase
            count = f"{phase.done} {_plural(unit) if phase.done != 1 else unit}"
            seconds = format_seconds(time.monotonic() - started)
            click.echo(", ".join(filter(None, (f"{label}: {count} in {seconds}", phase.note))), err=True)
        else:
            columns = shutil.get_terminal_size().columns
            with click.progressbar(
                length=total,
                label=label,
                file=sys.stderr,
                show_pos=True,
                show_percent=False,
                width=max(5, min(_BAR, columns - len(label) - _BESIDE)),
                item_show_func=lambda item: item,
            ) as bar:

                def draw(steps: int, text: str) -> None:
                    bar.update(steps, text or None)

                phase = Phase(draw)
                if done:
                    bar.update(done)
                yield phase
                phase.flush()
    finally:
        _Nesting.depth -= 1


def track(items: Sequence[T], label: str, *, unit: str = "step") -> Iterator[T]:
    """Yield the items as a phase with one step for each; see progress()."""
    with progress(label, len(items), unit=unit) as phase:
        for item in items:
            yield item
            phase.advance()


def format_seconds(seconds: float) -> str:
    """A time for people, such as "8.2 s", "4 min 05 s" or "2 h 10 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def _plural(unit: str) -> str:
    return unit + ("es" if unit.endswith("ch") else "s")


def _is_terminal() -> bool:
    """Whether standard error is a terminal that can redraw a line."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
