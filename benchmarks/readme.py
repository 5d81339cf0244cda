"""The README's figures and docs/measured.md, written from the files that the benchmarks left in results/.

    python benchmarks/readme.py            # make bench ends with it

Nothing in those tables is typed by hand. Every table says on what machine and when it was measured: the
README has the short ones, docs/measured.md all of them, losers included.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from offramp.benchmarks import readme_decoders as decoders
from offramp.benchmarks.compare_all import grid
from offramp.benchmarks.compare_all import read as read_comparisons
from offramp.benchmarks.compare_all import summary as methods

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: make bench -->", "<!-- end of figures -->"
ALONE, WITH = "walk / one graph, last exit alone", "walk / one graph with all exits"
LOOP = "bare loop / one graph, last exit alone"
# Of the contenders of one data set, in this order; all of them are in the JSON.
SUMMED = ("walk within-1.0", "walk int8-within-1.0")
SHOWN = ("monolith", "monolith int8", "walk full depth", "nested if", "random exits")

HEAD = """# Measured

Written by `make bench` (`make figures` from what is there) out of `benchmarks/results/`; the commands are in
the heads of the files of `benchmarks/`. Points were chosen on dev; test was read once.

- x fp32, x int8: mean time of that monolith over the contender's, batch 1, in data order.
- x static: time of a network cut off at the same accuracy over the contender's, on the line through those
  measured.
- realised: share of the time saved over share of the multiply-accumulates saved, at batch 1 and in bulk
  (batches of 32).
- floor: the segments' own sessions run in a bare loop, without a walker.
"""


def read(name: str) -> dict[str, Any] | None:
    """A result file, or None where it was not made."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def where(about: dict[str, Any]) -> str:
    """On what machine, when."""
    threads = f", {about['threads']} threads" if "threads" in about else ""
    ort = f", onnxruntime {about['onnxruntime']}" if "onnxruntime" in about else ""
    return f"{about['cpu']}{threads}{ort}, {about['when'][:10]}"


