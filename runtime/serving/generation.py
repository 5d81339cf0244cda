"""A bundle that generates text, as a server has it: many texts at once, each chunk as soon as it exists."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offramp.runtime.batching import TEXTS
from offramp.runtime.bundle.manifest import Manifest
from offramp.runtime.errors import OfframpError, SessionClosed, SessionForked
from offramp.runtime.generator import TextGenerator
from offramp.runtime.inputs.chat import Message
from offramp.runtime.sampling import Sampling
from offramp.runtime.serving.limits import LOG, ServerLimits
from offramp.runtime.serving.scheduler import DeadlinePassed, QueueFull, ThreadEnded
from offramp.runtime.text_chunks import TextChunk

Result = TextChunk | BaseException  # a chunk ends the text if it says why; an exception ends it always


@dataclass(eq=False)
class _Request:
    """A text that is asked for. give: gets each result.

    accepted_at: when it was accepted (time.perf_counter). tokens: that were generated. is_abandoned: whether
    nobody waits for it any more.
    """

    ids: Sequence[int]
    max_new_tokens: int
    stop: Sequence[str]
    sampling: Sampling | None
    give: Callable[[Result], None]
    accepted_at: float
    tokens: int = 0
    is_abandoned: bool = False


@dataclass(frozen=True)
class EndedText:
    """The tokens of a text that ended, one or more of which were generated.

    ended: as in TextChunk; None if its caller went away, or an error or its time limit ended it.
    """

    ended: str | None
    prompt_tokens: int
    tokens: int


@dataclass
class ServedGenerator:
    """A bundle that generates text: its name in requests and its session, whose texts one thread generates.

    queue: most texts that are accepted and not finished. tag: see ServedModel. texts: most texts that are
    generated at once; the others wait in the order in which they came. observe: told, in the thread, of each
    text that ended, and the seconds since it was accepted.
    """

    name: str
    folder: Path
    session: TextGenerator
    queue: int
    tag: str
    texts: int = TEXTS
    observe: Callable[[EndedText, float], None] | None = None
    accepted: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._arrived: deque[_Request] = deque()
        self._requests: dict[int, _Request] = {}  # of the batch, by the numbers of their texts
        self._closing = False
        self._is_over = False  # whether the thread takes no further requests
        self._ended_by: BaseException | None = None  # the error that ended it
        self._finish = True
        self._batch = self.session.open_batch(self.texts)
        self._thread = threading.Thread(target=self._run, name="offramp texts", daemon=True)
        self._thread.start()

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle."""
        return self.session.manifest

    @property
    def is_alive(self) -> bool:
        """Whether texts are still generated; False after close(), or if an error ended the thread."""
        return self._thread.is_alive() and not self._closing

    @property
    def under_way(self) -> int:
        """Texts that are generated now."""
        return self._batch.under_way

    async def chunks(
        self,
        prompt: str | Sequence[Message],
        max_new_tokens: int,
        *,
        stop: Sequence[str] = (),
        for_template: Mapping[str, Any] | None = None,
        sampling: Sampling | None = None,
        timeout: float | None = None,
        first_token: float = ServerLimits.timeout,
        read: Callable[[Sequence[int]], None] | None = None,
    ) -> AsyncGenerator[TextChunk, None]:
        """Generate a text; see TextGenerator.generate, whose errors are raised before the first chunk.

        stop: strings at which the text ends.
        for_template: the keywords of TextGenerator.generate that are for a chat template.
        sampling: how tokens are chosen; None: the most probable one each time.
        timeout: seconds in which the text must end; None: a text that has its first token has no limit.
        first_token: seconds in which the first token must be there if there is no timeout.
        read: called with the ids of the prompt.

        A text that is late is given up, and DeadlinePassed is raised. The caller must close the iterator; the
        text ends then, after the step that is computed. Raises QueueFull, SessionClosed, and ThreadEnded if
        no text can be generated any more.
        """
        with self._changed:
            if self._closing or self._ended_by is not None:
                raise self._ended()
            if self.accepted >= self.queue:
                raise QueueFull(self.accepted, 1.0)
            self.accepted += 1
        accepted_at = time.perf_counter()
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Result] = asyncio.Queue()

        def give(result: Result) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits for the text any more
                loop.call_soon_threadsafe(arrived.put_nowait, result)

        def give_up() -> None:
            if timeout is not None or request is None or not request.tokens:
                arrived.put_nowait(_too_late(timeout, first_token))

        request: _Request | None = None
        seconds = first_token if timeout is None else timeout
        timer = loop.call_later(seconds, give_up)
        try:
            # Long prompts and chat templates take time, in which neither requests nor texts may wait.
            encoded = asyncio.to_thread(self.session.encode_prompt, prompt, **(for_template or {}))
            try:
                ids = await asyncio.wait_for(encoded, seconds)
            except asyncio.TimeoutError:
                raise _too_late(timeout, first_token) from None
            if read is not None:
                read(ids)
            waiting = _Request(ids, max_new_tokens, list(stop), sampling, give, accepted_at)
            with self._changed:
                if self._is_over or not self._thread.is_alive():
                    raise self._ended()
                request = waiting
                self._arrived.append(request)
                self._changed.notify()
            while True:
                result = await arrived.get()
                if isinstance(result, BaseException):
                    raise result
                yield result
                if result.ended is not None:
                    return
        finally:
            timer.cancel()
            with self._changed:
                if request is None:
                    self.accepted -= 1
                else:
                    request.is_abandoned = True
                self._changed.notify()

    def close(self, *, finish: bool = True) -> None:
        """Close the session; finish: after the texts that were accepted."""
        with self._changed:
            self._closing, self._finish = True, finish
            self._changed.notify()
        self._thread.join()
        self.session.close()

    def _run(self) -> None:
        """What the thread does: let requests join the batch, and do the batch's work."""
        while self._wait():
            try:
                self._take_requests()
                for number, result in self._batch.advance():
                    self._give(number, result)
            except (SessionClosed, SessionForked) as problem:
                self._fail_all(problem)
                return
            except BaseException as problem:
                LOG.error("model %s: an error ended the generation of texts", self.name, exc_info=problem)
                self._ended_by = problem
                self._fail_all(self._ended())
                return
        self._fail_all(SessionClosed("the server is closing"))

    def _ended(self) -> OfframpError:
        """Why no further text is generated."""
        if self._ended_by is None:
            return SessionClosed("the server is closing")
        return ThreadEnded(self._ended_by, f"generates the texts of model {self.name}")

    def _wait(self) -> bool:
        """Wait until there is something to do; False once all is done and the server closes."""
        with self._changed:
            while not self._arrived and not self._requests:
                if self._closing and (not self._finish or not self.accepted):
                    return False
                self._changed.wait()
            return self._finish

    def _take_requests(self) -> None:
        """Let requests that arrived join the batch, and drop those for which nobody waits."""
        with self._changed:
            arrived = list(self._arrived)
            self._arrived.clear()
            left = [number for number, request in self._requests.items() if request.is_abandoned]
        for number in left:
            self._batch.drop(number)
            self._forget(number)
        for request in arrived:
            if request.is_abandoned:
                with self._changed:
                    self.accepted -= 1
                continue
            try:
                number = self._batch.add(request.ids, request.max_new_tokens, request.stop, request.sampling)
            except Exception as problem:
                with self._changed:
                    self.accepted -= 1
                request.give(problem)
                continue
            self._requests[number] = request

    def _give(self, number: int, result: TextChunk | Exception) -> None:
        """Give a result to whoever asked for the text."""
        request = self._requests[number]
        if isinstance(result, Exception):
            self._forget(number)
        else:
            request.tokens += 1
            if result.ended is not None:
                self._forget(number, result.ended)
        request.give(result)

    def _forget(self, number: int, ended: str | None = None) -> None:
        """A text has ended; ended: see EndedText."""
        with self._changed:
            request = self._requests.pop(number)
            self.accepted -= 1
        self._tell(request, ended)

    def _tell(self, request: _Request, ended: str | None) -> None:
        """Tell whoever observes of a text that ended."""
        if self.observe is not None and request.tokens:
            text = EndedText(ended, len(request.ids), request.tokens)
            self.observe(text, time.perf_counter() - request.accepted_at)

    def _fail_all(self, problem: BaseException) -> None:
        """Give an error to all that still wait, and close the batch."""
        with self._changed:
            self._is_over = True
            requests = [*self._arrived, *self._requests.values()]
            self._arrived.clear()
            self._requests.clear()
            self.accepted -= len(requests)
        for request in requests:
            self._tell(request, None)
            request.give(problem)
        self._batch.close()


def _too_late(timeout: float | None, first_token: float) -> DeadlinePassed:
    """The error of a text that did not end within `timeout` seconds, or did not begin; see chunks."""
    if timeout is None:
        return DeadlinePassed(
            f"the text had no token in {1e3 * first_token:g} ms: others are generated before it, or its "
            "prompt is long; ask again later, or for more time (timeout_ms)"
        )
    return DeadlinePassed(
        f"the text was not finished in {1e3 * timeout:g} ms; ask for fewer tokens (max_tokens), or for "
        "more time (timeout_ms)"
    )
