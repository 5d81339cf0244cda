"""Rows per second of the full walk over those of the monolith, in bulk on the same batches, turn by turn.

    python benchmarks/bulk.py --bundle bundle/ --against rivals/ --data DATA/test.jsonl --json FILE

Both see the same windows of rows, sorted by length and cut into the same batches; every exit and policy of
the walk is computed and none is taken.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np

from offramp.runtime import load
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.classifier import WINDOW
from offramp.runtime.inputs.text import Encoder
from offramp.runtime.rules import RuleSpec
from offramp.runtime.tuning.baselines import MONOLITH, open_rival, read_rivals
from offramp.runtime.tuning.labelled import read_data
from offramp.runtime.tuning.report import machine
from offramp.runtime.tuning.timing import Batches, in_bulk, walking

TO_THE_END = RuleSpec("gate", {"threshold": 1.0})  # the gate is read and never taken


@click.command(context_settings={"show_default": True})
@click.option("--bundle", type=click.Path(path_type=Path), default=Path("bundle"), help="As in ee-run.")
@click.option("--against", type=click.Path(path_type=Path), required=True, help="Of ee-split --rivals.")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="As in ee-bench.")
@click.option("--batch-size", default=32, help="Rows together.")
@click.option("--rows", default=512, help="Rows at most.")
@click.option("--turns", default=7, help="Rounds.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write.")
def main(
    bundle: Path, against: Path, data: Path, batch_size: int, rows: int, turns: int, json_file: Path | None
) -> None:
    """Take turns in every variant, print rows per second and their ratio."""
    found: list[dict[str, Any]] = []
    with ExitStack() as stack:
        opened = open_bundle(bundle)
        manifest, encoder = opened.manifest, Encoder(opened)
        for variant in manifest.variants:
            session = stack.enter_context(load(bundle, rule=TO_THE_END, variant=variant, share=False))
            fact = next(
                graph
                for graph in read_rivals(against, manifest).graphs
                if (graph.kind, graph.variant) == (MONOLITH, variant)
            )
            single = open_rival(against, fact, manifest, threads=None, threshold=None)
            items, _, _ = read_data(data, manifest.labels, rows)
            encoded = [encoder([item])[0] for item in items]
            windows: list[tuple[Batches, int]] = []
            for start in range(0, len(encoded), batch_size * WINDOW):
                window = encoded[start : start + batch_size * WINDOW]
                windows.append((list(session._batches(window, batch_size)), len(window)))
            contenders = [walking(session, "walk", "full"), single]
            ratios = []
            for _ in range(turns):
                rates = in_bulk(contenders, windows, batch_size, 1)
                ratios.append(rates["walk"] / rates[single.name])
            row = {"variant": variant, "rows_per_second": round(rates["walk"], 1)}
            row |= {"ratio": round(float(np.median(ratios)), 4), "each": [round(r, 3) for r in ratios]}
            found.append(row)
            click.echo(f"{bundle.name} {variant}: {row}")
    if json_file is not None:
        result = {"machine": machine(), "bundle": bundle.name, "rows": found}
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
