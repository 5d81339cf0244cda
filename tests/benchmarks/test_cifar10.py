"""The fixed part of CIFAR-10: the same rows each time, evenly drawn, none of them in two splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny

from offramp.benchmarks.cifar10 import LABELS, draw, write_parts
from offramp.training.data import load_data


def source(folder: Path, rows: int) -> Path:
    """Files as the real ones are: every image another one, labels in turn."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(LABELS))}
    )
    for part, name in enumerate(("train", "test")):
        images: list[Any] = [
            {"bytes": tiny.png(row % 2, 1000 * part + row, (4, 4)), "path": None} for row in range(rows)
        ]
        found = {"image": images, "label": [row % 10 for row in range(rows)]}
        datasets.Dataset.from_dict(found, features=features).to_parquet(folder / f"{name}.parquet")
    return folder


def test_parts_are_even_disjoint_and_the_same_each_time() -> None:
    labels = np.random.default_rng(1).integers(0, 10, 500).tolist()
    first, second = draw(labels, [200, 100]), draw(labels, [200, 100])
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
        assert len(set(np.bincount(np.asarray(labels)[one]))) == 1
    assert [len(part) for part in first] == [200, 100]
    assert not set(first[0]) & set(first[1])
    assert not np.array_equal(draw(labels, [200, 100], seed=2)[0], first[0])
    with pytest.raises(ValueError, match="evenly"):
        draw(labels, [205])
    with pytest.raises(ValueError, match="evenly"):
        draw(labels, [500])


def test_what_is_written_is_what_was_drawn(tmp_path: Path) -> None:
    given = source(tmp_path, 60)
    sizes = {"train": 30, "dev": 10, "test": 20}
    assert write_parts(given, tmp_path / "work", sizes) == sizes
    data = load_data(str(tmp_path / "work"))
    assert data.labels == LABELS and data.images
    assert {name: len(rows) for name, rows in data.splits.items()} == sizes
    whole = datasets.load_dataset("parquet", data_files=str(given / "test.parquet"), split="train")
    whole = whole.cast_column("image", datasets.Image(decode=False))
    test = data.split("test").images
    assert test is not None and test.files == [row["bytes"] for row in whole["image"][:20]]
    train, dev = data.split("train").images, data.split("dev").images
    assert train is not None and dev is not None and not set(train.files) & set(dev.files)
    lines = [json.loads(line) for line in (tmp_path / "work/images/dev.jsonl").read_text().splitlines()]
    assert [(tmp_path / "work/images" / line["image"]).read_bytes() for line in lines] == dev.files
    assert [LABELS.index(line["label"]) for line in lines] == data.split("dev").label.tolist()
