"""A bundle that generates text, as a server has it: a few texts at once, each chunk as soon as it exists."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offramp.runtime.bundle.manifest import Manifest
from offramp.runtime.errors import SessionClosed
from offramp.runtime.generator import TextChunk, TextGenerator
from offramp.runtime.inputs.chat import Message
from offramp.runtime.serving.scheduler import QueueFull

TEXTS = 4  # texts that are generated at once, token by token in turn


@dataclass
class ServedGenerator:
    """A bundle that generates text: its name in requests and its session.

    queue: most texts that are accepted and not finished. tag: see ServedModel.
    """

    name: str
    folder: Path
    session: TextGenerator
    queue: int
    tag: str
    accepted: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._closing = False
        self._threads = ThreadPoolExecutor(TEXTS, thread_name_prefix="offramp text")

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle."""
        return self.session.manifest

    @property
    def is_alive(self) -> bool:
        """Whether texts are still generated."""
        return not self._closing

    @property
    def under_way(self) -> int:
        """Texts that are generated now."""
        return min(self.accepted, TEXTS)

    async def chunks(
        self,
        prompt: str | Sequence[Message],
        max_new_tokens: int,
        stop: Sequence[str],
        for_template: Mapping[str, Any],
    ) -> AsyncIterator[TextChunk]:
        """Generate a text; see TextGenerator.generate, whose errors are raised before the first chunk.

        for_template: its keywords for a chat template.
        When the iterator is closed, the text ends after the token that is computed. Raises QueueFull.
        """
        with self._lock:
            if self._closing:
                raise SessionClosed("the server is closing")
            if self.accepted >= self.queue:
                raise QueueFull(self.accepted, 1.0)
            self.accepted += 1
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[TextChunk | BaseException | None] = asyncio.Queue()
        is_left = threading.Event()

        def give(value: TextChunk | BaseException | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(arrived.put_nowait, value)

        def generate() -> None:
            try:
                for chunk in self.session.generate(prompt, max_new_tokens, list(stop), **for_template):
                    if is_left.is_set():
                        break
                    give(chunk)
                give(None)
            except BaseException as problem:
                give(problem)
            finally:
                with self._lock:
                    self.accepted -= 1

        self._threads.submit(generate)
        try:
            while (value := await arrived.get()) is not None:
                if isinstance(value, BaseException):
                    raise value
                yield value
        finally:
            is_left.set()

    def close(self, *, finish: bool = True) -> None:
        """Close the session; finish: after the texts that were accepted."""
        with self._lock:
            self._closing = True
        self._threads.shutdown(wait=finish, cancel_futures=not finish)
        self.session.close()
