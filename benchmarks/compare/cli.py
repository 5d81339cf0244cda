"""The command ee-compare: train the methods that are missing, evaluate all by the same means, write the
tables.

    ee-compare --model MODEL --data DATA --recipes consistentee,jei_dnn,quee,deebert --seeds 3 --out results/

Started again with the same command after an interruption, it resumes: checkpoints and the outputs of their
exits are kept in --out. Every recipe has its own default settings and number of epochs; recipes that start
from another's checkpoint share it, one a seed. Each method leaves by its own rule; on the joint checkpoint
the plain rules are tried as well. The same number of settings is swept for each rule on dev; the undominated
ones are evaluated once on test.

Compared with max-probability on the joint checkpoint: the area between the frontiers with its sign, and over
resampled rows the difference between 30 and 60 % of multiply-accumulates saved. Controls at a point that
saves at least half: exits drawn at random with the same histogram, a truncated network of equal cost, first
right (oracle). Where precision varies, bit operations are counted; with --measure, the exported bundles are
timed in milliseconds.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from offramp.benchmarks.compare.evaluation import Evaluation, evaluate_methods, time_bundles
from offramp.benchmarks.compare.exit_outputs import CheckpointOutputs, collect_outputs
from offramp.benchmarks.compare.frontiers import (
    Floats,
    accuracy_differences,
    areas_between,
    bootstrap_weights,
    difference_interval,
)
from offramp.benchmarks.compare.pages import HEAD, REFERENCE, html_page, table_rows
from offramp.runtime.tuning.report import write_atomically
from offramp.training.collect import oracle_point
from offramp.training.recipes import RECIPES, load_recipe

PLAIN_RULES = ("max_probability", "entropy", "margin", "patience")
ORACLE = "first right (joint)"
CORNERS = 61  # of a frontier as it is written to the file
RANGE = (30.0, 60.0)  # per cent of multiply-accumulates saved


def train_once(recipe: str, seed: int, out: Path, words: list[str]) -> Path:
    """Train the checkpoint out/RECIPE_SEED, and the one that it starts from, unless they exist; give its
    folder.

    words: arguments of ee-train for model and data, "--data" among them.
    """
    folder, data = out / f"{recipe}_{seed}", words[words.index("--data") :]
    if not (folder / "training.json").is_file():
        begin, start = words[: words.index("--data")], load_recipe(recipe).STARTS_FROM
        if start is not None:
            begin = ["--init", str(train_once(start, seed, out, words))]
        command = [str(Path(sys.executable).parent / "ee-train"), "--recipe", recipe, "--seed", str(seed)]
        subprocess.run([*command, "--out", str(folder), *begin, *data], check=True, stdout=subprocess.DEVNULL)
    return folder


def compare(
    recipes: list[str], seeds: list[int], out: Path, words: list[str], data: str, measure: int = 0
) -> dict[str, Any]:
    """Train and evaluate all recipes; the content of compare.json.

    It holds every method's figures for every seed, and over seeds its difference from max-probability.
    measure: rows of test on which the bundles of the first seed are timed; 0 for none.
    """
    methods: dict[str, list[dict[str, Any]]] = {}
    differences: dict[str, list[Floats]] = {}
    milliseconds: dict[str, Any] | None = None
    names = ["joint", *(name for name in recipes if name != "joint")]
    for seed in seeds:
        for name in names:
            train_once(name, seed, out, words)
    for seed in seeds:
        outputs = {name: collect_outputs(out / f"{name}_{seed}", data) for name in names}
        evaluations = evaluate_methods(outputs, PLAIN_RULES)
        reference = evaluations[REFERENCE].settings
        weights = bootstrap_weights(reference.right.shape[1])
        for name, evaluation in evaluations.items():
            figures, line = dict(evaluation.figures), evaluation.settings.frontier()
            figures["above"], figures["below"] = areas_between(line, reference.frontier(), *RANGE)
            figures |= {"seed": seed, "lines": _lines(evaluation)}
            methods.setdefault(name, []).append(figures)
            differences.setdefault(name, []).append(
                accuracy_differences(evaluation.settings, reference, *RANGE, weights)
            )
        methods.setdefault(ORACLE, []).append(_oracle_figures(outputs["joint"]) | {"seed": seed})
        if measure and seed == seeds[0]:
            joint = outputs["joint"]
            milliseconds = time_bundles(evaluations, joint.folder, joint.rows["test"], measure)
    result = {
        "data": Path(data).name,
        "rows": {split: len(rows) for split, rows in outputs["joint"].rows.items()},
        "seeds": seeds,
        "methods": methods,
        "against_max_probability": {
            name: difference_interval(of_seeds) for name, of_seeds in differences.items()
        },
        "draws": {
            name: np.mean(of_seeds, axis=0)[1:].round(4).tolist() for name, of_seeds in differences.items()
        },
    }
    if milliseconds is not None:
        result["milliseconds"] = milliseconds
        for name, points in milliseconds["points"].items():
            methods[name][0]["time_share"] = _share_at(points, methods[name][0]["macs_saved"])
    return result


def _lines(evaluation: Evaluation) -> dict[str, Any]:
    """By cost axis, savings at even spacing and the accuracies of the method's frontier there."""
    lines = {}
    for axis in evaluation.settings.spent:
        saved, accuracy = evaluation.settings.frontier(axis)
        grid = np.linspace(saved[0], saved[-1], CORNERS)
        lines[axis] = [grid.round(2).tolist(), np.interp(grid, saved, accuracy).round(2).tolist()]
    return lines


