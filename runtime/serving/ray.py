"""ee-serve's application on Ray Serve: `serve run offramp.runtime.serving.ray:app bundles=bundle/`."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.runtime.errors import BadSetting

if TYPE_CHECKING:  # of the extras ray and serve: imported where they are used
    from ray.serve import Application
    from starlette.types import ASGIApp, Receive, Scope, Send

    from offramp.runtime.serving.limits import ServerLimits
    from offramp.runtime.serving.metrics import Metrics
    from offramp.runtime.serving.models import Models

BUNDLES = "OFFRAMP_BUNDLES"  # environment variable for what no argument names
API, PROBES = "/v1/", ("/healthz", "/readyz")
SHORTEST_KEY = 16  # characters
EXTRA = "offramp.runtime.serving.ray needs the extra ray ({} is missing): pip install 'offramp[ray]'"


@dataclass(frozen=True)
class ReplicaOptions:
    """Arguments of `app`, all of which may be left out but bundles.

    bundles: each NAME=BUNDLE or BUNDLE, as ee-serve has them; as text, separated by blanks.
    bundles_per_replica: 0, every replica opens all bundles; else a replica opens a bundle when a request
    first asks for it, and at most so many. threads: of a replica, and the CPUs that it takes. min_replicas to
    ongoing_at_most: of Ray Serve's autoscaling; a replica is added when there are more than ongoing_requests
    on each, and one accepts ongoing_at_most. The others are options of ee-serve; api_keys is a file that each
    replica reads.
    """

    bundles: tuple[str, ...]
    bundles_per_replica: int = 0
    threads: int = 1
    min_replicas: int = 1
    max_replicas: int = 4
    ongoing_requests: float = 16.0
    ongoing_at_most: int = 256
    variant: str | None = None
    point: str | None = None
    long_texts: str = "cut"
    require_signature: str | None = None
    batch_size: int = 32
    queue: int = 1024
    max_bytes: int = 1 << 20
    max_items: int = 256
    timeout: float = 30.0
    api_keys: str | None = None

    @property
    def limits(self) -> ServerLimits:
        """What a replica takes; raises BadSetting for a file of keys that cannot be used."""
        from offramp.runtime.serving.limits import ServerLimits

        keys = frozenset[str]() if self.api_keys is None else read_keys(self.api_keys)
        return ServerLimits(keys, self.max_bytes, self.max_items, self.timeout, log=False)

    def models(self, folders: Mapping[str, Path], metrics: Metrics) -> Models:
        """The bundles in these folders, not opened."""
        from offramp.runtime.serving.models import Models

        names = ("variant", "point", "long_texts", "require_signature", "batch_size", "threads")
        values = asdict(self)
        loading = {name: values[name] for name in names} | {
            "global_pool": True
        }  # the process is the replica's
        return Models(folders, loading, {"queue": self.queue}, metrics.answered)


def app(args: Mapping[str, Any]) -> Application:
    """Build the application of Ray Serve; args: fields of ReplicaOptions, as text or as values.

    Without bundles, they are those of the environment variable OFFRAMP_BUNDLES. Raises BadSetting for
    arguments that are unknown or no numbers where numbers are needed, and ImportError without the extra.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        from ray import serve
    except ImportError as problem:
        raise ImportError(EXTRA.format(problem.name)) from problem

    options = read_options(args)
    count, kind = options.bundles_per_replica, BundleReplica
    if count:

        class MultiplexedReplica(BundleReplica):
            """Opens bundles when requests ask for them; Ray Serve closes the least recently used one."""

            @serve.multiplexed(max_num_models_per_replica=count)  # type: ignore[untyped-decorator]
            async def load_bundle(self, name: str) -> OpenBundles:
                return await self.open_bundle(name)

        kind = MultiplexedReplica
    deployment: Any = serve.deployment(
        serve.ingress()(kind),
        name="offramp",
        max_ongoing_requests=options.ongoing_at_most,
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.ongoing_requests,
        },
        ray_actor_options={"num_cpus": options.threads},
        # Until then rows, and texts without a token, are answered or given up. A text that is longer under
        # way is cut.
        graceful_shutdown_timeout_s=options.timeout + 10,
    )
    application: Application = deployment.bind(options)
    return application


def read_options(args: Mapping[str, Any]) -> ReplicaOptions:
    """Arguments as ReplicaOptions: see app."""
    known = {field.name: field for field in fields(ReplicaOptions)}
    if unknown := [name for name in args if name not in known]:
        raise BadSetting(f"{unknown[0]}: no such argument; there are {', '.join(known)}")
    values: dict[str, Any] = {"bundles": os.environ.get(BUNDLES, "")}
    for name, value in args.items():
        default: object = known[name].default
        convert = float if isinstance(default, float) else int if isinstance(default, int) else None
        try:
            values[name] = value if convert is None else convert(value)
        except (TypeError, ValueError):
            raise BadSetting(f"{name}={value}: expected a number") from None
    given = values["bundles"]
    bundles = given.split() if isinstance(given, str) else list(given)
    if not bundles:
        raise BadSetting(f"name bundles: bundles=bundle/, or the environment variable {BUNDLES}")
    return ReplicaOptions(**{**values, "bundles": tuple(map(_absolute, bundles))})


