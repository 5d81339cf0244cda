"""ee-compare: one judge for all methods on one model and data set.

    ee-compare --model MODEL --data DATA --recipes consistentee,jei_dnn,branchynet --seeds 3 --out results/

Trains what is not there, with the same command killed and given again: checkpoints and what their exits said
are kept in --out. Every recipe has its own default settings and budget of epochs; those that start from
another's checkpoint share it, one a seed. Each method leaves by its own rule; on the joint checkpoint the
plain rules are tried beside them. The same number of settings is swept for each on dev, the undominated ones
are read once on test.

Against max-probability on the joint checkpoint: the area between the lines with its sign, and over rows drawn
anew the difference between 30 and 60 % of multiply-accumulates saved. Controls at a point that saves at least
half: exits drawn by chance with the same histogram, a truncated network of equal cost, first right (oracle).
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from offramp.benchmarks.compare_page import page
from offramp.benchmarks.frontiers import Settings, area, ordered, paired, score
from offramp.runtime.report import write_whole
from offramp.runtime.rules import bind, simulate
from offramp.runtime.rules.sweep import (
    SWEPT,
    Costs,
    ExitTable,
    Point,
    full_depth,
    settings_to_try,
    sweep,
    undominated,
)
from offramp.training.batches import encode_for
from offramp.training.calibration import trust
from offramp.training.checkpoint import load_checkpoint
from offramp.training.collect import collect
from offramp.training.data import Columns, load_data
from offramp.training.frontier import costs_of, oracle, random_control, table_of
from offramp.training.recipes import RECIPES, load_recipe

PLAIN = ("max_probability", "entropy", "margin", "patience")
REFERENCE = "max_probability (joint)"
RANGE = (30.0, 60.0)  # per cent of multiply-accumulates saved
HALF = 50.0
FIGURES = (
    "accuracy_at_half",
    "macs_saved",
    "random",
    "static",
    "above",
    "below",
    "difference",
    "elue",
    "ece",
)
HEAD = ("method (rule)", *(name.replace("_", " ") for name in FIGURES), "verdict")


@dataclass(frozen=True)
class Said:
    """What a checkpoint's exits said of dev and test, what leaving costs, and the rule it was trained for."""

    dev: ExitTable
    test: ExitTable
    dev_costs: Costs
    test_costs: Costs
    rule: str


def trained(recipe: str, seed: int, out: Path, words: list[str]) -> Path:
    """The checkpoint out/RECIPE_SEED, trained now if it is not there; before it the one it starts from."""
    folder, data = out / f"{recipe}_{seed}", words[2:]
    if not (folder / "training.json").is_file():
        start = load_recipe(recipe).STARTS_FROM
        begin = words[:2] if start is None else ["--init", str(trained(start, seed, out, words))]
        command = [str(Path(sys.executable).parent / "ee-train"), "--recipe", recipe, "--seed", str(seed)]
        subprocess.run([*command, "--out", str(folder), *begin, *data], check=True, stdout=subprocess.DEVNULL)
    return folder


def listened(folder: Path, data: str) -> Said:
    """What the checkpoint says, read from the file beside it, or computed now."""
    loaded = load_checkpoint(folder)
    rows = load_data(data, Columns())
    tables, costs = {}, {}
    for split in ("dev", "test"):
        file = folder.with_name(f"{folder.name}.{split}.npz")
        encoded = encode_for(loaded, rows.split(split))
        if not file.is_file():
            _keep(file, table_of(collect(loaded.network, encoded, what=f"{folder.name} {split}")))
        kept = np.load(file, allow_pickle=False)
        gates = kept["gates"] if "gates" in kept.files else None
        tables[split] = ExitTable(kept["logits"], gates, kept["labels"])
        costs[split] = costs_of(loaded.network, encoded.lengths)
    training = loaded.training
    points = training.get("operating_points") or [{"rule": {"name": "max_probability"}}]
    rule = training.get("rule") or points[0]["rule"]["name"]
    return Said(tables["dev"], tables["test"], costs["dev"], costs["test"], rule)


def _keep(file: Path, table: ExitTable) -> None:
    beside = file.with_name(f".{file.name}")
    gates: dict[str, Any] = {} if table.gates is None else {"gates": table.gates}
    with beside.open("wb") as target:
        np.savez(target, logits=table.logits, labels=table.labels, **gates)
    beside.replace(file)


def judged(said: Said, rule: str) -> tuple[Settings, dict[str, Any]]:
    """A rule's settings on test, chosen on dev, and its figures at the point that saves half."""
    # Whoever chooses may also choose never to leave: every line begins at full depth.
    whole = full_depth(said.dev, said.dev_costs)
    points = undominated([*sweep(rule, settings_to_try(rule, said.dev), said.dev, said.dev_costs), whole])
    points += [] if whole in points else [whole]
    exits = [_exits(point, said.test) for point in points]
    rows = np.arange(len(said.test.labels))
    right = np.stack([said.test.right[rows, chosen] for chosen in exits])
    macs = np.stack([said.test_costs.to_exit[rows, chosen] for chosen in exits])
    settings = Settings(right, macs, said.test_costs.full)
    enough = [at for at, point in enumerate(points) if point.macs_saved >= HALF]
    best = max(enough, key=lambda at: points[at].accuracy, default=0)
    measured = said.test_costs.point(points[best].rule, exits[best], said.test)
    static = static_line(said)
    found = {
        "accuracy_at_half": measured.accuracy,
        "macs_saved": measured.macs_saved,
        "mean_exit": measured.mean_exit,
        "setting": dict(points[best].rule.parameters),
        "random": random_control(exits[best], said.test),
        "static": float(np.interp(measured.macs_saved, *static)),
        "elue": score(settings.line(), static),
    }
    said_of = trust(
        said.dev.logits,
        _exits(points[best], said.dev),
        said.dev.labels,
        said.test.logits,
        exits[best],
        said.test.labels,
    )
    return settings, found | said_of