def _oracle_figures(joint: CheckpointOutputs) -> dict[str, float]:
    """Figures of exiting at the first right exit, which bounds the accuracy of any rule on these exits."""
    outputs = joint.exit_outputs("test")
    best = oracle_point(outputs.table, outputs.costs)
    return {"accuracy_at_half": best.accuracy, "macs_saved": best.macs_saved}


def _share_at(points: list[dict[str, float]], macs_saved: float) -> float:
    """Time in percent of the monolith's, at the timed point whose saving is nearest to `macs_saved`."""
    return min(points, key=lambda point: abs(point["macs_saved"] - macs_saved))["share"]


def print_table(result: dict[str, Any]) -> None:
    """Print a table with one line for each method."""
    seeds = ", ".join(map(str, result["seeds"]))
    table = Table(title=f"{result['data']}, test, seeds {seeds}; at the point that saves half")
    for name in HEAD:
        table.add_column(name, justify="left" if name in (HEAD[0], HEAD[-1]) else "right")
    for row in table_rows(result):
        table.add_row(*row)
    Console(width=220).print(table)


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--model", required=True, help="As in ee-train.")
@click.option("--data", required=True, help="As in ee-train.")
@click.option("--recipes", default="consistentee", help=f"Some of {', '.join(RECIPES)}.")
@click.option("--seeds", default=1, type=click.IntRange(min=1), help="Runs of each recipe: seeds 0, 1, …")
@click.option("--prefix", default="", help="As in ee-train.")
@click.option("--augment", default="none", help="As in ee-train.")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="As in ee-train, for every recipe."
)
@click.option(
    "--measure",
    default=0,
    metavar="ROWS",
    help="Export the bundles of seed 0 and time them on this number of rows.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("results"), help="Folder for everything it makes."
)
@click.argument("more", nargs=-1)
def main(
    model: str,
    data: str,
    recipes: str,
    seeds: int,
    prefix: str,
    augment: str,
    settings: tuple[str, ...],
    measure: int,
    out: Path,
    more: tuple[str, ...],
) -> None:
    """Train what is missing, measure every method by the same means, print the table, write compare.json and
    the page compare.html.

    Started again after an interruption, it resumes. Points are chosen on dev; test is read once. Arguments
    after -- are passed to ee-train whenever --model is, for example -- --image-size 112 --pooling cls.
    """
    names = list(dict.fromkeys(recipes.split(",")))
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        raise click.UsageError(f"--recipes: {unknown[0]!r} is not known; choose among {', '.join(RECIPES)}")
    out.mkdir(parents=True, exist_ok=True)
    options = ["--prefix", prefix] if prefix else []
    options += ["--augment", augment] if augment != "none" else []
    options += [word for setting in settings for word in ("--set", setting)]
    words = ["--model", model, *more, "--data", data, *options]
    try:
        result = compare(names, list(range(seeds)), out, words, data, measure)
    except subprocess.CalledProcessError as problem:
        command = " ".join(map(str, problem.cmd))
        raise click.ClickException(f"{command} ended with {problem.returncode}") from None
    print_table(result)
    arguments = [model, "--data", data, *options, "--recipes", recipes]
    without_folders = [Path(word).name if Path(word).exists() else word for word in arguments]
    tail = ["--seeds", str(seeds), *(["--measure", str(measure)] if measure else [])]
    tail += ["--", *more] if more else []
    command = shlex.join(["ee-compare", "--model", *without_folders, *tail])
    result = {"command": command, "settings": list(settings)} | result
    write_atomically(out / "compare.json", json.dumps(result) + "\n")
    write_atomically(out / "compare.html", html_page(result))


if __name__ == "__main__":
    main()
