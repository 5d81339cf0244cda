"""Load on loopback: ee-serve with exits beside the same server on one segment, and a plain server.

    ee-split CKPT --out exits/ --baselines graphs/ --dev dev.jsonl
    ee-split CKPT --out monolith/ --segments 12          # all blocks in one segment
    python benchmarks/serving.py exits/ --monolith monolith/ --baselines graphs/ --data test.jsonl

"exits": ee-serve with exits/ at --point. "monolith": ee-serve with monolith/, which has no early exits.
"plain": the single graph of graphs/ behind FastAPI and ONNX Runtime, as a user would write it (PLAIN_SERVER),
without offramp. Each server is a process with all cores; the client, which takes its share of them, is the
same for all. Closed: as many connections as asked for, each with its next request behind its answer; capacity
is what the best number of connections reaches. Open: requests arrive at random (Poisson), whether or not
those before are answered, at shares of the plain server's capacity ("equal": the same load for all) and of
the server's own ("own"); goodput is the answers in time, each second. Servers take turns, so that a change of
the machine meets all. "empty": the plain server without its graph, which reads a request, makes its tokens
and answers the first label; what it reaches is a bound for every server that does at least this work.
Overload: twice the capacity of a server for --overload-seconds: what it refuses, whether anything was
answered wrongly or twice, and its resident memory before, and at each tenth of the time.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from offramp.benchmarks.overhead import write_figures
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import TextInput
from offramp.runtime.tuning.baselines import MONOLITH, read_baselines
from offramp.runtime.tuning.labelled import read_rows
from offramp.runtime.tuning.report import machine_facts

PLAIN_SERVER = """
import numpy, onnxruntime, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file({tokenizer!r})
graph = onnxruntime.InferenceSession({graph!r}, providers=["CPUExecutionProvider"])
names = [entry.name for entry in graph.get_inputs()]
labels = {labels!r}
app = FastAPI()

class Request(BaseModel):
    input: str

@app.post("/v1/classify")
def classify(body: Request):
    encoded = tokenizer.encode({prefix!r} + body.input)
    ids = dict(input_ids=encoded.ids, attention_mask=encoded.attention_mask, token_type_ids=encoded.type_ids)
    arrays = {{name: numpy.array([ids[name]]) for name in names}}
    logits = graph.run(["logits"], arrays)[0][0] if {runs_graph} else numpy.zeros(len(labels))
    return {{"results": [{{"label": labels[int(logits.argmax())]}}]}}

uvicorn.run(app, host="127.0.0.1", port={port}, log_level="error", access_log=False)
"""
PATH, HOST = "/v1/classify", "127.0.0.1"
FIRST_PORT = 18_080
BROKEN = 0  # in place of a status
TURNS = 3  # of each server in each cell
WITH_MODEL = ("exits", "monolith", "plain")
MEMORY_SAMPLES = 10


@dataclass
class Load:
    """What came back: milliseconds of answers in their order, statuses, and labels that were not expected."""

    seconds: float = 0.0
    ms: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    twice: int = 0

    def add(self, other: Load) -> None:
        """Join the result of another turn."""
        self.seconds += other.seconds
        self.ms += other.ms
        self.statuses += other.statuses
        self.wrong += other.wrong
        self.twice += other.twice


class Connection:
    """A connection that is kept, with one request at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer to a request; status BROKEN if the connection broke off."""
        # A server closes a connection that rests for some seconds. A client then opens another one, also if
        # it learns of that only when it has sent a request, which the server has not read.
        if self._streams is not None and not self._streams[0].at_eof():
            try:
                return await self._ask(*self._streams, body)
            except (OSError, asyncio.IncompleteReadError):
                pass
        try:
            self._streams = await asyncio.open_connection(HOST, self._port)
            return await self._ask(*self._streams, body)
        except ConnectionRefusedError:  # no server yet
            raise
        except (OSError, asyncio.IncompleteReadError):
            return BROKEN, b""

    async def _ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes
    ) -> tuple[int, bytes]:
        writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" % PATH.encode())
        writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length")
        )
        return int(head.split(b" ", 2)[1]), await reader.readexactly(length)

    async def close(self) -> int:
        """Close the connection; returns 1 if bytes came that no request asked for, else 0."""
        if self._streams is None:
            return 0
        reader, writer = self._streams
        try:
            extra = await asyncio.wait_for(reader.read(1), 0.02)
        except (asyncio.TimeoutError, OSError):
            extra = b""
        writer.close()
        return len(extra)


async def timed(connection: Connection, body: bytes, expected: str | None, load: Load, begun: float) -> None:
    """Ask, and note the answer; begun: when the request arrived (perf_counter)."""
    status, answer = await connection.ask(body)
    load.statuses[status] += 1
    if status != 200:
        return
    load.ms.append(1e3 * (time.perf_counter() - begun))
    label = json.loads(answer)["results"][0]["label"]
    load.wrong += expected is not None and label != expected


async def closed_load(port: int, bodies: Sequence[bytes], connections: int, seconds: float) -> Load:
    """As many connections, each with its next request behind its answer."""
    load, end, number = Load(), time.perf_counter() + seconds, iter(range(10**9))

    async def caller() -> None:
        connection = Connection(port)
        while (begun := time.perf_counter()) < end:
            await timed(connection, bodies[next(number) % len(bodies)], None, load, begun)
        load.twice += await connection.close()

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(connections)))
    load.seconds = time.perf_counter() - started
    return load


async def open_load(
    port: int, bodies: Sequence[bytes], expected: Sequence[str | None], rate: float, seconds: float, seed: int
) -> Load:
    """Requests at random times, `rate` a second on average, on as many connections as are needed."""
    load, random = Load(), np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(1 / rate, int(rate * seconds)))
    idle: list[Connection] = []
    opened: list[Connection] = []
    tasks = []

    async def request(number: int, begun: float) -> None:
        connection = idle.pop() if idle else Connection(port)
        if connection not in opened:
            opened.append(connection)
        row = number % len(bodies)
        await timed(connection, bodies[row], expected[row], load, begun)
        idle.append(connection)

    started = time.perf_counter()
    for number, arrival in enumerate(arrivals.tolist()):
        begun = started + arrival
        if (pause := begun - time.perf_counter()) > 0:
            await asyncio.sleep(pause)
        tasks.append(asyncio.create_task(request(number, begun)))
    await asyncio.gather(*tasks)
    load.seconds = time.perf_counter() - started
    load.twice = sum(await asyncio.gather(*(connection.close() for connection in opened)))
    return load


@contextmanager
def running(name: str, command: Sequence[str], port: int, body: bytes) -> Iterator[int]:
    """A server process; gives its process id once it answers."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(600):
                if process.poll() is not None:
                    raise click.ClickException(f"{name}: the server ended with {process.returncode}")
                try:
                    asyncio.run(_ask_once(port, body))
                    break
                except OSError:
                    time.sleep(0.1)
            else:
                raise click.ClickException(f"{name}: no answer within a minute")
            yield process.pid
        finally:
            process.terminate()


