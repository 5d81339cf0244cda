"""Labels over several splits: which numbers they get, which splits have none, and which rows are refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from offramp.training.data import NO_LABEL, BadData, Dataset, balanced_index, load_data

LABELS = dict[str, list[Any]]


def write(root: Path, splits: LABELS, **more: list[Any]) -> Path:
    """JSON lines by split, with a text and such a label for each row; more: columns of train."""
    for split, labels in splits.items():
        rows = [{"text": f"{split} {row}", "label": label} for row, label in enumerate(labels)]
        for name, values in more.items() if split == "train" else ():
            rows = [row | {name: value} for row, value in zip(rows, values, strict=True)]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def load(root: Path, splits: LABELS, *, needed: bool = True) -> tuple[Dataset, str]:
    messages = io.StringIO()
    data = load_data(str(write(root, splits)), labels_needed=needed, messages=messages)
    return data, messages.getvalue()


def numbers(data: Dataset) -> dict[str, list[int]]:
    return {split: rows.label.tolist() for split, rows in data.splits.items()}


@pytest.mark.parametrize(
    ("splits", "labels", "expected"),
    [
        ({"train": ["b", "a"], "dev": ["a"]}, ("a", "b"), {"train": [1, 0], "dev": [0]}),
        ({"train": ["10", "9", "2"], "dev": ["2"]}, ("10", "2", "9"), {"train": [0, 2, 1], "dev": [1]}),
        ({"train": [2, 0, 1], "dev": [0]}, ("0", "1", "2"), {"train": [2, 0, 1], "dev": [0]}),
        ({"train": [2, 0], "dev": [1]}, ("0", "1", "2"), {"train": [2, 0], "dev": [1]}),
        ({"train": [True, False], "dev": [True]}, ("False", "True"), {"train": [1, 0], "dev": [1]}),
        ({"train": ["1", "0"], "dev": [1, 0]}, ("0", "1"), {"train": [1, 0], "dev": [1, 0]}),
        ({"train": [1, 0], "dev": ["1"]}, ("0", "1"), {"train": [1, 0], "dev": [1]}),
    ],
)
def test_names_and_numbers_from_zero_stay_as_they_were(
    tmp_path: Path, splits: LABELS, labels: tuple[str, ...], expected: dict[str, list[int]]
) -> None:
    data, printed = load(tmp_path, splits)
    assert data.labels == labels and numbers(data) == expected
    assert "numbered" not in printed


def test_the_rows_that_are_set_aside_stay_the_same(tmp_path: Path) -> None:
    data, _ = load(tmp_path, {"train": ["x", "y"] * 10})
    assert data.split("dev").text == ["train 4", "train 19"]
    assert data.split("train").text == [f"train {row}" for row in range(20) if row not in (4, 19)]


@pytest.mark.parametrize(
    ("splits", "labels", "expected"),
    [
        ({"train": [5, 1, 3], "dev": [3]}, ("1", "3", "5"), {"train": [2, 0, 1], "dev": [1]}),
        ({"train": [1, -1], "dev": [-1, 1]}, ("-1", "1"), {"train": [1, 0], "dev": [0, 1]}),
        ({"train": [1, -1, 0], "dev": [-1, 1]}, ("-1", "0", "1"), {"train": [2, 0, 1], "dev": [0, 2]}),
        ({"train": [2.0, 1.0, None], "dev": [1]}, ("1", "2"), {"train": [1, 0, -1], "dev": [0]}),
    ],
)
def test_other_integers_are_numbered_in_order_and_keep_their_names(
    tmp_path: Path, splits: LABELS, labels: tuple[str, ...], expected: dict[str, list[int]]
) -> None:
    data, printed = load(tmp_path, splits, needed=False)
    assert data.labels == labels and numbers(data) == expected
    assert printed.count("are numbered 0 to") == 1


def test_numbers_to_predict_are_no_classes(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"train\.jsonl: 150 different whole numbers .* of the task regression"):
        load(tmp_path, {"train": [1000 + 7 * row for row in range(150)]})


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (
            {"train": ["a", "b"], "dev": ["a", "c"]},
            r"dev\.jsonl, row 2: label 'c' is not one of \['a', 'b'\]",
        ),
        ({"train": [1, 2], "test": [1, 2, 3]}, r"test\.jsonl, row 3: label 3 is not one of \['1', '2'\]"),
        ({"train": [0, 1], "test": [0, 7]}, r"test\.jsonl, row 2: label 7 is not one of \['0', '1'\]"),
        ({"train": [0, 1], "dev": [1, -1]}, r"dev\.jsonl, row 2: label -1 .*train\.jsonl run from 0; label"),
        ({"train": [0, -1, 1], "dev": [0, 1]}, r"train\.jsonl, row 2: label -1 .*dev\.jsonl run from 0"),
        ({"train": ["a", "b"], "dev": ["a", None]}, r"dev\.jsonl, row 2: no label; label the row or take it"),
        ({"train": ["a", " "], "dev": ["a"]}, r"train\.jsonl, row 2: no label"),
        ({"train": [0, 1], "dev": [0.5]}, r"dev\.jsonl, row 1: label 0\.5 is a fraction"),
        ({"train": [-1, -1], "test": [-1]}, r"train\.jsonl: no row has a label"),
    ],
)
def test_a_wrong_label_is_named_with_file_and_row(tmp_path: Path, splits: LABELS, message: str) -> None:
    with pytest.raises(BadData, match=message) as caught:
        load(tmp_path, splits)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("labels", [[-1, -1], [None, None], [None, -1], [-1.0, -1.0]])
def test_a_split_without_labels_is_left_out_and_named_where_they_are_needed(
    tmp_path: Path, labels: list[Any]
) -> None:
    splits: LABELS = {"train": [0, 1], "dev": [1, 0], "test": labels}
    data, printed = load(tmp_path, splits)
    assert sorted(data.splits) == ["dev", "train"]
    assert "test.jsonl: no row has a label in column 'label'; the split is left out" in printed
    with pytest.raises(BadData, match=r"test\.jsonl: no row has a label"):
        data.split("test")
    data, _ = load(tmp_path, splits, needed=False)
    assert numbers(data) == {"train": [0, 1], "dev": [1, 0], "test": [NO_LABEL, NO_LABEL]}
    assert data.split("train").labelled and not data.split("test").labelled


def test_a_test_split_without_the_column_is_named_where_it_is_needed(tmp_path: Path) -> None:
    write(tmp_path, {"train": ["a", "b"], "dev": ["a", "b"]})
    (tmp_path / "test.csv").write_text("text,Label\na plot,a\n")
    data = load_data(str(tmp_path), messages=io.StringIO())
    with pytest.raises(BadData, match=r"test\.csv: no column 'label'; it has: text, Label; .*--label-column"):
        data.split("test")
    assert not load_data(str(tmp_path), labels_needed=False, messages=io.StringIO()).split("test").labelled


def test_a_dev_split_without_the_column_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"train": ["a", "b"]})
    (tmp_path / "dev.csv").write_text("text,Label\na plot,a\n")
    with pytest.raises(BadData, match=r"dev\.csv: no column 'label'; it has: text, Label"):
        load_data(str(tmp_path), messages=io.StringIO())


def test_one_class_is_enough_where_labels_are_not_needed(tmp_path: Path) -> None:
    data, _ = load(tmp_path, {"train": ["a", "a"], "dev": ["a"]}, needed=False)
    assert data.labels == ("a",)
    with pytest.raises(BadData, match=r"train\.jsonl: every row has the label 'a'"):
        load(tmp_path, {"train": ["a", "a"], "dev": ["a"]})


def test_classes_that_a_split_lacks_are_listed(tmp_path: Path) -> None:
    _, printed = load(tmp_path, {"train": ["a", "b", "c"], "dev": ["a"], "test": ["c", "b", "a"]})
    assert printed.splitlines() == [f"{tmp_path}: dev has no row of 2 of 3 classes: b, c"]


def test_label_text_names_other_integers_too(tmp_path: Path) -> None:
    write(tmp_path, {"train": [4, 2, 4], "dev": [2]}, label_text=["four", "two", "four"])
    data = load_data(str(tmp_path), messages=io.StringIO())
    assert data.labels == ("two", "four") and numbers(data) == {"train": [1, 0, 1], "dev": [0]}


def test_class_names_of_a_file_are_kept_and_minus_one_there_is_no_label(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])}
    )
    for split, labels in (("train", [1, 0, 1]), ("dev", [0, -1])):
        rows = {"text": ["a plot"] * len(labels), "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    data = load_data(str(tmp_path), labels_needed=False, messages=io.StringIO())
    assert data.labels == ("x", "y") and numbers(data) == {"train": [1, 0, 1], "dev": [0, -1]}
    with pytest.raises(BadData, match=r"dev\.parquet, row 2: label -1 stands for no label"):
        load_data(str(tmp_path), messages=io.StringIO())


def test_second_texts_in_some_splits_alone_are_reported(tmp_path: Path) -> None:
    write(tmp_path, {"train": ["a", "b"], "dev": ["a", "b"]}, text_b=["x", "y"])
    messages = io.StringIO()
    load_data(str(tmp_path), messages=messages)
    assert "dev has no column 'text_b', and another split has it" in messages.getvalue()


def test_rows_of_rarer_labels_are_repeated_evenly() -> None:
    labels = np.array([4, 0, 0, 2, 0, 4, 0, 4, 0])
    index = balanced_index(labels)
    assert index.tolist() == [0, 0, 1, 2, 3, 3, 3, 3, 3, 4, 5, 5, 6, 7, 8]
    assert np.bincount(labels[index]).tolist() == [5, 0, 5, 0, 5]
    assert balanced_index(np.array([1, 0, 1, 0])).tolist() == [0, 1, 2, 3]
