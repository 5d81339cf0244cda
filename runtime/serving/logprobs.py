"""Log-probabilities of an answer's tokens, in the forms of OpenAI's API for completions and for chats."""

from __future__ import annotations

from typing import Any

from offramp.runtime.generator import TextGenerator
from offramp.runtime.sampling import LOWEST_LOGPROB
from offramp.runtime.text_chunks import TextChunk


class TokenLogprobs:
    """Collects the log-probabilities of an answer whose chunks have them.

    is_chat: the form, that of chats or of completions. Tokens that end answers are left out, as they have no
    text.
    """

    def __init__(self, session: TextGenerator, *, is_chat: bool) -> None:
        self._session, self._is_chat = session, is_chat
        self._chunks: list[TextChunk] = []

    def add(self, chunk: TextChunk) -> None:
        """Add the token of a chunk."""
        if chunk.token not in self._session.stop_ids:
            self._chunks.append(chunk)

    @property
    def waiting(self) -> bool:
        """Whether tokens were added since the last call of take()."""
        return bool(self._chunks)

    def take(self) -> dict[str, Any]:
        """The JSON object of the tokens that were added since the last call."""
        chunks, self._chunks = self._chunks, []
        if self._is_chat:
            return {"content": [self._chat_entry(chunk) for chunk in chunks], "refusal": None}
        return {
            "tokens": [self._session.token_text(chunk.token) for chunk in chunks],
            "token_logprobs": [_in_json(chunk.logprob) for chunk in chunks],
            "top_logprobs": [self._by_text(chunk) for chunk in chunks],
            "text_offset": [chunk.offset for chunk in chunks],
        }

    def _by_text(self, chunk: TextChunk) -> dict[str, float]:
        """The most probable tokens and the chosen one; of tokens with the same text, the most probable."""
        values: dict[str, float] = {}
        for id, logprob in (*chunk.top_logprobs, (chunk.token, chunk.logprob)):
            values.setdefault(self._session.token_text(id), _in_json(logprob))
        return values

    def _chat_entry(self, chunk: TextChunk) -> dict[str, Any]:
        top = [self._entry(id, logprob) for id, logprob in chunk.top_logprobs]
        return self._entry(chunk.token, chunk.logprob) | {"top_logprobs": top}

    def _entry(self, id: int, logprob: float | None) -> dict[str, Any]:
        """A token; its bytes are null if it is part of a character."""
        text = self._session.token_text(id)
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _in_json(logprob), "bytes": data}


def _in_json(logprob: float | None) -> float:
    assert logprob is not None, "the text was generated without log-probabilities"
    return round(max(logprob, LOWEST_LOGPROB), 6)
