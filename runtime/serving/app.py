"""The HTTP application: routes, their JSON, and the errors as status codes."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from offramp.runtime.bundle.manifest import EMBEDDING
from offramp.runtime.errors import BadInput, BadSetting, ItemError, OfframpError, SessionClosed
from offramp.runtime.row_session import RowAnswer
from offramp.runtime.serving.demo import add_demo_routes
from offramp.runtime.serving.generation import ServedGenerator
from offramp.runtime.serving.metrics import Metrics
from offramp.runtime.serving.models import Models, ServedModel, UnknownModel, manifest_time
from offramp.runtime.serving.openai import add_text_routes
from offramp.runtime.serving.protection import LOG, Protection, ServerLimits
from offramp.runtime.serving.scheduler import DeadlinePassed, QueueFull
from offramp.runtime.serving.settings import TooManyBudgets, Wanted

INLINE_CHARACTERS = 20_000  # more text than this is tokenized in another thread, so that no request waits


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Pair(_Strict):
    """Two texts that are read together."""

    text: str
    text_b: str | None = None


class Picture(_Strict):
    """An image file in base64, with or without "data:image/…;base64," before it."""

    image: str


AnyItem = str | Pair | Picture


class WalkFields(_Strict):
    """What a request can ask of the walk; each field may be left out."""

    model: str | None = Field(None, description="Name of the bundle; the first if left out.")
    point: str | None = Field(None, description="Operating point of the bundle.")
    max_risk: float | None = Field(None, gt=0, lt=1, description="Cheapest point that guarantees this risk.")
    max_depth: int | None = Field(None, ge=1, description="Most blocks that are run.")
    budget_ms: float | None = Field(
        None, gt=0, description="Milliseconds of an answer, held over all rows that ask for the same."
    )
    budget_depth: float | None = Field(
        None, gt=0, le=1, description="Share of the blocks, held over all rows that ask for the same."
    )
    timeout_ms: float | None = Field(None, gt=0, description="Time in which the answer must be there.")


class ClassifyRequest(WalkFields):
    """Texts, pairs of texts or images that are answered."""

    input: AnyItem | Annotated[list[AnyItem], Field(min_length=1)]


class EmbeddingRequest(WalkFields):
    """As OpenAI's API has it; further fields of it are refused by name."""

    input: str | Annotated[list[str], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="Numbers of a vector: as many as it has.")
    user: str | None = None


