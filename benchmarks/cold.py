"""A fresh process from start to end on one line: ee-run against ten lines around the monolith.

    python benchmarks/cold.py --bundle bundle/ --against rivals/ --json benchmarks/results/cold.json

Taken in turns; seconds are the whole process's, peak memory is what the system says of it when it has ended.
The ten lines are GRAPH below: what a user would write who has the monolith, onnxruntime and tokenizers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import TextInput
from offramp.runtime.tuning.report import machine

TEXT = "a stirring , funny film that stays with you"
GRAPH = """
import numpy, onnxruntime
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file({tokenizer!r})
graph = onnxruntime.InferenceSession({graph!r}, providers=["CPUExecutionProvider"])
for line in open({lines!r}, encoding="utf-8"):
    found = tokenizer.encode({prefix!r} + line.strip())
    made = dict(input_ids=found.ids, attention_mask=found.attention_mask, token_type_ids=found.type_ids)
    feed = {{entry.name: numpy.array([made[entry.name]]) for entry in graph.get_inputs()}}
    print({labels!r}[int(graph.run(["logits"], feed)[0][0].argmax())])
"""


def once(command: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes resident of one process."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}")
    return seconds, usage.ru_maxrss * 1024


@click.command(context_settings={"show_default": True})
@click.option("--bundle", type=click.Path(path_type=Path), default=Path("bundle"), help="As in ee-run.")
@click.option("--against", type=click.Path(path_type=Path), required=True, help="Of ee-split --rivals.")
@click.option("--turns", default=15, help="Processes of each kind.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write.")
def main(bundle: Path, against: Path, turns: int, json_file: Path | None) -> None:
    """Start each in turn, print medians and the ratio turn by turn."""
    manifest = open_bundle(bundle).manifest
    if not isinstance(manifest.input, TextInput):
        raise click.ClickException(f"{bundle}: the ten lines are for text")
    with tempfile.TemporaryDirectory() as scratch:
        lines = Path(scratch) / "line.txt"
        lines.write_text(TEXT + "\n", encoding="utf-8")
        facts: dict[str, Any] = {"tokenizer": str(bundle / manifest.input.tokenizer), "lines": str(lines)}
        facts |= {"graph": str(against / "monolith.onnx"), "prefix": manifest.input.prefix}
        script = GRAPH.format(labels=list(manifest.labels), **facts)
        run = [str(Path(sys.executable).parent / "ee-run"), "--bundle", str(bundle)]
        commands = {
            "ee-run": [*run, str(lines)],
            "ee-run --rule never": [*run, "--rule", "never", str(lines)],
            "monolith": [sys.executable, "-c", script],
        }
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
        for turn in range(turns + 1):
            for name, command in commands.items():
                ended = once(command)
                if turn:  # the first brings the files into the system's cache
                    found[name].append(ended)
    rows: list[dict[str, Any]] = []
    monolith = np.array([seconds for seconds, _ in found["monolith"]])
    for name, seen in found.items():
        clocks = np.array([seconds for seconds, _ in seen])
        row: dict[str, Any] = {"command": name, "seconds": round(float(np.median(clocks)), 4)}
        row |= {"ratio": round(float(np.median(clocks / monolith)), 3)}
        rows.append(row | {"peak_mb": round(float(np.median([size for _, size in seen])) / 1e6, 1)})
    table = Table(title=f"a fresh process on one line, medians of {turns}")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
    if json_file is not None:
        result = {"machine": machine(), "bundle": bundle.name, "turns": turns, "rows": rows}
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
