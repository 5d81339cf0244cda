"""What recipe quee is worth on rows that it has never seen: frontiers by forecaster, and lines beside them.

    python benchmarks/quee.py joint_ckpt/ --data DATA --json benchmarks/results/quee_trec6_int8.json
    python benchmarks/quee.py joint_ckpt/ --data DATA --bundle bundle/

Forecasters are fitted on dev, walks are replayed on test, over one grid of prices for all. Every line is its
upper hull on test, which flatters all lines alike. The oracle knows the answers: a bound, not a rival. A
checkpoint of another recipe will do: backbone and exits are all that is read. --bundle (a calibrated one of
recipe quee) adds the frontiers in its milliseconds. What the paths ended in is kept beside the checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from offramp.benchmarks.heard import listen_to
from offramp.runtime.bundle.files import open_bundle
from offramp.training.recipes.quee import FORECASTERS, Quee, compare, fitted
from offramp.training.replanning import Ledger, bit_ledger, clock_ledger, frontier


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--data", required=True, help="As in ee-train; dev is fitted on, --split is walked.")
@click.option("--split", default="test", help="Split that is measured.")
@click.option("--variants", default="fp32,int8", help="Precisions, simulated: of fp32, int8, int6, int4.")
@click.option("--bundle", type=click.Path(exists=True, path_type=Path), help="For its milliseconds.")
@click.option("--seed", default=0, help="Seed of clusters and networks.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(
    checkpoint: Path,
    data: str,
    split: str,
    variants: str,
    bundle: Path | None,
    seed: int,
    json_file: Path | None,
) -> None:
    settings = Quee(variants=variants)
    ears = listen_to(checkpoint, data, ("dev", split))
    network, test = ears.loaded.network, ears.rows[split]
    known, unseen = (ears.paths(name, settings.names).outcomes for name in ("dev", split))
    fit = settings.fit(seed)
    forecasters = fitted(known, fit)
    exits = {name: fitted(known.only([name]), fit)["mlp"] for name in known.variants}
    ledgers = [bit_ledger(network, test.lengths, settings.names)]
    if bundle is not None:
        ledgers.append(_clock(bundle, ledgers[0]))
    found: dict[str, Any] = {
        "checkpoint": checkpoint.name,
        "data": Path(data).name,
        "split": split,
        "rows": len(test),
        "variants": list(settings.names),
        "command": f"benchmarks/quee.py {checkpoint.name} --data {Path(data).name} --variants {variants}"
        + (f" --bundle {bundle.name}" if bundle is not None else ""),
    }
    for ledger in ledgers:
        points = {kind: frontier(unseen, forecasters[kind], ledger) for kind in FORECASTERS}
        found[ledger.unit] = compare(points, unseen, exits, ledger)
        _print(found[ledger.unit], f"{found['checkpoint']} on {found['data']} ({split})")
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _clock(bundle: Path, like: Ledger) -> Ledger:
    """The milliseconds of a calibrated bundle; the stem's are in what a walk to the end took beyond steps."""
    manifest = open_bundle(bundle).manifest
    if "ms" not in manifest.costs:
        raise click.UsageError(f"{bundle} says no milliseconds: measure them with ee-calibrate")
    costs = manifest.costs["ms"]
    whole = next(point.measured["ms"] for point in manifest.points if point.name == "full")
    stem = max(0.0, whole - sum(costs.steps[manifest.variants[0]]))
    return clock_ledger(costs.steps, stem, whole, costs.tokens, like)


def _print(found: dict[str, Any], what: str) -> None:
    lines = found["accuracy_at"]
    shares = list(next(iter(lines.values())))
    table = Table(title=f"{what}: accuracy at a share (%) of the full fp32 cost in {found['unit']}")
    table.add_column("")
    for share in shares:
        table.add_column(share, justify="right")
    for name, row in lines.items():
        table.add_row(name, *("-" if row[s] is None else f"{row[s]:.2f}" for s in shares))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
