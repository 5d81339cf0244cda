"""Command ee-serve: answer over HTTP with one or several bundles."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import warnings
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from offramp.runtime import shared_options as shared
from offramp.runtime.shared_options import ON_DRIFT, STATISTICS

if TYPE_CHECKING:
    from types import FrameType

    from offramp.runtime.serving.models import Models

ENDED, NOT_STARTED = 0, 2
LOOPBACK = "127.0.0.1"
BUDGET_OPTIONS = ("budget_ms", "budget_depth", "budget_of", "budget_window", "max_risk")

HELP = """Answer requests over HTTP with each BUNDLE: a folder, or hub:user/name of a model hub; NAME=BUNDLE
gives it another name in requests than that of its folder. Requests that name no model are for the first.

\b
    ee-serve bundle/
    curl localhost:8000/v1/classify -H 'Content-Type: application/json' \\
         -d '{"input": "a stirring, funny film"}'

\b
POST /v1/classify    {"input": TEXT or a list of them}; a text, {"text": …, "text_b": …} or
                     {"image": base64}. Optional: "model", "point" (an operating point),
                     "max_risk" (the cheapest point that guarantees it), "max_depth" (blocks),
                     "budget_ms" or "budget_depth" (held over all rows that ask for the same;
                     with "max_risk": by points that guarantee it), "timeout_ms".
                     Answers: {"model": …, "results": [objects as of ee-run]}
POST /v1/embeddings  as OpenAI's API has it, for bundles that embed texts
POST /v1/completions, /v1/chat/completions
                     as OpenAI's API has them, for bundles that generate text; also streamed.
                     "timeout_ms" limits the whole text
POST /v1/walk        one text, with what every exit gave
GET  /v1/models      the bundles, with labels and operating points; /v1/models/NAME: one of them
GET  /demo           a page that shows how far each text walks while it is typed
GET  /healthz /readyz /metrics (Prometheus) /openapi.json (every route and field)

\b
Rows of all requests share the steps of one walk: rows that wait for the same segment run
together, and each row is answered at its own exit. A row's answer does not depend on the others.

\b
Errors are {"error": {"message": …, "type": …}}:
  400  the request or an item of it cannot be answered; in a list, the item's result is an error
  401  no API key, or a wrong one        408  the body did not come in time
  404  no such model                     413  too many bytes
  503  the server is closing, or an      429  too many rows wait, or too many budgets
       error ended a thread of it             are named; see Retry-After
  504  not answered in time              500  the engine failed; the log says how
The error of a stream that has begun is such an object in its last event, without [DONE].

\b
SIGTERM and Ctrl-C: what was accepted is answered, further requests are refused, and the
command ends. SIGHUP: bundles whose manifest has changed are opened anew; requests that are
under way are answered by the bundle of before. A bundle of a model hub stays at the commit that was
pulled at the start; start anew for a later one.

Options --budget-* and --audit watch the rows of each bundle (docs/budgets.md): what they find is in
/metrics, and their warnings are lines of the log.

