"""ee-compare: one judge for all methods on one model and data set.

    ee-compare --model MODEL --data DATA --recipes consistentee,jei_dnn,quee,deebert --seeds 3 --out results/

Trains what is not there, with the same command killed and given again: checkpoints and what their exits said
are kept in --out. Every recipe has its own default settings and budget of epochs; those that start from
another's checkpoint share it, one a seed. Each method leaves by its own rule; on the joint checkpoint the
plain rules are tried beside them. As many settings are swept for each on dev, the undominated ones are read
once on test.

Against max-probability on the joint checkpoint: the area between the lines with its sign, and over rows drawn
anew the difference between 30 and 60 % of multiply-accumulates saved. Controls at a point that saves at least
half: exits drawn by chance with the same histogram, a truncated network of equal cost, first right (oracle).
Where precision varies, bit operations; with --measure, milliseconds of the exported bundles.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from offramp.benchmarks.compare_ms import timed
from offramp.benchmarks.compare_page import page
from offramp.benchmarks.contest import Entry, of_methods
from offramp.benchmarks.frontiers import Floats, area, gaps, interval, redrawn
from offramp.benchmarks.heard import Ears, listen_to
from offramp.runtime.tuning.report import write_whole
from offramp.training.frontier import oracle
from offramp.training.recipes import RECIPES, load_recipe

PLAIN = ("max_probability", "entropy", "margin", "patience")
REFERENCE = "max_probability (joint)"
ORACLE = "first right (joint)"
CORNERS = 61  # of a line as it is written to the file
RANGE = (30.0, 60.0)  # per cent of multiply-accumulates saved
FIGURES = (
    "accuracy_at_half",
    "macs_saved",
    "bops_saved",
    "random",
    "static",
    "above",
    "below",
    "elue",
    "ece_raw",
    "ece",
    "set_size",
    "time_share",
)
HEAD = ("method (rule)", *(name.replace("_", " ") for name in FIGURES), "difference", "verdict")


def trained(recipe: str, seed: int, out: Path, words: list[str]) -> Path:
    """The checkpoint out/RECIPE_SEED, trained now if it is not there; before it the one it starts from."""
    folder, data = out / f"{recipe}_{seed}", words[words.index("--data") :]
    if not (folder / "training.json").is_file():
        begin, start = words[: words.index("--data")], load_recipe(recipe).STARTS_FROM
        if start is not None:
            begin = ["--init", str(trained(start, seed, out, words))]
        command = [str(Path(sys.executable).parent / "ee-train"), "--recipe", recipe, "--seed", str(seed)]
        subprocess.run([*command, "--out", str(folder), *begin, *data], check=True, stdout=subprocess.DEVNULL)
    return folder


def compare(
    recipes: list[str], seeds: list[int], out: Path, words: list[str], data: str, measure: int = 0
) -> dict[str, Any]:
    """Every method's figures for every seed, and over seeds its difference from max-probability.

    measure: rows of test that the bundles of seed 0 walk; 0 for none.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    differences: dict[str, list[Floats]] = {}
    milliseconds: dict[str, Any] | None = None
    names = ["joint", *(name for name in recipes if name != "joint")]
    for seed in seeds:
        for name in names:
            trained(name, seed, out, words)
    for seed in seeds:
        said = {name: listen_to(out / f"{name}_{seed}", data) for name in names}
        entries = of_methods(said, PLAIN)
        reference = entries[REFERENCE].settings
        weights = redrawn(reference.right.shape[1])
        for name, entry in entries.items():
            figures, line = dict(entry.figures), entry.settings.line()
            figures["above"], figures["below"] = area(line, reference.line(), *RANGE)
            figures |= {"seed": seed} | _lines(entry)
            found.setdefault(name, []).append(figures)
            differences.setdefault(name, []).append(gaps(entry.settings, reference, *RANGE, weights))
        found.setdefault(ORACLE, []).append(_bound(said["joint"]) | {"seed": seed})
        if measure and seed == seeds[0]:
            milliseconds = timed(entries, said["joint"].folder, said["joint"].rows["test"], measure)
    result = {
        "data": Path(data).name,
        "rows": {split: len(rows) for split, rows in said["joint"].rows.items()},
        "seeds": seeds,
        "methods": found,
        "against_max_probability": {name: interval(of_seeds) for name, of_seeds in differences.items()},
        "draws": {
            name: np.mean(of_seeds, axis=0)[1:].round(4).tolist() for name, of_seeds in differences.items()
        },
    }
    if milliseconds is not None:
        result["milliseconds"] = milliseconds
        for name, points in milliseconds["points"].items():
            found[name][0]["time_share"] = _share_at(points, found[name][0]["macs_saved"])
    return result


def _lines(entry: Entry) -> dict[str, Any]:
    """The frontier on every axis, at savings that are evenly apart."""
    lines = {}
    for axis in entry.settings.spent:
        saved, accuracy = entry.settings.line(axis)
        grid = np.linspace(saved[0], saved[-1], CORNERS)
        lines[axis] = [grid.round(2).tolist(), np.interp(grid, saved, accuracy).round(2).tolist()]
    return {"lines": lines}


