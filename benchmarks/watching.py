"""Whether budgets hold on a stream whose difficulty doubles, and whether audits see a stream that shifts.

    python benchmarks/watching.py budget bundle/ ROWS --json benchmarks/results/budget_depth.json
    python benchmarks/watching.py budget bundle/ ROWS --ms --json benchmarks/results/budget_ms.json
    python benchmarks/watching.py audit bundle/ ROWS SHIFTED --point risk-0.05 --json ...

ROWS and SHIFTED are JSON lines with text; nothing was trained, chosen or calibrated on them. budget: rows are
drawn, with replacement, so that the mean depth at a point in the middle of the frontier doubles half-way. A
session holds the mean of what this point costs over both halves; beside it stand the costs of the point
itself. --ms holds milliseconds, which needs a machine that does nothing else: a session that stays at the
point walks the same rows in turns with the other. audit:
ROWS in random order, which nothing should flag; and 500 of them, then SHIFTED ones. Outputs of all exits
are computed once; runs replay them, each with a seed of its own; one stream of each kind is walked by a
session.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from offramp.runtime import Classifier, RunWarning, load_classifier
from offramp.runtime.audit import Audit, AuditOptions, AuditPlan, AuditReport, plan_audit
from offramp.runtime.budget import BudgetPoint, budget_points
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import Manifest, RuleSpec
from offramp.runtime.rules import bind, simulate
from offramp.runtime.rules.resolve import resolve_rule
from offramp.runtime.tuning.report import machine_facts, write_atomically
from offramp.runtime.walker import Trace

BEFORE = 500  # rows before the shift, as said above
EASY, HARD = 2 / 3, 4 / 3  # mean depth of the halves of a stream, as shares of that of all rows
TIMED = 200  # rows of each half from which a budget in milliseconds is taken

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


def tilted_shares(values: Floats, mean: float) -> Floats:
    """Shares of rows, exponential in their values, with which the mean of the values is `mean` [rows]."""
    if not values.min() < mean < values.max():
        raise click.ClickException(f"no draw of these rows has a mean depth of {mean:.3f}")
    low, high = -200.0, 200.0
    for _ in range(100):
        tilt = (low + high) / 2
        weights = np.exp(tilt * values - (tilt * values).max())
        shares: Floats = weights / weights.sum()
        low, high = (tilt, high) if float(shares @ values) < mean else (low, tilt)
    return shares


def doubling_stream(depths: Floats, rows: int, seed: int) -> Ids:
    """Row numbers of a stream whose mean depth doubles half-way: depths [rows of the data] at one point."""
    random, mean = np.random.default_rng(seed), float(depths.mean())
    halves = [
        random.choice(len(depths), rows // 2, p=tilted_shares(depths, part * mean)) for part in (EASY, HARD)
    ]
    return np.concatenate(halves)


def exits_of(trace: Trace, rule: RuleSpec) -> Ids:
    """The exits (0-based) of rows at a rule, from the outputs of all exits."""
    gates = np.nan_to_num(trace.gates, nan=1.0)
    return simulate(bind(rule, trace.logits.shape[1]), trace.logits, gates)


def depths_at(trace: Trace, manifest: Manifest, rule: RuleSpec) -> Floats:
    """Depth of rows at a rule, as a share of all blocks [rows]."""
    blocks = np.array([segment.blocks[-1] for segment in manifest.segments], float)
    depths: Floats = blocks[exits_of(trace, rule)] / manifest.blocks
    return depths


def middle_point(points: Sequence[BudgetPoint]) -> BudgetPoint:
    """The point whose depth is nearest to the geometric mean of the frontier's ends."""
    middle = (points[0].depth * points[-1].depth) ** 0.5
    return min(points[1:-1] or points, key=lambda point: abs(point.depth - middle))


def windows_of(costs: Sequence[float], window: int) -> list[float]:
    """Means of complete windows, one after another."""
    whole = len(costs) // window * window
    return [float(mean) for mean in np.array(costs[:whole]).reshape(-1, window).mean(1)]