def chosen(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Walks at their points, the single graphs, chance, and of the truncated graphs the most accurate one
    that is not slower than the first walk.
    """
    walks = [row for row in rows if row["kind"] == "walk"]
    static = [row for row in rows if row["kind"] == "truncated"]
    quick = [row for row in static if row["mean_ms"] <= 1.05 * walks[0]["mean_ms"]]
    best = max(quick, key=lambda row: row["accuracy"], default=None)
    named = {row["name"]: row for row in rows}
    single = [named[name] for name in SHOWN if name in named]
    return [*walks, *single, *([best] if best else [])]


def accuracy_and_time() -> list[str]:
    """One table for each checkpoint that early_exit.py measured."""
    lines: list[str] = []
    for file in sorted(RESULTS.glob("early_exit_*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        about = found["about"]
        head = ("", "accuracy %", "mean exit", "ms", "x fp32", "x int8", "x static", "realised", "in bulk")
        rows = []
        for row in chosen(found["rows"]):
            values = [row[name] for name in ("realised", "realised_in_bulk")]
            cells = [f"{row['times_fp32_monolith']:.2f}", f"{row['times_int8_monolith']:.2f}"]
            cells += ["-" if value is None else f"{value:.2f}" for value in (row["times_static"], *values)]
            variant = "" if row["variant"] in row["name"] else f" ({row['variant']})"
            known = [f"{row['accuracy']:.2f}", f"{row['mean_exit']:.2f}", f"{row['mean_ms']:.2f}"]
            rows.append([row["name"] + variant, *known, *cells])
        title = f"**{about['model']} on {about['data']}** ({about['rows']} rows of test; {where(about)})"
        lines += [title, "", *grid(head, rows)]
    return lines


def summary() -> list[str]:
    """One line for each checkpoint and precision: the point within 1.0, chosen on dev."""
    head = ("", "full depth %", "early exit %", "mean exit", "x fp32", "x int8", "x static", "realised")
    rows: list[list[str]] = []
    about: dict[str, Any] = {}
    for file in sorted(RESULTS.glob("early_exit_*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        about = found["about"]
        named = {row["name"]: row for row in found["rows"]}
        for name in SUMMED:
            row = named[name]
            cells = [f"{about['model']} on {about['data']}, {row['variant']}"]
            cells += [f"{named['walk full depth']['accuracy']:.2f}", f"{row['accuracy']:.2f}"]
            cells += [
                f"{row[key]:.2f}" for key in ("mean_exit", "times_fp32_monolith", "times_int8_monolith")
            ]
            values = (row["times_static"], row["realised"] if row["variant"] == "fp32" else None)
            rows.append([*cells, *("-" if value is None else f"{value:.2f}" for value in values)])
    if not rows:
        return []
    title = "**Early exit against the same network as one graph**, point within-1.0, batch 1"
    return [f"{title} ({where(about)})", "", *grid(head, rows)]


def overhead() -> list[str]:
    """The full walk against one graph, and where the floor is."""
    found = read("overhead")
    if found is None:
        return []
    title = f"**A full walk over the time of one graph**, batch 1 ({where(found['machine'])})"
    lines = [title, ""]
    head = (
        "network",
        "tokens",
        "walk / no exits",
        "floor / no exits",
        "walk / same exits",
        "walk / nested if",
    )
    rows = []
    for row in found["rows"]:
        same = f"{row[WITH][0]:.3f}" if WITH in row else ""
        nested = row.get("walk / nested if, by exit", [])
        span = f"{min(nested):.3f} to {max(nested):.3f}" if nested else ""
        name = f"{row['network']} {row['variant']}"
        rows.append([name, row["length"], f"{row[ALONE][0]:.3f}", f"{row[LOOP][0]:.3f}", same, span])
    return [*lines, *grid(head, rows)]


def bulk() -> list[str]:
    """The full walk's rows per second over the monolith's, on the same batches."""
    rows = []
    about: dict[str, Any] = {}
    for file in sorted(RESULTS.glob("bulk_*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        about, name = found["machine"], file.stem.removeprefix("bulk_")
        rows += [[f"{name} {row['variant']}", row["rows_per_second"], row["ratio"]] for row in found["rows"]]
    if not rows:
        return []
    title = f"**In bulk at full depth**, batches of 32, every exit computed ({where(about)})"
    return [title, "", *grid(("", "rows/s", "x rows/s of the monolith"), rows)]


def starts() -> list[str]:
    """A fresh process, and what a step costs."""
    lines: list[str] = []
    found = read("cold")
    if found is not None:
        title = f"**A fresh process on one line**, {found['bundle']} ({where(found['machine'])})"
        rows = [[row["command"], row["seconds"], row["ratio"], row["peak_mb"]] for row in found["rows"]]
        lines += [title, "", *grid(("", "seconds", "x ten-line script", "peak MB"), rows)]
    found = read("steps")
    if found is not None:
        title = f"**Microseconds a step that are not ONNX Runtime's**, batch 1 ({where(found['machine'])})"
        names = ("network", "length", "onnxruntime", "ours in use", "ours by itself")
        lines += [title, "", *grid(names, [[row[name] for name in names] for row in found["rows"]])]
    return lines


def recipes() -> list[str]:
    """Every method over all data sets."""
    title = (
        "**Which recipe**, accuracy on test less that of max-probability on recipe joint, mean between "
        "30 and 60 % of multiply-accumulates saved (`docs/comparison.md`)"
    )
    return [title, "", *methods(read_comparisons())]


def short() -> str:
    """What stands between the README's marks."""
    return "\n".join([*summary(), *recipes(), *decoders.short(), *starts()])


def tables() -> str:
    """All of docs/measured.md."""
    return "\n".join([HEAD, *accuracy_and_time(), *overhead(), *bulk(), *starts(), *decoders.all_tables()])


@click.command()
def main() -> None:
    """Put the short tables between the README's two marks, and write docs/measured.md."""
    file = ROOT / "README.md"
    text = file.read_text(encoding="utf-8")
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise click.ClickException(f"README.md: the marks {BEGIN} and {END} are not there")
    file.write_text(f"{before}{BEGIN}\n\n{short()}{END}{after}", encoding="utf-8")
    (ROOT / "docs" / "measured.md").write_text(tables(), encoding="utf-8")


if __name__ == "__main__":
    main()
