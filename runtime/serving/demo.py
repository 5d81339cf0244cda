"""The page of web/ on the server: what it shows is walked here, one text at a time, with every step."""

from __future__ import annotations

import base64
import re
from hashlib import sha256
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from offramp.runtime.bundle.manifest import CLASSIFICATION, FILE_NAME
from offramp.runtime.errors import BadInput, BadSetting, ItemError
from offramp.runtime.row_session import ExitRecord
from offramp.runtime.serving.limits import ServerLimits
from offramp.runtime.serving.models import Models, ServedModel
from offramp.runtime.serving.row_requests import answer_items
from offramp.runtime.serving.scheduler import RowOptions

FOLDER = Path(__file__).parents[2] / "web"  # in a checkout and where the wheel is installed
FILES = (".html", ".js", ".css")
_INLINE = re.compile(r'<script type="importmap">(.*?)</script>', re.DOTALL)


class WalkRequest(BaseModel):
    """A text whose walk is told. full_depth: a variant, to run all segments in instead of a point."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input: str
    model: str | None = None
    point: str | None = None
    full_depth: str | None = None


def page_headers() -> dict[str, str]:
    """Headers of the page: it runs its own scripts alone, and talks to this server alone."""
    inline = _INLINE.findall((FOLDER / "index.html").read_text(encoding="utf-8"))
    digests = [base64.b64encode(sha256(script.encode()).digest()).decode() for script in inline]
    scripts = " ".join(["'self'", *(f"'sha256-{digest}'" for digest in digests)])
    policy = f"default-src 'self'; img-src data:; script-src {scripts}"
    return {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}


def add_demo_routes(app: FastAPI, models: Models, limits: ServerLimits) -> None:
    """Add the page at /demo/, and the route that it asks."""
    headers = page_headers()

    @app.post("/v1/walk", summary="Walk one text and tell what every exit gave")
    async def walk(body: WalkRequest, request: Request) -> JSONResponse:
        model, records = models.rows(body.model), list[ExitRecord]()
        _check(model, body)

        def options(model: ServedModel) -> RowOptions:
            records.clear()  # of a bundle that was replaced
            return RowOptions(*model.numbers(body.point, body.full_depth), on_exit=records.append)

        (answer,), tokens = await answer_items(
            models, body.model, [body.input], options, request, limits, windows=False
        )
        if isinstance(answer, ItemError):
            raise BadInput(answer.message)
        steps = [record._asdict() for record in records]
        return JSONResponse(
            {"model": model.name, "tokens": tokens, "truncated": answer.truncated, "steps": steps}
        )

    @app.get("/demo", include_in_schema=False)
    @app.get("/demo/", include_in_schema=False)
    async def to_page() -> Response:
        return RedirectResponse("/demo/index.html?server=1")

    @app.get("/demo/manifest.json", include_in_schema=False)
    async def manifest(model: str | None = None) -> Response:
        return FileResponse(models.rows(model).folder / FILE_NAME, headers=headers)

    @app.get("/demo/{name}", include_in_schema=False)
    async def page(name: str) -> Response:
        file = FOLDER / name
        # A name has no separator, and only files that lie in the folder itself are given out.
        if file.suffix not in FILES or file.parent != FOLDER or not file.is_file():
            raise HTTPException(404, f"there is no {name}")
        return FileResponse(file, headers=headers)


def _check(model: ServedModel, body: WalkRequest) -> None:
    """Raise BadSetting if the bundle gives a text no label, or lacks the variant."""
    manifest = model.manifest
    if manifest.kind != CLASSIFICATION or model.reads_images:
        raise BadSetting(
            f"model {model.name}: its task is {manifest.task}; this route is for bundles that give a "
            "text one label: ask /v1/classify"
        )
    if body.full_depth is not None and body.full_depth not in manifest.variants:
        raise BadSetting(f"full_depth {body.full_depth!r}: choose one of {', '.join(manifest.variants)}")