def hold_budget(
    folder: Path, texts: Sequence[str], *, timed: bool, rows: int, window: int, seed: int
) -> dict[str, Any]:
    """Walk a stream whose difficulty doubles with a budget, and at a fixed point beside it."""
    with load_classifier(folder, rule="never", batch_size=32, global_pool=True) as session:
        manifest = session.manifest
        trace, _ = session.at_full_depth(texts)
    spec, variant = resolve_rule(manifest)
    points = budget_points(manifest, spec.name, variant)
    point = middle_point(points)
    depths = depths_at(trace, manifest, point.rule)
    stream = doubling_stream(depths, rows, seed)
    fixed: dict[str, object] = {"rule": point.rule, "variant": variant, "global_pool": True}
    target = float(depths[stream].mean())
    if timed:
        with load_classifier(folder, **fixed) as session:
            session.warm_up()
            sample = np.concatenate([stream[:TIMED], stream[-TIMED:]])
            target = float(np.mean([1e3 * session(texts[number]).seconds for number in sample]))
    budget = {"budget_ms" if timed else "budget_depth": target, "budget_window": window}
    options: dict[str, object] = {"rule": spec.name, "variant": variant, "global_pool": True, **budget}
    held, stayed = list[float](), list[float]()
    with (
        load_classifier(folder, **options) as session,
        load_classifier(folder, **fixed, lazy=not timed) as other,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RunWarning)  # the report has them
        if timed:
            session.warm_up()
            other.warm_up()
        for number in stream:
            answer = session(texts[number])
            held.append(1e3 * answer.seconds if timed else answer.depth / manifest.blocks)
            stayed.append(1e3 * other(texts[number]).seconds if timed else float(depths[number]))
        report = session.budget_report()
    return {
        "unit": report.unit,
        "target": target,
        "window": window,
        "points": {entry.name: entry.depth for entry in points},
        "fixed_point": point.name,
        "held": windows_of(held, window),
        "fixed": windows_of(stayed, window),
        "report": asdict(report),
    }


def replay(plan: AuditPlan, exits: Ids, losses: Floats, rows: Ids) -> AuditReport:
    """Let an audit see stored rows, one after another."""
    audit = Audit[float](plan, lambda loss: loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)
        for row in rows.tolist():
            audit.observe(float(losses[row]), int(exits[row]) + 1)
            audit.report()  # waits for the audit, as if each ended before the next row
        return audit.report()


def after_shift(report: AuditReport) -> dict[str, int | None]:
    """Rows after the shift at which each test flagged the stream."""
    moments = {"disagreement": report.exceeded_at, "exits": report.exits_changed_at}
    return {name: None if row is None else row - BEFORE for name, row in moments.items()}