def _bound(joint: Ears) -> dict[str, float]:
    """First right: no rule on these exits is more accurate."""
    heard = joint.heard("test")
    best = oracle(heard.table, heard.costs)
    return {"accuracy_at_half": best.accuracy, "macs_saved": best.macs_saved}


def _share_at(points: list[dict[str, float]], macs_saved: float) -> float:
    """Time as a share of the monolith's, at the walked point nearest to the one in the table."""
    return min(points, key=lambda point: abs(point["macs_saved"] - macs_saved))["share"]


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """One line a method: means over seeds, standard deviation of the accuracy in brackets, the verdict."""
    rows = []
    for name, seeds in result["methods"].items():
        cells = []
        for figure in FIGURES:
            values = [one[figure] for one in seeds if figure in one]
            cells.append(f"{np.mean(values):.2f}" if values else "-")
        accuracy = [one["accuracy_at_half"] for one in seeds]
        if len(accuracy) > 1:
            cells[0] += f" ({np.std(accuracy, ddof=1):.2f})"
        against = result["against_max_probability"].get(name)
        difference = "-"
        if against is not None:
            difference = f"{against['difference']:+.2f} [{against['low']:+.2f}, {against['high']:+.2f}]"
        rows.append([name, *cells, difference, verdict(seeds, against)])
    return rows


def show(result: dict[str, Any]) -> None:
    """The table on stdout."""
    seeds = ", ".join(map(str, result["seeds"]))
    table = Table(title=f"{result['data']}, test, seeds {seeds}; at the point that saves half")
    for name in HEAD:
        table.add_column(name, justify="left" if name in (HEAD[0], HEAD[-1]) else "right")
    for row in rows_of(result):
        table.add_row(*row)
    Console(width=220).print(table)


def verdict(seeds: list[dict[str, Any]], against: Mapping[str, float] | None) -> str:
    """What a method loses to, in words; nothing where it beats both controls and ties with the reference."""
    if against is None:
        return ""
    mean = {
        name: float(np.mean([one[name] for one in seeds]))
        for name in ("accuracy_at_half", "random", "static")
    }
    lost = [name for name in ("random", "static") if mean["accuracy_at_half"] <= mean[name]]
    words = [f"does not beat {name}" for name in lost]
    if against["high"] < 0:
        words.append("below max-probability")
    if against["low"] > 0:
        words.append("above max-probability")
    return "; ".join(words)


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--model", required=True, help="As in ee-train.")
@click.option("--data", required=True, help="As in ee-train.")
@click.option("--recipes", default="consistentee", help=f"Some of {', '.join(RECIPES)}.")
@click.option("--seeds", default=1, type=click.IntRange(min=1), help="Runs of each: seeds 0, 1, …")
@click.option("--prefix", default="", help="As in ee-train.")
@click.option("--augment", default="none", help="As in ee-train.")
@click.option(
    "--set", "wishes", multiple=True, metavar="NAME=VALUE", help="As in ee-train, for every recipe."
)
@click.option(
    "--measure", default=0, metavar="ROWS", help="Export the bundles of seed 0 and time them on so many rows."
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), help="Where all is kept.")
@click.argument("more", nargs=-1)
def main(
    model: str,
    data: str,
    recipes: str,
    seeds: int,
    prefix: str,
    augment: str,
    wishes: tuple[str, ...],
    measure: int,
    out: Path,
    more: tuple[str, ...],
) -> None:
    """Train what is missing, measure every method by the same means, print the table, write compare.json and
    the page compare.html.

    Given again after an interruption, it goes on. Points are chosen on dev; test is read once. What follows
    -- goes to ee-train where it begins with --model, such as -- --image-size 112 --pooling cls.
    """
    names = list(dict.fromkeys(recipes.split(",")))
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        raise click.UsageError(f"--recipes: {unknown[0]!r} is not known; choose among {', '.join(RECIPES)}")
    out.mkdir(parents=True, exist_ok=True)
    words = ["--model", model, *more, "--data", data]
    words += ["--prefix", prefix] if prefix else []
    words += ["--augment", augment] if augment != "none" else []
    words += [word for wish in wishes for word in ("--set", wish)]
    try:
        result = compare(names, list(range(seeds)), out, words, data, measure)
    except subprocess.CalledProcessError as problem:
        raise click.ClickException(
            f"{' '.join(map(str, problem.cmd))} ended with {problem.returncode}"
        ) from None
    show(result)
    said = [model, "--data", data, *words[words.index("--data") + 2 :], "--recipes", recipes]
    shown = [Path(word).name if Path(word).exists() else word for word in said]
    tail = ["--seeds", str(seeds), *(["--measure", str(measure)] if measure else [])]
    tail += ["--", *more] if more else []
    command = shlex.join(["ee-compare", "--model", *shown, *tail])
    result = {"command": command, "settings": list(wishes)} | result
    write_whole(out / "compare.json", json.dumps(result) + "\n")
    write_whole(out / "compare.html", page(result, HEAD, rows_of(result)))


if __name__ == "__main__":
    main()
