"""Accuracy and time on a real data set: early exits in fp32 and int8 against all single graphs, by ee-bench.

    python benchmarks/early_exit.py CKPT --model e5-small --data DATA --truncate 3,5,6,7,8,9 \
        --work runs/ --json benchmarks/results/early_exit_NAME.json

It splits the checkpoint with baselines into --work (once); the engine measures the operating points on
DATA/dev.jsonl. ee-bench then walks DATA/test.jsonl at points that were chosen on dev. Each candidate is
compared with full depth in fp32 (accuracy lost), with the fp32 and the int8 monolith (ratio of mean
wall-clock an input at batch 1), and with a truncated network of the same accuracy, read off the line through
the truncated graphs and the monolith.
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
POINTS = "default,dev-1.0,saves-57,int8-default,int8-dev-1.0,int8-saves-57"
LEFT_OUT = ("percentiles_ms", "exits", "rule")
COLUMNS = {
    "accuracy": "accuracy",
    "lost": "accuracy_lost",
    "exit": "mean_exit",
    "ms": "mean_ms",
    "x fp32": "times_fp32_monolith",
    "x int8": "times_int8_monolith",
    "x static": "times_static",
    "realised": "realised",
    "bulk": "realised_in_bulk",
    "rows/s": "rows_per_second",
}


def static_ms(candidates: list[dict[str, Any]], accuracy: float) -> float | None:
    """Interpolated milliseconds of a truncated network of this accuracy; None outside the measured range.

    The time is read off the upper hull of the static graphs, without graphs that a faster one matches in
    accuracy.
    """
    hull: list[tuple[float, float]] = []  # accuracy, milliseconds; both rise
    static = [c for c in candidates if c["kind"] in ("truncated", "monolith") and c["variant"] == "fp32"]
    for graph in sorted(static, key=lambda c: c["mean_ms"]):
        if not hull or graph["accuracy"] > hull[-1][0]:
            hull.append((graph["accuracy"], graph["mean_ms"]))
    if not hull[0][0] <= accuracy <= hull[-1][0]:
        return None
    return float(np.interp(accuracy, [known for known, _ in hull], [ms for _, ms in hull]))


def rows_with_ratios(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """One row of figures for each candidate, with its ratios to the baselines."""
    candidates = figures["candidates"]
    by_name = {candidate["name"]: candidate for candidate in candidates}
    full, monolith, int8 = by_name["walk full depth"], by_name["monolith"], by_name["monolith int8"]
    rows = []
    for candidate in candidates:
        static = static_ms(candidates, candidate["accuracy"])
        row: dict[str, Any] = {name: value for name, value in candidate.items() if name not in LEFT_OUT}
        row["accuracy_lost"] = round(full["accuracy"] - candidate["accuracy"], 2)
        row["times_fp32_monolith"] = round(monolith["mean_ms"] / candidate["mean_ms"], 3)
        row["times_int8_monolith"] = round(int8["mean_ms"] / candidate["mean_ms"], 3)
        row["times_static"] = None if static is None else round(static / candidate["mean_ms"], 3)
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]], title: str) -> None:
    """Print a table with one line for each candidate."""
    table = Table(title=title)
    for head in ("candidate", *COLUMNS):
        table.add_column(head, justify="right")
    for row in rows:
        cells = ["-" if row[name] is None else f"{row[name]:.2f}" for name in COLUMNS.values()]
        table.add_row(row["name"], *cells)
    Console(width=150).print(table)


@click.command(context_settings={"show_default": True})
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="dev, test .jsonl.")
@click.option("--model", required=True, help="Name of the backbone for the table.")
@click.option("--truncate", default="3,5,6,7,8,9", help="As in ee-split.")
@click.option("--points", default=POINTS, help="As in ee-bench; points that the bundle lacks are left out.")
@click.option("--rows", default=100_000, help="Test rows at most.")
@click.option("--turns", "rounds", default=1, help="As in ee-bench.")
@click.option("--work", default=Path("runs"), type=click.Path(path_type=Path), help="Folder for bundles.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File for the figures.")
@click.option("--report", type=click.Path(path_type=Path), help="As in ee-bench.")
def main(
    checkpoint: Path,
    data: Path,
    model: str,
    truncate: str,
    points: str,
    rows: int,
    rounds: int,
    work: Path,
    json_file: Path | None,
    report: Path | None,
) -> None:
    """Split the checkpoint once, run ee-bench, and print the table."""
    work.mkdir(parents=True, exist_ok=True)
    bundle, baselines = work / f"{checkpoint.name}.bundle", work / f"{checkpoint.name}.baselines"
    if not (baselines / "baselines.json").is_file():
        words = ["--out", str(bundle), "--baselines", str(baselines), "--truncate", truncate, "--overwrite"]
        words += ["--dev", str(data / "dev.jsonl")]
        subprocess.run([str(BIN / "ee-split"), str(checkpoint), *words], check=True, stdout=sys.stderr)
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    known = {point["name"] for point in manifest["points"]}
    available = ",".join(name for name in points.split(",") if name in known)
    out = work / f"{checkpoint.name}.bench.json"
    words = ["--bundle", str(bundle), "--data", str(data / "test.jsonl"), "--baselines", str(baselines)]
    words += ["--points", available, "--rows", str(rows), "--turns", str(rounds), "--json", str(out)]
    words += ["--report", str(report)] if report is not None else []
    subprocess.run([str(BIN / "ee-bench"), *words], check=True, stdout=sys.stderr)
    figures = json.loads(out.read_text(encoding="utf-8"))
    table_rows = rows_with_ratios(figures)
    print_table(table_rows, f"{checkpoint.name}, test, {figures['about']['rows']} rows")
    if json_file is not None:
        about = figures["about"] | {"bundle": checkpoint.name, "model": model, "data": data.name}
        result = {"about": about, "rows": table_rows}
        result |= {"segments": figures["segments"], "cold_start": figures["cold_start"]}
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
