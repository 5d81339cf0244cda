"""ConsistentEE against the plain rules on the exits of its own warm start, several seeds.

    python benchmarks/consistentee.py --model MODEL --data DATA --prefix "query: " \
        --seeds 0,1,2 --work runs/ --json benchmarks/results/consistentee_sst2.json

For every seed: recipe joint, then recipe consistentee from that checkpoint, then ee-eval of both. What is
finished is not done again, so that the whole can be interrupted. Settings are chosen on dev, test is read
once; the table compares the learned policy of the consistentee checkpoint with max-probability, entropy,
margin and patience on the joint checkpoint at equal mean exit.
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
# Points of training.json: chosen there on dev, read here on test.
POINTS = ("default", "saves-57", "saves-65", "trained")
RIVALS = ("max_probability", "entropy", "margin", "patience")


def finished(work: Path, name: str, words: list[str]) -> Path:
    """The checkpoint work/name, trained now if it is not there."""
    out = work / name
    if not (out / "training.json").is_file():
        command = [str(BIN / "ee-train"), "--out", str(out), *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def evaluated(checkpoint: Path, data: str, within: float) -> dict[str, Any]:
    """Figures of ee-eval on test, computed now if they are not beside the checkpoint."""
    file = checkpoint.with_name(f"{checkpoint.name}.eval.json")
    if not file.is_file():
        files = ["--json", str(file), "--picture", str(file.with_suffix(".png"))]
        command = [str(BIN / "ee-eval"), str(checkpoint), "--data", data, "--within", str(within), *files]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return figures


def summary(values: list[float | None]) -> dict[str, Any] | None:
    """Mean and standard deviation (of the sample) over seeds; None where a seed has no value there."""
    if any(value is None for value in values):
        return None
    found = np.array(values, dtype=float)
    spread = float(found.std(ddof=1)) if len(found) > 1 else 0.0
    return {
        "mean": round(float(found.mean()), 3),
        "std": round(spread, 3),
        "each": [round(v, 3) for v in found],
    }


def compare(joint: list[dict[str, Any]], learned: list[dict[str, Any]]) -> dict[str, Any]:
    """Every seed's figures as means: exits, the point chosen on dev, accuracy at equal mean exit."""
    depths = list(joint[0]["equal_mean_exit"]["max_probability"])
    equal = {"consistentee": {d: summary([f["equal_mean_exit"]["gate"][d] for f in learned]) for d in depths}}
    for rule in RIVALS:
        equal[rule] = {d: summary([f["equal_mean_exit"][rule][d] for f in joint]) for d in depths}
    chosen = [f["chosen_on_dev"]["gate"] for f in learned]
    lost = [
        f["full_depth"]["accuracy"] - point["test"]["accuracy"]
        for f, point in zip(learned, chosen, strict=True)
    ]
    names = ("accuracy", "mean_exit", "layers_saved", "macs_saved")
    return {
        "full_depth": {
            "joint": summary([f["full_depth"]["accuracy"] for f in joint]),
            "consistentee": summary([f["full_depth"]["accuracy"] for f in learned]),
        },
        "exit_accuracy": {
            "joint": np.mean([f["exit_accuracy"] for f in joint], axis=0).round(2).tolist(),
            "consistentee": np.mean([f["exit_accuracy"] for f in learned], axis=0).round(2).tolist(),
        },
        "chosen_on_dev": {
            **{name: summary([point["test"][name] for point in chosen]) for name in names},
            "accuracy_lost": summary(lost),
            "random_same_depth": summary([point["random_same_depth"] for point in chosen]),
        },
        "operating_points": {name: point_summary(learned, name, names) for name in POINTS},
        "oracle": {name: summary([f["oracle"][name] for f in learned]) for name in names},
        "equal_mean_exit": equal,
    }


def point_summary(learned: list[dict[str, Any]], name: str, names: tuple[str, ...]) -> dict[str, Any]:
    """One operating point of the checkpoints, as it came out on test."""
    points = [
        next(p for p in figures["operating_points"] if p["name"] == name)["test"] for figures in learned
    ]
    lost = [f["full_depth"]["accuracy"] - point["accuracy"] for f, point in zip(learned, points, strict=True)]
    return {
        **{figure: summary([point[figure] for point in points]) for figure in names},
        "accuracy_lost": summary(lost),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """The tables of one data set."""
    seeds = ", ".join(map(str, result["seeds"]))  # a list in brackets would pass for markup
    title = f"{result['data']} (test), seeds {seeds}: accuracy at equal mean exit, mean (std)"
    table = Table(title=title)
    table.add_column("rule")
    equal = result["figures"]["equal_mean_exit"]
    depths = list(equal["consistentee"])
    for depth in depths:
        table.add_column(depth, justify="right")
    for rule, row in equal.items():
        cells = ("-" if row[d] is None else f"{row[d]['mean']:.2f} ({row[d]['std']:.2f})" for d in depths)
        table.add_row(rule, *cells)
    console.print(table)
    figures = result["figures"]
    named = {"full depth": figures["full_depth"], "chosen on dev": figures["chosen_on_dev"]}
    for name, found in {**named, **figures["operating_points"]}.items():
        console.print(
            f"{name}: " + ", ".join(f"{k} {v['mean']:.2f} ({v['std']:.2f})" for k, v in found.items())
        )


@click.command(context_settings={"show_default": True})
@click.option("--model", required=True, help="As in ee-train.")
@click.option("--data", required=True, help="As in ee-train.")
@click.option("--prefix", default="", help="As in ee-train.")
@click.option("--seeds", default="0,1,2", help="One run each.")
@click.option("--set", "wishes", multiple=True, metavar="NAME=VALUE", help="Settings of recipe consistentee.")
@click.option("--within", default=1.0, help="Accuracy points that the point chosen on dev may lose.")
@click.option(
    "--work", default=Path("runs"), type=click.Path(path_type=Path), help="Where checkpoints are kept."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(
    model: str,
    data: str,
    prefix: str,
    seeds: str,
    wishes: tuple[str, ...],
    within: float,
    work: Path,
    json_file: Path | None,
) -> None:
    """Train what is missing, evaluate, compare."""
    work.mkdir(parents=True, exist_ok=True)
    name = Path(data).name
    joint, learned, settings = [], [], {}
    for seed in seeds.split(","):
        common = ["--data", data, "--seed", seed]
        start = finished(
            work, f"joint_{name}_{seed}", [*common, "--model", model, "--prefix", prefix, "--recipe", "joint"]
        )
        recipe = ["--recipe", "consistentee", "--init", str(start)]
        sets = [word for wish in wishes for word in ("--set", wish)]
        final = finished(work, f"consistentee_{name}_{seed}", [*common, *recipe, *sets])
        joint.append(evaluated(start, data, within))
        learned.append(evaluated(final, data, within))
        settings = json.loads((final / "training.json").read_text(encoding="utf-8"))["settings"]
    result = {
        "model": Path(model).name,
        "data": name,
        "seeds": [int(seed) for seed in seeds.split(",")],
        "settings": settings,
        "within": within,
        "figures": compare(joint, learned),
    }
    show(result, Console(width=150))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
