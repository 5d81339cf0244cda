"""A fixed part of CIFAR-10 as parquet files: 4,000 images to train on, 1,000 to choose on, 2,000 to test.

    python benchmarks/cifar10.py FOLDER --work build/cifar10

FOLDER holds CIFAR-10's train.parquet and test.parquet in the Hugging Face Image layout: a struct of bytes and
path, and a label. Train and dev are drawn from train.parquet, as many of each label, by a fixed seed; test is
the first 2,000 rows of test.parquet. Images are not decoded: their bytes come out as they went in. Dev is
also written as files with dev.jsonl, under images/, which is what ee-split --dev and ee-calibrate read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import datasets
import numpy as np

LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZES = {"train": 4000, "dev": 1000, "test": 2000}
SEED = 10


def draw(labels: Sequence[int], sizes: Sequence[int], seed: int = SEED) -> list[np.ndarray]:
    """Row numbers of disjoint parts of these sizes, each with as many rows of every label, in mixed order.

    Raises ValueError where a size cannot be shared out or a label has too few rows.
    """
    numbers, rng = np.asarray(labels), np.random.default_rng(seed)
    classes = np.unique(numbers)
    parts: list[list[np.ndarray]] = [[] for _ in sizes]
    for label in classes:
        order, start = rng.permutation(np.flatnonzero(numbers == label)), 0
        for part, size in zip(parts, sizes, strict=True):
            share, left = divmod(size, len(classes))
            if left or start + share > len(order):
                raise ValueError(
                    f"{size} rows cannot be drawn evenly from {len(numbers)} of {len(classes)} labels"
                )
            part.append(order[start : start + share])
            start += share
    return [rng.permutation(np.concatenate(part)) for part in parts]


def write_parts(source: Path, work: Path, sizes: dict[str, int] | None = None) -> dict[str, int]:
    """Write train, dev and test parquet, and dev as files; gives the rows of each."""
    sizes = sizes or SIZES
    tables: dict[str, Any] = {name: _read(source / f"{name}.parquet") for name in ("train", "test")}
    train, dev = draw(tables["train"]["label"], [sizes["train"], sizes["dev"]])
    parts = {
        "train": tables["train"].select(train),
        "dev": tables["train"].select(dev),
        "test": tables["test"].select(range(sizes["test"])),
    }
    work.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        beside = work / f"{name}.parquet.writing"
        part.to_parquet(beside)
        os.replace(beside, work / f"{name}.parquet")
    _write_files(parts["dev"], work / "images", "dev")
    return {name: len(part) for name, part in parts.items()}


def _read(file: Path) -> Any:
    table = datasets.load_dataset("parquet", data_files=str(file), split="train")
    names = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=LABELS)}
    )
    return table.select_columns(["image", "label"]).cast(names)


def _write_files(part: Any, folder: Path, name: str) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (image, label) in enumerate(zip(part["image"], part["label"], strict=True)):
        file = f"{name}/{number:05}.img"  # Pillow goes by what is in it
        (folder / file).write_bytes(image["bytes"])
        lines.append(json.dumps({"image": file, "label": LABELS[label]}) + "\n")
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


@click.command(
    help="Write the fixed part of CIFAR-10 that the benchmarks use, from its parquet files in SOURCE."
)
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), default=Path("build/cifar10"))
def main(source: Path, work: Path) -> None:
    missing = [name for name in ("train.parquet", "test.parquet") if not (source / name).is_file()]
    if missing:
        raise click.UsageError(f"{source} has no {missing[0]}")
    datasets.disable_progress_bars()
    rows = write_parts(source, work)
    click.echo(", ".join(f"{name} {count}" for name, count in rows.items()) + f" rows in {work}")


if __name__ == "__main__":
    main()
