"""The tables and the picture of docs/fleet.md, from the result files of fleet.py."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from offramp.benchmarks.compare.pages import markdown_table, read_result_file
from offramp.benchmarks.compare.pictures import COLOURS

RESULTS = Path(__file__).resolve().parent / "results"
COSTS, CHECK, RUNS = "fleet_costs", "fleet_check", "fleet_runs"  # kinds of result files
EXITS, MONOLITHS = "exits", ("monolith", "monolith by length")
SHOWN_FLEET, SHOWN_LOAD = 100, 0.8  # of the tables and the picture, or the nearest there is

Line = Mapping[str, Any]

CAPACITY_HEAD = (
    *("", "accuracy %", "of the monolith", "exits, answers/s", "monolith", "by length"),
    "exits / faster monolith",
)
LIMIT_HEAD = ("", "rows of a step at most", "exits", "monolith", "by length", "exits / faster monolith")
NEEDED_HEAD = (
    *("", "limit of p99, ms", "arrivals", "balancer", "exits", "monolith", "exits / monolith"),
    *("replica-seconds a million: exits", "monolith"),
)
LOAD_HEAD = (
    *("", "arrivals", "load", "exits: p50", "p95", "p99", "p99 of waiting"),
    *("monolith: p50", "p95", "p99", "p99 of waiting"),
)
LONE_HEAD = (
    *("", "load of exits", "not padded: rows in a step", "p50", "p99"),
    *("padded: rows in a step", "p50", "p99"),
)
CHECK_HEAD = (
    *("", "load of exits", "scheduler: mean", "p50", "p95", "p99"),
    *("simulation: mean", "p50", "p95", "p99", "mean / scheduler"),
)


def read_named(kind: str, folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The content of the result files of a kind, by NAME."""
    files = sorted(folder.glob(f"{kind}_*.json"))
    return {file.stem.removeprefix(f"{kind}_"): read_result_file(file) for file in files}


def fleet_tables(folder: Path = RESULTS) -> list[str]:
    """Markdown lines of all tables of docs/fleet.md; none without result files."""
    results, checks = read_named(RUNS, folder), read_named(CHECK, folder)
    return [*result_tables(results), *check_tables(checks)] if results else []


def result_tables(results: Mapping[str, Line]) -> list[str]:
    """Markdown lines of the tables of simulations, by name."""
    first = next(iter(results.values()))
    threads = f"{first['machine']['threads']} thread" + "s" * (first["machine"]["threads"] != "1")
    machine = f"{first['machine']['cpu']}, {threads}, {first['time']} time, {first['rounds']} rounds, "
    machine += first["machine"]["when"][:10]
    parts = [
        (f"**One replica that always has requests** ({machine})", CAPACITY_HEAD, capacity_rows),
        ("**The same by the limit of rows in a step**", LIMIT_HEAD, limit_rows),
        (
            "**What if batches were cheaper**: answers a second of exits / faster monolith, if only this "
            "part of a step's cost grew with its rows (costs of one row measured, of more rows assumed)",
            ("", *next(iter(results.values()))["by_share"]),
            share_rows,
        ),
        (
            "**Replicas that keep p99 within a limit**, of the traffic that loads 100 monoliths to 80 %",
            NEEDED_HEAD,
            needed_rows,
        ),
        ("**Milliseconds by load**, 100 replicas, shortest queue", LOAD_HEAD, load_rows),
        (
            "**What it brings that a row which begins alone is padded to a multiple of 8 if others wait**, "
            "so that it can share their steps: ms, one replica, poisson, load as a share of the capacity",
            LONE_HEAD,
            lone_rows,
        ),
    ]
    lines: list[str] = []
    for title, head, rows_of in parts:
        rows = [row for name, result in results.items() for row in rows_of(name, result)]
        lines += [title, "", *markdown_table(head, rows)]
    sizes = sorted({line["replicas"] for result in results.values() for line in result["lines"]})
    columns = ["", "arrivals", "balancer", "", *(f"{size} replica{'s' * (size > 1)}" for size in sizes)]
    rows = [row for name, result in results.items() for row in size_rows(name, result, sizes)]
    return [
        *lines,
        "**p99 in milliseconds by size of the fleet**, load 0.8",
        "",
        *markdown_table(columns, rows),
    ]