def create_app(models: Models, limits: ServerLimits, metrics: Metrics) -> FastAPI:
    """The application for models that are open; it closes them when the server ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(models.close)

    app = FastAPI(
        title="offramp",
        description="Answers of early-exit networks: rows of all requests share the steps of one walk.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from a public server, and send no API key
        redoc_url=None,
    )
    app.add_middleware(Protection, limits=limits, metrics=metrics)
    _add_errors(app, metrics)

    @app.post("/v1/classify", summary="Answer texts, pairs of texts or images")
    async def classify(body: ClassifyRequest, request: Request) -> JSONResponse:
        given = body.input if isinstance(body.input, list) else [body.input]
        model = models.rows(body.model)
        items = [_item(entry, model) for entry in given]
        answers, _ = await _answers(models, items, body, request, limits)
        results = [_result(answer) for answer in answers]
        if not isinstance(body.input, list) and isinstance(answers[0], ItemError):
            raise BadInput(answers[0].message)
        return JSONResponse({"model": model.name, "results": results})

    @app.post("/v1/embeddings", summary="Embed texts, as OpenAI's API does")
    async def embed(body: EmbeddingRequest, request: Request) -> JSONResponse:
        model = models.rows(body.model)
        if model.manifest.kind != EMBEDDING:
            raise BadSetting(f"model {model.name}: its task is {model.manifest.task}; ask /v1/classify")
        size = model.manifest.answer_size
        if body.dimensions not in (None, size):
            raise BadSetting(
                f"dimensions {body.dimensions}: vectors of model {model.name} have {size} numbers and are "
                "not shortened; leave it out"
            )
        texts = body.input if isinstance(body.input, list) else [body.input]
        answers, tokens = await _answers(models, texts, body, request, limits)
        data = []
        for index, answer in enumerate(answers):
            if isinstance(answer, ItemError):
                raise BadInput(f"input {index}: {answer.message}")
            data.append({"object": "embedding", "index": index, "embedding": _numbers(answer, body)})
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "model": model.name, "data": data, "usage": usage})

    add_text_routes(app, models)
    add_demo_routes(app, models)

    @app.get("/v1/models", summary="The bundles that are served")
    async def list_models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_description(model) for model in models.all()]})

    @app.get("/v1/models/{name:path}", summary="One of them")
    async def describe_model(name: str) -> JSONResponse:
        return JSONResponse(_description(models.get(name)))

    @app.get("/healthz", summary="Whether the server runs", response_class=PlainTextResponse)
    async def healthy() -> Response:
        is_alive = all(model.is_alive for model in models.all())
        return PlainTextResponse(
            "ok" if is_alive else "a thread has ended: start anew", 200 if is_alive else 503
        )

    @app.get("/readyz", summary="Whether requests are answered", response_class=PlainTextResponse)
    async def ready() -> Response:
        is_ready = bool(models.all()) and all(model.is_alive for model in models.all())
        return PlainTextResponse("ready" if is_ready else "not ready", 200 if is_ready else 503)

    @app.get("/metrics", summary="Figures for Prometheus", response_class=PlainTextResponse)
    async def figures() -> Response:
        text, kind = metrics.text(models.all())
        return Response(text, media_type=kind)

    return app


async def _answers(
    models: Models, items: Sequence[Any], body: WalkFields, request: Request, limits: ServerLimits
) -> tuple[list[RowAnswer | ItemError], int]:
    """The answers to the items of a request, in order, and the number of their tokens.

    Rows of a caller that goes away are dropped. Raises QueueFull if there is no room for all of them. If the
    bundle is replaced before its rows are accepted, the new one answers.
    """
    while True:
        model = models.rows(body.model)
        try:
            return await _answers_of(model, items, body, request, limits)
        except SessionClosed:
            if models.rows(body.model) is model:
                raise


async def _answers_of(
    model: ServedModel, items: Sequence[Any], body: WalkFields, request: Request, limits: ServerLimits
) -> tuple[list[RowAnswer | ItemError], int]:
    """See _answers; raises SessionClosed if the bundle was closed."""
    if len(items) > limits.items:
        raise BadSetting(f"input: {len(items)} items; this server takes {limits.items} in a request")
    queue = model.scheduler.queue
    if len(items) > queue:
        raise BadSetting(
            f"input: {len(items)} items; this server accepts {queue} rows at once (--queue), so it can never "
            f"accept these: send {queue} or fewer in a request, or start the server with a larger --queue"
        )
    model.scheduler.require_room(len(items))
    timeout = limits.timeout if body.timeout_ms is None else body.timeout_ms / 1e3
    wanted = Wanted(body.point, body.max_risk, body.max_depth, body.budget_ms, body.budget_depth)
    if sum(len(item) for item in items if isinstance(item, str)) > INLINE_CHARACTERS or model.reads_images:
        rows = await run_in_threadpool(model.read, items)
    else:
        rows = model.read(items)
    # Other requests may have come while these items were read. From here there is no await until all rows are
    # accepted, so that no other request comes in between: a refusal counts the rows of others alone.
    model.scheduler.require_room(sum(not isinstance(row, ItemError) for row in rows))
    futures: dict[int, Future[RowAnswer]] = {}  # by index
    try:
        for index, row in enumerate(rows):
            if not isinstance(row, ItemError):
                futures[index] = model.scheduler.submit(row, model.options(wanted), timeout)
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
    gone = asyncio.ensure_future(_wait_until_gone(request))
    either: set[asyncio.Future[Any]] = {answered, gone}
    try:
        await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            raise HTTPException(499, "the caller went away")
        if not answered.done():
            raise DeadlinePassed(f"not answered in {1e3 * timeout:g} ms")
        return list(await answered)
    finally:
        gone.cancel()
        answered.cancel()


async def _wait_until_gone(request: Request) -> None:
    """Return when the connection of a request whose body was read is closed."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _item(entry: AnyItem, model: ServedModel) -> Any:
    """An item as the session reads it; raises BadInput for what this bundle does not read."""
    if isinstance(entry, Picture) != model.reads_images:
        reads = 'images: {"image": "…"} in base64' if model.reads_images else "texts"
        raise BadSetting(f"input: model {model.name} reads {reads}")
    if isinstance(entry, Picture):
        data = entry.image.partition(",")[2] if entry.image.startswith("data:") else entry.image
        try:
            return base64.b64decode(data, validate=True)
        except binascii.Error as problem:
            raise BadInput(f"image: not base64: {problem}") from None
    if isinstance(entry, Pair):
        return entry.text if entry.text_b is None else (entry.text, entry.text_b)
    return entry


