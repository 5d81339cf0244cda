"""Routes for text, in the form of OpenAI's API: completions and chat, whole or as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from offramp.runtime.errors import BadSetting, OfframpError, SessionClosed
from offramp.runtime.generator import MAX_NEW_TOKENS
from offramp.runtime.inputs.chat import Message
from offramp.runtime.sampling import MOST_LOGPROBS, Sampling
from offramp.runtime.serving.error_replies import reply_to
from offramp.runtime.serving.generation import ServedGenerator
from offramp.runtime.serving.limits import LOG, ServerLimits
from offramp.runtime.serving.logprobs import TokenLogprobs
from offramp.runtime.serving.metrics import Metrics
from offramp.runtime.serving.models import Models
from offramp.runtime.serving.row_requests import cancel_if_caller_leaves
from offramp.runtime.text_chunks import TextChunk, repeated_tokens

# Fields of requests that are fields of Sampling.
SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
)


class TextFields(BaseModel):
    """What both kinds of requests have. Answers are greedy unless a temperature is given."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(None, description="Name of the bundle; the first if left out.")
    max_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    temperature: float | None = Field(
        None, description="1 draws by the probabilities of the model; 0, the default, is greedy."
    )
    top_p: float | None = Field(None, description="Draw from the fewest tokens with this probability.")
    top_k: int | None = Field(None, description="Draw from so many most probable tokens; 0 is all.")
    min_p: float | None = Field(None, description="Draw tokens with this share of the best probability.")
    repetition_penalty: float | None = Field(None, description="Over tokens of prompt and answer.")
    frequency_penalty: float | None = Field(None, description="For each time in the answer.")
    presence_penalty: float | None = Field(None, description="Once for tokens of the answer.")
    seed: int | None = Field(None, description="The same one gives the same text.")
    n: Literal[1] | None = None
    user: str | None = None
    timeout_ms: float | None = Field(
        None, gt=0, description="Time in which the text must end, waiting included."
    )

    def sampling_with(self, logprobs: int | None) -> Sampling:
        """How tokens are chosen; raises BadSetting for values out of range."""
        values = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        given = {name: value for name, value in values.items() if value is not None}
        return Sampling(**given, logprobs=logprobs).seeded()


class CompletionRequest(TextFields):
    """A prompt that is continued."""

    prompt: str
    logprobs: int | None = Field(None, description="Most probable tokens that are told beside each.")

    def sampling(self) -> Sampling:
        """How tokens are chosen; raises BadSetting."""
        return self.sampling_with(self.logprobs)


class ChatMessage(BaseModel):
    """One message of a chat; what is beside role and content is for templates that read it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatRequest(TextFields):
    """A chat whose next message is written."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = Field(None, description="Tell the log-probability of each token.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MOST_LOGPROBS, description="Most probable tokens that are told beside it."
    )
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = Field(None, description="Name of a chat template of the bundle.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Further values for it.")

    def sampling(self) -> Sampling:
        """How tokens are chosen; raises BadSetting."""
        if self.top_logprobs and not self.logprobs:
            raise BadSetting(
                f"top_logprobs {self.top_logprobs}: they are told with logprobs true; ask for both"
            )
        return self.sampling_with((self.top_logprobs or 0) if self.logprobs else None)

    def for_template(self) -> dict[str, Any]:
        """The keywords of TextGenerator.generate that are for the chat template."""
        given = {"tools": self.tools, "documents": self.documents}
        values = {name: value for name, value in given.items() if value is not None}
        return {
            "template": self.chat_template,
            "template_arguments": {**(self.chat_template_kwargs or {}), **values} or None,
        }


@dataclass(frozen=True)
class Form:
    """How a kind of answer is written: names of objects, and the field of a choice with its text."""

    prefix: str
    answer_object: str
    chunk_object: str
    is_chat: bool

    def choice(
        self,
        text: str | None,
        reason: str | None,
        logprobs: dict[str, Any] | None,
        *,
        streamed: bool,
        first: bool = False,
    ) -> dict[str, Any]:
        """The one choice of an answer or of a part of it."""
        common = {"index": 0, "logprobs": logprobs, "finish_reason": reason}
        if not self.is_chat:
            return common | {"text": text or ""}
        content = {} if text is None else {"content": text}
        role = {"role": "assistant"} if first or not streamed else {}
        return common | {"delta" if streamed else "message": role | content}


