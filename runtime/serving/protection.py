"""What stands before the routes: API keys, a limit on the size of requests, and the log of requests."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from offramp.runtime.serving.limits import LOG, ServerLimits

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from offramp.runtime.serving.metrics import Metrics

Refusal = tuple[int, str, str]  # status, type and message of an error
OPEN_PATHS = ("/healthz", "/readyz")  # probes of an orchestrator have no key
# A browser cannot send a key with the page of /demo, which asks for one; what the page shows needs the key.
OPEN_PAGE = re.compile(r"/demo(/([a-z0-9-]+\.(html|js|css))?)?")


class Protection:
    """ASGI middleware that checks keys and sizes before a route sees a request, and logs it afterwards.

    Logs hold no text of requests: time, path, status, milliseconds.
    """

    def __init__(self, app: ASGIApp, *, limits: ServerLimits, metrics: Metrics) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope["path"], dict(scope["headers"]))
            body = b""
            if refusal is None:
                body, refusal = await self._read(receive)
            if refusal is not None:
                self._metrics.refused(refusal[1])
                await _refuse(noted, *refusal)
                return
            await self._app(scope, _replay(body, receive), noted)
        finally:
            seconds = time.perf_counter() - started
            self._metrics.requested(scope["path"], status, seconds)
            if self._limits.log:
                LOG.info(_line(scope, status, seconds))

    def _refusal(self, path: str, headers: Mapping[bytes, bytes]) -> Refusal | None:
        """Why a request is refused before its body is read; None if it is not."""
        if not self._is_allowed(path, headers):
            return 401, "no_key", "send an API key: Authorization: Bearer KEY"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 19 or int(length) > self._limits.body:
            return self._too_large()
        return None

    async def _read(self, receive: Receive) -> tuple[bytes, Refusal | None]:
        """The body of a request, or why it is refused."""
        parts, size, end = list[bytes](), 0, time.monotonic() + self._limits.timeout
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except asyncio.TimeoutError:
                return b"", (408, "too_slow", f"the body did not come in {self._limits.timeout:g} seconds")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._limits.body:
                return b"", self._too_large()
            if not message.get("more_body", False):  # the end, or a caller that went away
                return b"".join(parts), None

    def _too_large(self) -> Refusal:
        limit = self._limits.body
        return 413, "too_large", f"the request has more than {limit} bytes, which is the limit of this server"

    def _is_allowed(self, path: str, headers: Mapping[bytes, bytes]) -> bool:
        if not self._limits.keys or path in OPEN_PATHS or OPEN_PAGE.fullmatch(path):
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = key.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        # Every key is compared, so that the time tells nothing of which one it is.
        return any([hmac.compare_digest(given, known.encode()) for known in self._limits.keys])


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives a body that was read, and then what comes behind it."""
    is_given = False

    async def replayed() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _line(scope: Scope, status: int, seconds: float) -> str:
    facts = {"method": scope["method"], "path": scope["path"], "status": status}
    return json.dumps({"time": round(time.time(), 3), **facts, "ms": round(1e3 * seconds, 3)})


async def _refuse(send: Send, status: int, kind: str, message: str) -> None:
    body: dict[str, Any] = {"error": {"message": message, "type": kind}}
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
