"""What exits on a fine-tuned model give: points chosen on dev by agreement, measured on test.

    python benchmarks/fine_tune.py MODEL DATA tuned/
    ee-train --recipe attach --model tuned/ --data TEXTS --out attached/
    python benchmarks/attach.py attached/ [attached_unfrozen/ …] --data DATA --user-model tuned/

TEXTS holds train and dev as lines of text, so that no training sees a label; DATA is the labelled set.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from offramp.benchmarks.compare.exit_outputs import CheckpointOutputs, collect_outputs
from offramp.runtime.rules import bind, simulate
from offramp.runtime.rules.sweep import ExitTable, full_depth_point, settings_to_try, shallowest_point, sweep
from offramp.training.collect import exit_costs

LOSSES = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0)  # percent of dev rows that may differ from full depth
RULE = "max_probability"


def against_full_depth(table: ExitTable) -> ExitTable:
    """The table with the answers of its last exit in place of the labels."""
    return dataclasses.replace(table, labels=table.logits[:, -1].argmax(-1))


def attached_figures(outputs: CheckpointOutputs) -> dict[str, Any]:
    """Figures of one checkpoint: full depth, exits, and a point for each of LOSSES."""
    network, training = outputs.checkpoint.network, outputs.checkpoint.training
    dev, test = (outputs.exit_outputs(split).table for split in ("dev", "test"))
    dev_costs, test_costs = (exit_costs(network, outputs.rows[split].lengths) for split in ("dev", "test"))
    dev_agreement, test_agreement = against_full_depth(dev), against_full_depth(test)
    swept = sweep(RULE, settings_to_try(RULE, dev), dev_agreement, dev_costs)
    points = []
    for loss in LOSSES:
        point = shallowest_point(swept, 100 - loss)
        if point is None:
            continue
        exits = simulate(bind(point.rule, test.logits.shape[1]), test.logits, test.gates)
        right = test_costs.point(point.rule, exits, test)
        same = test_costs.point(point.rule, exits, test_agreement)
        points.append(
            {
                "loss": loss,
                "dev": point.figures("agreement"),
                "test": right.figures() | {"agreement": round(same.accuracy, 3)},
            }
        )
    spec = network.spec
    return {
        "name": outputs.folder.name,
        "exits": {"pooling": spec.pooling, "head": spec.head, "ensemble": spec.ensemble},
        "settings": training["settings"],
        "full_depth": round(full_depth_point(test, test_costs).accuracy, 3),
        "exit_agreement": [round(100 * float(share), 2) for share in test_agreement.right.mean(0)],
        "points": points,
    }


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--data", required=True, help="The labelled data set.")
@click.option("--user-model", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File for the figures.")
def main(checkpoints: tuple[Path, ...], data: str, user_model: Path, json_file: Path | None) -> None:
    """Measure checkpoints of recipe attach on test and print a table."""
    given = json.loads((user_model / "fine_tune.json").read_text(encoding="utf-8"))["accuracy"]
    methods = []
    for folder in checkpoints:
        figures = attached_figures(collect_outputs(folder, data))
        methods.append(figures)
        click.echo(f"{figures['name']}: full depth {figures['full_depth']:.2f}, the user's model {given:.2f}")
        for point in figures["points"]:
            test = point["test"]
            click.echo(
                f"  at most {point['loss']} % of dev differ: {test['accuracy']:.2f} on test, "
                f"{test['agreement']:.2f} agree, {test['macs_saved']:.1f} % saved"
            )
    if json_file is not None:
        names = " ".join(folder.name for folder in checkpoints)
        command = f"benchmarks/attach.py {names} --data {Path(data).name} --user-model {user_model.name}"
        result = {"command": command, "data": Path(data).name, "user_model": given, "methods": methods}
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
