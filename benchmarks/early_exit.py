"""Accuracy and time on a real data set: early exits in fp32 and int8 against every single graph, by ee-bench.

    python benchmarks/early_exit.py CKPT --model e5-small --data DATA --truncate 3,5,6,7,8,9 \
        --work runs/ --json benchmarks/results/early_exit_NAME.json

Splits the checkpoint with rivals into --work (once), with operating points measured on DATA/dev.jsonl by the
engine itself; then ee-bench walks DATA/test.jsonl at points that were chosen on dev. Beside each walk stands
what the targets ask: accuracy lost against full depth in fp32, how many times faster than the fp32 and the
int8 monolith (mean wall-clock an input at batch 1), and how many times faster than a truncated network of the
same accuracy, read off the line through the truncated graphs and the monolith.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

BIN = Path(sys.executable).parent
POINTS = "default,within-1.0,saves-57,int8-default,int8-within-1.0,int8-saves-57"
LEFT_OUT = ("percentiles_ms", "exits", "rule")


def static_ms(contenders: list[dict[str, Any]], accuracy: float) -> float | None:
    """Milliseconds of a truncated network of that accuracy; None above the best and below the worst.

    The upper hull of the static graphs is what counts: nobody deploys one that a faster one beats.
    """
    line: list[tuple[float, float]] = []  # accuracy, milliseconds; better is always slower
    static = [c for c in contenders if c["kind"] in ("truncated", "monolith") and c["variant"] == "fp32"]
    for graph in sorted(static, key=lambda c: c["mean_ms"]):
        if not line or graph["accuracy"] > line[-1][0]:
            line.append((graph["accuracy"], graph["mean_ms"]))
    if not line[0][0] <= accuracy <= line[-1][0]:
        return None
    return float(np.interp(accuracy, [one for one, _ in line], [ms for _, ms in line]))


def judged(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """A line a contender, with the ratios that the targets are about."""
    contenders = figures["contenders"]
    named = {c["name"]: c for c in contenders}
    full, whole, int8 = named["walk full depth"], named["monolith"], named["monolith int8"]
    rows = []
    for one in contenders:
        static = static_ms(contenders, one["accuracy"])
        facts: dict[str, Any] = {name: value for name, value in one.items() if name not in LEFT_OUT}
        facts["accuracy_lost"] = round(full["accuracy"] - one["accuracy"], 2)
        facts["times_fp32_monolith"] = round(whole["mean_ms"] / one["mean_ms"], 3)
        facts["times_int8_monolith"] = round(int8["mean_ms"] / one["mean_ms"], 3)
        facts["times_static"] = None if static is None else round(static / one["mean_ms"], 3)
        rows.append(facts)
    return rows


def show(rows: list[dict[str, Any]], title: str) -> None:
    """The table, losers included."""
    table = Table(title=title)
    heads = (
        "contender",
        "accuracy",
        "lost",
        "exit",
        "ms",
        "x fp32",
        "x int8",
        "x static",
        "realised",
        "bulk",
    )
    for head in (*heads, "rows/s"):
        table.add_column(head, justify="right")
    names = (
        "accuracy",
        "accuracy_lost",
        "mean_exit",
        "mean_ms",
        "times_fp32_monolith",
        "times_int8_monolith",
    )
    for row in rows:
        last = ("times_static", "realised", "realised_in_bulk", "rows_per_second")
        cells = ["-" if row[name] is None else f"{row[name]:.2f}" for name in (*names, *last)]
        table.add_row(row["name"], *cells)
    Console(width=150).print(table)


@click.command(context_settings={"show_default": True})
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="dev, test .jsonl.")
@click.option("--model", required=True, help="Name of the backbone for the table.")
@click.option("--truncate", default="3,5,6,7,8,9", help="As in ee-split.")
@click.option("--points", default=POINTS, help="As in ee-bench; those that the bundle lacks are passed over.")
@click.option("--rows", default=100_000, help="Test rows at most.")
@click.option("--turns", default=1, help="As in ee-bench.")
@click.option("--work", default=Path("runs"), type=click.Path(path_type=Path), help="Where bundles are kept.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where to write the figures.")
@click.option("--report", type=click.Path(path_type=Path), help="As in ee-bench.")
def main(
    checkpoint: Path,
    data: Path,
    model: str,
    truncate: str,
    points: str,
    rows: int,
    turns: int,
    work: Path,
    json_file: Path | None,
    report: Path | None,
) -> None:
    """Split once, bench, print the table."""
    work.mkdir(parents=True, exist_ok=True)
    bundle, rivals = work / f"{checkpoint.name}.bundle", work / f"{checkpoint.name}.rivals"
    if not (rivals / "rivals.json").is_file():
        words = ["--out", str(bundle), "--rivals", str(rivals), "--truncate", truncate, "--overwrite"]
        words += ["--dev", str(data / "dev.jsonl")]
        subprocess.run([str(BIN / "ee-split"), str(checkpoint), *words], check=True, stdout=sys.stderr)
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    known = {point["name"] for point in manifest["points"]}
    wanted = ",".join(name for name in points.split(",") if name in known)
    out = work / f"{checkpoint.name}.bench.json"
    words = ["--bundle", str(bundle), "--data", str(data / "test.jsonl"), "--against", str(rivals)]
    words += ["--points", wanted, "--rows", str(rows), "--turns", str(turns), "--json", str(out)]
    words += ["--report", str(report)] if report is not None else []
    subprocess.run([str(BIN / "ee-bench"), *words], check=True, stdout=sys.stderr)
    figures = json.loads(out.read_text(encoding="utf-8"))
    judgement = judged(figures)
    show(judgement, f"{checkpoint.name}, test, {figures['about']['rows']} rows")
    if json_file is not None:
        about = figures["about"] | {"bundle": checkpoint.name, "model": model, "data": data.name}
        result = {"about": about, "rows": judgement}
        result |= {"segments": figures["segments"], "cold_start": figures["cold_start"]}
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
