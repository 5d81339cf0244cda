"""Resident memory of `ee-run -` over a long input: it must not grow with the number of lines.

    python benchmarks/memory.py --bundle tests/data/tiny_bundle --lines 1000000 \
        --json benchmarks/results/memory.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import click
from tqdm import tqdm

WORDS = ("a", "film", "that", "is", "good", "bad", "warm", "cold", "and", "very", "long", "or", "short")


def resident(process: int) -> float:
    """Resident memory of a process in MiB, as the kernel counts it."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise SystemExit("the kernel tells no VmRSS here")


def feed(target: IO[bytes], lines: int) -> None:
    """Write lines of 1 to 15 words."""
    for number in range(lines):
        words = [WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(1 + number % 15)]
        target.write((" ".join(words) + "\n").encode())
    target.close()


@click.command(context_settings={"show_default": True})
@click.option("--bundle", default="tests/data/tiny_bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--lines", default=1_000_000, type=click.IntRange(min=100))
@click.option("--batch-size", default=32)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the figures."
)
def main(bundle: Path, lines: int, batch_size: int, json_file: Path | None) -> None:
    """Feed the lines, read the answers, look at the memory a hundred times on the way."""
    program = Path(sys.executable).parent / "ee-run"
    command = [str(program), "--bundle", str(bundle), "--batch-size", str(batch_size), "-"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    threading.Thread(target=feed, args=(process.stdin, lines), daemon=True).start()
    seen, every = [], lines // 100
    answered = 0
    for _ in tqdm(process.stdout, total=lines, unit="line", mininterval=2):
        answered += 1
        if answered % every == 0 and answered < lines:
            seen.append(round(resident(process.pid), 1))
    code = process.wait()
    tenth = len(seen) // 10
    result = {
        "lines": lines,
        "answers": answered,
        "exit code": code,
        "MiB after a tenth": seen[tenth],
        "MiB at the end": seen[-1],
        "growth MiB": round(max(seen[tenth:]) - seen[tenth], 1),
        "MiB along the way": seen,
    }
    click.echo(
        json.dumps({name: value for name, value in result.items() if name != "MiB along the way"}, indent=1)
    )
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if answered != lines or code != 0:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
