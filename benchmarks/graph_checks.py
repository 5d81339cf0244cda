"""What checking a bundle's graphs costs beside opening them: reading, hashing, checking, ONNX Runtime.

    python benchmarks/graph_checks.py bundle/ --json OUT

The graphs of the default variant, in turns and one thread, with the files in the cache of the system. share:
time of the checks over that of reading, hashing and opening.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.graph_checks import check_graph
from offramp.runtime.engines.graphs import import_onnxruntime
from offramp.runtime.tuning.figures import round_figure
from offramp.runtime.tuning.timing import time_in_turns


def measure(folder: Path, rounds: int) -> dict[str, float]:
    """Median milliseconds of each step for all graphs of the default variant, and the share of the checks."""
    bundle, ort = open_bundle(folder), import_onnxruntime("cpu")
    manifest = bundle.manifest
    parts = [manifest.stem, *manifest.segments]
    files = list(dict.fromkeys(graph.file for part in parts for graph in part.first_graph.graphs))
    contents = {file: bundle.read(file) for file in files}
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3

    def open_all() -> None:
        for data in contents.values():
            ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    steps: dict[str, Callable[[], object]] = {
        "read": lambda: [(folder / file).read_bytes() for file in files],
        "hash": lambda: [hashlib.sha256(data).digest() for data in contents.values()],
        "check": lambda: [check_graph(data, file) for file, data in contents.items()],
        "open": open_all,
    }
    seconds = time_in_turns(steps, rounds, warmup=1)
    medians = {name: 1000 * float(np.median(each)) for name, each in seconds.items()}
    share = medians["check"] / (medians["read"] + medians["hash"] + medians["open"])
    nodes = sum(check_graph(data, file).nodes for file, data in contents.items())
    size = sum(map(len, contents.values()))
    facts = {
        "graphs": float(len(files)),
        "nodes": float(nodes),
        "bytes": float(size),
        "share": round_figure(share),
    }
    return facts | {f"{name}_ms": round_figure(value) for name, value in medians.items()}


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--rounds", default=11, show_default=True, help="Turns of each step.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the figures there.")
def main(bundle: Path, rounds: int, target: Path | None) -> None:
    """Print, and write, what the checks cost."""
    text = json.dumps(measure(bundle, rounds), indent=1)
    click.echo(text)
    if target is not None:
        target.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
