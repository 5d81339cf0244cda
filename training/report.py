"""ee-eval: evaluates one checkpoint on one split; writes a table, a JSON file and a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from offramp.models.tasks import CLASSIFICATION
from offramp.runtime.rules import RULES, RuleSpec
from offramp.runtime.rules.sweep import (
    COUNTED,
    ExitMacs,
    ExitTable,
    MeasuredPoint,
    accuracy_at,
    full_depth_point,
    settings_to_try,
    shallowest_point,
    sweep,
    swept_rules,
    undominated_points,
)
from offramp.training.batches import encode_rows
from offramp.training.checkpoint import load_checkpoint, write_json
from offramp.training.collect import collect, exit_costs, exit_table, oracle_point, random_exit_accuracy
from offramp.training.data import Columns
from offramp.training.user_model import load_matching

# Shares of the depth at which rules are compared at equal mean exit.
SHARES = (0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class EvaluationConfig:
    """The options of ee-eval; ee-eval --help describes each."""

    checkpoint: Path
    data: str
    split: str
    calibration_split: str
    max_accuracy_drop: float
    json_file: Path | None
    picture: Path | None
    batch_size: int
    text_column: str
    text_b_column: str
    label_column: str
    image_column: str = "image"


def evaluate_checkpoint(config: EvaluationConfig) -> dict[str, Any]:
    """Evaluate a checkpoint on `split` with operating points chosen on `calibration_split`.

    Prints the table, writes JSON and picture, and returns the figures.
    """
    checkpoint = load_checkpoint(config.checkpoint)
    columns = Columns(config.text_column, config.text_b_column, config.label_column, config.image_column)
    dataset = load_matching(
        config.data, columns, checkpoint.network.spec.labels, checkpoint.network.spec.task
    )
    tables, costs = {}, {}
    for name in dict.fromkeys((config.calibration_split, config.split)):
        rows = encode_rows(checkpoint, dataset.split(name))
        collected = collect(checkpoint.network, rows, batch_size=config.batch_size, description=name)
        tables[name] = exit_table(collected)
        costs[name] = exit_costs(checkpoint.network, collected.lengths)
    figures = {
        "checkpoint": Path(config.checkpoint).name,
        "data": Path(config.data).name,
        "split": config.split,
        "calibration_split": config.calibration_split,
        "user_model": checkpoint.training.get("user_model"),
        **evaluation_figures(
            tables[config.calibration_split],
            tables[config.split],
            costs[config.calibration_split],
            costs[config.split],
            config.max_accuracy_drop,
            checkpoint.training,
            checkpoint.network.spec.task,
        ),
    }
    _print(figures, Console())
    write_json(config.json_file or Path("eval.json"), figures)
    draw_picture(figures, config.picture or Path("eval.png"))
    return figures


def evaluation_figures(
    dev: ExitTable,
    test: ExitTable,
    dev_costs: ExitMacs,
    test_costs: ExitMacs,
    max_accuracy_drop: float,
    training: dict[str, Any],
    kind: str = CLASSIFICATION,
) -> dict[str, Any]:
    """Compute every figure of the report; settings are chosen on dev alone.

    max_accuracy_drop: points of accuracy, or of what the quality of the task is. training: the checkpoint's
    training.json. kind: the task. The oracle is for one label a row: it takes the first right exit.
    """
    full, quality = full_depth_point(test, test_costs), test.measure.name
    min_accuracy = full_depth_point(dev, dev_costs).accuracy - max_accuracy_drop
    rules = [rule for rule in swept_rules(kind) if rule != "gate" or test.gates is not None]
    curves: dict[str, list[MeasuredPoint]] = {}
    chosen: dict[str, dict[str, Any]] = {}
    for rule in rules:
        values = settings_to_try(rule, dev)
        dev_points = sweep(rule, values, dev, dev_costs)
        if rule in COUNTED:
            values = [point.rule.parameters for point in undominated_points(dev_points)]
        curves[rule] = sweep(rule, values, test, test_costs)
        best = shallowest_point(dev_points, min_accuracy)
        if best is not None:
            chosen[rule] = {
                "setting": best.rule.parameters,
                "dev": best.figures(quality),
                **_tested(best.rule, test, test_costs),
            }
    points = [
        {
            "name": point["name"],
            **_tested(RuleSpec(point["rule"]["name"], point["rule"]["parameters"]), test, test_costs),
        }
        for point in training.get("operating_points", [])
        # Rule quee changes precisions, and this table has only one; training.json has its figures.
        if RULES[point["rule"]["name"]].exits is not None
    ]
    depth = float(test_costs.blocks[-1])
    equal = {
        rule: {f"{share * depth:.2f}": accuracy_at(curve, share * depth) for share in SHARES}
        for rule, curve in curves.items()
    }
    return {
        "rows": len(test.labels),
        "exits": [int(block) for block in test_costs.blocks],
        "quality": quality,
        f"exit_{quality}": [round(float(percent), 2) for percent in test.measure.each],
        "full_depth": full.figures(quality),
        "oracle": oracle_point(test, test_costs).figures() if kind == CLASSIFICATION else None,
        "max_accuracy_drop": max_accuracy_drop,
        "chosen_on_dev": chosen,
        "operating_points": points,
        "equal_mean_exit": equal,
        "curves": {rule: [point.figures(quality) for point in curve] for rule, curve in curves.items()},
    }


def _tested(rule: RuleSpec, test: ExitTable, costs: ExitMacs) -> dict[str, Any]:
    exits = test.exits(rule)
    histogram = np.bincount(exits, minlength=test.logits.shape[1])
    return {
        "test": costs.point(rule, exits, test).figures(test.measure.name),
        "random_same_depth": round(random_exit_accuracy(exits, test), 3),
        "histogram": [int(count) for count in histogram],
    }


def _print(figures: dict[str, Any], console: Console) -> None:
    title = f"{figures['checkpoint']} on {figures['data']} ({figures['split']}), {figures['rows']} rows"
    quality = figures["quality"]
    exits = Table(title=f"{title}: {quality} of each exit")
    for block in figures["exits"]:
        exits.add_column(str(block), justify="right")
    exits.add_row(*(f"{percent:.1f}" for percent in figures[f"exit_{quality}"]))
    console.print(exits)
    chosen = f"points chosen on {figures['calibration_split']}"
    table = Table(title=f"{chosen}: shallowest within {figures['max_accuracy_drop']} of full depth")
    for name in ("rule", quality, "mean exit", "layers saved %", "MACs saved %", "random, same depths"):
        table.add_column(name, justify="left" if name == "rule" else "right")
    table.add_row("full depth", *_cells(figures["full_depth"], quality), "")
    if figures["user_model"] is not None:
        table.add_row("model as given, on dev", f"{figures['user_model'][quality]:.2f}", "", "", "", "")
    for rule, result in figures["chosen_on_dev"].items():
        table.add_row(rule, *_cells(result["test"], quality), f"{result['random_same_depth']:.2f}")
    for point in figures["operating_points"]:
        table.add_row(
            f"point {point['name']}", *_cells(point["test"], quality), f"{point['random_same_depth']:.2f}"
        )
    if figures["oracle"] is not None:
        table.add_row("oracle, first right", *_cells(figures["oracle"], quality), "")
    console.print(table)
    equal = Table(title=f"{quality} at equal mean exit (interpolated on each rule's curve)")
    equal.add_column("rule")
    depths = list(next(iter(figures["equal_mean_exit"].values())))
    for depth in depths:
        equal.add_column(depth, justify="right")
    for rule, row in figures["equal_mean_exit"].items():
        equal.add_row(rule, *("-" if row[depth] is None else f"{row[depth]:.2f}" for depth in depths))
    console.print(equal)


def _cells(point: dict[str, float], quality: str) -> tuple[str, ...]:
    return tuple(f"{point[name]:.2f}" for name in (quality, "mean_exit", "layers_saved", "macs_saved"))


def draw_picture(figures: dict[str, Any], file: Path) -> None:
    """Draw the quality against mean exit for every rule, with single exits, oracle and chosen points, into a
    file.
    """
    import matplotlib

    matplotlib.use("Agg")  # draws without a screen
    import matplotlib.pyplot as plt

    quality = figures["quality"]
    figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
    axes.plot(figures["exits"], figures[f"exit_{quality}"], "o:", color="0.6", label="all rows at one exit")
    for rule, curve in figures["curves"].items():
        marker: dict[str, Any] = {"marker": "s", "markersize": 4} if rule == "patience" else {}
        axes.plot(
            [point["mean_exit"] for point in curve],
            [point[quality] for point in curve],
            label=rule.replace("_", " "),
            linewidth=1.6,
            **marker,
        )
    for result in figures["chosen_on_dev"].values():
        axes.plot(result["test"]["mean_exit"], result["test"][quality], "kx", markersize=7)
    axes.axhline(figures["full_depth"][quality], color="0.8", linewidth=1, zorder=0)
    if (oracle := figures["oracle"]) is not None:
        style: dict[str, Any] = {"color": "goldenrod", "markersize": 12, "label": "oracle"}
        axes.plot(oracle["mean_exit"], oracle[quality], "*", **style)
    axes.set(xlabel="mean exit (blocks)", ylabel=f"{quality} (%)")
    title = f"{figures['checkpoint']} on {figures['data']} ({figures['split']})"
    axes.set_title(f"{title}; x: chosen on {figures['calibration_split']}")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(file, dpi=130)
    plt.close(figure)
