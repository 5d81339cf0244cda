"""The price of thread pools that leave the rest of a process as it is: load() by default against global_pool.

    pools.py BUNDLE [--rounds 40] [--threads 2] [--json FILE]

BUNDLE classifies texts, all of which are walked to full depth at batch 1. ONNX Runtime's global pool is for a
whole process, so two processes take turns: one with a pool for each segment, one with the global pool. Prints
the median of the ratios of the turns, with an interval of 95 % over them, for texts of several lengths.
Measure on a machine that does nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np

from offramp.runtime.tuning.report import machine_facts

WORDS = (10, 25, 55, 110)  # of a text; about 16 to 128 tokens
CALLS = 20  # of a turn
_WORKER = """
import json, sys, time
from offramp.runtime import load
bundle, threads, global_pool = json.loads(sys.argv[1])
session = load(bundle, rule="never", threads=threads, global_pool=global_pool)
for line in sys.stdin:
    text, calls = json.loads(line)
    started = time.perf_counter()
    for _ in range(calls):
        session(text)
    print((time.perf_counter() - started) / calls, flush=True)
"""


class Worker:
    """A process with a session, which times calls on request; a context manager."""

    def __init__(self, bundle: Path, threads: int | None, global_pool: bool) -> None:
        command = [sys.executable, "-c", _WORKER, json.dumps([str(bundle), threads, global_pool])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self, text: str, calls: int = CALLS) -> float:
        """Mean seconds of a call on this text."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([text, calls]) + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *problem: object) -> None:
        self._process.communicate()


def measure(bundle: Path, rounds: int, threads: int | None) -> list[dict[str, Any]]:
    """A row for each length: milliseconds with either pool, and their ratio with its interval."""
    rows = []
    with Worker(bundle, threads, False) as own, Worker(bundle, threads, True) as shared:
        for words in WORDS:
            text = " ".join(["film"] * words)
            for worker in (own, shared):
                worker.seconds(text)  # opens what a text of this length needs
            pairs = np.array([(own.seconds(text), shared.seconds(text)) for _ in range(rounds)])
            ratios = pairs[:, 0] / pairs[:, 1]
            draws = np.random.default_rng(0).integers(0, rounds, (2000, rounds))
            low, high = np.quantile(np.median(ratios[draws], axis=1), (0.025, 0.975))
            own_ms, shared_ms = 1e3 * np.median(pairs, axis=0)
            rows.append(
                {
                    "words": words,
                    "own pools ms": round(float(own_ms), 3),
                    "global pool ms": round(float(shared_ms), 3),
                    "ratio": round(float(np.median(ratios)), 3),
                    "low": round(float(low), 3),
                    "high": round(float(high), 3),
                }
            )
    return rows


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--rounds", type=click.IntRange(2, 10_000), default=40, show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="Of each.  [default: those of load()]")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write what was measured.")
def main(bundle: Path, rounds: int, threads: int | None, json_file: Path | None) -> None:
    """Command pools.py; its help is the module's docstring."""
    rows = measure(bundle, rounds, threads)
    for row in rows:
        click.echo("  ".join(f"{name} {value}" for name, value in row.items()))
    if json_file is not None:
        facts = {"bundle": bundle.name, "rounds": rounds, "machine": machine_facts(), "rows": rows}
        json_file.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
