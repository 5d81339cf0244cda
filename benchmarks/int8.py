"""Compare ways to write an int8 graph: speed, answers as in fp32, and whether a row's answer is its own.

    python benchmarks/int8.py speed --json benchmarks/results/int8_speed.json
    python benchmarks/int8.py accuracy NETWORK --data test.jsonl --calibration train.jsonl --json FILE
    python benchmarks/int8.py batches NETWORK --data FILE --data FILE --json FILE

NETWORK is a checkpoint or a bundle in fp32 and int8. Every candidate (CANDIDATES) writes the segments' int8
graphs of one bundle anew from the fp32 graphs; all other files are the same. speed: walks at full depth of
random BERTs, all candidates in turns in one process, on one thread pool, at batch 1 and 32; the candidates
are opened in both orders, since the session that a process opens first runs 1 to 3 % slower than the last.
accuracy: real texts one by one, under the bundle's rule and at full depth. batches: label and exit of every
row at batch 1, at batch 32, with the rows reversed and shuffled.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from offramp.benchmarks.compare.pages import RESULTS, markdown_table, read_result_file
from offramp.benchmarks.int8_candidates import CANDIDATES, SAME_GRAPHS, TODAY, TOKEN, Feed, segment_feeds
from offramp.benchmarks.overhead import (
    pooled_ratio,
    random_checkpoint,
    random_inputs,
    walk_run,
    write_figures,
)
from offramp.export.bundle import write_manifest
from offramp.runtime import load_classifier
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import FILE_NAME
from offramp.runtime.classifier import Classifier
from offramp.runtime.tuning.labelled import read_rows
from offramp.runtime.tuning.report import machine_facts
from offramp.runtime.tuning.timing import time_in_turns

FP32 = "fp32"
FOLDER = click.Path(exists=True, path_type=Path)
SHOWN = {"show_default": True}
SHARES = ("label", "exit", "label at full depth", "accuracy", "accuracy at full depth")
Walked = tuple[str, int, float]  # label, exit, score


def split_network(network: Path, bundle: Path) -> Path:
    """The bundle in fp32 and int8 of a network: `network` itself, or what ee-split writes of a checkpoint."""
    if (network / FILE_NAME).exists():
        return network
    program = str(Path(sys.executable).parent / "ee-split")
    words = [program, str(network), "--out", str(bundle), "--variants", "fp32,int8"]
    subprocess.run(words, check=True, stdout=sys.stderr)
    return bundle


def write_candidates(
    bundle: Path, scratch: Path, names: Sequence[str], rows: Sequence[Feed]
) -> dict[str, Path]:
    """Write a copy of the bundle for each candidate into `scratch`; gives their folders by name.

    rows: inputs of the stem, for candidates with calibrated scales. It runs in a process of its own: the
    quantizers open sessions with threads of their own, after which a process cannot have one thread pool for
    all sessions.
    """
    targets = {name: scratch / f"candidate_{number}" for number, name in enumerate(names)}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_write_all, bundle, targets, rows).result()
    return targets


def _write_all(bundle: Path, targets: Mapping[str, Path], rows: Sequence[Feed]) -> None:
    manifest = open_bundle(bundle).manifest
    feeds = segment_feeds(bundle, rows)
    for name, target in targets.items():
        target.mkdir()
        for file in bundle.iterdir():
            if file.name != FILE_NAME:
                shutil.copyfile(file, target / file.name)
        for segment, calibration in zip(manifest.segments, feeds, strict=True):
            graphs = zip(segment.variants[FP32].graphs, segment.variants["int8"].graphs, strict=True)
            for source, small in graphs:
                with contextlib.redirect_stdout(sys.stderr):  # the quantizer prints what it does
                    CANDIDATES[name](bundle / source.file, target / small.file, calibration)
        write_manifest(target, manifest)


@contextlib.contextmanager
def opened(bundles: Mapping[str, Path], names: Sequence[str]) -> Iterator[dict[str, Classifier]]:
    """Context with a session for each candidate, opened in this order; FP32 is the first bundle in fp32."""
    with contextlib.ExitStack() as stack:
        sessions = {}
        for name in names:
            folder = next(iter(bundles.values())) if name == FP32 else bundles[name]
            variant = FP32 if name == FP32 else "int8"
            session = load_classifier(folder, variant=variant, share=False, global_pool=True)
            sessions[name] = stack.enter_context(session)
        yield sessions


def time_network(
    bundles: Mapping[str, Path], network: str, cells: Sequence[tuple[int, int]], seconds: float
) -> list[dict[str, Any]]:
    """Times of every candidate at full depth, a row for each cell (rows of a batch, tokens).

    seconds: about how long a cell is measured.
    """
    timed: dict[tuple[int, int], list[dict[str, list[float]]]] = {cell: [] for cell in cells}
    names = [FP32, *bundles]
    for order in (names, names[::-1]):
        with opened(bundles, order) as sessions:
            for cell in cells:
                click.echo(f"{network}, {cell[0]} rows of {cell[1]} tokens", err=True)
                inputs = random_inputs(*cell)
                calls = {name: walk_run(session, inputs, 1.0) for name, session in sessions.items()}
                first = time_in_turns(calls, 1, warmup=1)
                round_time = sum(values[0] for values in first.values())
                rounds = int(np.clip(seconds / 2 / round_time, 3, 100))
                timed[cell].append(time_in_turns(calls, rounds))
    rows = []
    for (batch, length), pairs in timed.items():
        for name in bundles:
            medians = [float(np.median(pair[name])) for pair in pairs]
            rows.append(
                {"network": network, "batch": batch, "length": length, "candidate": name}
                | {"ms": round(1e3 * float(np.mean(medians)), 3), "rounds": len(pairs[0][name])}
                | {"times_fp32": pooled_ratio(pairs, FP32, name)}
                | {"times_today": pooled_ratio(pairs, TODAY, name)}
            )
    return rows


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table; of a ratio and its interval the median."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        values = (value[0] if isinstance(value, list) else value for value in row.values())
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in values))
    Console(width=170).print(table)


def _results(kind: str) -> list[dict[str, Any]]:
    return [read_result_file(file) for file in sorted(RESULTS.glob(f"{kind}*.json"))]


def int8_tables() -> list[str]:
    """Markdown lines of the tables of docs/measured.md; a table without its result file is left out."""
    lines: list[str] = []
    for result in _results("int8_speed"):
        cells = list(dict.fromkeys((r["network"], r["batch"], r["length"]) for r in result["rows"]))
        times = {(r["candidate"], r["network"], r["batch"], r["length"]): r for r in result["rows"]}
        names = list(dict.fromkeys(row["candidate"] for row in result["rows"]))
        rows = []
        for network, batch, length in cells:
            ratios = [times[name, network, batch, length] for name in names]
            shown = [f"{row['times_today'][0]:.2f} ({row['times_fp32'][0]:.2f})" for row in ratios]
            rows.append([network, str(batch), str(length), *shown])
        text = "Speed over that of one scale for a tensor (over fp32's), full depth, one thread pool"
        about = result["machine"]
        lines += [f"{text}; {about['cpu']}, {about['when'][:10]}:", ""]
        lines += markdown_table(["network", "rows", "tokens", *names], rows)
    for result in _results("int8_accuracy"):
        rows = [
            [
                row["candidate"],
                *(f"{100 * row[name]:.1f}" for name in SHARES),
                f"{row['logit difference']:.3f}",
            ]
            for row in result["candidates"]
        ]
        lines += [f"{result['data']}, {result['rows']} rows one by one, percent as in fp32:", ""]
        lines += markdown_table(["candidate", *SHARES, "difference of logits"], rows)
    for result in _results("int8_batches"):
        rows = [[str(value) for value in row.values()] for row in result["differences"]]
        lines += [f"Of {result['rows']} rows, those that differ from batch 1:", ""]
        lines += markdown_table(list(result["differences"][0]), rows)
    title = "**Ways to write int8** (`benchmarks/int8.py`; `token` is what `ee-split` writes)"
    return [title, "", *lines] if lines else []


@click.group(help=__doc__)
def main() -> None:
    """The command group of the int8 benchmarks."""


JSON = click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="File for the figures."
)
NAMES = "Names, separated by commas; today's is added."


def parsed(names: str) -> list[str]:
    """The candidates of option --candidates, today's first; raises UsageError for one that does not exist."""
    chosen = list(dict.fromkeys((TODAY, *names.split(","))))
    if unknown := [name for name in chosen if name not in CANDIDATES]:
        raise click.UsageError(f"--candidates: {unknown[0]!r} is not one of {', '.join(CANDIDATES)}")
    return chosen


