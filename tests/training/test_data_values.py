"""Numbers to predict, as users bring them: each is read as it stands, or refused in one line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from offramp.training.data import BadData, Dataset, load_data

NAN = float("nan")


def load(root: Path, name: str, content: str | list[Any], **options: Any) -> tuple[Dataset, str]:
    """Data of one file for regression: its text, or the labels of JSON lines; and what is printed."""
    if not isinstance(content, str):
        rows = [{"text": f"film {row}", "label": label} for row, label in enumerate(content)]
        content = "".join(json.dumps(row) + "\n" for row in rows)
    (root / name).write_text(content)
    messages = io.StringIO()
    data = load_data(str(root / name), messages=messages, **{"task": "regression"} | options)
    return data, messages.getvalue()


def values(data: Dataset) -> list[float]:
    """The values of all rows in the order of their texts."""
    rows = [pair for split in data.splits.values() for pair in zip(split.text, split.label, strict=True)]
    return [float(value) for _, value in sorted(rows, key=lambda row: row[0])]


READ: dict[str, tuple[str | list[Any], list[float]]] = {
    "fractions.jsonl": ([1.5, 2, -0.25], [1.5, 2, -0.25]),
    "integers.jsonl": ([3, 1, -1], [3, 1, -1]),
    "many_integers.jsonl": ([1000 + row for row in range(10)], [1000.0 + row for row in range(10)]),
    "texts.jsonl": (["3.5", " 4 ", "-1e-3"], [3.5, 4, np.float32(-1e-3)]),
    "floats.csv": ("text,label\nfilm 0,3.5\nfilm 1,4\nfilm 2,.5\n", [3.5, 4, 0.5]),
    "integers.csv": ("text,label\nfilm 0,3\nfilm 1,4\nfilm 2,3\n", [3, 4, 3]),
    "exponents.tsv": ("text\tlabel\nfilm 0\t1e2\nfilm 1\t+4.\nfilm 2\t0\n", [100, 4, 0]),
    "quoted.csv": ('text,label\nfilm 0,"3.5"\nfilm 1,"4"\nfilm 2,"0.5"\n', [3.5, 4, 0.5]),
}


@pytest.mark.parametrize("name", READ)
def test_numbers_are_read_as_they_stand(tmp_path: Path, name: str) -> None:
    content, expected = READ[name]
    data, _ = load(tmp_path, name, content)
    assert values(data) == expected
    assert data.labels == () and all(rows.label.dtype == np.float32 for rows in data.splits.values())


WITHOUT: dict[str, str | list[Any]] = {
    "null.jsonl": [1.5, None, 2.5],
    "nan.jsonl": [1.5, NAN, 2.5],
    "words.jsonl": ["1.5", "n/a", "2.5"],
    "empty.csv": "text,label\nfilm 0,1.5\nfilm 1,\nfilm 2,2.5\n",
    "nan.csv": "text,label\nfilm 0,1.5\nfilm 1,NaN\nfilm 2,2.5\n",
    "na.csv": "text,label\nfilm 0,1.5\nfilm 1,NA\nfilm 2,2.5\n",
    "absent.jsonl": (
        '{"text": "film 0", "label": 1.5}\n{"text": "film 1"}\n{"text": "film 2", "label": 2.5}\n'
    ),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_a_row_without_a_number_is_named_where_it_is_needed(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadData, match=rf"{name}, row 2: no label; label the row or take it out"):
        load(tmp_path, name, WITHOUT[name])


@pytest.mark.parametrize("name", WITHOUT)
def test_a_row_without_a_number_is_nan_where_none_is_needed(tmp_path: Path, name: str) -> None:
    data, printed = load(tmp_path, name, WITHOUT[name], labels_needed=False)
    assert str(values(data)) == "[1.5, nan, 2.5]"
    assert f"{name}: rows without a label: 1 of 3" in printed


REFUSED: dict[str, tuple[str | list[Any], str]] = {
    "word.jsonl": ([1.5, "good"], ", row 2: label 'good' is no number to predict; give one such as 3.5"),
    "word.csv": ("text,label\na,1.5\nb,good\n", ", row 2: label 'good' is no number"),
    "decimal_comma.csv": (
        "text;label\na;1,5\nb;2\n",
        ", row 1: label '1,5' is no number to predict; write 1.5",
    ),
    "percent.csv": ("text,label\na,15%\nb,2\n", ", row 1: label '15%' is no number"),
    "boolean.jsonl": ([1.5, True], ", row 2: label True is no number to predict"),
    "list.jsonl": ([[1.5], [2.5]], ", row 1: label [1.5] is no number to predict"),
    "object.jsonl": ([{"score": 1.5}, 2], ", row 1: label {'score': 1.5} is no number to predict"),
    "infinity.jsonl": ([1.5, float("inf")], ", row 2: label inf is beyond the numbers of float32"),
    "too_large.jsonl": ([1.5, -(10**60)], ", row 2: label -1000"),
    "all_minus_one.jsonl": ([-1, -1.0], "no row has a label in column 'label'"),
    "no_column.csv": ("text,score\na,1.5\nb,2\n", "no column 'label'; it has: text, score"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_values_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, part = REFUSED[name]
    with pytest.raises(BadData) as caught:
        load(tmp_path, name, content)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(tmp_path / name)) and part in message, message


def test_nan_in_a_column_of_fractions_leaves_it_a_column_of_fractions(tmp_path: Path) -> None:
    data, _ = load(tmp_path, "a.jsonl", [1.5, NAN, None, 2], task=None, labels_needed=False)
    assert data.task == "regression" and str(values(data)) == "[1.5, nan, nan, 2.0]"


def test_minus_one_in_all_rows_of_a_split_stands_for_no_number(tmp_path: Path) -> None:
    for split, labels in (("train", [1.5, -1]), ("dev", [-1, 2]), ("test", [-1.0, -1.0])):
        rows = [{"text": "a", "label": label} for label in labels]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_data(str(tmp_path), labels_needed=False, messages=io.StringIO())
    assert {split: rows.has_label.all() for split, rows in data.splits.items()} == {
        "train": True,
        "dev": True,
        "test": False,
    }


def test_floats_of_a_parquet_file_are_values(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.Value("float32")})
    table = {"text": ["film 0", "film 1", "film 2"], "label": [3.8, 0.0, 5.0]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train.parquet")
    data = load_data(str(tmp_path), messages=io.StringIO())
    assert data.task == "regression" and values(data) == [np.float32(3.8), 0, 5]