def _absolute(place: str) -> str:
    """NAME=BUNDLE with a path that does not depend on the current folder."""
    name, equals, reference = place.rpartition("=")
    return f"{name}{equals}{os.path.abspath(reference) if os.path.isdir(reference) else reference}"


def read_keys(file: str) -> frozenset[str]:
    """The API keys of a file, one a line; raises BadSetting if there is none, or one is too short."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise BadSetting(f"api_keys {file}: it cannot be read as text: {problem}") from problem
    keys = frozenset(line.strip() for line in lines if line.strip())
    if not keys or min(map(len, keys)) < SHORTEST_KEY:
        raise BadSetting(f"api_keys {file}: write keys of {SHORTEST_KEY} characters or more, one a line")
    return keys


class OpenBundles:
    """ee-serve's application with the bundles that it answers with; an ASGI application itself.

    It counts the requests that it answers, so that close() can wait for them.
    """

    def __init__(self, models: Models, limits: ServerLimits, metrics: Metrics) -> None:
        from offramp.runtime.serving.app import create_app

        self._models, self._unused, self._requests = models, threading.Condition(), 0
        self.is_open = True
        models.open()
        self.app = create_app(models, limits, metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        with self._counted():
            await self.app(scope, receive, send)

    def check(self) -> None:
        """Raise RuntimeError if rows of a bundle are not walked any more."""
        for model in self._models.all():
            if self.is_open and not model.is_alive:
                raise RuntimeError(f"model {model.name}: a thread has ended")

    def close(self) -> None:
        """Wait until every request is answered, and close the bundles; a second call does nothing."""
        with self._unused:
            self._unused.wait_for(lambda: not self._requests)
        self.is_open = False
        self._models.close()

    def __del__(self) -> None:
        """What Ray Serve calls, in a thread, when it has taken the bundle out of a replica."""
        self.close()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._unused:
            self._requests += 1
        try:
            yield
        finally:
            with self._unused:
                self._requests -= 1
                self._unused.notify_all()


class BundleReplica:
    """A replica: every bundle, or with bundles_per_replica those that requests asked for last."""

    # What load_bundle is in a replica that opens bundles when they are asked for.
    load_bundle: Callable[[str], Any]

    def __init__(self, options: ReplicaOptions) -> None:
        from offramp.runtime.serving.metrics import Metrics
        from offramp.runtime.serving.models import names_of
        from offramp.runtime.serving.protection import Protection

        self._options, self._limits = options, options.limits
        self._folders, self._open = names_of(options.bundles), dict[str, OpenBundles]()
        metrics = Metrics()
        self._asgi: ASGIApp
        if options.bundles_per_replica:
            self._asgi = Protection(self._dispatch, limits=self._limits, metrics=metrics)
        else:
            bundles = OpenBundles(options.models(self._folders, metrics), self._limits, metrics)
            self._open[""], self._asgi = bundles, bundles.app

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application, for Ray Serve."""
        return self._asgi

    def check_health(self) -> None:
        """Raise RuntimeError if rows are not walked any more; Ray Serve then replaces the replica."""
        for bundles in list(self._open.values()):
            bundles.check()

    async def open_bundle(self, name: str) -> OpenBundles:
        """Open one bundle, in a thread; requests for others are answered meanwhile."""
        from starlette.concurrency import run_in_threadpool

        from offramp.runtime.serving.metrics import Metrics

        def opened() -> OpenBundles:
            metrics = Metrics()
            models = self._options.models({name: self._folders[name]}, metrics)
            # Keys were checked before a bundle is opened.
            return OpenBundles(models, replace(self._limits, keys=frozenset()), metrics)

        bundles: OpenBundles = await run_in_threadpool(opened)
        self._open = {known: other for known, other in self._open.items() if other.is_open} | {name: bundles}
        return bundles

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with the bundle that its header names; the first if it names none."""
        from ray import serve

        if scope["type"] == "lifespan":
            await _confirm_lifespan(receive, send)
            return
        name = serve.get_multiplexed_model_id() or next(iter(self._folders))
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in PROBES:
            try:
                self.check_health()
            except RuntimeError as problem:
                await _reply(send, 503, "engine", str(problem))
            else:
                await _reply(send, 200)
        elif not path.startswith(API):
            await _reply(send, 404, "http", f"with bundles_per_replica there are only paths under {API}")
        elif name not in self._folders:
            known = ", ".join(self._folders)
            await _reply(send, 404, "unknown_model", f"model {name!r}: this server has {known}")
        else:
            bundles: OpenBundles = await self.load_bundle(name)
            await bundles(scope, receive, send)


async def _confirm_lifespan(receive: Receive, send: Send) -> None:
    """Answer the events of an application's start and end, at which there is nothing to do."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


async def _reply(send: Send, status: int, kind: str = "", message: str = "") -> None:
    """Send an error in the form of ee-serve's, or "ok"."""
    body = json.dumps({"error": {"message": message, "type": kind}}).encode() if kind else b"ok"
    headers = [(b"content-type", b"application/json" if kind else b"text/plain")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
