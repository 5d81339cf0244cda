"""docs/comparison.md from the files of ee-compare: a table a data set, and methods over all data sets.

    python benchmarks/compare_all.py    # reads compare_*.json and agreement_*.json of benchmarks/results

A file whose "settings" are not empty is a variant: it is held against the file of the same data without
them, row by row, since both drew the same rows anew.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from offramp.benchmarks.compare import HEAD, REFERENCE, rows_of
from offramp.benchmarks.frontiers import Floats, interval
from offramp.runtime.tuning.report import write_whole

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "comparison.md"
INTRODUCTION = """# Methods compared

Written by `python benchmarks/compare_all.py` out of `benchmarks/results/compare_*.json`, which the commands
below made. Settings were chosen on dev; test was read once.

- Accuracy (standard deviation over seeds), savings and controls: of the point that was the most accurate on
  dev among those that save half of the multiply-accumulates. random: exits drawn by chance with the same
  histogram. static: a truncated network of equal cost.
- difference: mean accuracy between 30 and 60 % of multiply-accumulates saved, less that of max-probability on
  the joint checkpoint, with its 95 % interval over rows drawn anew, the same rows for both and for all seeds.
  It says nothing about other seeds.
"""


AGREEMENT = """## Torch and the bundle decide alike

The same rows through the trained modules and through the exported bundle, by two programs. same: the same
segments in the same precision and the same label. ties: decided differently though no probability and no gate
on the way was further apart than 1e-5. other: neither. In fp32 there is to be none of the last. In int8 a
number between two grid points may fall to either side and moves all that comes after it, so that torch in
float64 does not decide as torch in float32 does either; the bundle is held against that.
"""


def read(kind: str = "compare") -> list[dict[str, Any]]:
    """All result files of a kind, in the order of their names."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob(f"{kind}_*.json"))]


def drawn(result: dict[str, Any], name: str) -> Floats:
    """What gaps() gave, averaged over seeds: the difference as it is, then draw by draw."""
    mean = result["against_max_probability"][name]["difference"]
    return np.array([mean, *result["draws"][name]])


def over_all(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Methods that all data sets have, each data set counted once."""
    names = [name for name in results[0]["draws"] if all(name in one["draws"] for one in results)]
    rows = []
    for name in names:
        if name == REFERENCE:
            continue
        found = interval([drawn(one, name) for one in results])
        each = [f"{one['against_max_probability'][name]['difference']:+.2f}" for one in results]
        rows.append([name, *each, said(found), judgement(found)])
    return rows


def summary(results: Sequence[dict[str, Any]]) -> list[str]:
    """The table over all data sets, nothing where there is only one."""
    plain = [one for one in results if not one["settings"]]
    if len(plain) < 2:
        return []
    head = ("method (rule)", *(one["data"] for one in plain), "all, 95 %", "against max-probability")
    return grid(head, over_all(plain))


def said(found: dict[str, float]) -> str:
    """A difference and its interval."""
    return f"{found['difference']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def judgement(found: dict[str, float]) -> str:
    """Whether the interval leaves zero, in words."""
    if found["low"] > 0:
        return "above"
    return "below" if found["high"] < 0 else "not apart"


def variants(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Other settings of a recipe less its default ones."""
    plain = {one["data"]: one for one in results if not one["settings"]}
    rows = []
    for one in results:
        base = plain.get(one["data"])
        if not one["settings"] or base is None or one["seeds"] != base["seeds"]:
            continue
        for name in one["draws"]:
            if name.endswith("(joint)"):
                continue
            found = interval([drawn(one, name) - drawn(base, name)])
            figures = (np.mean([s["accuracy_at_half"] for s in r["methods"][name]]) for r in (one, base))
            accuracy = [f"{figure:.2f}" for figure in figures]
            rows.append(
                [one["data"], name, " ".join(one["settings"]), *accuracy, said(found), judgement(found)]
            )
    return rows


def grid(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def milliseconds(result: dict[str, Any]) -> list[list[str]]:
    """The walked points of every method."""
    rows = []
    for name, points in result["milliseconds"]["points"].items():
        for point in points:
            rows.append(
                [
                    name,
                    f"{point['ms']:.2f}",
                    f"{point['share']:.1f}",
                    f"{point['macs_saved']:.1f}",
                    f"{point['accuracy']:.2f}",
                ]
            )
    return rows


def agreement(found: dict[str, Any]) -> list[str]:
    """The command and a line for every walk of a file of agreement.py."""
    head = list(found["lines"][0])
    rows = [[str(value).replace("_", " ") for value in line.values()] for line in found["lines"]]
    return [f"    python {found['command']}", "", *grid([name.replace("_", " ") for name in head], rows)]


def text(results: Sequence[dict[str, Any]], agreements: Sequence[dict[str, Any]] = ()) -> str:
    """The whole page."""
    lines = [INTRODUCTION, "## Over all data sets", "", *summary(results)]
    for one in (one for one in results if not one["settings"]):
        seeds = ", ".join(map(str, one["seeds"]))
        title = f"## {one['data']} ({one['rows']['test']} rows of test, seeds {seeds})"
        lines += [title, "", f"    {one['command']}", "", *grid(HEAD, rows_of(one))]
        if "milliseconds" in one:
            about = one["milliseconds"]
            words = (
                f"Walked at batch 1 ({about['rows']} rows of test, single graph {about['monolith_ms']} ms):"
            )
            head = ("method (rule)", "ms", "% of the single graph", "macs saved %", "accuracy %")
            lines += [words, "", *grid(head, milliseconds(one))]
    other = variants(results)
    if other:
        known = ("data", "method (rule)", "instead of the default", "accuracy at half", "default's")
        lines += ["## Other settings", "", *grid((*known, "less the default", ""), other)]
    if agreements:
        lines += [AGREEMENT, *(line for found in agreements for line in agreement(found))]
    return "\n".join(lines)


@click.command(help=__doc__)
def main() -> None:
    results = read()
    if not results:
        raise click.ClickException(f"no compare_*.json in {RESULTS.name}/: run ee-compare and copy its file")
    write_whole(PAGE, text(results, read("agreement")))
    click.echo(PAGE.name)


if __name__ == "__main__":
    main()
