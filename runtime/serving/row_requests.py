"""The rows of a request: they are read, accepted by the scheduler all or none, and answered or given up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar, cast

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from offramp.runtime.errors import BadInput, BadSetting, ItemError, SessionClosed
from offramp.runtime.row_session import RowAnswer
from offramp.runtime.serving.limits import ServerLimits
from offramp.runtime.serving.models import Models, ServedModel
from offramp.runtime.serving.scheduler import DeadlinePassed, RowOptions

INLINE_CHARACTERS = 20_000  # more text than this is tokenized in another thread, so that no request waits
CALLER_GONE = 499  # status of requests whose caller went away, for the log
T = TypeVar("T")
Answers = tuple[list[RowAnswer | ItemError], int]  # answers in the order of the items, and their tokens


async def answer_items(
    models: Models,
    name: str | None,
    items: Sequence[Any],
    options: Callable[[ServedModel], RowOptions],
    request: Request,
    limits: ServerLimits,
    timeout_ms: float | None = None,
    *,
    windows: bool = True,
) -> Answers:
    """The answers to the items of a request, in order, and the number of their tokens.

    name: of the model. options: called for each row. timeout_ms: of the request; None: that of the server.
    windows: whether those of a long text behind the first are walked. Rows of a caller that goes away are
    dropped. Raises QueueFull if there is no room for all of them, and DeadlinePassed. If the bundle is
    replaced before its rows are accepted, the new one answers.
    """
    timeout = limits.timeout if timeout_ms is None else timeout_ms / 1e3
    while True:
        model = models.rows(name)
        try:
            return await _answer_by(model, items, options, request, limits.items, timeout, windows)
        except SessionClosed:
            if models.rows(name) is model:
                raise


async def _answer_by(
    model: ServedModel,
    items: Sequence[Any],
    options: Callable[[ServedModel], RowOptions],
    request: Request,
    max_items: int,
    timeout: float,
    windows: bool,
) -> Answers:
    """See answer_items; max_items: of a request. Raises SessionClosed if the bundle was closed."""
    if len(items) > max_items:
        raise BadSetting(f"input: {len(items)} items; this server takes {max_items} in a request")
    queue = model.scheduler.queue
    if len(items) > queue:
        raise BadSetting(
            f"input: {len(items)} items; this server accepts {queue} rows at once (--queue), so it can never "
            f"accept these: send {queue} or fewer in a request, or start the server with a larger --queue"
        )
    model.scheduler.require_room(len(items))
    if sum(len(item) for item in items if isinstance(item, str)) > INLINE_CHARACTERS or model.reads_images:
        rows = await run_in_threadpool(model.read, items)
    else:
        rows = model.read(items)
    if not windows:
        rows = [row if isinstance(row, ItemError) else replace(cast(Any, row), rest=()) for row in rows]
    # Other requests may have come while these items were read. From here there is no await until all rows are
    # accepted, so that no other request comes in between: a refusal counts the rows of others alone.
    model.scheduler.require_room(sum(not isinstance(row, ItemError) for row in rows))
    futures: dict[int, Future[RowAnswer]] = {}  # by index
    try:
        for index, row in enumerate(rows):
            if not isinstance(row, ItemError):
                futures[index] = model.scheduler.submit(row, options(model), timeout)
        results = dict(zip(futures, await _results(list(futures.values()), request, timeout), strict=True))
    except BaseException:
        for future in futures.values():
            future.cancel()
        raise
    answers: list[RowAnswer | ItemError] = []
    for index, row in enumerate(rows):
        result = row if isinstance(row, ItemError) else results[index]
        if isinstance(result, BadInput):
            result = ItemError(index, str(result))
        if isinstance(result, BaseException):
            raise result
        answers.append(result)
    read = (part for row in rows if not isinstance(row, ItemError) for part in (row, *row.rest))
    return answers, sum(part.length for part in read)


async def _results(
    futures: Sequence[Future[RowAnswer]], request: Request, timeout: float
) -> list[RowAnswer | BaseException]:
    """The results of futures, or their exceptions; cancels them if the caller goes away or time is over."""
    answered = asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
    try:
        return list(await cancel_if_caller_leaves(request, answered, timeout))
    except asyncio.TimeoutError:
        raise DeadlinePassed(f"not answered in {1e3 * timeout:g} ms") from None


async def cancel_if_caller_leaves(request: Request, work: Awaitable[T], timeout: float | None = None) -> T:
    """The result of some work, which is cancelled if the caller of a request goes away before.

    The body of the request must have been read. Raises an HTTPException then, and asyncio.TimeoutError after
    so many seconds.
    """
    result = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_until_gone(request))
    either: set[asyncio.Future[Any]] = {result, gone}
    try:
        await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            raise HTTPException(CALLER_GONE, "the caller went away")
        if not result.done():
            raise asyncio.TimeoutError
        return await result
    finally:
        for future in either:
            future.cancel()
        await asyncio.gather(*either, return_exceptions=True)  # until the work has ended


async def _wait_until_gone(request: Request) -> None:
    """Return when the connection of a request whose body was read is closed."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
