"""ee-run with a bundle that gives one answer for each line: the JSON object of every answer and error."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from offramp.runtime.bundle.manifest import ImageInput
from offramp.runtime.errors import ItemError
from offramp.runtime.inputs.lines import Line
from offramp.runtime.inputs.text import Item
from offramp.runtime.output import Output
from offramp.runtime.row_session import WINDOW, RowAnswer, RowSession
from offramp.runtime.run_stats import RunStats
from offramp.runtime.termination import Termination

if TYPE_CHECKING:
    from offramp.runtime.classifier import Answer


def window_of(batch_size: int) -> int:
    """Lines that are answered together: those whose rows are sorted by length and may be joined."""
    return batch_size * WINDOW if batch_size > 1 else 1


def write_answers(
    session: RowSession[RowAnswer],
    lines: Iterator[Line],
    output: Output,
    stats: RunStats,
    termination: Termination,
    *,
    sets: bool,
) -> None:
    """Write one JSON object for every line, in order, and hand on each window when it is answered.

    Ends early, behind the answers of a window, if the termination is requested.
    """
    images = isinstance(session.manifest.input, ImageInput)
    window = window_of(session.batch_size)
    pending: deque[Line] = deque()  # lines that were read and are not written yet: two windows at most

    def items() -> Iterator[Item]:
        for line in termination.lines(lines):
            if line.problem is not None and window == 1:
                output.write_answer(_error_object(line, line.problem, stats, images), 0, flush=True)
                continue
            pending.append(line)
            # In a window a bad line is an item, too, so that windows are the same lines in every run.
            yield line.item if line.problem is None else None

    answers = session.answers(items())
    for number, answer in enumerate(answers, 1):
        line = pending.popleft()
        if line.problem is not None:
            value, depth = _error_object(line, line.problem, stats, images), 0
        else:
            value = _object(line, answer, stats, images, sets=sets)
            depth = 0 if isinstance(answer, ItemError) else answer.depth
        is_last = number % window == 0
        output.write_answer(value, depth / session.manifest.blocks, flush=is_last or not pending)
        if is_last and termination.requested:
            break
    output.flush()


def _object(
    line: Line, answer: RowAnswer | ItemError, stats: RunStats, images: bool, *, sets: bool
) -> dict[str, Any]:
    """The JSON object of an answer."""
    if isinstance(answer, ItemError):
        return _error_object(line, answer.message, stats, images)
    stats.add(answer.exit, answer.depth, answer.seconds)
    value: dict[str, Any] = {"file": line.shown_name} if images else {}
    value |= answer.as_json()
    if sets:
        value |= _sets(cast("Answer", answer))  # the command refused the option for other tasks
    value |= {"exit": answer.exit, "depth": answer.depth, "ms": round(1e3 * answer.seconds, 3)}
    if answer.windows > 1:
        value["windows"] = answer.windows
    return value | {"truncated": True} if answer.truncated or line.cut else value


def _sets(answer: Answer) -> dict[str, Any]:
    """The fields that option --sets adds; none for an answer without calibration, as of several windows."""
    if answer.calibrated is None or answer.label_set is None:
        return {}
    return {"calibrated": round(answer.calibrated, 6), "set": list(answer.label_set)}


def _error_object(line: Line, problem: str, stats: RunStats, images: bool) -> dict[str, Any]:
    stats.failed += 1
    name = {"file": line.shown_name} if images and line.name else {}
    return {"error": problem, "line": line.number} | name
