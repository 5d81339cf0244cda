"""What Ray costs on one machine: ee-run --ray with two actors beside two ee-run processes on the halves.

    bulk_ray.py BUNDLE --data texts.jsonl [--rows 100000] [--rounds 3] [--json FILE]

The texts of the data file are repeated until there are as many as --rows, and written as two files of JSON
lines. "plain": two processes, ee-run --threads 1 on a file each. "ray": one command, ee-run --ray --actors 2
on both files. Batch size and bundle are the same, and each has one thread for each of two workers. The two
take turns, --rounds times, so that a change of the machine meets both. Times are of whole commands, with
their start; "ray" also has the seconds until its first file of answers, most of which is the start of Ray.
Both must give the same label to every row, else the exit code is 1.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import click

from offramp.benchmarks.overhead import write_figures
from offramp.runtime.bulk_cli import ROWS_PER_FILE
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.tuning.labelled import read_rows
from offramp.runtime.tuning.report import machine_facts

WORKERS = 2
EE_RUN = [sys.executable, "-m", "offramp.runtime.cli"]
POLL = 0.02  # seconds between two looks for the first file of answers


def write_halves(data: Path, names: Sequence[str], rows: int, folder: Path) -> list[Path]:
    """Write rows of the data file, repeated, as one file of JSON lines for each worker; names: of labels."""
    items, _, _ = read_rows(data, names, sys.maxsize)
    texts = [item if isinstance(item, str) else item[0] for item in items]
    repeated, files = cycle(texts), []
    for number in range(WORKERS):
        count = rows // WORKERS + (number < rows % WORKERS)
        files.append(folder / f"half_{number}.jsonl")
        lines = (json.dumps({"text": text}) + "\n" for text in islice(repeated, count))
        files[-1].write_text("".join(lines), encoding="utf-8")
    return files


def run_plain(options: Sequence[str], files: Sequence[Path], out: Path) -> dict[str, float]:
    """Time one ee-run process for each file; they run at the same time."""
    out.mkdir()
    started = time.perf_counter()
    processes = [
        subprocess.Popen([*EE_RUN, *options, "--threads", "1", "--out", str(out / file.name), str(file)])
        for file in files
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise click.ClickException(f"ee-run ended with {codes}")
    return {"seconds": time.perf_counter() - started}


def run_ray(options: Sequence[str], files: Sequence[Path], out: Path) -> dict[str, float]:
    """Time ee-run --ray on all files."""
    started, first = time.perf_counter(), 0.0
    words = ["--ray", "--actors", str(WORKERS), "--out", str(out), *map(str, files)]
    process = subprocess.Popen([*EE_RUN, *options, *words], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any(out.glob("*.jsonl")):
        time.sleep(POLL)
    first = time.perf_counter() - started
    _, messages = process.communicate()
    if process.returncode:
        raise click.ClickException(f"ee-run --ray ended with {process.returncode}: {messages}")
    return {"seconds": time.perf_counter() - started, "first_file_seconds": first}


def labels(folder: Path) -> list[str]:
    """The label of every row, in order."""
    files = sorted(folder.glob("*.jsonl"))
    return [
        json.loads(line).get("label", "") for file in files for line in file.read_text("utf-8").splitlines()
    ]


CANDIDATES: dict[str, Callable[[Sequence[str], Sequence[Path], Path], dict[str, float]]] = {
    "plain": run_plain,
    "ray": run_ray,
}


@click.command(context_settings={"show_default": True}, help=__doc__)
@click.argument("bundle", type=click.Path(exists=True, file_okay=False))
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path), help="Texts, as lines.")
@click.option("--rows", default=100_000, help="Rows of a run.")
@click.option("--rounds", default=3, help="Runs of each.")
@click.option("--batch-size", default=32, help="As in ee-run.")
@click.option("--rows-per-file", default=ROWS_PER_FILE, help="As in ee-run --ray.")
@click.option("--point", help="As in ee-run.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures to a file.")
def main(
    bundle: str,
    data: Path,
    rows: int,
    rounds: int,
    batch_size: int,
    rows_per_file: int,
    point: str | None,
    json_file: Path | None,
) -> None:
    """See the docstring of the module."""
    options = ["--bundle", bundle, "--batch-size", str(batch_size)]
    options += [] if point is None else ["--point", point]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CANDIDATES}
    differ = 0
    with tempfile.TemporaryDirectory() as scratch:
        names = open_bundle(Path(bundle)).manifest.labels
        files = write_halves(data, names, rows, Path(scratch))
        for number in range(rounds):
            # Who runs first changes from round to round.
            for name in sorted(CANDIDATES, reverse=number % 2 == 1):
                more = ["--rows-per-file", str(rows_per_file)] if name == "ray" else []
                out = Path(scratch, f"{name}_{number}")
                runs[name].append(CANDIDATES[name]([*options, *more], files, out))
                click.echo(f"round {number + 1}: {name}: {rows / runs[name][-1]['seconds']:.0f} rows/s")
            answers = [labels(Path(scratch, f"{name}_{number}")) for name in CANDIDATES]
            differ += sum(a != b for a, b in zip(*answers, strict=True))
    ratios = [p["seconds"] / r["seconds"] for p, r in zip(runs["plain"], runs["ray"], strict=True)]
    middle = sorted(ratios)[len(ratios) // 2]
    click.echo(f"rows/s of ray to plain: {middle:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    settings = {"rows": rows, "batch_size": batch_size, "rows_per_file": rows_per_file, "workers": WORKERS}
    figures: dict[str, Any] = {**machine_facts(), **settings, "point": point, "labels_that_differ": differ}
    write_figures(json_file, {**figures, "runs": runs, "ratios": ratios, "ratio": middle})
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
