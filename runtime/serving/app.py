"""The HTTP application: routes, their JSON, and the errors as status codes."""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncIterator, Sequence
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
from offramp.runtime.errors import BadInput, BadSetting, ItemError, OfframpError
from offramp.runtime.row_session import RowAnswer
from offramp.runtime.serving.demo import add_demo_routes
from offramp.runtime.serving.error_replies import ErrorReply, reply_to
from offramp.runtime.serving.generation import ServedGenerator
from offramp.runtime.serving.limits import ServerLimits
from offramp.runtime.serving.metrics import Metrics
from offramp.runtime.serving.models import Models, ServedModel, manifest_time
from offramp.runtime.serving.openai import add_text_routes
from offramp.runtime.serving.protection import Protection
from offramp.runtime.serving.row_requests import CALLER_GONE, Answers, answer_items
from offramp.runtime.serving.scheduler import RowOptions
from offramp.runtime.serving.settings import Wanted


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

    def options(self, model: ServedModel) -> RowOptions:
        """How a row is walked; see ServedModel.options."""
        wanted = Wanted(self.point, self.max_risk, self.max_depth, self.budget_ms, self.budget_depth)
        return model.options(wanted)


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
        redirect_slashes=False,  # the address of such a redirect has whatever host the request names
    )
    app.add_middleware(Protection, limits=limits, metrics=metrics)
    _add_errors(app, metrics)

    async def answer_rows(items: Sequence[Any], body: WalkFields, request: Request) -> Answers:
        return await answer_items(models, body.model, items, body.options, request, limits, body.timeout_ms)

    @app.post("/v1/classify", summary="Answer texts, pairs of texts or images")
    async def classify(body: ClassifyRequest, request: Request) -> JSONResponse:
        given = body.input if isinstance(body.input, list) else [body.input]
        model = models.rows(body.model)
        items = [_item(entry, model) for entry in given]
        answers, _ = await answer_rows(items, body, request)
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
        answers, tokens = await answer_rows(texts, body, request)
        data = []
        for index, answer in enumerate(answers):
            if isinstance(answer, ItemError):
                raise BadInput(f"input {index}: {answer.message}")
            data.append({"object": "embedding", "index": index, "embedding": _numbers(answer, body)})
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "model": model.name, "data": data, "usage": usage})

    add_text_routes(app, models, limits, metrics)
    add_demo_routes(app, models, limits)

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


def _reason(errors: Sequence[Any]) -> str:
    """What is wrong with a body: one of all the errors that pydantic found, or the header that is missing.

    For a field of several types pydantic lists the errors of each type. The type that the caller meant is
    that with the deepest errors in the body, and of several such types that with the fewest errors. Of its
    errors, one that is no wrong type comes first.
    """
    depth = max(len(error["loc"]) for error in errors)
    by_type: dict[Any, list[Any]] = {}  # errors at the deepest level, by the place that has them
    for error in errors:
        if len(error["loc"]) == depth:
            by_type.setdefault(error["loc"][:-1], []).append(error)
    fewest = min(by_type.values(), key=len)
    error = max(fewest, key=lambda error: not error["type"].endswith("_type"))
    # For a field of several types, the place has the name of the type, too; that of a list is left out.
    where = [str(part) for part in error["loc"] if part != "body" and not str(part).startswith("list[")]
    if error["type"] == "json_invalid":
        return f"body: not JSON at character {where[-1]}: {error['ctx']['error']}"
    if not where:
        return "body: expected a JSON object; send it with the header Content-Type: application/json"
    return f"{'.'.join(where)}: {error['msg']}"


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    """Answer errors as ErrorReply says."""

    def send(reply: ErrorReply) -> JSONResponse:
        metrics.refused(reply.kind)
        return JSONResponse(reply.as_json(), reply.status, dict(reply.headers))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, problem: RequestValidationError) -> JSONResponse:
        return send(ErrorReply(400, "bad_request", _reason(problem.errors())))

    @app.exception_handler(HTTPException)
    async def other(request: Request, problem: HTTPException) -> JSONResponse:
        kind = {400: "bad_request", CALLER_GONE: "caller_gone"}.get(problem.status_code, "http")
        message, headers = str(problem.detail), problem.headers or {}
        if problem.status_code == 404 and message == "Not Found":
            message = f"there is no {request.url.path}; /openapi.json lists the paths"
        if problem.status_code == 405:
            message = f"{request.method} {request.url.path}: this path takes {headers.get('Allow', 'others')}"
        return send(ErrorReply(problem.status_code, kind, message, headers))

    @app.exception_handler(OfframpError)
    async def ours(_: Request, problem: OfframpError) -> JSONResponse:
        return send(reply_to(problem))

    @app.exception_handler(Exception)  # which is raised again then, so that the log has its traceback
    async def unexpected(_: Request, problem: Exception) -> JSONResponse:
        return send(reply_to(problem))