def _result(answer: RowAnswer | ItemError) -> dict[str, Any]:
    """The JSON object of an answer, as ee-run writes it, or of the error of one item of several."""
    if isinstance(answer, ItemError):
        return {"error": answer.message}
    value = answer.as_json() | {"exit": answer.exit, "depth": answer.depth}
    value["ms"] = round(1e3 * answer.seconds, 3)
    calibrated, labels = getattr(answer, "calibrated", None), getattr(answer, "label_set", None)
    if calibrated is not None and labels is not None:
        value |= {"calibrated": round(calibrated, 6), "set": list(labels)}
    if answer.windows > 1:
        value["windows"] = answer.windows
    return value | {"truncated": True} if answer.truncated else value


def _numbers(answer: Any, body: EmbeddingRequest) -> list[float] | str:
    """An embedding as a list, or as OpenAI's clients ask for it: float32, little-endian, in base64."""
    if body.encoding_format == "base64":
        return base64.b64encode(np.asarray(answer.embedding, "<f4").tobytes()).decode()
    numbers: list[float] = answer.as_json()["embedding"]
    return numbers


def _description(model: ServedModel | ServedGenerator) -> dict[str, Any]:
    """What /v1/models tells of a bundle."""
    manifest = model.manifest
    points = [
        {"name": p.name, "rule": p.rule.name, "variant": p.variant, "measured": p.measured}
        | ({} if p.guarantee is None else {"risk": p.guarantee.limit, "confidence": p.guarantee.confidence})
        for p in manifest.points
    ]
    facts = {"task": manifest.task, "labels": list(manifest.labels), "blocks": manifest.blocks}
    about = {
        "id": model.name,
        "object": "model",
        "created": manifest_time(model.folder),
        "owned_by": "offramp",
    }
    return {**about, **facts, "points": points}


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, -int(-seconds // 1)))}


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    """Answer errors in OpenAI's form: {"error": {"message": …, "type": …}}."""

    def reply(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
        metrics.refused(kind)
        return JSONResponse({"error": {"message": message, "type": kind}}, status, headers)

    @app.exception_handler(OfframpError)
    async def ours(_: Request, problem: OfframpError) -> JSONResponse:
        if isinstance(problem, QueueFull):
            return reply(429, "queue_full", str(problem), _retry_after(problem.retry_after))
        if isinstance(problem, TooManyBudgets):
            return reply(429, "too_many_budgets", str(problem), _retry_after(problem.retry_after))
        if isinstance(problem, DeadlinePassed):
            return reply(504, "deadline_passed", str(problem))
        if isinstance(problem, SessionClosed):
            return reply(503, "closing", "the server is closing; ask again", {"Retry-After": "1"})
        if isinstance(problem, UnknownModel):
            return reply(404, "unknown_model", str(problem))
        if isinstance(problem, (BadInput, BadSetting)):
            return reply(400, "bad_request", str(problem))
        # The message may name files of the server, so that the caller does not get it.
        LOG.error("%s: %s", type(problem).__name__, problem)
        return reply(500, "engine", f"{type(problem).__name__}: see the log of the server")

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, problem: RequestValidationError) -> JSONResponse:
        first = problem.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        return reply(400, "bad_request", f"{where}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def other(_: Request, problem: HTTPException) -> JSONResponse:
        kind = "bad_request" if problem.status_code == 400 else "http"
        return reply(problem.status_code, kind, str(problem.detail), dict(problem.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, problem: Exception) -> JSONResponse:
        return reply(500, "engine", f"{type(problem).__name__}: the row could not be walked")