def check_tables(checks: Mapping[str, Line]) -> list[str]:
    """Markdown lines of the table of the simulation beside the real scheduler."""
    if not checks:
        return []
    machine = next(iter(checks.values()))["machine"]
    title = (
        f"**One simulated replica beside the real scheduler**, ms ({machine['cpu']}, {machine['when'][:10]})"
    )
    rows = [row for name, result in checks.items() for row in check_rows(name, result)]
    text = ["Requests that all come at once, seconds until the last answer:", ""]
    for name, result in checks.items():
        backlog = result["backlog"]
        text += [
            f"- {name}, {backlog['requests']} requests: scheduler {backlog['scheduler_seconds']:.2f} (its "
            f"process: {backlog['scheduler_cpu_seconds']:.2f} of CPU), "
            f"simulation {backlog['simulation_seconds']:.2f}"
        ]
    return [title, "", *markdown_table(CHECK_HEAD, rows), *text, ""]


def check_rows(name: str, result: Line) -> list[list[str]]:
    """Rows of check_tables of one bundle."""
    rows = []
    for line in result["lines"]:
        both = [line[side] for side in ("scheduler", "simulation")]
        figures = [f"{ms:.1f}" for side in both for ms in side.values()]
        ratio = both[1]["mean_ms"] / both[0]["mean_ms"]
        rows.append([name, f"{line['share']:g}", *figures, f"{ratio:.2f}"])
    return rows


def capacity_rows(name: str, result: Line) -> list[list[str]]:
    """Accuracy, and answers a second of each system."""
    accuracy = result["accuracy"] or {}
    shown = [f"{accuracy[kind]:.2f}" if kind in accuracy else "-" for kind in (EXITS, MONOLITHS[0])]
    return [[f"{name}, {result['point']}", *shown, *_rates(result["capacity"])]]


def limit_rows(name: str, result: Line) -> list[list[str]]:
    """Answers a second by the limit of a step's rows."""
    return [[name, limit, *_rates(rates)] for limit, rates in result["by_batch_limit"].items()]


def share_rows(name: str, result: Line) -> list[list[str]]:
    """What exits gain by the part of a step's cost that grows with its rows."""
    return [[name, *(_rates(rates)[-1] for rates in result["by_share"].values())]]


def needed_rows(name: str, result: Line) -> list[list[str]]:
    """Replicas that are needed, and what a million requests take; with a price, what they cost."""
    rows = []
    groups: dict[tuple[float, str, str], dict[str, Line]] = {}
    for line in result["needed"]:
        case = line["limit_ms"], line["arrivals"], line["balancer"]
        groups.setdefault(case, {})[line["kind"]] = line
    for (limit, arrivals, balancer), lines in groups.items():
        exits = lines[EXITS]
        other = min((lines[kind] for kind in MONOLITHS), key=lambda line: _mean(line["replicas"]))
        ratio = _mean(exits["replicas"]) / _mean(other["replicas"])
        shown = "-" if not 0 < ratio < float("inf") else f"{ratio:.2f}"
        cells = [_text(line["replicas"]) for line in (exits, other)]
        million = [_cost(line["seconds_per_million"], result["price"]) for line in (exits, other)]
        rows.append([name, f"{limit:g}", arrivals, balancer, *cells, shown, *million])
    return rows


def load_rows(name: str, result: Line) -> list[list[str]]:
    """Times and waiting by load, beside the monolith whose p99 is lower."""
    rows = []
    for arrivals in dict.fromkeys(line["arrivals"] for line in result["lines"]):
        for load, exits, other in pairs(result, arrivals, "shortest queue", by="load"):
            names = ("p50_ms", "p95_ms", "p99_ms", "wait_p99_ms")
            cells = [_text(line[column]) for line in (exits, other) for column in names]
            rows.append([name, arrivals, f"{load:g}", *cells])
    return rows


def lone_rows(name: str, result: Line) -> list[list[str]]:
    """Times of exits as they are, and with rows padded that begin alone, by load."""
    lines = {(line["load"], line["pads_alone"]): line for line in result["lone_rows"]}
    columns = ("rows_per_step", "p50_ms", "p99_ms")
    return [
        [
            name,
            f"{load:g}",
            *(_text(lines[load, pads][column]) for pads in (False, True) for column in columns),
        ]
        for load in dict.fromkeys(load for load, _ in lines)
    ]