def resident_mb(process: int) -> float:
    """Resident memory of a process in megabytes."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


async def with_memory(
    load: Coroutine[Any, Any, Load], process: int, pause: float
) -> tuple[Load, list[float]]:
    """Run a load; gives its result and the resident memory of a process after every `pause` seconds."""
    task, samples = asyncio.ensure_future(load), list[float]()
    while not (await asyncio.wait([task], timeout=pause))[0]:
        samples.append(resident_mb(process))
    return task.result(), samples


async def _ask_once(port: int, body: bytes) -> bytes:
    connection = Connection(port)
    _, answer = await connection.ask(body)
    await connection.close()
    return answer


async def labels_of(port: int, bodies: Sequence[bytes]) -> list[str | None]:
    """The label of every request, asked one by one."""
    connection, labels = Connection(port), list[str | None]()
    for body in bodies:
        labels.append(json.loads((await connection.ask(body))[1])["results"][0]["label"])
    await connection.close()
    return labels


def plain_command(bundle: Path, baselines: Path, port: int, variant: str, *, runs_graph: bool) -> list[str]:
    """The command of the plain server with the single graph of a variant, which it runs or not."""
    manifest = open_bundle(bundle).manifest
    assert isinstance(manifest.input, TextInput)
    graphs = {
        fact.variant: fact.file
        for fact in read_baselines(baselines, manifest).graphs
        if fact.kind == MONOLITH
    }
    script = PLAIN_SERVER.format(
        tokenizer=str(bundle / manifest.input.tokenizer),
        graph=str(baselines / graphs[variant]),
        prefix=manifest.input.prefix,
        labels=list(manifest.labels),
        port=port,
        runs_graph=runs_graph,
    )
    return [sys.executable, "-c", script]


def summary(load: Load, limit: float) -> dict[str, Any]:
    """The figures of one cell; limit: milliseconds within which an answer counts for goodput."""
    times = np.array(load.ms or [np.nan])
    percentiles = {f"p{share}_ms": round(float(np.percentile(times, share)), 3) for share in (50, 95, 99)}
    return {
        "answers_per_s": round(len(load.ms) / load.seconds, 2),
        "goodput_per_s": round(float((times <= limit).sum()) / load.seconds, 2),
        **percentiles,
        "refused": load.statuses[429],
        "failed": sum(n for status, n in load.statuses.items() if status not in (200, 429)),
        "statuses": {str(status): n for status, n in sorted(load.statuses.items())},
        "wrong": load.wrong,
        "twice": load.twice,
    }


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--monolith", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--baselines", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--point", default="default", help="Operating point of exits/.")
@click.option("--variant", default="fp32", help="Precision of the servers without exits.")
@click.option("--rows", default=500, help="Texts that are asked for in turn.")
@click.option("--connections", default="1,8,64")
@click.option("--shares", default="0.5,0.8,1.0", help="Of capacity; none leaves out random arrivals.")
@click.option("--limit-ms", default=50.0, help="Time within which an answer counts for goodput.")
@click.option("--seconds", default=6.0, help="Of each turn.")
@click.option("--overload-seconds", default=60.0, help="Of the overload of each server.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(
    bundle: Path,
    monolith: Path,
    baselines: Path,
    data: Path,
    point: str,
    variant: str,
    rows: int,
    connections: str,
    shares: str,
    limit_ms: float,
    seconds: float,
    overload_seconds: float,
    json_file: Path | None,
) -> None:
    """Measure the servers; see the head of this file."""
    most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # a connection is one, in overload
    manifest = open_bundle(bundle).manifest
    items, truth, _ = read_rows(data, manifest.labels, rows)
    if truth is None:
        raise click.ClickException(f"{data}: rows need labels, so that accuracy can be stated")
    bodies = [json.dumps({"input": item}).encode() for item in items]
    program = str(Path(sys.executable).parent / "ee-serve")
    ports = {name: FIRST_PORT + number for number, name in enumerate((*WITH_MODEL, "empty"))}
    commands = {
        "exits": [program, str(bundle), "--point", point, "--port", str(ports["exits"]), "--quiet"],
        "monolith": [
            program,
            str(monolith),
            "--variant",
            variant,
            "--port",
            str(ports["monolith"]),
            "--quiet",
        ],
        "plain": plain_command(bundle, baselines, ports["plain"], variant, runs_graph=True),
        "empty": plain_command(bundle, baselines, ports["empty"], variant, runs_graph=False),
    }
    figures: list[dict[str, Any]] = []
    accuracy: dict[str, float] = {}
    expected: dict[str, list[str | None]] = {}

    about = {
        "bundle": bundle.name,
        "point": point,
        "variant": variant,
        "limit_ms": limit_ms,
        "cores": os.cpu_count(),
    }

    def write() -> None:  # after every cell: the whole takes a quarter of an hour
        write_figures(json_file, {"machine": machine_facts(), **about, "accuracy": accuracy, "rows": figures})

    def cell(kind: str, size: float, loads: Mapping[str, Load]) -> None:
        for name, load in loads.items():
            figures.append({"server": name, "load": kind, "size": size} | summary(load, limit_ms))
        write()

    def in_turn(run: Any, names: Sequence[str] = tuple(commands)) -> dict[str, Load]:
        loads = {name: Load() for name in names}
        for turn in range(TURNS):
            for name in names if turn % 2 == 0 else names[::-1]:
                with running(name, commands[name], ports[name], bodies[0]):
                    asyncio.run(closed_load(ports[name], bodies, 4, 1.0))  # warm
                    loads[name].add(asyncio.run(run(name, ports[name], turn)))
        return loads

    for name in WITH_MODEL:
        with running(name, commands[name], ports[name], bodies[0]):
            expected[name] = asyncio.run(labels_of(ports[name], bodies))
            right = [
                manifest.labels[number] == label for number, label in zip(truth, expected[name], strict=True)
            ]
            accuracy[name] = round(100 * float(np.mean(right)), 2)
    for count in (int(part) for part in connections.split(",")):
        click.echo(f"{count} connections", err=True)
        cell(
            "closed", count, in_turn(lambda name, port, turn, n=count: closed_load(port, bodies, n, seconds))
        )
    capacity = {
        name: max(row["answers_per_s"] for row in figures if row["server"] == name) for name in WITH_MODEL
    }
    for kind, names in (("equal", WITH_MODEL), ("own", ("exits", "monolith"))):
        for share in (float(part) for part in shares.split(",") if part):
            rates = {name: share * capacity["plain" if kind == "equal" else name] for name in names}
            click.echo(f"{kind} load, {share:g} of capacity", err=True)
            cell(
                kind,
                share,
                in_turn(
                    lambda name, port, turn, rates=rates: open_load(
                        port, bodies, expected[name], rates[name], seconds, turn
                    ),
                    names,
                ),
            )
    for name in WITH_MODEL:
        click.echo(f"{name}: overload", err=True)
        with running(name, commands[name], ports[name], bodies[0]) as process:
            asyncio.run(closed_load(ports[name], bodies, 64, seconds))  # memory settles
            before = resident_mb(process)
            rate = 2 * capacity[name]
            overload = open_load(ports[name], bodies, expected[name], rate, overload_seconds, 0)
            load, after = asyncio.run(with_memory(overload, process, overload_seconds / MEMORY_SAMPLES))
        memory = {"mb_before": before, "mb_during": after}
        figures.append({"server": name, "load": "overload", "size": 2.0} | summary(load, limit_ms) | memory)
        write()
    table = Table(title=f"{bundle.name}, {point}; accuracy {accuracy}; goodput within {limit_ms:g} ms")
    columns = list(figures[-1])  # of overload, which has memory too
    for column in columns:
        table.add_column(column, justify="right")
    for row in figures:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