@main.command(context_settings=SHOWN)
@click.option("--sizes", default="12x384,12x768", help="Blocks x width of random networks.")
@click.option("--lengths", default="16,32,64,128", help="Tokens.")
@click.option("--batches", "batch_sizes", default="1,32", help="Rows of a batch.")
@click.option("--seconds", default=10.0, help="Time of a cell, at least six rounds.")
@click.option("--candidates", default=",".join(n for n in CANDIDATES if n not in SAME_GRAPHS), help=NAMES)
@JSON
def speed(
    sizes: str, lengths: str, batch_sizes: str, seconds: float, candidates: str, json_file: Path | None
) -> None:
    """Time full-depth walks of every candidate over fp32 and over today's int8."""
    names = parsed(candidates)
    cells = [(int(b), int(n)) for b in batch_sizes.split(",") for n in lengths.split(",")]
    rows: list[dict[str, Any]] = []
    for size in sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            checkpoint = random_checkpoint(scratch, *map(int, size.split("x")))
            bundle = split_network(checkpoint, scratch / "bundle")
            bundles = write_candidates(bundle, scratch, names, [random_inputs(1, 32)])
            rows += time_network(bundles, size, cells, seconds)
    show("full depth; medians", rows)
    write_figures(json_file, {"machine": machine_facts(), "rows": rows})