def size_rows(name: str, result: Line, sizes: Sequence[int]) -> list[list[str]]:
    """p99 by size of the fleet, of exits and of the monolith whose p99 is lower."""
    rows = []
    kinds = {(line["arrivals"], line["balancer"]): None for line in result["lines"]}
    for arrivals, balancer in kinds:
        lines_of = {size: both for size, *both in pairs(result, arrivals, balancer, by="replicas")}
        for side, label in enumerate((EXITS, MONOLITHS[0])):
            cells = [_text(lines_of[size][side]["p99_ms"]) if size in lines_of else "-" for size in sizes]
            rows.append([name, arrivals, balancer, label, *cells])
    return rows


def pairs(result: Line, arrivals: str, balancer: str, *, by: str) -> Iterator[tuple[Any, Line, Line]]:
    """Loads or sizes (by: "load", "replicas"), each with the lines of exits and of the better monolith."""
    fixed = "replicas" if by == "load" else "load"
    target = SHOWN_FLEET if by == "load" else SHOWN_LOAD
    at = min({line[fixed] for line in result["lines"]}, key=lambda value: abs(value - target))
    lines = [
        line
        for line in result["lines"]
        if (line["arrivals"], line["balancer"], line[fixed]) == (arrivals, balancer, at)
    ]
    for value in sorted({line[by] for line in lines}):
        kinds = {line["kind"]: line for line in lines if line[by] == value}
        yield value, kinds[EXITS], min((kinds[kind] for kind in MONOLITHS), key=lambda one: one["p99_ms"][0])


def latency_svg(results: Mapping[str, Line]) -> str:
    """p99 by load for exits and monoliths, one field for each name, as SVG text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fleet", "font.size": 9}):
        figure, fields = plt.subplots(
            1, len(results), figsize=(2.6 * len(results) + 1.2, 3.2), sharey=True, squeeze=False,
            constrained_layout=True,
        )  # fmt: skip
        for axes, (name, result) in zip(fields[0], results.items(), strict=True):
            draw_latency(axes, result)
            axes.set(title=name, xlabel="load, % of the monoliths' capacity")
        fields[0][0].set_ylabel("p99, ms (logarithmic)")
        fields[0][-1].legend(fontsize="x-small", frameon=False)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None})
        plt.close(figure)
    return target.getvalue()


def draw_latency(axes: Any, result: Line) -> None:
    """p99 by load at the shown size of the fleet, with bars of standard errors."""
    dashes = {"poisson": "-", "tenants": ":"}
    arrivals = dict.fromkeys(line["arrivals"] for line in result["lines"])
    for side, kind in product(range(2), arrivals):
        points = [
            (load, both[side]["p99_ms"]) for load, *both in pairs(result, kind, "shortest queue", by="load")
        ]
        label = f"{(EXITS, MONOLITHS[0])[side]}, {kind}"
        axes.errorbar(
            [100 * load for load, _ in points],
            [mean for _, (mean, _) in points],
            [error for _, (_, error) in points],
            linestyle=dashes.get(kind, "-"), marker="o", markersize=3, color=COLOURS[side], label=label,
        )  # fmt: skip
    axes.axhline(result["limit_ms"][-1], color="black", linestyle="--", linewidth=0.8)
    axes.set_yscale("log")
    axes.grid(alpha=0.25)


def _rates(rates: Mapping[str, float]) -> list[str]:
    """Answers a second of each system, and exits / faster monolith."""
    faster = max(rates[kind] for kind in MONOLITHS)
    return [*(f"{rates[kind]:.1f}" for kind in (EXITS, *MONOLITHS)), f"{rates[EXITS] / faster:.2f}"]


def _mean(figure: Sequence[float] | None) -> float:
    return float("inf") if figure is None else figure[0]


def _text(figure: Sequence[float] | None) -> str:
    """A mean with its standard error; a dash for none."""
    return "-" if figure is None else f"{figure[0]:.1f} ± {figure[1]:.1f}"


def _cost(seconds: Sequence[float] | None, price: float | None) -> str:
    """Replica-seconds, and their price if there is one, of a replica for an hour."""
    if seconds is None:
        return "-"
    priced = "" if price is None else f" ({seconds[0] / 3600 * price:.2f} at {price:g} an hour)"
    return f"{seconds[0]:.0f}{priced}"
