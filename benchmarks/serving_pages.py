"""The tables of docs/serving.md, from the result files of serving.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from offramp.benchmarks.compare.pages import markdown_table, read_result_file

RESULTS = Path(__file__).resolve().parent / "results"
EXITS, MONOLITH, PLAIN, EMPTY = "exits", "monolith", "plain", "empty"
CLOSED_HEAD = (
    *("", "connections", "exits, answers/s", "monolith", "plain", "empty", "exits / plain"),
    *("exits: p50, ms", "p99", "plain: p50, ms", "p99"),
)
OPEN_HEAD = (
    *("", "arrivals", "exits, in time/s", "monolith", "plain", "exits / plain"),
    *("exits: p50, ms", "p95", "p99", "plain: p50, ms", "p95", "p99"),
)
OVERLOAD_HEAD = (
    *("", "server", "answers/s", "refused (429)", "failed", "wrong", "answered twice"),
    *("MB before", "MB after each tenth"),
)

Line = Mapping[str, Any]


def serving_tables(folder: Path = RESULTS) -> list[str]:
    """Markdown lines of all tables of docs/serving.md; none without result files."""
    files = sorted(folder.glob("serving_*.json"))
    results = {file.stem.removeprefix("serving_"): read_result_file(file) for file in files}
    if not results:
        return []
    lines = list[str]()
    for name, result in results.items():
        accuracy = ", ".join(f"{server} {share:.2f} %" for server, share in result["accuracy"].items())
        lines.append(
            f"- {name}: `{result['point']}` beside {result['variant']} graphs; accuracy: {accuracy}; "
            f"{result['machine']['cpu']}, {result['cores']} cores, {result['machine']['when'][:10]}"
        )
    limits = sorted({result["limit_ms"] for result in results.values()})
    limit = " or ".join(f"{limit:g}" for limit in limits)
    return [
        *lines,
        "",
        "**Each connection sends its next request when its answer is there**",
        "",
        *markdown_table(CLOSED_HEAD, [row for item in results.items() for row in _closed(*item)]),
        f"**Requests arrive at random times**; answers within {limit} ms, each second",
        "",
        *markdown_table(OPEN_HEAD, [row for item in results.items() for row in _open(*item)]),
        "**Twice the capacity of each server**",
        "",
        *markdown_table(OVERLOAD_HEAD, [row for item in results.items() for row in _overload(*item)]),
    ]


def _cells(result: Line, load: str) -> dict[float, dict[str, Line]]:
    """The figures of a kind of load: by its size, and by server."""
    cells: dict[float, dict[str, Line]] = {}
    for row in result["rows"]:
        if row["load"] == load:
            cells.setdefault(row["size"], {})[row["server"]] = row
    return cells


def _closed(name: str, result: Line) -> Iterator[list[str]]:
    for connections, servers in _cells(result, "closed").items():
        rates = {server: row["answers_per_s"] for server, row in servers.items()}
        shown = [f"{rates[server]:.0f}" for server in (EXITS, MONOLITH, PLAIN, EMPTY)]
        times = [f"{servers[s][p]:.1f}" for s in (EXITS, PLAIN) for p in ("p50_ms", "p99_ms")]
        yield [name, f"{connections:g}", *shown, f"{rates[EXITS] / rates[PLAIN]:.2f}", *times]


def _open(name: str, result: Line) -> Iterator[list[str]]:
    for load, share, exits, others in _open_cells(result):
        arrivals = f"{share:g} of plain's capacity" if load == "equal" else f"{share:g} of its own capacity"
        plain = others[PLAIN]
        rates = [f"{row['goodput_per_s']:.0f}" for row in (exits, others[MONOLITH], plain)]
        times = [f"{row[p]:.1f}" for row in (exits, plain) for p in ("p50_ms", "p95_ms", "p99_ms")]
        ratio = exits["goodput_per_s"] / max(plain["goodput_per_s"], 1e-9)
        yield [name, arrivals, *rates, f"{ratio:.2f}", *times]


def _open_cells(result: Line) -> Iterator[tuple[str, float, Line, Mapping[str, Line]]]:
    """Load, share of capacity, figures of the server with exits, and those of the others at that share.

    A share of a server's own capacity is, for the plain server, the same as the equal load.
    """
    equal = _cells(result, "equal")
    for share, servers in equal.items():
        yield "equal", share, servers[EXITS], servers
    for share, servers in _cells(result, "own").items():
        yield "own", share, servers[EXITS], {**servers, PLAIN: equal[share][PLAIN]}


def _overload(name: str, result: Line) -> Iterator[list[str]]:
    for row in result["rows"]:
        if row["load"] == "overload":
            memory = " ".join(f"{mb:.0f}" for mb in row["mb_during"])
            counts = [str(row[part]) for part in ("refused", "failed", "wrong", "twice")]
            yield [
                *(name, row["server"], f"{row['answers_per_s']:.0f}", *counts),
                *(f"{row['mb_before']:.0f}", memory),
            ]
