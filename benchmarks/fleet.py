"""How many replicas exits save: fleets of 1 to 1,000, simulated from measured costs of steps and real exits.

    python benchmarks/fleet.py measure BUNDLE --baselines GRAPHS --data test.jsonl --name sst2
    python benchmarks/fleet.py check BUNDLE --data test.jsonl --name sst2    # the real scheduler beside it
    python benchmarks/fleet.py simulate sst2
    python benchmarks/fleet.py picture                                       # docs/fleet.svg
    make figures                                                             # the tables of docs/fleet.md

measure and check need a machine that does nothing else. "exits": each replica walks as ee-serve does.
"monolith": each replica runs the single graph, on the rows that came first, padded to the longest of them.
"monolith by length": it runs the graph on rows of one length, as the scheduler would. A load is a share of
what as many replicas of the faster monolith can answer. All systems get the same requests. Figures are means
over seeds, with standard errors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from offramp.benchmarks.compare.pages import markdown_table, read_result_file
from offramp.benchmarks.fleet_costs import check_scheduler, measure_costs, percentiles
from offramp.benchmarks.fleet_pages import (
    CHECK,
    CHECK_HEAD,
    COSTS,
    EXITS,
    MONOLITHS,
    RESULTS,
    RUNS,
    check_rows,
    latency_svg,
    read_named,
    result_tables,
)
from offramp.benchmarks.fleet_sim import (
    BALANCERS,
    Network,
    Outcome,
    Requests,
    capacity,
    network_from,
    poisson_arrivals,
    simulate,
    tenant_arrivals,
)
from offramp.runtime.tuning.report import write_atomically

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "fleet.svg"
KINDS = (EXITS, *MONOLITHS)
ARRIVALS = ("poisson", "tenants")
FLEETS, LOADS = (1, 10, 100, 1000), (0.5, 0.8, 0.95)
SIZED_FOR, SIZED_LOAD = 100, 0.8  # the traffic for which replicas are counted: that load of as many monoliths
WARM_UP = 0.1  # share of the first requests, which are not counted
PER_REPLICA = 150  # requests of a run for each replica, at least
TENANT_SECONDS = 5.0  # of a run with tenants, at least
BATCH_LIMITS = (1, 8, 32)
SHARES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.0)  # parts of a step's cost that grow with its rows
LONE_LOADS = (0.4, 0.6, 0.8, 0.9)  # of the capacity of exits, on one replica
OUTGROWN = 20  # times the replicas that the rate needs, beyond which no count keeps the limit

Floats = NDArray[np.float64]
Costs = Mapping[str, Any]


def recorded(costs: Costs) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and exits (0-based) of the rows of the data."""
    return np.array(costs["rows"]["tokens"], np.int64), np.array(costs["rows"]["exits"], np.int64)


