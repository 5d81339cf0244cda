"""ee-bench: what early exit saves on this machine, against single graphs and chance, in one process."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from offramp.runtime.bundle.files import Bundle, open_bundle
from offramp.runtime.bundle.manifest import GENERATION, TextInput
from offramp.runtime.classifier import WINDOW, Session
from offramp.runtime.engines.threads import usable_cores
from offramp.runtime.errors import BadSetting, OfframpError
from offramp.runtime.inputs.text import reader_of
from offramp.runtime.loading import load
from offramp.runtime.rules.resolve import chosen_points
from offramp.runtime.tuning import bench_generation as bench_text
from offramp.runtime.tuning import report as pages
from offramp.runtime.tuning.baselines import (
    GRAPH_SCRIPT,
    MONOLITH,
    NESTED,
    WALK_SCRIPT,
    GraphFact,
    by_chance,
    cold_starts,
    nested_threshold,
    open_rival,
    read_rivals,
    wishes_of,
)
from offramp.runtime.tuning.labelled import read_data
from offramp.runtime.tuning.timing import (
    Batches,
    Contender,
    accuracy,
    by_segment,
    in_bulk,
    macs_share,
    one_by_one,
    realised,
    short,
    summary,
    walking,
    weigh,
)

FULL, CHANCE = "walk full depth", "random exits"
BULK_WINDOWS = 2  # windows of rows that are measured in bulk: a rate needs no more
NOT_STARTED, INTERRUPTED = 2, 130
AT_LEAST_1, PATH = click.IntRange(min=1), click.Path(path_type=Path)

HELP = """Measure on this machine what early exit saves: accuracy, time and memory, against single graphs.

\b
FILE is plain text, one text a line, or JSON lines with "text", for pairs "text_b", and on
every line or on none "label": its name or its number. Without labels there is no accuracy.
For images lines are paths, seen from FILE's folder, or JSON with "image".
Contenders, on one thread pool, in turns of a few rows:
  walk NAME        the bundle's operating point of that name
  walk full depth  every row to the last exit
  random exits     as many rows at each exit as the first point has, drawn by chance
  graphs           of a folder that ee-split --rivals DIR wrote; a nested graph decides by the
                   first point's threshold

