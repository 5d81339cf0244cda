"""Compare the decisions of a bundle with those of torch, row by row: segments, their precision, and label.

    python benchmarks/compare/agreement.py runs/ --data DATA --json benchmarks/results/agreement_sst2.json

runs/ is the --out of ee-compare, with its checkpoints RECIPE_SEED. Torch walks rows through the trained
modules, by a loop that is independent of the walker; the bundle walks them as it is deployed, a text or an
image file through the session's encoder, at batch 1. Two operating points of each bundle are compared:
"default" and the first whose name begins with "saves-".

A row that the two decide differently is a tie if no probability and no gate before the decision differed by
more than 1e-5. Any other difference is "other". In walks that stay in fp32 "other" ends the command with exit
code 1, and so do ties of more than one row in a hundred. Where weights are rounded, a number between two grid
points may be rounded either way. Torch in float64 is therefore compared with torch in float32 too, which
measures how often arithmetic alone changes a decision.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from offramp.benchmarks.compare.exit_outputs import ensure_bundle
from offramp.models.network import EarlyExitNetwork
from offramp.models.precision import in_precision
from offramp.runtime import Classifier, load_classifier
from offramp.runtime.rules import RowSignals, Rule, StepCosts, bind, softmax
from offramp.runtime.tuning.report import write_atomically
from offramp.runtime.walker import Trace, walk
from offramp.training.batches import Encoded, encode_rows
from offramp.training.checkpoint import load_checkpoint
from offramp.training.data import Columns, Dataset, ImageFiles, Rows, load_data
from offramp.training.outcomes import equal_length_batches

TIE = 1e-5
SPLITS = ("test", "dev", "train")  # in the order in which rows are taken from them


@torch.no_grad()
def walk_torch(
    network: EarlyExitNetwork, rows: Encoded, variants: Sequence[str], rule: Rule, start: int, what: str = ""
) -> Trace:
    """Walk all rows through the trained torch modules, each variant in its simulated precision.

    Everything is computed in the network's dtype.

    Rows of one length run together, so nothing is padded. All of them run in every variant in which one of
    them runs; the results that a row does not need are dropped.
    """
    blocks = [in_precision(network.blocks, name).eval() for name in variants]
    segments, ends = len(network.spec.exits), (0, *network.spec.exits)
    trace = Trace(
        np.full((len(rows), segments), start, np.int8),
        np.zeros((len(rows), segments, len(network.spec.labels)), np.float32),
        np.full((len(rows), segments), np.nan, np.float32),
        np.zeros(len(rows)),
    )
    memory = np.zeros((len(rows), rule.width), np.float32)
    for index in tqdm(
        equal_length_batches(rows.lengths), desc=what, unit="batch", file=sys.stderr, mininterval=1.0
    ):
        hidden, context = network.stem(_in_dtype(network, rows.batch(index)[0]))
        context, evidence, logits = _in_dtype(network, context), network.no_evidence(hidden), None
        for segment in range(segments):
            before, planned = hidden, trace.variants[index, segment]
            for variant in np.unique(planned[planned >= 0]):
                after = before
                for block in range(ends[segment], ends[segment + 1]):
                    after = network.family.run_block(blocks[variant][block], after, context)
                in_variant = torch.from_numpy(planned == variant)[:, None, None]
                hidden = torch.where(in_variant, after, hidden)
            pooled = network.pooled(segment, hidden, context)
            logits = network.classify(segment, pooled, logits)
            waiting = np.flatnonzero(planned >= 0)
            at = index[waiting]
            trace.logits[at, segment] = logits.float().numpy()[waiting]
            if segment == segments - 1 or not len(waiting):
                break
            gate, forecast = None, None
            if len(network.policies):
                gate_logit, evidence = network.gate_logit(segment, pooled, logits, evidence)
                gate = trace.gates[at, segment] = gate_logit.sigmoid().float().numpy()[waiting]
            if len(network.forecasts):
                forecast = network.forecasts[segment](logits, pooled).sigmoid().numpy()[waiting]
            signals = RowSignals(trace.logits[at, segment], gate, forecast)
            trace.variants[at], memory[at] = rule(signals, memory[at], trace.variants[at], segment)
    return trace


def walk_bundle(session: Classifier, items: Sequence[Any], rule: Rule, start: int, what: str = "") -> Trace:
    """Walk every item (a text, a pair of texts, an image file) through a bundle at batch 1."""
    manifest, number = session.manifest, np.zeros(1, np.int64)
    sizes = {"segments": len(manifest.segments), "classes": len(manifest.labels), "rows": 1, "limit": 1}
    traces = []
    for item in tqdm(items, desc=what, unit="row", file=sys.stderr, mininterval=1.0):
        inputs = session.encode(*item) if isinstance(item, tuple) else session.encode(item)
        traces.append(walk(session.engine, rule, [(number, inputs)], variant=start, **sizes))
    names = [field.name for field in fields(Trace) if getattr(traces[0], field.name) is not None]
    return Trace(**{name: np.concatenate([getattr(trace, name) for trace in traces]) for name in names})


def compare_walks(walk: Trace, other: Trace) -> dict[str, Any]:
    """Count the rows that two walks decide alike, the ties among the others, and how far apart they are.

    gap: the largest difference of a row's probabilities and gates, over the segments in which both walks took
    the same path.
    """
    elsewhere = (walk.variants != other.variants).any(1)
    labels = _labels(walk) != _labels(other)
    common = np.cumprod((walk.variants == other.variants) & (walk.variants >= 0), axis=1).astype(bool)
    gaps = np.abs(softmax(walk.logits) - softmax(other.logits)).max(-1)
    gaps = np.maximum(gaps, np.nan_to_num(np.abs(walk.gates - other.gates)))
    gap = np.where(common, gaps, 0.0).max(1)  # [rows]
    different = elsewhere | labels
    return {
        "rows": len(different),
        "same": int((~different).sum()),
        "ties": int((different & (gap <= TIE)).sum()),
        "other": int((different & (gap > TIE)).sum()),
        "labels": int(labels.sum()),
        "gap_median": float(f"{np.median(gap):.2g}"),
        "gap_max": float(f"{gap.max():.2g}"),
    }


def compare_checkpoint(folder: Path, data: Dataset, count: int) -> list[dict[str, Any]]:
    """Compare torch with a checkpoint's bundle at two operating points; one dictionary of figures a
    comparison.

    Where precision varies, torch in float64 is compared too.
    """
    checkpoint = load_checkpoint(folder)
    variants = checkpoint.network.spec.forecast or ("fp32",)
    rows = first_rows(data, count)
    items, encoded = _items(rows), encode_rows(checkpoint, rows)
    network, double = checkpoint.network.eval(), deepcopy(checkpoint.network).double().eval()
    lines = []
    # One thread: a row is small, and waiting for other processes would cost more time than a second thread
    # saves.
    with load_classifier(ensure_bundle(folder, variants), rule="never", threads=1) as session:
        points, costs = session.manifest.points, session.manifest.costs
        default = [point for point in points if point.name == "default"]
        for point in [*default, *[point for point in points if point.name.startswith("saves-")][:1]]:
            cases = [(variants[:1], costs_of_one_variant(costs, variants[0]))]
            cases += [(variants, costs)] if variants[1:] else []
            for names, stated in cases:
                rule = bind(point.rule, len(session.manifest.segments), stated)
                start = variants.index(point.variant) if point.variant in names else 0
                what = " ".join([folder.name, point.name, *names])
                in_torch = walk_torch(network, encoded, variants, rule, start, what)
                others = {"bundle": walk_bundle(session, items, rule, start, what)}
                if names[1:]:
                    others["float64"] = walk_torch(double, encoded, variants, rule, start, what)
                for name, other in others.items():
                    line = {"checkpoint": folder.name, "rule": point.rule.name, "point": point.name}
                    line |= {"variants": ",".join(names), "torch_against": name}
                    lines.append(line | compare_walks(in_torch, other))
    return lines


def first_rows(data: Dataset, count: int) -> Rows:
    """The first `count` rows of a data set: rows of test, then of dev, then of train."""
    first, *others = [data.splits[name] for name in SPLITS if name in data.splits]
    rows = first
    for split in others:
        rows = _joined(rows, split) if len(rows) < count else rows
    return rows.take(np.arange(min(count, len(rows))))


def costs_of_one_variant(costs: Mapping[str, StepCosts], variant: str) -> dict[str, StepCosts]:
    """Step costs in which all variants but one cost infinity, so that rule quee never changes the variant."""
    finite = {}
    for unit, stated in costs.items():
        infinite = dict.fromkeys(stated.steps, tuple(np.inf for _ in stated.steps[variant]))
        finite[unit] = StepCosts(stated.tokens, infinite | {variant: stated.steps[variant]})
    return finite


def _items(rows: Rows) -> list[Any]:
    """The rows as items of a session: paths of images, texts, or pairs of texts."""
    if rows.images is not None:
        return list(rows.images.files)
    return list(rows.text if rows.text_b is None else zip(rows.text, rows.text_b, strict=True))


def _joined(rows: Rows, more: Rows) -> Rows:
    label = np.concatenate([rows.label, more.label])
    if rows.images is not None and more.images is not None:
        images = ImageFiles(rows.images.files + more.images.files, rows.images.places + more.images.places)
        return Rows([], None, label, images)
    seconds = None if rows.text_b is None or more.text_b is None else rows.text_b + more.text_b
    return Rows(rows.text + more.text, seconds, label)


def _labels(trace: Trace) -> NDArray[np.int64]:
    """The label number that each row has at its exit [rows]."""
    last = trace.variants.shape[1] - 1 - (trace.variants[:, ::-1] >= 0).argmax(1)
    labels: NDArray[np.int64] = trace.logits[np.arange(len(last)), last].argmax(-1)
    return labels


def _in_dtype(network: EarlyExitNetwork, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with floating-point ones converted to the network's dtype."""
    dtype = next(network.parameters()).dtype
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def print_table(lines: Sequence[Mapping[str, Any]]) -> None:
    """Print a table with one line for each comparison of two walks."""
    table = Table(title="torch in float32 against the bundle, and against torch in float64")
    for name in lines[0]:
        table.add_column(name)
    for line in lines:
        table.add_row(*(str(value) for value in line.values()))
    Console(width=180).print(table)


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("runs", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--data", required=True, help="As in ee-train.")
@click.option("--seed", default=0, help="Seed of the checkpoints that are compared.")
@click.option("--rows", default=2000, help="Number of rows: of test, then of dev, then of train.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File for the figures.")
def main(runs: Path, data: str, seed: int, rows: int, json_file: Path | None) -> None:
    """Compare all checkpoints of a folder with their bundles; exit code 1 if fp32 decisions differ."""
    loaded = load_data(data, Columns())
    lines = []
    for folder in sorted(path for path in runs.glob(f"*_{seed}") if (path / "training.json").is_file()):
        lines += compare_checkpoint(folder, loaded, rows)
    if not lines:
        raise click.UsageError(
            f"{runs} holds no checkpoint RECIPE_{seed}; make some with ee-compare --out {runs}"
        )
    print_table(lines)
    if json_file is not None:
        words = f"{runs.name} --data {Path(data).name} --seed {seed} --rows {rows}"
        command = f"benchmarks/compare/agreement.py {words}"
        write_atomically(json_file, json.dumps({"command": command, "lines": lines}, indent=1) + "\n")
    strict = [line for line in lines if line["variants"] == "fp32"]
    if any(line["other"] or line["ties"] > line["rows"] / 100 for line in strict):
        sys.exit(1)


if __name__ == "__main__":
    main()