@main.command(context_settings=SHOWN)
@click.argument("network", type=FOLDER)
@click.option("--data", type=FOLDER, required=True, help="Rows that are answered, as in ee-bench.")
@click.option("--calibration", type=FOLDER, required=True, help="Rows that static scales are made on.")
@click.option("--rows", "limit", default=1000, help="Most rows that are answered.")
@click.option("--calibration-rows", default=64)
@click.option("--candidates", default=",".join(CANDIDATES), help=NAMES)
@JSON
def accuracy(
    network: Path,
    data: Path,
    calibration: Path,
    limit: int,
    calibration_rows: int,
    candidates: str,
    json_file: Path | None,
) -> None:
    """Compare labels and exits of real texts, one by one, with those in fp32."""
    names = parsed(candidates)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        bundle = split_network(network, scratch / "bundle")
        manifest = open_bundle(bundle).manifest
        items, labels, _ = read_rows(data, manifest.labels, limit)
        texts, _, _ = read_rows(calibration, manifest.labels, 20 * calibration_rows)
        with load_classifier(bundle, share=False, global_pool=True) as session:
            encoded = of_commonest_length([session.encode(text) for text in texts])[:calibration_rows]
        bundles = write_candidates(bundle, scratch, names, encoded)
        right = answers_of(bundles, FP32, items)
        rows = [
            agreement(name, answers_of(bundles, name, items), right, np.asarray(labels)) for name in bundles
        ]
        about = agreement(FP32, right, right, np.asarray(labels))
    show(f"{network.name}, {len(items)} rows at batch 1: share as in fp32", [about, *rows])
    figures = {"machine": machine_facts(), "network": network.name, "rows": len(items)}
    write_figures(
        json_file, figures | {"data": f"{data.parent.name}/{data.name}", "candidates": [about, *rows]}
    )


def of_commonest_length(encoded: Sequence[Feed]) -> list[Feed]:
    """The inputs whose number of tokens is the commonest; ONNX Runtime's histograms read one shape alone."""
    lengths = [feed["input_ids"].shape[1] for feed in encoded]
    commonest = max(set(lengths), key=lengths.count)
    return [feed for feed, length in zip(encoded, lengths, strict=True) if length == commonest]


def answers_of(bundles: Mapping[str, Path], name: str, items: Sequence[Any]) -> dict[str, np.ndarray]:
    """Labels (numbers) and exits under the bundle's rule, and logits at full depth, of rows one by one."""
    click.echo(f"{name}: {len(items)} rows", err=True)
    with opened(bundles, [name]) as sessions:
        session = sessions[name]
        answers = list(session.map(items, batch_size=1))
        number = session.labels.index
        trace, _ = session.at_full_depth(items)
    return {
        "label": np.array([number(answer.label) for answer in answers]),
        "exit": np.array([answer.exit for answer in answers]),
        "logits": trace.logits,
    }


