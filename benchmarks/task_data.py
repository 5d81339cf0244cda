"""Data sets of the tasks beside classification as JSON lines, from the files that their authors publish.

    python benchmarks/task_data.py snips SlotGated-SLU/data/snips OUT
    python benchmarks/task_data.py goemotions GoEmotions-pytorch/data/original OUT
    python benchmarks/task_data.py stsb stsb-multi-mt/data OUT

snips: slots of spoken commands, a tag for each word (CC0; Coucke et al., arXiv 1805.10190), as in
github.com/MiuLab/SlotGated-SLU. goemotions: emotions of comments, several labels a text (Apache-2.0; Demszky
et al., arXiv 2005.00547), as in github.com/monologg/GoEmotions-pytorch; 8,000 of 43,410 train and 2,000 of
5,426 dev rows, drawn by seed 0, and all of test. stsb: how alike two sentences are, 0 to 5 (CC BY-SA 4.0; Cer
et al., arXiv 1708.00055), as in github.com/PhilipMay/stsb-multi-mt, English.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import click
import numpy as np

Row = Mapping[str, object]
DRAWN = {"train": 8000, "dev": 2000}  # rows of GoEmotions


def snips(source: Path, split: str) -> Iterator[Row]:
    """Words with their tags."""
    folder = source / {"train": "train", "dev": "valid", "test": "test"}[split]
    files = [(folder / name).read_text(encoding="utf-8").splitlines() for name in ("seq.in", "seq.out")]
    for words, tags in zip(*files, strict=True):
        yield {"tokens": words.split(), "tags": tags.split()}


def goemotions(source: Path, split: str) -> Iterator[Row]:
    """Comments with the names of their emotions."""
    names = (source / "labels.txt").read_text(encoding="utf-8").split()
    lines = (source / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
    if (count := DRAWN.get(split)) is not None:
        chosen = np.sort(np.random.default_rng(0).permutation(len(lines))[:count])
        lines = [lines[number] for number in chosen]
    for line in lines:
        text, numbers, _ = line.split("\t")
        yield {"text": text, "labels": [names[int(number)] for number in numbers.split(",")]}


def stsb(source: Path, split: str) -> Iterator[Row]:
    """Pairs of sentences with the mean of their scores."""
    with (source / f"stsb-en-{split}.csv").open(encoding="utf-8", newline="") as file:
        for first, second, score in csv.reader(file):
            yield {"text": first, "text_b": second, "label": float(score)}


SETS: dict[str, Callable[[Path, str], Iterable[Row]]] = {
    "snips": snips,
    "goemotions": goemotions,
    "stsb": stsb,
}


@click.command()
@click.argument("name", type=click.Choice(list(SETS)))
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
def main(name: str, source: Path, out: Path) -> None:
    """Write train.jsonl, dev.jsonl and test.jsonl of data set NAME into OUT."""
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev", "test"):
        rows = [json.dumps(row, ensure_ascii=False) for row in SETS[name](source, split)]
        (out / f"{split}.jsonl").write_text("".join(row + "\n" for row in rows), encoding="utf-8")
        click.echo(f"{out / split}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
