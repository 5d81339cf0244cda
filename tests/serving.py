"""A server of ee-serve in a thread of this process, for tests that ask it over real connections."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from offramp.runtime.serving.app import create_app  # noqa: E402
from offramp.runtime.serving.cli import bind  # noqa: E402
from offramp.runtime.serving.limits import ServerLimits  # noqa: E402
from offramp.runtime.serving.metrics import Metrics  # noqa: E402
from offramp.runtime.serving.models import Models, names_of  # noqa: E402
from offramp.runtime.serving.settings import WatchOptions  # noqa: E402

CLASSIFY = "/v1/classify"


class Server:
    """A server in a thread of this process."""

    def __init__(self, models: Models, limits: ServerLimits, metrics: Metrics) -> None:
        self.models = models
        config = uvicorn.Config(
            create_app(models, limits, metrics), port=0, log_config=None, access_log=False
        )
        self._server = uvicorn.Server(config)
        self._socket = bind("127.0.0.1", 0)
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)

    def ask(
        self, path: str, value: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Status, JSON (or text) and headers of an answer; a value is posted, bytes as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            if value is None:
                connection.request("GET", path, headers=dict(headers or {}))
            else:
                body = value if isinstance(value, bytes) else json.dumps(value).encode()
                kind = {"Content-Type": "application/json"}
                connection.request("POST", path, body, kind | dict(headers or {}))
            reply = connection.getresponse()
            data, replies = reply.read(), {key.lower(): text for key, text in reply.getheaders()}
        is_json = replies.get("content-type", "").startswith("application/json")
        return reply.status, json.loads(data) if is_json else data.decode(), replies

    def send(self, path: str, value: Any) -> socket.socket:
        """A connection on which a value was posted; whoever closes it goes away."""
        body = json.dumps(value).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return connection

    def results(self, value: Any) -> Any:
        """The results of a request that is answered."""
        status, answer, _ = self.ask(CLASSIFY, value)
        assert status == 200, answer
        return answer["results"]

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait until a condition holds, for 20 seconds at most."""
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.002)


def hold_engine(server: Server, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Hold the engine of the first model before its next step until the event is set."""
    engine, go_on = server.models.rows(None).session.engine, threading.Event()
    step = engine.step

    def held(*arguments: Any) -> Any:
        assert go_on.wait(20)
        return step(*arguments)

    monkeypatch.setattr(engine, "step", held)
    return go_on


def futures_of(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[Future[Any]]:
    """The futures of all rows that the first model accepts from now on."""
    scheduler, futures = server.models.rows(None).scheduler, list[Future[Any]]()
    submit = scheduler.submit

    def submit_row(*arguments: Any) -> Future[Any]:
        futures.append(submit(*arguments))
        return futures[-1]

    monkeypatch.setattr(scheduler, "submit", submit_row)
    return futures


@contextlib.contextmanager
def serving(
    *folders: str | Path,
    scheduling: Mapping[str, int] | None = None,
    watch: WatchOptions | None = None,
    options: Mapping[str, Any] | None = None,
    **limits: Any,
) -> Iterator[Server]:
    """A server of some bundles. options: of load(). watch: budgets and audits. limits: of ServerLimits."""
    metrics = Metrics()
    models = Models(
        names_of([str(f) for f in folders]),
        options or {},
        scheduling or {},
        metrics.answered,
        watch or WatchOptions(),
    )
    models.open()
    server = Server(models, ServerLimits(**{"log": False, **limits}), metrics)
    try:
        yield server
    finally:
        server.stop()