def watch(
    folder: Path, usual: Sequence[str], shifted: Sequence[str], points: Sequence[str], share: float, runs: int
) -> dict[str, Any]:
    """Audit streams that shift and streams that do not, at several points of the default variant."""
    manifest = open_bundle(folder).manifest
    specs = [resolve_rule(manifest, point=point) for point in points]
    if any(variant != manifest.variants[0] for _, variant in specs):
        raise click.ClickException(f"points of variant {manifest.variants[0]} are measured, others are not")
    with load_classifier(folder, rule="never", batch_size=32, global_pool=True) as session:
        trace, _ = session.at_full_depth([*usual, *shifted])
    rows = {"unshifted": len(usual), "before": BEFORE, "shifted": len(shifted)}
    figures: dict[str, Any] = {"share": share, "runs": runs, "rows": rows, "points": {}}
    for point, (spec, variant) in zip(points, specs, strict=True):
        plans = [plan_audit(manifest, spec, variant, AuditOptions(share, seed=seed)) for seed in range(runs)]
        replayed = replay_streams(plans, trace, exits_of(trace, spec), len(usual))
        options: dict[str, object] = {"point": point, "audit": share, "global_pool": True}
        order = np.random.default_rng(runs).permutation(len(usual))
        before = [usual[row] for row in order[:BEFORE]]
        with load_classifier(folder, **options) as session:
            unshifted_report = walk_all(session, [usual[row] for row in order[: len(usual) // 2]])
        with load_classifier(folder, **options) as session:
            shifted_report = walk_all(session, [*before, *shifted])
        figures["points"][point] = {
            "limit": plans[0].limit,
            "source": plans[0].source,
            **replayed,
            "session": {
                "unshifted": asdict(unshifted_report),
                "shifted": asdict(shifted_report),
                "rows_to_flag": after_shift(shifted_report),
            },
        }
    return figures


def replay_streams(plans: Sequence[AuditPlan], trace: Trace, exits: Ids, usual: int) -> dict[str, Any]:
    """Let each plan audit the first `usual` rows of a trace, and a stream that shifts to the others."""
    labels = trace.logits.argmax(-1)  # [rows, exits]
    losses = (labels[np.arange(len(exits)), exits] != labels[:, -1]).astype(float)
    alarms, delays = 0, list[dict[str, int | None]]()
    for seed, plan in enumerate(plans):
        random = np.random.default_rng(seed)
        order = random.permutation(usual)
        report = replay(plan, exits, losses, order)
        alarms += report.exceeded_at is not None or report.exits_changed_at is not None
        new = usual + random.permutation(len(exits) - usual)
        delays.append(after_shift(replay(plan, exits, losses, np.concatenate([order[:BEFORE], new]))))
    first = [min((row for row in delay.values() if row is not None), default=None) for delay in delays]

    def halves(values: NDArray[Any]) -> dict[str, float]:
        return {"unshifted": float(values[:usual].mean()), "shifted": float(values[usual:].mean())}

    return {
        "disagreement": halves(losses),
        "mean_exit": halves(exits + 1),
        "unshifted_flagged": alarms,
        "shifted_flagged": sum(row is not None for row in first),
        "rows_to_flag": {"each": delays, **worst_of(delays, first)},
    }


def worst_of(
    delays: Sequence[Mapping[str, int | None]], first: Sequence[int | None]
) -> dict[str, dict[str, float | None]]:
    """Median and largest number of rows of each test and of the first one; None if a run was not flagged."""
    columns = {name: [delay[name] for delay in delays] for name in delays[0]} | {"either": list(first)}
    figures: dict[str, dict[str, float | None]] = {"median": {}, "largest": {}}
    for name, rows in columns.items():
        known = [row for row in rows if row is not None]
        complete = len(known) == len(rows)
        figures["median"][name] = float(np.median(known)) if complete else None
        figures["largest"][name] = float(max(known)) if complete else None
    return figures


def walk_all(session: Classifier, texts: Iterable[str]) -> AuditReport:
    """Answer texts one by one, and return the report of the audit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)
        for text in texts:
            session(text)
        return session.audit_report()


def read_texts(file: Path, count: int | None = None) -> list[str]:
    """The texts of a file of JSON lines, the first of them if only some are wanted."""
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()][:count]


def write(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Print figures, and write them to a file of results if there is one."""
    text = json.dumps({**machine_facts(), **figures}, indent=1)
    click.echo(text)
    if path is not None:
        write_atomically(path, text + "\n")


@click.group(help=__doc__)
def main() -> None:
    """The two measurements of this file."""


@main.command("budget")
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.argument("rows_file", metavar="ROWS", type=click.Path(exists=True, path_type=Path))
@click.option("--ms", is_flag=True, help="Hold milliseconds instead of depth.")
@click.option("--rows", default=8000, show_default=True, help="Rows of the stream.")
@click.option("--window", default=1000, show_default=True, help="Rows of a window.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "path", type=click.Path(path_type=Path), help="File of results.")
def budget_command(
    bundle: Path, rows_file: Path, ms: bool, rows: int, window: int, seed: int, path: Path | None
) -> None:
    """Hold the mean of a stream whose difficulty doubles half-way."""
    write(path, hold_budget(bundle, read_texts(rows_file), timed=ms, rows=rows, window=window, seed=seed))


@main.command("audit")
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.argument("rows_file", metavar="ROWS", type=click.Path(exists=True, path_type=Path))
@click.argument("shifted_file", metavar="SHIFTED", type=click.Path(exists=True, path_type=Path))
@click.option("--point", "points", multiple=True, required=True, help="Where rows are walked; several times.")
@click.option("--share", default=0.1, show_default=True, help="Of rows that are audited.")
@click.option("--runs", default=20, show_default=True)
@click.option("--count", type=int, help="Rows of each file at most.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="File of results.")
def audit_command(
    bundle: Path,
    rows_file: Path,
    shifted_file: Path,
    points: tuple[str, ...],
    share: float,
    runs: int,
    count: int | None,
    path: Path | None,
) -> None:
    """Audit streams that shift and streams that do not."""
    usual, shifted = (read_texts(file, count) for file in (rows_file, shifted_file))
    write(path, watch(bundle, usual, shifted, points, share, runs))


if __name__ == "__main__":
    main()
