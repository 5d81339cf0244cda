"""The text of an answer, chunk by chunk: tokens decoded one after another, stop strings, loops at the end."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offramp.runtime.decoding import STOP, Token

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LEAST_COPIES, LEAST_LOOP = 3, 24  # of a loop at the end of an answer: copies of its tokens, and tokens in all


@dataclass(frozen=True)
class TextChunk:
    """The text that one token adds to an answer, which may be empty.

    token: its id. depth, blocks_run, drafted: see decoding.Token. seconds: from the start of the prompt until
    the chunk existed. ended: on the last chunk why the answer ended, None before: "stop" (a stop token of the
    bundle, or a stop string), "length" (max_new_tokens), "context" (the longest sequence of the network).
    logprob, top_logprobs: see sampling.Choice. offset: number of characters that the answer had before the
    token, without those of an incomplete last character.
    """

    text: str
    token: int
    depth: int
    seconds: float
    blocks_run: int = 0
    drafted: bool = False
    ended: str | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    offset: int = 0


class AnswerText:
    """Makes the chunks of one answer from its tokens, and ends it at stop strings.

    stop_ids: tokens that have no text. stop: strings before which the text ends.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int], stop: Sequence[str]) -> None:
        self._text, self._stop_ids, self._stop = _DecodedText(tokenizer), stop_ids, stop
        # Characters that may be the start of a stop string.
        self._held_back = max((len(word) for word in stop), default=1) - 1
        self._emitted = self._offset = 0
        self._started = time.perf_counter()

    def chunk(self, token: Token) -> TextChunk:
        """The chunk of the next token; no token may follow one that says why the answer ended."""
        text, stop, emitted, offset = self._text, self._stop, self._emitted, self._offset
        is_over = token.ended is not None
        if token.id not in self._stop_ids:
            text.add(token.id)
        answer = text.all() if is_over else text.complete()
        stops = [at for word in stop if (at := answer.find(word, emitted)) >= 0]
        end = min(stops) if stops else len(answer) if is_over else max(emitted, len(answer) - self._held_back)
        self._emitted, self._offset = end, len(answer)
        return TextChunk(
            answer[emitted:end],
            token.id,
            token.depth,
            time.perf_counter() - self._started,
            token.blocks_run,
            token.drafted,
            STOP if stops else token.ended,
            token.logprob,
            token.top_logprobs,
            offset,
        )


def repeated_tokens(ids: Sequence[int]) -> int:
    """How many tokens at the end of an answer only repeat those before them; 0 if it does not end in a loop.

    An answer ends in a loop if its last tokens are LEAST_COPIES or more copies of the same tokens, of which
    one may be cut off at the end of the answer, and LEAST_LOOP tokens or more in all. The first copy does not
    count as repeated.
    """
    reverse, count = list(reversed(ids)), len(ids)
    # matches[shift]: so many tokens at the end equal those `shift` places before (Z-function of the reverse)
    matches, begin, end = [0] * count, 0, 0
    for shift in range(1, count):
        length = min(end - shift, matches[shift - begin]) if shift < end else 0
        while shift + length < count and reverse[length] == reverse[shift + length]:
            length += 1
        matches[shift] = length
        if shift + length > end:
            begin, end = shift, shift + length
    loops = (
        matches[size]
        for size in range(1, count // LEAST_COPIES + 1)
        if size + matches[size] >= max(LEAST_COPIES * size, LEAST_LOOP)
    )
    return max(loops, default=0)


class _DecodedText:
    """Decodes tokens one by one, each with the few tokens before it on which its text may depend.

    Decoding all tokens again for each new token takes time that grows with the square of the length.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._text = ""  # text of all tokens before self._end
        self._ids: list[int] = []
        self._begin = self._end = 0  # the last tokens that ended with a complete character

    def add(self, id: int) -> None:
        """Add a token."""
        self._ids.append(id)

    def complete(self) -> str:
        """The text so far, without the bytes of an incomplete last character."""
        new_text = self._new_text()
        if not new_text:
            return self._text  # the last token with text stays in the window: a space may depend on it
        if new_text.endswith("\ufffd"):
            return self._text + new_text.rstrip("\ufffd")
        self._text += new_text
        self._begin, self._end = self._end, len(self._ids)
        return self._text

    def all(self) -> str:
        """The text of all tokens so far."""
        return self._text + self._new_text()

    def _new_text(self) -> str:
        if self._end == len(self._ids):
            return ""
        known = self._decode(self._ids[self._begin : self._end])
        return self._decode(self._ids[self._begin :])[len(known) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)) if ids else ""