def agreement(
    name: str, actual: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray], labels: np.ndarray
) -> dict[str, Any]:
    """Shares of rows on which a candidate agrees with fp32, and its accuracy on the data."""
    full, full_right = actual["logits"][:, -1].argmax(-1), right["logits"][:, -1].argmax(-1)
    shares = {
        "label": actual["label"] == right["label"],
        "exit": actual["exit"] == right["exit"],
        "label at full depth": full == full_right,
        "accuracy": actual["label"] == labels,
        "accuracy at full depth": full == labels,
    }
    row: dict[str, Any] = {"candidate": name}
    row |= {key: round(float(np.mean(value)), 5) for key, value in shares.items()}
    row["logit difference"] = round(float(np.abs(actual["logits"] - right["logits"]).mean()), 5)
    return row | {"mean exit": round(float(actual["exit"].mean()), 3)}


@main.command(context_settings=SHOWN)
@click.argument("network", type=FOLDER)
@click.option(
    "--data", type=FOLDER, multiple=True, required=True, help='JSON lines with "text"; several times.'
)
@click.option("--rows", "limit", default=10_000, help="Most rows.")
@click.option("--batch-size", default=32)
@click.option("--candidates", default=TOKEN, help=NAMES)
@JSON
def batches(
    network: Path,
    data: Sequence[Path],
    limit: int,
    batch_size: int,
    candidates: str,
    json_file: Path | None,
) -> None:
    """Count rows whose label or exit depends on the batch; exit code 1 if a candidate but today's has one."""
    lines = [line for file in data for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    texts = [json.loads(line)["text"] for line in lines[:limit]]
    orders: dict[str, tuple[np.ndarray, int]] = {
        f"batch {batch_size}": (np.arange(len(texts)), batch_size),
        "reversed": (np.arange(len(texts))[::-1], batch_size),
        "shuffled": (np.random.default_rng(0).permutation(len(texts)), batch_size),
    }
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        bundle = split_network(network, scratch / "bundle")
        names = parsed(candidates)
        with load_classifier(bundle, share=False, global_pool=True) as session:
            encoded = [session.encode(text) for text in texts[:64]]
        bundles = write_candidates(bundle, scratch, names, encoded)
        for name in (FP32, *names):
            with opened(bundles, [name]) as sessions:
                walk = partial(walk_in_order, sessions[name], texts)
                alone = walk(np.arange(len(texts)), 1)
                for order, (numbers, size) in orders.items():
                    click.echo(f"{name}: {order}", err=True)
                    rows.append({"candidate": name, "order": order} | differences(alone, walk(numbers, size)))
    show(f"{network.name}: rows of {len(texts)} that differ from batch 1", rows)
    write_figures(json_file, {"machine": machine_facts(), "rows": len(texts), "differences": rows})
    if any(row["label"] or row["exit"] for row in rows if row["candidate"] not in (TODAY, FP32)):
        raise SystemExit(1)


def walk_in_order(session: Classifier, texts: Sequence[str], numbers: np.ndarray, size: int) -> list[Walked]:
    """Label, exit and score of every text, in the order of `texts`, walked in the order of `numbers`."""
    given = session.map((texts[number] for number in numbers), batch_size=size)
    answers = dict(zip(numbers.tolist(), given, strict=True))
    return [(answers[n].label, answers[n].exit, answers[n].score) for n in range(len(texts))]


def differences(alone: Sequence[Walked], among: Sequence[Walked]) -> dict[str, Any]:
    """How many rows have another label, exit, or score in any bit, and the largest change of a score."""
    pairs = list(zip(alone, among, strict=True))
    changes = [abs(first[2] - second[2]) for first, second in pairs]
    return {
        "label": sum(first[0] != second[0] for first, second in pairs),
        "exit": sum(first[1] != second[1] for first, second in pairs),
        "score in any bit": sum(change > 0 for change in changes),
        "largest change of a score": f"{max(changes):.2g}",
    }


if __name__ == "__main__":
    main()