COMPLETION = Form("cmpl", "text_completion", "text_completion", False)
CHAT = Form("chatcmpl", "chat.completion", "chat.completion.chunk", True)


def add_text_routes(app: FastAPI, models: Models, limits: ServerLimits, metrics: Metrics) -> None:
    """Add the routes for text to an application."""

    async def reply(
        form: Form,
        body: CompletionRequest | ChatRequest,
        prompt: str | Sequence[Message],
        max_new_tokens: int | None,
        for_template: Mapping[str, Any],
        request: Request,
    ) -> Response:
        """A text as one answer, or as server-sent events; for_template: see ServedGenerator.chunks.

        If the caller goes away, the text ends after the step that is computed. If the bundle is replaced
        before the text is accepted, the new one generates it.
        """
        sampling = body.sampling()
        for option in body.stream_options or {}:
            if option != "include_usage":
                raise BadSetting(f"stream_options: {option!r} is not known; include_usage is")
        while True:
            model = models.text(body.model)
            answer = _Answer(model, form, body, sampling)
            chunks = model.chunks(
                prompt,
                max_new_tokens or MAX_NEW_TOKENS,
                stop=answer.stop,
                for_template=for_template,
                sampling=sampling,
                timeout=None if body.timeout_ms is None else body.timeout_ms / 1e3,
                first_token=limits.timeout,
                read=answer.count_prompt,
            )
            try:
                return await answer_with(answer, chunks, body.stream, request)
            except SessionClosed:
                if models.text(body.model) is model:
                    raise

    async def answer_with(
        answer: _Answer, chunks: AsyncGenerator[TextChunk, None], stream: bool, request: Request
    ) -> Response:
        """The response for a text, whose chunks are closed when it is sent, or when an error is raised."""
        if not stream:
            await cancel_if_caller_leaves(request, answer.add_all(chunks))
            return JSONResponse(answer.as_json())
        try:
            # Errors before the first token become a status code, which needs that nothing was sent.
            first = await cancel_if_caller_leaves(request, _first(chunks))
        except BaseException:
            await chunks.aclose()  # the caller may go away at the moment in which the first chunk comes
            raise
        return _EventStream(_until_error(answer.events(first, chunks), metrics.refused), chunks)

    @app.post("/v1/completions", summary="Continue a prompt, as OpenAI's API does", response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await reply(COMPLETION, body, body.prompt, body.max_tokens, {}, request)

    @app.post("/v1/chat/completions", summary="Answer a chat, as OpenAI's API does", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        max_new_tokens = body.max_completion_tokens or body.max_tokens
        return await reply(CHAT, body, messages, max_new_tokens, body.for_template(), request)


class _EventStream(StreamingResponse):
    """Server-sent events of the chunks of a text; both are closed at its end, even if no event was sent."""

    def __init__(self, events: AsyncGenerator[str, None], chunks: AsyncGenerator[TextChunk, None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events, self._chunks = events, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        async with aclosing(self._chunks), aclosing(self._events):
            await super().__call__(scope, receive, send)


class _Answer:
    """An answer that is being written."""

    def __init__(
        self,
        model: ServedGenerator,
        form: Form,
        body: TextFields,
        sampling: Sampling,
    ) -> None:
        self.stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        self._model, self._form, self._sampling = model, form, sampling
        self._logprobs = TokenLogprobs(model.session, is_chat=form.is_chat)
        self._prompt_tokens = 0
        self._with_usage = bool((body.stream_options or {}).get("include_usage"))
        self._facts = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time())}
        self._chunks: list[TextChunk] = []

    def count_prompt(self, ids: Sequence[int]) -> None:
        """Count the tokens of the prompt."""
        self._prompt_tokens = len(ids)

    def add(self, chunk: TextChunk) -> None:
        """Add a chunk."""
        self._chunks.append(chunk)
        self._logprobs.add(chunk)

    async def add_all(self, chunks: AsyncGenerator[TextChunk, None]) -> None:
        """Add every chunk of a text."""
        async with aclosing(chunks):
            async for chunk in chunks:
                self.add(chunk)

    def as_json(self) -> dict[str, Any]:
        """The JSON object of the whole answer."""
        text = "".join(chunk.text for chunk in self._chunks)
        choice = self._form.choice(text, self._reason(), self._take_logprobs(), streamed=False)
        return self._object(self._form.answer_object, [choice]) | {
            "usage": self._usage(),
            "offramp": self._walk(),
        }

    async def events(
        self, first: TextChunk | None, chunks: AsyncGenerator[TextChunk, None]
    ) -> AsyncGenerator[str, None]:
        """Server-sent events: a part for each chunk with text, then the reason for the end and the walk."""
        async with aclosing(chunks):
            chunk = first
            is_first = True
            while chunk is not None:
                self.add(chunk)
                if chunk.text or is_first:
                    logprobs = self._take_logprobs()
                    yield self._chunk_event(
                        self._form.choice(chunk.text, None, logprobs, streamed=True, first=is_first)
                    )
                    is_first = False
                chunk = await anext(chunks, None)
        # Tokens at the end may have no text.
        logprobs = self._take_logprobs() if self._logprobs.waiting else None
        choice = self._form.choice(None, self._reason(), logprobs, streamed=True, first=is_first)
        yield self._chunk_event(choice, {"offramp": self._walk()})
        if self._with_usage:
            yield _event(self._object(self._form.chunk_object, []) | {"usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _take_logprobs(self) -> dict[str, Any] | None:
        """Log-probabilities of the tokens since the last call, if they were asked for."""
        return None if self._sampling.logprobs is None else self._logprobs.take()

    def _chunk_event(self, choice: dict[str, Any], further: Mapping[str, Any] | None = None) -> str:
        usage = {"usage": None} if self._with_usage else {}  # the last event has it
        return _event({**self._object(self._form.chunk_object, [choice]), **usage, **(further or {})})

    def _object(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {**self._facts, "object": kind, "model": self._model.name, "choices": choices}

    @property
    def _ended(self) -> str | None:
        return self._chunks[-1].ended if self._chunks else None

    def _reason(self) -> str:
        """Why the text ended: "stop" at a stop token or string, else "length"."""
        return "stop" if self._ended == "stop" else "length"

    def _usage(self) -> dict[str, int]:
        written = len(self._chunks)
        counts = {"prompt_tokens": self._prompt_tokens, "completion_tokens": written}
        return counts | {"total_tokens": self._prompt_tokens + written}

    def _walk(self) -> dict[str, float | str | None]:
        """How the text was walked, drawn and ended, as ee-run states it."""
        chunks = self._chunks
        if not chunks:
            return {}
        repeated = 0 if self._ended == "stop" else repeated_tokens([chunk.token for chunk in chunks])
        walk: dict[str, float | str | None] = {
            "depth": round(sum(chunk.depth for chunk in chunks) / len(chunks), 3),
            "blocks_run": round(sum(chunk.blocks_run for chunk in chunks) / len(chunks), 3),
            "ms": round(1e3 * chunks[-1].seconds, 3),
            "first_ms": round(1e3 * chunks[0].seconds, 3),
            "ended": self._ended,
            "repeated_tokens": repeated,
        }
        return walk | {"seed": self._sampling.seed} if self._sampling.is_drawn else walk


async def _first(chunks: AsyncGenerator[TextChunk, None]) -> TextChunk | None:
    """The first chunk of a text."""
    return await anext(chunks, None)


async def _until_error(
    events: AsyncGenerator[str, None], refused: Callable[[str], None]
) -> AsyncGenerator[str, None]:
    """Server-sent events; an error ends them as an event of its own, since the status was sent before.

    refused: told of the type of the error.
    """
    try:
        async with aclosing(events):
            async for event in events:
                yield event
    except Exception as problem:
        if not isinstance(problem, OfframpError):  # reply_to writes those to the log
            LOG.error("a streamed text: %s", type(problem).__name__, exc_info=problem)
        error = reply_to(problem)
        refused(error.kind)
        yield _event(error.as_json())


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
