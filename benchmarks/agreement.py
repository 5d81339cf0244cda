"""Do bundles decide as torch does? The same segments in the same precision and the same label, row by row.

    python benchmarks/agreement.py runs/ --data DATA --json benchmarks/results/agreement_sst2.json

runs/ is where ee-compare kept its checkpoints RECIPE_SEED. Torch walks rows through the trained modules, by
a loop of its own; the bundle walks them as it is deployed, text or image file through the session's reader,
at batch 1. Two operating points of each bundle: "default" and the first that saves.

A row that they decide differently is a tie where nothing said on the way, no probability and no gate, was
further apart than 1e-5. Anything else that differs is "other". In walks that stay in fp32 that is exit code
1, and so are more ties than one row in a hundred.
Where weights are rounded, a number that lies between two grid points may fall to either side, so torch in
float64 is held against torch in float32 too: how often arithmetic alone changes a decision.
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

from offramp.benchmarks.compare_ms import bundle_of
from offramp.models.network import EarlyExitNetwork
from offramp.models.precision import in_precision
from offramp.runtime.classifier import Session
from offramp.runtime.loading import load
from offramp.runtime.rules import Rule, Signals, StepCosts, bind, softmax
from offramp.runtime.tuning.report import write_whole
from offramp.runtime.walker import Trace, walk
from offramp.training.batches import Encoded, encode_for
from offramp.training.checkpoint import load_checkpoint
from offramp.training.data import Columns, TextData, load_data
from offramp.training.outcomes import of_one_length
from offramp.training.rows import Pictures, Rows

TIE = 1e-5
SPLITS = ("test", "dev", "train")  # rows are taken from the first, then from the next


@torch.no_grad()
def through_torch(
    network: EarlyExitNetwork, rows: Encoded, variants: Sequence[str], rule: Rule, start: int, what: str = ""
) -> Trace:
    """Every row through the modules, each variant in its simulated precision, in the network's own dtype.

    Rows of one length go together, so that nothing is padded. All of them run in every variant in which one
    of them does: what comes of the others is thrown away.
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
    for index in tqdm(of_one_length(rows.lengths), desc=what, unit="batch", file=sys.stderr, mininterval=1.0):
        hidden, context = network.stem(_like(network, rows.batch(index)[0]))
        context, evidence = _like(network, context), network.no_evidence(hidden)
        for segment in range(segments):
            before, now = hidden, trace.variants[index, segment]
            for variant in np.unique(now[now >= 0]):
                onward = before
                for block in range(ends[segment], ends[segment + 1]):
                    onward = network.family.call(blocks[variant][block], onward, context)
                mine = torch.from_numpy(now == variant)[:, None, None]
                hidden = torch.where(mine, onward, hidden)
            pooled = network.pooled(hidden, context)
            said = network.classify(segment, pooled)
            here = np.flatnonzero(now >= 0)
            at = index[here]
            trace.logits[at, segment] = said.float().numpy()[here]
            if segment == segments - 1 or not len(here):
                break
            gate, forecast = None, None
            if len(network.policies):
                column, evidence = network.gate(segment, pooled, said, evidence)
                gate = trace.gates[at, segment] = column.sigmoid().float().numpy()[here]
            if len(network.forecasts):
                forecast = network.forecasts[segment](said).sigmoid().numpy()[here]
            signals = Signals(trace.logits[at, segment], gate, forecast)
            trace.variants[at], memory[at] = rule(signals, memory[at], trace.variants[at], segment)
    return trace


def through_bundle(session: Session, items: Sequence[Any], rule: Rule, start: int, what: str = "") -> Trace:
    """Every row through a bundle, from what a user gives: a text, a pair, an image."""
    manifest, number = session.manifest, np.zeros(1, np.int64)
    sizes = {"segments": len(manifest.segments), "classes": len(manifest.labels), "rows": 1, "limit": 1}
    traces = []
    for item in tqdm(items, desc=what, unit="row", file=sys.stderr, mininterval=1.0):
        inputs = session.encode(*item) if isinstance(item, tuple) else session.encode(item)
        traces.append(walk(session.engine, rule, [(number, inputs)], variant=start, **sizes))
    return Trace(*(np.concatenate([getattr(one, part.name) for one in traces]) for part in fields(Trace)))


def held_against(one: Trace, other: Trace) -> dict[str, Any]:
    """How many rows two walks decide alike, how many of the rest are ties, how far apart they were.

    apart: the furthest of a row's probabilities and gates, as far as its walks went the same way.
    """
    elsewhere = (one.variants != other.variants).any(1)
    labels = _labels(one) != _labels(other)
    common = np.cumprod((one.variants == other.variants) & (one.variants >= 0), axis=1).astype(bool)
    gaps = np.abs(softmax(one.logits) - softmax(other.logits)).max(-1)
    gaps = np.maximum(gaps, np.nan_to_num(np.abs(one.gates - other.gates)))
    apart = np.where(common, gaps, 0.0).max(1)  # [rows]
    different = elsewhere | labels
    return {
        "rows": len(different),
        "same": int((~different).sum()),
        "ties": int((different & (apart <= TIE)).sum()),
        "other": int((different & (apart > TIE)).sum()),
        "labels": int(labels.sum()),
        "apart_median": float(f"{np.median(apart):.2g}"),
        "apart_most": float(f"{apart.max():.2g}"),
    }


