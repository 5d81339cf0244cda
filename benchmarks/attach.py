"""What exits on a fine-tuned model give: points chosen on dev by agreement, measured on test.

    python benchmarks/fine_tune.py MODEL DATA tuned/
    ee-train --recipe attach --model tuned/ --data TEXTS --out attached/
    ee-split attached/ --out bundle/
    python benchmarks/attach.py attached/ [others/ …] --data DATA --user-model tuned/ --bundle bundle/

TEXTS holds train and dev as lines of text, so that no training sees a label; DATA is the labelled set. Other
checkpoints, such as those of joint and deebert, are measured by the same means beside them. With --bundle,
the bundle at full depth is compared with the user's model in transformers, on every row of test.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoConfig

from offramp.benchmarks.compare.exit_outputs import CheckpointOutputs, collect_outputs
from offramp.models.own_head import classification_class
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.inputs.text import items_to_rows, open_reader
from offramp.runtime.loading import load_classifier
from offramp.runtime.rules.sweep import ExitTable, full_depth_point, settings_to_try, shallowest_point, sweep
from offramp.training.checkpoint import load_checkpoint
from offramp.training.collect import exit_costs
from offramp.training.data import Columns
from offramp.training.user_model import load_matching

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
        exits = test.exits(point.rule)
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


@torch.no_grad()
def compared_with_user_model(bundle: Path, user_model: Path, items: Sequence[Any]) -> dict[str, Any]:
    """The largest difference of logits, and the percentage of equal labels, between bundle and transformers.

    items: texts or paths of images. The model is run on the arrays that the bundle's reader makes.
    """
    config = AutoConfig.from_pretrained(user_model, trust_remote_code=False)
    model = (
        classification_class(config)
        .from_pretrained(user_model, dtype=torch.float32, trust_remote_code=False)
        .eval()
    )
    known = set(inspect.signature(model.forward).parameters)
    with load_classifier(bundle, rule="never", global_pool=True) as session:
        trace, _ = session.at_full_depth(items)
        rows = items_to_rows(open_reader(open_bundle(bundle)), items)
        logits = torch.zeros(len(rows), len(session.labels))
        for ids, arrays in session.batches(rows, session.batch_size):
            inputs = {name: torch.from_numpy(array) for name, array in arrays.items() if name in known}
            logits[torch.from_numpy(ids)] = model(**inputs).logits
    ours = torch.from_numpy(trace.logits[:, -1])
    return {
        "rows": len(rows),
        "largest_difference": float((ours - logits).abs().max()),
        "labels_equal": 100 * float((ours.argmax(-1) == logits.argmax(-1)).float().mean()),
    }


def test_items(checkpoint: Path, data: str) -> list[Any]:
    """The items of the test split as a session takes them."""
    labels = load_checkpoint(checkpoint).network.spec.labels
    rows = load_matching(data, Columns(), labels).split("test")
    if rows.images is None:
        return rows.text if rows.text_b is None else list(zip(rows.text, rows.text_b, strict=True))
    return list(rows.images.files)


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--data", required=True, help="The labelled data set.")
@click.option("--user-model", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--bundle", type=click.Path(exists=True, path_type=Path), help="Of the first checkpoint.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File for the figures.")
def main(
    checkpoints: tuple[Path, ...], data: str, user_model: Path, bundle: Path | None, json_file: Path | None
) -> None:
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
    equality = None
    if bundle is not None:
        equality = compared_with_user_model(bundle, user_model, test_items(checkpoints[0], data))
        click.echo(
            f"bundle at full depth: largest difference of logits {equality['largest_difference']:.2g}, "
            f"{equality['labels_equal']:.2f} % of {equality['rows']} labels equal"
        )
    if json_file is not None:
        names = " ".join(folder.name for folder in checkpoints)
        command = f"benchmarks/attach.py {names} --data {Path(data).name} --user-model {user_model.name}"
        result = {"command": command, "data": Path(data).name, "user_model": given, "methods": methods}
        result |= {} if equality is None else {"bundle": equality}
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
