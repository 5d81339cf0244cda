"""A batch of texts of one session, which prompts join and leave at any token: prompts in, chunks out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING

from offramp.runtime.batching import DecodingLoop
from offramp.runtime.errors import SessionClosed, SessionForked
from offramp.runtime.sampling import Sampling
from offramp.runtime.text_chunks import AnswerText, TextChunk

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextBatch:
    """Texts of a session that are generated at once; TextGenerator.open_batch opens it.

    One thread at a time may use it; between two calls other texts of the session may be generated.

    walking: makes a context in which the engine is the caller's alone, and which raises SessionClosed or
    SessionForked. loop: generates the tokens. tokenizer, stop_ids: see AnswerText.
    """

    def __init__(
        self,
        walking: Callable[[], AbstractContextManager[None]],
        loop: DecodingLoop,
        tokenizer: Tokenizer,
        stop_ids: Collection[int],
    ) -> None:
        self._walking, self._loop = walking, loop
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._answers: dict[int, AnswerText] = {}

    @property
    def unfinished(self) -> int:
        """Texts that have not ended."""
        return len(self._answers)

    @property
    def under_way(self) -> int:
        """Texts whose prompt has begun; the others wait for a place."""
        return self._loop.under_way

    def add(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
    ) -> int:
        """Add a prompt, given as the ids of TextGenerator.encode_prompt; returns the number of its text.

        max_new_tokens, stop, sampling: see TextGenerator.generate. A prompt that is too long is an error of
        advance().
        """
        sampler = None if sampling is None else sampling.sampler(ids)
        number = self._loop.add(ids, max_new_tokens, self._stop_ids, sampler=sampler)
        self._answers[number] = AnswerText(self._tokenizer, self._stop_ids, stop)
        return number

    def advance(self) -> list[tuple[int, TextChunk | Exception]]:
        """Do one piece of work; returns the chunks that came out, each with the number of its text.

        A text ends with a chunk that says why, or with an error of any type in place of a chunk; the others
        go on. Raises SessionClosed, SessionForked, and errors that belong to no single text, after which the
        batch is lost.
        """
        with self._walking():
            results = self._loop.advance()
        chunks: list[tuple[int, TextChunk | Exception]] = []
        for number, result in results:
            answer = self._answers.get(number)
            if answer is None:  # it ended at a stop string, before the last draft of a round
                continue
            chunk: TextChunk | Exception
            try:
                chunk = result if isinstance(result, Exception) else answer.chunk(result)
            except Exception as problem:  # of the tokenizer
                chunk = problem
            chunks.append((number, chunk))
            if isinstance(chunk, Exception) or chunk.ended is not None:
                self.drop(number)
        return chunks

    def drop(self, number: int) -> None:
        """End a text before its time; numbers of texts that have ended are ignored."""
        if self._answers.pop(number, None) is not None:
            with suppress(SessionClosed, SessionForked), self._walking():
                self._loop.drop(number)

    def close(self) -> None:
        """End all texts and free their caches."""
        self._answers.clear()
        with suppress(SessionClosed, SessionForked), self._walking():
            self._loop.close()
