"""Rows with several labels, as users bring them: each is read as it stands, or refused in one line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from offramp.training.data import BadData, Dataset, load_data

TASK = "multi-label-classification"
Labels = tuple[str, ...]


def load(root: Path, name: str, content: str | list[Any], **options: Any) -> tuple[Dataset, str]:
    """Data of one file: its text, or the labels of JSON lines, and what is printed about it."""
    if not isinstance(content, str):
        rows = [{"text": f"film {row}", "label": label} for row, label in enumerate(content)]
        content = "".join(json.dumps(row) + "\n" for row in rows)
    (root / name).write_text(content)
    messages = io.StringIO()
    return load_data(str(root / name), messages=messages, **options), messages.getvalue()


def given(data: Dataset) -> list[Labels | None]:
    """Names of the labels of every row, in the order of the texts; None without labels."""
    rows = [
        (text, tuple(name for name, value in zip(data.labels, label, strict=True) if value > 0))
        if (label >= 0).any()
        else (text, None)
        for split in data.splits.values()
        for text, label in zip(split.text, split.label, strict=True)
    ]
    return [labels for _, labels in sorted(rows)]


READ: dict[str, tuple[str | list[Any], list[Labels]]] = {
    "names.jsonl": ([["warm", "good"], ["bad"], []], [("good", "warm"), ("bad",), ()]),
    "numbers.jsonl": ([[2, 0], [1], []], [("0", "2"), ("1",), ()]),
    "whole_floats.jsonl": ([[2.0, 0.0], [1.0], []], [("0", "2"), ("1",), ()]),
    "other_numbers.jsonl": ([[30, 10], [20], [10]], [("10", "30"), ("20",), ("10",)]),
    "one_label.jsonl": ([["toxic"], [], []], [("toxic",), (), ()]),
    "twice.jsonl": ([["a", "b", "a"], ["b"], []], [("a", "b"), ("b",), ()]),
    "spaces.jsonl": ([[" a", "b"], ["a "], []], [("a", "b"), ("a",), ()]),
    "names_with_commas.jsonl": (
        [["Sci-Fi, new", "b;c"], ["b;c"], []],
        [("Sci-Fi, new", "b;c"), ("b;c",), ()],
    ),
    "single_names.jsonl": ([["a", "b"], "a, b", []], [("a", "b"), ("a, b",), ()]),
    "many_numbers.jsonl": (
        [[row, 1000 + row] for row in range(120)],
        [(str(row), str(1000 + row)) for row in sorted(range(120), key=str)],
    ),
    "pandas.csv": (
        "text,label\nfilm 0,\"['warm', 'good']\"\nfilm 1,['bad']\nfilm 2,[]\n",
        [("good", "warm"), ("bad",), ()],
    ),
    "json.csv": (
        'text,label\nfilm 0,"[""a b"", ""c""]"\nfilm 1,"[""c""]"\nfilm 2,[]\n',
        [("a b", "c"), ("c",), ()],
    ),
    "numbers.csv": ("text;label\nfilm 0;[0, 2]\nfilm 1;[1]\nfilm 2;[]\n", [("0", "2"), ("1",), ()]),
    "bars.csv": (
        "text,label\nfilm 0,warm|very good\nfilm 1,bad\nfilm 2,bad|warm|\n",
        [("very good", "warm"), ("bad",), ("bad", "warm")],
    ),
    "semicolons.tsv": (
        "text\tlabel\nfilm 0\ta; b\nfilm 1\tb\nfilm 2\ta, b\n",
        [("a", "b"), ("b",), ("a, b",)],
    ),
    "commas.csv": ('text,label\nfilm 0,"a, b"\nfilm 1,b\nfilm 2,a\n', [("a", "b"), ("b",), ("a",)]),
    "single.csv": ("text,label\nfilm 0,a\nfilm 1,b\nfilm 2,a\n", [("a",), ("b",), ("a",)]),
    "columns.json": (
        '{"text": ["film 0", "film 1", "film 2"], "label": [["a"], ["b", "a"], []]}',
        [("a",), ("a", "b"), ()],
    ),
    "array.json": (
        '[{"text": "film 0", "label": ["a"]}, {"text": "film 1", "label": ["b"]}, '
        '{"text": "film 2", "label": []}]',
        [("a",), ("b",), ()],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_several_labels_are_read_as_they_stand(tmp_path: Path, name: str) -> None:
    content, expected = READ[name]
    data, _ = load(tmp_path, name, content, task=TASK)
    assert given(data) == expected
    assert list(data.labels) == sorted({label for labels in expected for label in labels}, key=_order)


def _order(name: str) -> tuple[int, str]:
    return int(name) if name.isdigit() else 0, name


NOTED: dict[str, str] = {
    "twice.jsonl": "rows that have a label twice, which counts once: 1, first row 1: ['a', 'b', 'a']",
    "spaces.jsonl": "rows whose label has space around it, which is taken off: 2, first row 1: ' a'",
    "other_numbers.jsonl": "integer labels 10, 20, 30 are numbered 0 to 2 in ascending order",
    "bars.csv": 'labels are split at \'|\'; write a list such as ["a", "b"] where it is part of a name',
    "semicolons.tsv": "labels are split at ';'",
    "commas.csv": "labels are split at ','",
}


@pytest.mark.parametrize("name", NOTED)
def test_one_line_tells_what_is_read_otherwise(tmp_path: Path, name: str) -> None:
    _, printed = load(tmp_path, name, READ[name][0], task=TASK)
    assert [line for line in printed.splitlines() if NOTED[name] in line and name in line], printed


REFUSED: dict[str, tuple[str | list[Any], tuple[str, ...]]] = {
    "null.jsonl": ([["a"], None, ["b"]], (", row 2: no label; label the row, with [] if it has none",)),
    "nan.jsonl": ([["a"], float("nan"), ["b"]], (", row 2: no label",)),
    "empty_cell.csv": ("text,label\na,x|y\nb,\nc,x\n", (", row 2: no label; label the row, with []",)),
    "all_null.jsonl": ([None, None], ("no row has a label in column 'label'",)),
    "all_empty.jsonl": ([[], [], []], ("no row has a label in column 'label'",)),
    "null_in_list.jsonl": ([["a"], ["b", None]], (", row 2: None among the labels", "give a list")),
    "empty_name.jsonl": ([["a"], ["b", " "]], (", row 2: ' ' among the labels",)),
    "fraction_in_list.jsonl": ([["a"], [0.25, 0.75]], (", row 2: 0.25 among the labels",)),
    "list_in_list.jsonl": ([["a"], [["b"]]], (", row 2: ['b'] among the labels",)),
    "scores.jsonl": (
        [{"a": 0.5, "b": 1}, ["b"]],
        (", row 1: {'a': 0.5, 'b': 1} among the labels", "give a list"),
    ),
    "one_hot_lists.jsonl": (
        [[0, 1], [0, 0], [1, 1]],
        (", row 2: the labels [0, 0] are a 0 or 1 for each label", "of those that are 1, here []"),
    ),
    "one_hot_floats.jsonl": (
        [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]],
        (", row 1: the labels [0.0, 1.0, 1.0] are a 0 or 1", "here [1, 2]"),
    ),
    "one_hot_columns.csv": (
        "text,toxic,rude\na,1,0\nb,0,0\n",
        (
            "no column 'label'",
            "columns toxic, rude hold 0 or 1 in every row",
            "lists the names of those that are 1",
        ),
    ),
    "one_hot_column.csv": (
        "text,label,rude\na,1,0\nb,0,0\n",
        ("column 'label' holds 0 or 1 in every row; write one column that lists the names",),
    ),
    "numpy.csv": (
        "text,label\na,['x' 'y']\nb,['x']\n",
        (", row 1: label", "no list that JSON or Python reads"),
    ),
    "unquoted.csv": (
        "text,label\na,[x]\nb,[y]\n",
        (", row 1: label '[x]' is no list", 'write one such as ["a", "b"]'),
    ),
    "word_among_numbers.jsonl": ([[0, 1], [1], ["x"]], (", row 3: label 'x' is not one of ['0', '1']",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_labels_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, parts = REFUSED[name]
    with pytest.raises(BadData) as caught:
        load(tmp_path, name, content, task=TASK)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(tmp_path / name)), message
    assert all(part in message for part in parts), message


def test_columns_of_zeros_and_ones_are_named_without_a_task_too(tmp_path: Path) -> None:
    content = REFUSED["one_hot_columns.csv"][0]
    with pytest.raises(BadData, match="columns toxic, rude hold 0 or 1 in every row: for multi-label"):
        load(tmp_path, "a.csv", content)


def test_a_separator_in_the_names_of_classes_is_part_of_them(tmp_path: Path) -> None:
    data, _ = load(tmp_path, "a.csv", READ["bars.csv"][0])
    assert data.task == "classification" and data.labels == ("bad", "bad|warm|", "warm|very good")


def test_lists_in_cells_are_found_without_a_task(tmp_path: Path) -> None:
    data, printed = load(tmp_path, "a.csv", READ["pandas.csv"][0])
    assert data.task == TASK and "a.csv: labels are lists: read for multi-label-classification" in printed


def test_a_row_with_an_empty_list_has_none_of_the_labels_and_one_with_null_is_unlabelled(
    tmp_path: Path,
) -> None:
    data, printed = load(tmp_path, "a.jsonl", [["a"], [], None, ["b"]], labels_needed=False)
    assert given(data) == [("a",), (), None, ("b",)]
    rows = data.split("train")
    assert rows.has_label.tolist() == [text != "film 2" for text in rows.text]
    assert "a.jsonl: rows without a label: 1 of 4" in printed


def write(root: Path, **splits: list[Any]) -> Path:
    for split, labels in splits.items():
        rows = [{"text": f"{split} {row}", "label": label} for row, label in enumerate(labels)]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_labels_are_numbered_as_in_train(tmp_path: Path) -> None:
    write(tmp_path, train=[["b"], ["a", "c"]], dev=[["c"], []], test=[["a", "b"], ["c"]])
    messages = io.StringIO()
    data = load_data(str(tmp_path), messages=messages)
    assert data.labels == ("a", "b", "c")
    assert data.split("test").label.tolist() == [[1, 1, 0], [0, 0, 1]]
    assert f"{tmp_path}: dev has no row of 2 of 3 classes: a, b" in messages.getvalue()


@pytest.mark.parametrize(("train", "dev"), [([["a"], ["b"]], [[], ["c"]]), ([["a"], []], [[], ["b", "a"]])])
def test_a_label_that_train_lacks_is_named(tmp_path: Path, train: list[Any], dev: list[Any]) -> None:
    write(tmp_path, train=train, dev=dev)
    with pytest.raises(BadData, match=r"dev\.jsonl, row 2: label '[bc]' is not one of \['a'"):
        load_data(str(tmp_path), messages=io.StringIO())


def test_minus_one_in_all_lists_of_a_split_stands_for_no_labels(tmp_path: Path) -> None:
    write(tmp_path, train=[[0], [1, 0]], dev=[[1], []], test=[[-1], [-1]])
    data = load_data(str(tmp_path), labels_needed=False, messages=io.StringIO())
    assert data.split("test").label.tolist() == [[-1, -1], [-1, -1]] and not data.split("test").labelled


def test_names_of_numbers_in_a_parquet_file_are_kept(tmp_path: Path) -> None:
    names = ["joy", "anger", "fear"]
    features = datasets.Features(
        {"text": datasets.Value("string"), "labels": datasets.Sequence(datasets.ClassLabel(names=names))}
    )
    table = {"text": ["a", "b", "c"], "labels": [[2, 0], [], [1]]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train.parquet")
    data = load_data(str(tmp_path), messages=io.StringIO())
    assert data.task == TASK and data.labels == ("joy", "anger", "fear")
    assert given(data) == [("joy", "fear"), (), ("anger",)]


def test_pairs_of_texts_have_several_labels_too(tmp_path: Path) -> None:
    rows = [{"text": "a", "text_b": "b", "label": label} for label in (["x"], [], ["x", "y"])]
    data, _ = load(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert data.task == TASK and data.split("train").text_b == ["b", "b"]