def exits_for(kind: str, exits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where rows leave a network of a kind."""
    return exits if kind == EXITS else np.zeros_like(exits)


def networks(costs: Costs, limit: int | None = None) -> dict[str, Network]:
    """The network of each system; limit: rows of a step at most.

    None: all rows that were measured for exits, and for each monolith the limit of BATCH_LIMITS with which it
    answers most, as larger batches are padded more.
    """
    systems = {kind: network_from(costs, kind) for kind in KINDS}
    if limit is not None:
        return {kind: limited(network, limit) for kind, network in systems.items()}
    tokens, exits = recorded(costs)
    for kind in MONOLITHS:
        tried = [limited(systems[kind], size) for size in BATCH_LIMITS if size <= systems[kind].limit]
        systems[kind] = max(tried, key=lambda network: capacity(network, tokens, np.zeros_like(exits)))
    return systems


def limited(network: Network, limit: int) -> Network:
    """A network with fewer rows in a step."""
    return replace(network, limit=limit, rows=limit if network.mixed else network.rows)


def capacities(costs: Costs, limit: int | None = None) -> dict[str, float]:
    """Answers a second of one replica under endless load, by kind; limit: see networks."""
    tokens, exits = recorded(costs)
    systems = networks(costs, limit).items()
    return {kind: capacity(network, tokens, exits_for(kind, exits)) for kind, network in systems}


def monolith_rate(costs: Costs) -> float:
    """Answers a second of one replica of the faster monolith."""
    rates = capacities(costs)
    return max(rates[kind] for kind in MONOLITHS)


def with_shared_costs(costs: Costs, share: float) -> dict[str, Any]:
    """Costs as they are for one row, of which this share grows with the rows of a step: not measured."""
    rows = np.array(costs["batches"], float)

    def grown(table: Any) -> Any:
        one = np.array(table)[..., :1]
        return (one * (1 - share + share * rows)).tolist()

    return {**costs, **{name: grown(costs[name]) for name in ("begin", "steps", "monolith")}}


def draw_requests(costs: Costs, arrivals: str, rate: float, count: int, seed: int) -> Requests:
    """About `count` requests, `rate` a second, each a row of the data at random."""
    random, (tokens, exits) = np.random.default_rng(seed), recorded(costs)
    make = poisson_arrivals if arrivals == ARRIVALS[0] else tenant_arrivals
    times = make(rate, count, random)
    drawn = random.integers(0, len(tokens), len(times))
    return Requests(times, tokens[drawn], exits[drawn])


def run_kind(
    network: Network, kind: str, requests: Requests, replicas: int, balancer: str, seed: int
) -> tuple[Floats, Floats, Outcome, Requests]:
    """Simulate one system; gives seconds of answers and of waiting behind the warm-up, and what was run.

    Waiting is what an answer takes beyond the time of the row on an idle replica.
    """
    asked = requests if kind == EXITS else requests.without_exits()
    outcome = simulate(network, asked, replicas, balancer, seed)
    counted = slice(int(WARM_UP * len(asked.arrivals)), None)
    alone = network.seconds_alone(asked.tokens, asked.exits)
    return outcome.seconds[counted], (outcome.seconds - alone)[counted], outcome, asked


def run_cell(
    costs: Costs, full: float, requests: int, cell: tuple[str, float, int, str, int]
) -> list[dict[str, Any]]:
    """The figures of each system under one load; cell: arrivals, load, replicas, balancer, seed.

    full: answers a second of a monolith. requests: at least that many are simulated.
    """
    arrivals, load, replicas, balancer, seed = cell
    rate, lines = load * replicas * full, []
    seconds = TENANT_SECONDS if arrivals == ARRIVALS[1] else 0.0
    count = max(requests, PER_REPLICA * replicas, int(rate * seconds))
    drawn = draw_requests(costs, arrivals, rate, count, seed)
    for kind, network in networks(costs).items():
        times, waits, outcome, asked = run_kind(network, kind, drawn, replicas, balancer, seed)
        line = {"arrivals": arrivals, "load": load, "replicas": replicas, "balancer": balancer, "kind": kind}
        figures = percentiles(times) | {f"wait_{name}": value for name, value in percentiles(waits).items()}
        figures |= {"busy": outcome.busy / outcome.end / replicas}
        figures |= {"rows_per_step": outcome.stepped / outcome.steps}
        depth = np.array(costs["blocks"])[asked.exits] if kind == EXITS else np.array(costs["blocks"][-1])
        lines.append(line | figures | {"depth": float(depth.mean())})
    return lines


def replicas_needed(
    costs: Costs, full: float, requests: int, cell: tuple[float, str, str, int]
) -> list[dict[str, Any]]:
    """The fewest replicas of each system that keep p99 within a limit; cell: ms, arrivals, balancer, seed.

    The traffic is that of SIZED_FOR monoliths at SIZED_LOAD. None: no count keeps the limit.
    """
    limit_ms, arrivals, balancer, seed = cell
    rate, lines = SIZED_LOAD * SIZED_FOR * full, []
    seconds = TENANT_SECONDS if arrivals == ARRIVALS[1] else 0.0
    drawn = draw_requests(costs, arrivals, rate, max(requests, int(rate * seconds)), seed)
    tokens, exits = recorded(costs)
    for kind, network in networks(costs).items():

        def keeps(replicas: int, kind: str = kind, network: Network = network) -> bool:
            times, *_ = run_kind(network, kind, drawn, replicas, balancer, seed)
            return 1e3 * float(np.percentile(times, 99)) <= limit_ms

        least = math.ceil(rate / capacity(network, tokens, exits_for(kind, exits)))
        count = fewest(keeps, least)
        line: dict[str, Any] = {"limit_ms": limit_ms, "arrivals": arrivals, "balancer": balancer}
        line |= {"kind": kind, "replicas": count}
        lines.append(line | {"seconds_per_million": None if count is None else 1e6 * count / rate})
    return lines


def lone_rows(costs: Costs, requests: int, cell: tuple[float, int]) -> list[dict[str, Any]]:
    """Times of exits on one replica, as they are and if rows that begin alone were padded; cell: load, seed.

    load: share of what the replica can answer as it is.
    """
    load, seed = cell
    network, lines = network_from(costs, EXITS), []
    drawn = draw_requests(costs, ARRIVALS[0], load * capacities(costs)[EXITS], requests, seed)
    for pads in (False, True):
        times, _, outcome, _ = run_kind(
            replace(network, pads_alone=pads), EXITS, drawn, 1, BALANCERS[1], seed
        )
        figures = percentiles(times) | {"rows_per_step": outcome.stepped / outcome.steps}
        lines.append({"load": load, "pads_alone": pads} | figures)
    return lines


def fewest(keeps: Callable[[int], bool], least: int) -> int | None:
    """The smallest count from `least` on for which `keeps` holds; None if it is beyond OUTGROWN times that.

    keeps: is taken to hold for every count above one for which it holds.
    """
    low, high = max(least, 1) - 1, max(least, 1)
    while not keeps(high):
        low, high = high, math.ceil(high * 1.2)
        if high > OUTGROWN * max(least, 1):
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high


def over_seeds(lines: Iterable[Mapping[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """Join lines that differ by seed alone: figures as [mean, standard error], None if a seed has none."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for line in lines:
        groups.setdefault(tuple(line[name] for name in by), []).append(line)
    joined = []
    for key, group in groups.items():
        figures: dict[str, Any] = dict(zip(by, key, strict=True))
        for name in group[0]:
            if name not in by:
                values = [line[name] for line in group]
                figures[name] = None if None in values else _mean_and_error(values)
        joined.append(figures)
    return joined


def _mean_and_error(values: Sequence[float]) -> list[float]:
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return [round(float(np.mean(values)), 3), 0.0 if math.isnan(error) else round(error, 3)]


@click.group(help=__doc__)
def main() -> None:
    """The command group of this benchmark."""


FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
NAME = click.option("--name", required=True, help="Of the result file.")
OUT = click.option("--out", type=FOLDER, default=RESULTS, help="Folder of the result files.")
THREADS = click.option("--threads", type=click.IntRange(1, 1024), help="Of a replica.")


@main.command(context_settings={"show_default": True})
@click.argument("bundle", type=FOLDER)
@click.option("--baselines", type=FOLDER, required=True, help="Single graphs, from ee-split --baselines.")
@click.option("--data", type=FILE, required=True, help="Test rows: text, and label if accuracy is wanted.")
@click.option("--point", default="default", help="Operating point of the walk.")
@click.option("--rows", default=2000, help="Rows whose exits and lengths are recorded.")
@click.option("--rounds", default=9, help="Of every cell; medians are kept.")
@click.option("--cpu-time", is_flag=True, help="Not of the wall: for one thread on a busy machine.")
@NAME
@THREADS
@OUT
def measure(
    bundle: Path,
    baselines: Path,
    data: Path,
    point: str,
    rows: int,
    rounds: int,
    cpu_time: bool,
    name: str,
    threads: int | None,
    out: Path,
) -> None:
    """Measure costs of steps by length and batch, and record exits; writes fleet_costs_NAME.json."""
    if cpu_time and threads != 1:
        raise click.UsageError("--cpu-time counts all threads together: give --threads 1 with it")
    costs = measure_costs(
        bundle, baselines, data, point=point, count=rows, rounds=rounds, threads=threads, cpu_time=cpu_time
    )
    write(out / f"{COSTS}_{name}.json", costs)


@main.command(context_settings={"show_default": True})
@click.argument("bundle", type=FOLDER)
@click.option("--data", type=FILE, required=True, help="The rows that `measure` read.")
@click.option("--requests", default=600, help="At each share of the capacity.")
@NAME
@THREADS
@OUT
def check(bundle: Path, data: Path, requests: int, name: str, threads: int | None, out: Path) -> None:
    """Compare one simulated replica with the real scheduler; writes fleet_check_NAME.json."""
    costs = read_costs(out, name)
    result = check_scheduler(bundle, data, costs, requests=requests, threads=threads)
    write(out / f"{CHECK}_{name}.json", result)
    click.echo("\n".join(markdown_table(CHECK_HEAD, check_rows(name, result))))


@main.command("simulate", context_settings={"show_default": True})
@click.argument("name")
@click.option("--fleets", default=",".join(map(str, FLEETS)), help="Counts of replicas.")
@click.option("--loads", default=",".join(map(str, LOADS)), help="Shares of the monoliths' capacity.")
@click.option("--seeds", default=3, type=click.IntRange(1, 100))
@click.option("--requests", default=20_000, type=click.IntRange(100), help="Of a run, at least.")
@click.option("--limits", default="1.5,5", help="Of p99, in times of the monolith's rows alone (p99).")
@click.option("--price", type=float, help="Of a replica for an hour; without it no price is stated.")
@click.option("--jobs", default=1, type=click.IntRange(1, 64), help="Processes.")
@OUT
def simulate_command(
    name: str,
    fleets: str,
    loads: str,
    seeds: int,
    requests: int,
    limits: str,
    price: float | None,
    jobs: int,
    out: Path,
) -> None:
    """Simulate fleets from fleet_costs_NAME.json; writes fleet_runs_NAME.json."""
    costs = read_costs(out, name)
    full = monolith_rate(costs)
    shares, sizes = [float(part) for part in loads.split(",")], [int(part) for part in fleets.split(",")]
    cells = list(product(ARRIVALS, shares, sizes, BALANCERS, range(seeds)))
    cells.sort(key=lambda cell: -cell[1] * cell[2])  # the longest runs first, so that no process ends late
    lines = spread(partial(run_cell, costs, full, requests), cells, jobs, "fleets")
    tokens, exits = recorded(costs)
    alone = network_from(costs, MONOLITHS[0]).seconds_alone(tokens, np.zeros_like(exits))
    limit_ms = [round(1e3 * float(part) * float(np.percentile(alone, 99)), 1) for part in limits.split(",")]
    sizings = list(product(limit_ms, ARRIVALS, BALANCERS, range(seeds)))
    counts = spread(partial(replicas_needed, costs, full, requests), sizings, jobs, "replicas")
    facts = ("machine", "bundle", "data", "point", "variant", "time", "rounds")
    result = {name: costs[name] for name in facts}
    result |= {"accuracy": costs.get("accuracy"), "seeds": seeds, "limit_ms": limit_ms, "price": price}
    result |= {"capacity": rounded_rates(capacities(costs))}
    result["limits"] = {kind: network.limit for kind, network in networks(costs).items()}
    result["by_batch_limit"] = {
        str(limit): rounded_rates(capacities(costs, limit))
        for limit in BATCH_LIMITS
        if limit <= costs["batches"][-1]
    }
    result["by_share"] = {
        str(share): rounded_rates(capacities(with_shared_costs(costs, share))) for share in SHARES
    }
    by = ("arrivals", "balancer", "load", "replicas", "kind")
    result["lines"] = sorted(over_seeds(lines, by), key=lambda line: [str(line[name]) for name in by])
    lone_cells = list(product(LONE_LOADS, range(seeds)))
    alone_lines = spread(partial(lone_rows, costs, requests), lone_cells, jobs, "lone rows")
    result["lone_rows"] = over_seeds(alone_lines, ("load", "pads_alone"))
    result["needed"] = over_seeds(counts, ("limit_ms", "arrivals", "balancer", "kind"))
    write(out / f"{RUNS}_{name}.json", result)
    click.echo("\n".join(result_tables({name: result})))


@main.command()
@OUT
def picture(out: Path) -> None:
    """Draw docs/fleet.svg from the result files."""
    results = read_named(RUNS, out)
    if not results:
        raise click.ClickException(f"{out}: no {RUNS}_*.json; write one with `fleet.py simulate NAME`")
    write_atomically(PICTURE, latency_svg(results))


def spread(
    work: Callable[[Any], list[dict[str, Any]]], cells: Sequence[Any], jobs: int, label: str
) -> list[dict[str, Any]]:
    """The lines of all cells, on so many processes."""
    with click.progressbar(length=len(cells), label=label) as bar:
        lines = list[dict[str, Any]]()
        if jobs == 1:
            for cell in cells:
                lines += work(cell)
                bar.update(1)
            return lines
        with ProcessPoolExecutor(jobs) as pool:
            for result in pool.map(work, cells):
                lines += result
                bar.update(1)
    return lines


def rounded_rates(rates: Mapping[str, float]) -> dict[str, float]:
    """Answers a second with two decimals."""
    return {kind: round(rate, 2) for kind, rate in rates.items()}


def read_costs(folder: Path, name: str) -> dict[str, Any]:
    """The content of fleet_costs_NAME.json; ClickException if there is none."""
    file = folder / f"{COSTS}_{name}.json"
    if not file.is_file():
        raise click.ClickException(f"{file}: no such file; write it with `fleet.py measure`")
    return read_result_file(file)


def write(file: Path, result: Mapping[str, Any]) -> None:
    """Write a result, each line of a list of objects on a line of its own."""
    parts = []
    for name, value in result.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join("  " + json.dumps(line) for line in value) + "\n ]"
        else:
            text = json.dumps(value)
        parts.append(f" {json.dumps(name)}: {text}")
    write_atomically(file, "{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
