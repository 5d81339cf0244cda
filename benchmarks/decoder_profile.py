"""Where a token's time goes at full depth: the operators of our one graph, beside onnxruntime-genai's.

    python benchmarks/decoder_profile.py --scratch DIR --texts TEXTS --out PROFILE.json

Both run on ONNX Runtime, whose profiler clocks every operator; DIR is that of benchmarks/decoders.py rivals,
which has to come first. Milliseconds a token, medians over the runs of tokens; with the profiler on both are
slower than they are. weights: products with weights. other: all other operators, by name below. between:
what a run takes beyond its operators.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from bisect import bisect_right
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table

from offramp.benchmarks.decoder_contest import whole_of
from offramp.benchmarks.decoder_rivals import PRECISIONS, Genai
from offramp.benchmarks.lossless import prompts_of
from offramp.benchmarks.whole import OneGraph
from offramp.runtime import load
from offramp.runtime.engines.threads import claim
from offramp.runtime.generator import Writer
from offramp.runtime.tuning.report import machine
from offramp.training.checkpoint import write_json

PRODUCTS = ("MatMul", "Gemm")  # MatMulNBits and others have these in their names


def runs_of(events: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Milliseconds by operator of every run of a profile, "run" for the whole; products with weights are
    "weights".
    """
    runs = sorted((e for e in events if e.get("name") == "model_run"), key=lambda e: float(e["ts"]))
    starts = [float(run["ts"]) for run in runs]
    found = [defaultdict(float, run=float(run["dur"]) / 1e3) for run in runs]
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        at = bisect_right(starts, float(event["ts"])) - 1
        if at < 0 or float(event["ts"]) > starts[at] + float(runs[at]["dur"]):
            raise click.ClickException(f"{event['name']}: outside every run of the profile")
        name, told = event["args"]["op_name"], event["args"]
        # Weights were packed when the graph was opened and are no input any more, but their scales are.
        heavy = len(told["input_type_shape"]) == 1 or int(told.get("parameter_size", 0)) > 0
        product = any(kind in name for kind in PRODUCTS)
        found[at]["weights" if product and heavy else name] += float(event["dur"]) / 1e3
    return [dict(run) for run in found]


def spent(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over runs; the few that read prompts do not move them."""

    def middle(name: str) -> float:
        return float(np.median([run.get(name, 0.0) for run in runs]))

    names = {name for run in runs for name in run} - {"run", "weights"}
    other = [sum(time for name, time in run.items() if name not in ("run", "weights")) for run in runs]
    between = [2 * run["run"] - sum(run.values()) for run in runs]
    by_name = sorted(((middle(name), name) for name in names), reverse=True)
    return {
        "run": round(middle("run"), 3),
        "weights": round(middle("weights"), 3),
        "other": round(float(np.median(other)), 3),
        "between": round(float(np.median(between)), 3),
        "by_name": {name: round(time, 3) for time, name in by_name if time >= 0.01},
    }


def profiled(folder: Path, prefix: str) -> dict[str, Any]:
    """The one profile in a folder whose name begins so, with how many operators a token takes."""
    (file,) = folder.glob(f"{prefix}*.json")
    events = json.loads(file.read_text(encoding="utf-8"))
    kernels = Counter(e["name"] for e in events if str(e.get("name")).endswith("_kernel_time"))
    return {**spent(runs_of(events)), "operators": len(kernels)}


@click.command()
@click.option("--scratch", required=True, type=click.Path(exists=True, path_type=Path), help="See above.")
@click.option("--texts", required=True, type=click.Path(exists=True, path_type=Path), help="Rows {text}.")
@click.option("--count", default=5, show_default=True, help="Prompts.")
@click.option("--tokens", default=64, show_default=True, help="Tokens of an answer.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file.")
def main(scratch: Path, texts: Path, count: int, tokens: int, out: Path | None) -> None:
    """Profile both at every precision, in turns, and show where they differ."""
    for needed in (scratch / "auto", *(scratch / "genai" / precision for precision in PRECISIONS)):
        if not needed.is_dir():
            raise click.ClickException(f"{needed} is not there: run benchmarks/decoders.py full, then rivals")
    with load(scratch / "auto", rule="never") as writer:
        assert isinstance(writer, Writer)
        prompts = prompts_of(writer, texts, count, 24)
    pool, found = claim(onnxruntime, None, True), dict[str, dict[str, Any]]()
    for precision in PRECISIONS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            one = OneGraph(whole_of(scratch, precision), pool, folder / "ours")
            with Genai(scratch / "genai" / precision, profile=folder / "genai") as rival:
                for prompt in prompts:
                    list(itertools.islice(one.generate(prompt, tokens), tokens))
                    rival.greedy(prompt, tokens)
            one.session.end_profiling()
            found[precision] = {kind: profiled(folder, kind) for kind in ("ours", "genai")}
    if out is not None:
        facts = {"command": "benchmarks/decoder_profile.py", "prompts": count, "tokens": tokens}
        write_json(out, {**facts, "machine": machine(), "profiles": found})
    table = Table("", "run", "weights", "other", "between", "operators", "most of other", title="ms a token")
    for precision, kinds in found.items():
        for kind, row in kinds.items():
            most = ", ".join(f"{name} {time}" for name, time in itertools.islice(row["by_name"].items(), 5))
            cells = (row[key] for key in ("run", "weights", "other", "between", "operators"))
            table.add_row(f"{kind}, {precision}", *map(str, cells), most)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