\b
Exit codes: 0 ended by a signal, 2 not started: option, bundle, engine or address cannot be used.
"""


@click.command(help=HELP)
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True)
@click.option("--host", default=LOOPBACK, show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one.")
@click.option(
    "--api-keys",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File of API keys, one a line. Requests must have one: Authorization: Bearer KEY.",
)
@click.option(
    "--without-keys",
    is_flag=True,
    help="Listen at an address other than loopback without API keys, as behind a proxy that checks them.",
)
@shared.engine()
@shared.device()
@shared.variant()
@shared.point(help="Operating point of requests that name no setting.")
@shared.budget_ms(
    help="Hold this time of an answer over rows whose request names no setting, by moving among points."
)
@shared.budget_depth()
@shared.budget_of(
    default=STATISTICS[0], show_default=True, help="What budgets hold over a window, those of requests, too."
)
@shared.budget_window(default=1000, show_default=True, help="Rows over which they hold it.")
@shared.max_risk(
    help="Let --budget-ms and --budget-depth use only points that guarantee a risk of at most this."
)
@shared.audit(
    help="Walk this share of the rows to the end as well, after they were answered, and warn if answers "
    "disagree with full depth more than their point promises, or if rows leave at other exits than "
    "calibration rows."
)
@shared.audit_limit()
@shared.on_drift(
    help="What follows once the disagreement is above its limit: warn, or walk all rows of that setting to "
    "the end.  [default: warn]"
)
@shared.threads()
@shared.long_texts()
@shared.require_signature()
@shared.batch_size(default=32, help="Most rows of a step.")
@click.option(
    "--texts",
    type=click.IntRange(1, 1024),
    default=8,
    show_default=True,
    help="Texts of a bundle that are generated at once at most.",
)
@click.option(
    "--queue",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Most rows or texts of a bundle that are accepted and not answered. A request that does not fit now "
    "gets 429; one with more items than this gets 400.",
)
@click.option(
    "--max-bytes",
    type=click.IntRange(1),
    default=1 << 20,
    show_default=True,
    help="Most bytes of a request. A larger one gets 413.",
)
@click.option(
    "--max-items",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Most items of a request. One with more gets 400.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds in which the body of a request must come, and then its rows must be answered, or the first "
    "token of its text must be there. A late body gets 408, late rows and texts get 504. A text that has its "
    "first token has no further limit of time, unless its request has timeout_ms.",
)
@click.option("--open", "open_page", is_flag=True, help="Open the page /demo in the web browser.")
@click.option("--quiet", is_flag=True, help="No log of requests.")
def main(bundles: tuple[str, ...], **options: Any) -> None:
    """See HELP."""
    try:
        import uvicorn

        from offramp.runtime.serving.app import create_app
        from offramp.runtime.serving.limits import ServerLimits
        from offramp.runtime.serving.metrics import Metrics
        from offramp.runtime.serving.models import Models, names_of
        from offramp.runtime.serving.settings import WatchOptions
    except ImportError as problem:
        _refuse(f"ee-serve needs the extra serve ({problem.name} is missing): pip install 'offramp[serve]'")
    from offramp.runtime.audit import AuditOptions
    from offramp.runtime.errors import OfframpError, RunWarning

    keys = _keys(options["api_keys"])
    if not keys and not options["without_keys"] and not _is_loopback(options["host"]):
        _refuse(
            f"--host {options['host']}: everybody who reaches it could ask; give --api-keys FILE, or "
            "--without-keys if something before it checks who asks"
        )
    metrics = Metrics()
    loading = (
        "engine",
        "device",
        "variant",
        "point",
        "threads",
        "long_texts",
        "require_signature",
        "batch_size",
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        of_budget = {name: options[name] for name in BUDGET_OPTIONS}
        of_audit = (options["audit"], options["audit_limit"], options["on_drift"])
        audit = None
        if of_audit != (None, None, None):
            audit = AuditOptions(*of_audit[:2], options["on_drift"] or ON_DRIFT[0])
        models = Models(
            names_of(bundles),
            {name: options[name] for name in loading} | {"global_pool": options["engine"] == "ort"},
            {"queue": options["queue"], "texts": options["texts"]},
            metrics.answered,
            WatchOptions(**of_budget, audit=audit),
        )
        models.open()
    except OfframpError as problem:
        _refuse(str(problem))
    limits = ServerLimits(
        keys, options["max_bytes"], options["max_items"], options["timeout"], not options["quiet"]
    )
    config = uvicorn.Config(
        create_app(models, limits, metrics),
        access_log=False,
        log_config=None,
        server_header=False,
    )
    _reload_at_hangup(models)
    try:
        listening = bind(options["host"], options["port"])
    except OSError as problem:
        models.close(finish=False)
        _refuse(f"cannot listen at {options['host']}:{options['port']}: {problem.strerror or problem}")
    port = listening.getsockname()[1]
    shown = f"[{options['host']}]" if ":" in options["host"] else options["host"]
    address = f"http://{shown}:{port}"

    class Server(uvicorn.Server):
        """Tells its address once connections are taken."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            click.echo(f"{', '.join(models.folders)}: {address}/openapi.json and {address}/demo", err=True)
            if options["open_page"]:
                webbrowser.open(f"{address}/demo")

    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn sends them again when it has ended
        signal.signal(number, lambda *_: None)
    warnings.simplefilter("error", RunWarning)  # of budgets, which Setting writes to the log
    Server(config).run([listening])
    raise SystemExit(ENDED)


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 is a free one.

    It names its protocol: only then asyncio sends small answers at once (TCP_NODELAY). Otherwise the body of
    an answer waits some 40 ms for the caller to confirm its head.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would let two servers share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError:
        listening.close()
        raise
    return listening


def _keys(file: Path | None) -> frozenset[str]:
    if file is None:
        return frozenset()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        _refuse(f"--api-keys {file}: it cannot be read as text: {problem}")
    keys = frozenset(line.strip() for line in lines if line.strip())
    if not keys:
        _refuse(f"--api-keys {file}: it has no key; write one a line")
    if short := [key for key in keys if len(key) < 16]:
        _refuse(f"--api-keys {file}: a key has {len(short[0])} characters; 16 or more cannot be guessed")
    return keys


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reload_at_hangup(models: Models) -> None:
    """Open changed bundles anew at SIGHUP, where the system has it."""
    if not hasattr(signal, "SIGHUP"):
        return

    def reload() -> None:
        try:
            for name in models.reload():
                click.echo(f"{name}: opened anew", err=True)
        except Exception as problem:
            click.echo(f"reload: {problem}", err=True)

    def handle(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=reload, name="offramp reload").start()

    signal.signal(signal.SIGHUP, handle)


def _refuse(message: str) -> NoReturn:
    click.echo(f"Error: {message}", err=True)
    raise SystemExit(NOT_STARTED)


if __name__ == "__main__":
    main()
