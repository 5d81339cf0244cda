"""Where a walk's time goes at batch 1: ONNX Runtime's runs, and what is ours around them, by the step.

    python benchmarks/steps.py --json benchmarks/results/steps.json

Random networks as in overhead.py, walked to the last exit. Every run of ONNX Runtime is clocked from inside
the walk; all else is ours: binding inputs, reading the gate, the rule, the trace. Two figures: "in use", with
the weights of a segment passing through the cache between our lines as they do for a user, and "by itself",
with the runs left out. The clock's own time counts as ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from offramp.benchmarks.overhead import a_walk, random_checkpoint, some_inputs
from offramp.runtime import load
from offramp.runtime.tuning.report import machine


class Clocked:
    """A run of ONNX Runtime that is clocked: seconds so far in Clocked.seconds; real: or left out."""

    seconds = 0.0

    def __init__(self, run: Callable[[], None], real: bool) -> None:
        self._run, self._real = run, real

    def __call__(self) -> None:
        started = time.perf_counter()
        if self._real:
            self._run()
        Clocked.seconds += time.perf_counter() - started


def profile(bundle: Path, length: int, turns: int, real: bool) -> dict[str, float]:
    """Microseconds a step, the stem being one, medians over turns: in ONNX Runtime and ours."""
    with load(bundle, rule="never") as session:
        engine: Any = session.engine
        inputs = some_inputs(length)
        run = a_walk(session, inputs, 1.0)
        run()  # binds
        state = engine.begin(inputs)
        buffers = state.buffers
        buffers.bound.update({key: (Clocked(one, real), said) for key, (one, said) in buffers.bound.items()})
        buffers.stem = Clocked(buffers.stem, real)
        engine.drop(state)
        found = []
        for _ in range(turns + 3):
            Clocked.seconds = 0.0
            started = time.perf_counter()
            run()
            found.append((Clocked.seconds, time.perf_counter() - started))
        inside, whole = np.array(found[3:]).T / (len(session.manifest.segments) + 1)
    ours = float(np.median(whole - inside))
    return {"onnxruntime": round(1e6 * float(np.median(inside)), 2), "ours": round(1e6 * ours, 2)}


@click.command(context_settings={"show_default": True})
@click.option("--sizes", default="6x384,12x384,12x768", help="Blocks x width.")
@click.option("--lengths", default="16,32,128", help="Tokens.")
@click.option("--turns", default=300, help="Walks of each kind.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write.")
def main(sizes: str, lengths: str, turns: int, json_file: Path | None) -> None:
    """Split, export, walk, print microseconds a step."""
    rows: list[dict[str, Any]] = []
    for size in sizes.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            source = random_checkpoint(Path(scratch), *map(int, size.split("x")))
            bundle = Path(scratch) / "bundle"
            program = str(Path(sys.executable).parent / "ee-split")
            command = [program, str(source), "--out", str(bundle), "--variants", "fp32"]
            subprocess.run(command, check=True, stdout=sys.stderr)
            for length in map(int, lengths.split(",")):
                used, alone = (profile(bundle, length, turns, real) for real in (True, False))
                row = {"network": size, "length": length, "onnxruntime": used["onnxruntime"]}
                rows.append(row | {"ours in use": used["ours"], "ours by itself": alone["ours"]})
    table = Table(title="microseconds a step, batch 1, medians")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
    if json_file is not None:
        result = {"machine": machine(), "turns": turns, "rows": rows}
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