def _exits(point: Point, table: ExitTable) -> np.ndarray:
    return simulate(bind(point.rule, table.logits.shape[1]), table.logits, table.gates)


def static_line(said: Said) -> tuple[np.ndarray, np.ndarray]:
    """Truncated networks: every exit of the checkpoint for all rows, on test."""
    saved = 100 * (1 - said.test_costs.to_exit.sum(0) / said.test_costs.full.sum())
    return ordered(saved, 100 * said.test.right.mean(0))


def compare(recipes: list[str], seeds: list[int], out: Path, words: list[str], data: str) -> dict[str, Any]:
    """Every method's figures for every seed, differences against max-probability among them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        said = {name: listened(trained(name, seed, out, words), data) for name in ("joint", *recipes)}
        lines: dict[str, tuple[Settings, dict[str, Any]]] = {}
        for rule in PLAIN:
            lines[f"{rule} (joint)"] = judged(said["joint"], rule)
        for name in recipes:
            if name != "joint" and said[name].rule in SWEPT:
                lines[f"{name} ({said[name].rule})"] = judged(said[name], said[name].rule)
        reference = lines[REFERENCE][0]
        for name, (settings, figures) in lines.items():
            above, below = area(settings.line(), reference.line(), *RANGE)
            interval = paired(settings, reference, *RANGE)
            saved, accuracy = settings.line()
            figures |= {"above": above, "below": below, **interval, "seed": seed}
            figures |= {"saved": saved.round(3).tolist(), "accuracy": accuracy.round(3).tolist()}
            found.setdefault(name, []).append(figures)
        joint = said["joint"]
        best = oracle(joint.test, joint.test_costs)
        bound = {"accuracy_at_half": best.accuracy, "macs_saved": best.macs_saved, "seed": seed}
        found.setdefault("first right (joint)", []).append(bound)
    skipped = [name for name in recipes if name != "joint" and said[name].rule not in SWEPT]
    return {"data": Path(data).name, "seeds": seeds, "methods": found, "not_swept": skipped}


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
        rows.append([name, *cells, verdict(seeds)])
    return rows


def show(result: dict[str, Any]) -> None:
    """The table on stdout."""
    seeds = ", ".join(map(str, result["seeds"]))
    table = Table(title=f"{result['data']}, test, seeds {seeds}; at the point that saves half")
    for name in HEAD:
        table.add_column(name, justify="left" if name in (HEAD[0], HEAD[-1]) else "right")
    for row in rows_of(result):
        table.add_row(*row)
    Console(width=180).print(table)
    if result["not_swept"]:
        names = ", ".join(result["not_swept"])
        click.echo(f"not in the table, since no table of exits can replay their rule: {names}")


def verdict(seeds: list[dict[str, Any]]) -> str:
    """What a method loses to, in words; nothing where it beats both controls and ties with the reference."""
    if "random" not in seeds[0]:
        return ""
    mean = {
        name: float(np.mean([one[name] for one in seeds]))
        for name in ("accuracy_at_half", "random", "static")
    }
    lost = [name for name in ("random", "static") if mean["accuracy_at_half"] <= mean[name]]
    words = [f"does not beat {name}" for name in lost]
    if all(one["high"] < 0 for one in seeds):
        words.append("below max-probability")
    if all(one["low"] > 0 for one in seeds):
        words.append("above max-probability")
    return "; ".join(words)


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--model", required=True, help="As in ee-train.")
@click.option("--data", required=True, help="As in ee-train.")
@click.option("--recipes", default="consistentee", help=f"Some of {', '.join(RECIPES)}.")
@click.option("--seeds", default=1, type=click.IntRange(min=1), help="Runs of each: seeds 0, 1, …")
@click.option("--prefix", default="", help="As in ee-train.")
@click.option(
    "--set", "wishes", multiple=True, metavar="NAME=VALUE", help="As in ee-train, for every recipe."
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), help="Where all is kept.")
def main(
    model: str, data: str, recipes: str, seeds: int, prefix: str, wishes: tuple[str, ...], out: Path
) -> None:
    """Train what is missing, measure every method by the same means, print the table, write compare.json and
    the page compare.html.

    Given again after an interruption, it goes on. Points are chosen on dev; test is read once.
    """
    names = list(dict.fromkeys(recipes.split(",")))
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        raise click.UsageError(f"--recipes: {unknown[0]!r} is not known; choose among {', '.join(RECIPES)}")
    out.mkdir(parents=True, exist_ok=True)
    words = ["--model", model, "--data", data]
    words += ["--prefix", prefix] if prefix else []
    words += [word for wish in wishes for word in ("--set", wish)]
    try:
        result = compare(names, list(range(seeds)), out, words, data)
    except subprocess.CalledProcessError as problem:
        raise click.ClickException(
            f"{' '.join(map(str, problem.cmd))} ended with {problem.returncode}"
        ) from None
    show(result)
    write_whole(out / "compare.json", json.dumps(result, indent=1) + "\n")
    write_whole(out / "compare.html", page(result, HEAD, rows_of(result)))


if __name__ == "__main__":
    main()