\b
Bundles that generate text: FILE is prompts, one a line, or JSON lines with "prompt" or
"messages"; contenders are the full depth and --rules, in turns of a prompt.
\b
Exit codes: 0 measured; 2 a wrong option, file or bundle; 130 interrupted (Ctrl-C)
"""


@click.command(help=HELP, context_settings={"show_default": True})
@click.option("--bundle", metavar="DIR", type=PATH, default="bundle/", help="The bundle to walk.")
@click.option("--data", metavar="FILE", type=PATH, required=True, help="Lines to answer.")
@click.option("--against", metavar="DIR", type=PATH, help="Single graphs to compare with.")
@click.option("--points", metavar="A,B", help='Operating points.  [default: "default", or the first]')
@click.option(
    "--rules", metavar="A,B", help="Of generated text: rules, as gate:0.7.  [default: the bundle's]"
)
@click.option("--max-new-tokens", type=AT_LEAST_1, default=64, help="Of a generated text.")
@click.option("--rows", type=AT_LEAST_1, help="First rows of FILE.  [default: 300, of prompts 20]")
@click.option("--batch-size", type=AT_LEAST_1, default=32, help="Rows together when measuring in bulk.")
@click.option("--turns", type=AT_LEAST_1, default=3, help="Rounds over the rows.")
@click.option("--threads", type=AT_LEAST_1, help="Threads of the engine.  [default: one a core]")
@click.option("--budget-ms", type=float, help="Time an answer may take.  [default: the reference's median]")
@click.option("--json", "json_file", metavar="OUT", type=PATH, help="Write every figure as JSON.")
@click.option("--report", metavar="OUT", type=PATH, help="Write one HTML page with pictures.")
def main(json_file: Path | None, report: Path | None, **wishes: Any) -> None:
    code = NOT_STARTED
    try:
        pages.check(json_file, report)  # before minutes go into measuring
        figures, shown = _measured(report is not None, **wishes)
        if json_file is not None:
            text = json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False)
            pages.write_whole(json_file, text + "\n")
        if report is not None:
            pages.write_whole(report, pages.page(figures))
        click.echo(shown)
        code = 0
    except (KeyboardInterrupt, click.Abort):
        code = INTERRUPTED
    except OfframpError as problem:
        click.echo(f"ee-bench: {problem}", err=True)
    except OSError as problem:
        click.echo(f"ee-bench: {problem.filename or 'output'}: {problem.strerror or problem}", err=True)
    sys.exit(code)


def _measured(
    page: bool, rules: str | None, max_new_tokens: int, rows: int | None, **wishes: Any
) -> tuple[dict[str, Any], str]:
    """Figures and their table, of what the bundle is for."""
    bundle = open_bundle(wishes["bundle"])
    if bundle.manifest.task != GENERATION:
        if rules is not None:
            raise BadSetting(f"--rules is for generated text; {bundle.folder} classifies: say --points")
        figures = measure(**wishes, rows=rows or 300)
        return figures, pages.table(figures)
    for name in ("against", "points", "budget_ms"):
        if page or wishes[name] is not None:
            flag = "report" if page else name.replace("_", "-")
            raise BadSetting(f"--{flag} is for bundles that classify; {bundle.folder} generates text")
    given = {name: wishes[name] for name in ("data", "turns", "threads")}
    figures = bench_text.measure_text(bundle, rules=rules, most=max_new_tokens, rows=rows or 20, **given)
    return figures, bench_text.table(figures)


def measure(
    bundle: Path,
    data: Path,
    *,
    against: Path | None = None,
    points: str | None = None,
    rows: int = 300,
    batch_size: int = 32,
    turns: int = 3,
    threads: int | None = None,
    budget_ms: float | None = None,
    starts: int = 3,
) -> dict[str, Any]:
    """Every figure as it is written to JSON: accuracy in percent, other shares 0..1, units in the names.

    starts: fresh processes of each kind. Raises BadInput naming the line, and what load() and read_rivals()
    raise.
    """
    if budget_ms is not None and not 0 < budget_ms < float("inf"):
        raise BadSetting(f"budget {budget_ms:g} ms: expected a number above 0")
    opened = open_bundle(bundle)
    manifest, encoder = opened.manifest, reader_of(opened)
    text = manifest.input if isinstance(manifest.input, TextInput) else None
    items, truth, there = read_data(data, manifest.labels, rows, images=text is None)
    started = time.perf_counter()
    encoded = [encoder([item])[0] for item in items]
    tokenizing = (time.perf_counter() - started) / len(items)
    singles: list[Batches] = [[(np.zeros(1, np.int64), encoder.arrays([row]))] for row in encoded]
    with ExitStack() as stack:
        field = gather(opened, against, points, threads, singles, stack)
        full, contenders, monolith = field.full, field.contenders, field.monolith
        turned = one_by_one(contenders, singles, turns)
        windows: list[tuple[Batches, int]] = []
        crowd = encoded[: BULK_WINDOWS * batch_size * WINDOW]
        for start in range(0, len(crowd), batch_size * WINDOW):
            window = crowd[start : start + batch_size * WINDOW]
            windows.append((list(full._batches(window, batch_size)), len(window)))
        rates = in_bulk([c for c in contenders if c.bulk], windows, batch_size, turns)
        segments = by_segment(full, singles)
        running = {"engine": full.engine.name, "device": full.engine.device, **full.engine.facts}
    reference = monolith.name if monolith is not None else FULL
    budget = weigh(turned, reference) if budget_ms is None else budget_ms / 1e3
    lengths = [row.length for row in encoded]
    stages = [[stage.macs.of(n) for stage in (manifest.stem, *manifest.segments)] for n in lengths]
    macs = np.cumsum(np.array(stages, float), axis=1)[:, 1:]  # [rows, segments]: of a walk that leaves there
    found = []
    for c in contenders:
        mine = turned[c.name]
        rule = None if c.rule is None else {"name": c.rule.name, "parameters": c.rule.parameters}
        facts = {"name": c.name, "kind": c.kind, "variant": c.variant, "rule": rule, "bytes": c.bytes}
        facts |= {"accuracy": accuracy(mine, truth)} | summary(mine, turned[reference], macs, budget)
        bulk: dict[str, float | None] = {"rows_per_second": None, "realised_in_bulk": None}
        if c.bulk:
            share = macs_share(mine.exits[:, : len(crowd)], macs[: len(crowd)])
            time_share = rates[reference] / rates[c.name]
            bulk = {"rows_per_second": short(rates[c.name]), "realised_in_bulk": realised(time_share, share)}
        found.append(facts | bulk)
    about: dict[str, Any] = {
        **pages.machine(),
        **running,
        "bundle": str(bundle),
        "bundle_bytes": sum(fact.bytes for fact in manifest.files.values()),
        "data": str(data),
        "rows": len(items),
        "rows_in_bulk": len(crowd),
        "rows_there": there,
        "mean_tokens": short(float(np.mean(lengths))),
        "turns": turns,
        "batch_size": batch_size,
        "tokenizing_ms": short(1e3 * tokenizing),
        "reference": reference,
        "budget_ms": short(1e3 * budget),
        "left_out": field.left_out,
    }
    scripts: dict[str, tuple[str, list[Any]]] = {}
    item = [items[0]] if isinstance(items[0], str) else list(items[0])
    scripts[contenders[0].name] = (WALK_SCRIPT, [str(bundle), wishes_of(contenders[0], threads), item])
    if monolith is not None and against is not None and text is not None:
        paths = [str(against / monolith.file), str(bundle / text.tokenizer), text.longest, text.prefix]
        scripts[reference] = (GRAPH_SCRIPT, [*paths, manifest.labels, threads or usable_cores(), item])
    cold = cold_starts(scripts, starts)
    return {"format": 1, "about": about, "contenders": found, "segments": segments, "cold_start": cold}


@dataclass(frozen=True)
class Field:
    """Who runs, the walks first; the session at full depth; the first monolith; who is left out and why."""

    full: Session
    contenders: list[Contender]
    monolith: GraphFact | None
    left_out: list[str]


def gather(
    bundle: Bundle,
    against: Path | None,
    points: str | None,
    threads: int | None,
    singles: Sequence[Batches],
    stack: ExitStack,
) -> Field:
    """Open everybody, and let each run once on a row of every length, so that nobody is timed cold.

    Each walk has weights of its own: sharing, it would find them warmed by the one before, which no single
    graph does. Sessions opened late run 1 to 3 % faster; graphs come last: that speaks against the walks.
    """
    manifest = bundle.manifest
    graphs = () if against is None else read_rivals(against, manifest).graphs
    contenders: list[Contender] = []
    for name in chosen_points(manifest, points):
        session = stack.enter_context(load(bundle.folder, point=name, threads=threads, share=False))
        contenders.append(walking(session, f"walk {name}" if name else "walk", "walk"))
    full = stack.enter_context(load(bundle.folder, rule="never", threads=threads, share=False))
    first = contenders[0] if contenders else None
    contenders.append(walking(full, FULL, "full"))
    left_out = []
    if first is None:
        left_out.append(f"{CHANCE}: no operating point to draw like")
    else:
        exits = np.concatenate([first.read(first.run(single, 1, 1))[1] for single in singles])
        rule = by_chance(np.bincount(exits - 1, minlength=len(manifest.segments)).tolist())
        session = stack.enter_context(
            load(bundle.folder, rule="never", variant=first.variant, threads=threads, share=False)
        )
        contenders.append(replace(walking(session, CHANCE, "random", rule), rule=rule.spec))
    for graph in graphs:
        assert against is not None  # or there were none
        threshold = nested_threshold(manifest, first.rule if first else None)
        if graph.kind == NESTED and threshold is None:
            left_out.append(f"{graph.name}: its branches need the first point's rule to be theirs")
            continue
        if graph.name in [c.name for c in contenders]:
            raise BadSetting(f"{against}: graph {graph.name!r} has the name of a walk; rename one of them")
        opened = open_rival(against, graph, manifest, threads=threads, threshold=threshold)
        contenders.append(opened)
    lengths = {next(iter(single[0][1].values())).shape: single for single in singles}
    for contender in contenders:
        for single in lengths.values():
            contender.run(single, 1, 1)
    return Field(full, contenders, next((g for g in graphs if g.kind == MONOLITH), None), left_out)


if __name__ == "__main__":
    main()