def of_checkpoint(folder: Path, data: TextData, count: int) -> list[dict[str, Any]]:
    """A line for each operating point of two, and where precision varies one for torch in float64."""
    loaded = load_checkpoint(folder)
    variants = loaded.network.spec.forecast or ("fp32",)
    chosen = first_rows(data, count)
    items, encoded = _items(chosen), encode_for(loaded, chosen)
    network, double = loaded.network.eval(), deepcopy(loaded.network).double().eval()
    lines = []
    # One thread: a row is small, and what else runs on the machine must not be waited for.
    with load(bundle_of(folder, variants), rule="never", threads=1) as session:
        points, costs = session.manifest.points, session.manifest.costs
        default = [point for point in points if point.name == "default"]
        for point in [*default, *[point for point in points if point.name.startswith("saves-")][:1]]:
            cases = [(variants[:1], priced_out(costs, variants[0]))]
            cases += [(variants, costs)] if variants[1:] else []
            for allowed, stated in cases:
                rule = bind(point.rule, len(session.manifest.segments), stated)
                start = variants.index(point.variant) if point.variant in allowed else 0
                what = " ".join([folder.name, point.name, *allowed])
                one = through_torch(network, encoded, variants, rule, start, what)
                others = {"bundle": through_bundle(session, items, rule, start, what)}
                if allowed[1:]:
                    others["float64"] = through_torch(double, encoded, variants, rule, start, what)
                for name, other in others.items():
                    line = {"checkpoint": folder.name, "rule": point.rule.name, "point": point.name}
                    line |= {"variants": ",".join(allowed), "torch_against": name}
                    lines.append(line | held_against(one, other))
    return lines


def first_rows(data: TextData, count: int) -> Rows:
    """The first rows of test, then of dev, then of train."""
    parts = [data.splits[name] for name in SPLITS if name in data.splits]
    whole = parts[0]
    for part in parts[1:]:
        whole = _joined(whole, part) if len(whole) < count else whole
    return whole.take(np.arange(min(count, len(whole))))


def priced_out(costs: Mapping[str, StepCosts], variant: str) -> dict[str, StepCosts]:
    """The costs with every other variant at an infinite price: rule quee then only leaves."""
    found = {}
    for unit, stated in costs.items():
        endless = dict.fromkeys(stated.steps, tuple(np.inf for _ in stated.steps[variant]))
        found[unit] = StepCosts(stated.tokens, endless | {variant: stated.steps[variant]})
    return found


def _items(rows: Rows) -> list[Any]:
    """Rows as a session takes them."""
    if rows.images is not None:
        return list(rows.images.files)
    return list(rows.text if rows.text_b is None else zip(rows.text, rows.text_b, strict=True))


def _joined(one: Rows, other: Rows) -> Rows:
    label = np.concatenate([one.label, other.label])
    if one.images is not None and other.images is not None:
        pictures = Pictures(one.images.files + other.images.files, one.images.places + other.images.places)
        return Rows([], None, label, pictures)
    seconds = None if one.text_b is None or other.text_b is None else one.text_b + other.text_b
    return Rows(one.text + other.text, seconds, label)


def _labels(trace: Trace) -> NDArray[np.int64]:
    """Number of the label where each row left."""
    last = trace.variants.shape[1] - 1 - (trace.variants[:, ::-1] >= 0).argmax(1)
    found: NDArray[np.int64] = trace.logits[np.arange(len(last)), last].argmax(-1)
    return found


def _like(network: EarlyExitNetwork, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point tensors in the network's own dtype."""
    kind = next(network.parameters()).dtype
    return {name: t.to(kind) if t.is_floating_point() else t for name, t in tensors.items()}


def show(lines: Sequence[Mapping[str, Any]]) -> None:
    """The table on stdout."""
    table = Table(title="torch in float32 against the bundle, and against torch in float64")
    for name in lines[0]:
        table.add_column(name)
    for line in lines:
        table.add_row(*(str(value) for value in line.values()))
    Console(width=180).print(table)


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("runs", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--data", required=True, help="As in ee-train.")
@click.option("--seed", default=0, help="Which checkpoints.")
@click.option("--rows", default=2000, help="Rows of test, then of dev, then of train.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(runs: Path, data: str, seed: int, rows: int, json_file: Path | None) -> None:
    kept = load_data(data, Columns())
    lines = []
    for folder in sorted(path for path in runs.glob(f"*_{seed}") if (path / "training.json").is_file()):
        lines += of_checkpoint(folder, kept, rows)
    if not lines:
        raise click.UsageError(
            f"{runs} holds no checkpoint RECIPE_{seed}; make some with ee-compare --out {runs}"
        )
    show(lines)
    if json_file is not None:
        command = f"benchmarks/agreement.py {runs.name} --data {Path(data).name} --seed {seed} --rows {rows}"
        write_whole(json_file, json.dumps({"command": command, "lines": lines}, indent=1) + "\n")
    strict = [line for line in lines if line["variants"] == "fp32"]
    if any(line["other"] or line["ties"] > line["rows"] / 100 for line in strict):
        sys.exit(1)


if __name__ == "__main__":
    main()
