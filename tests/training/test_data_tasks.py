"""Which task a data set is for, by its columns or as it is named, and what each task asks of its rows."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny

from offramp.training.data import BadData, Columns, Dataset, has_label, load_data

FILES = Path(__file__).resolve().parents[1] / "data" / "user_files"
Row = dict[str, Any]
LISTS: list[Row] = [{"text": "good film", "label": ["warm", "good"]}, {"text": "bad film", "label": []}] * 4
VALUES: list[Row] = [{"text": "good film", "label": 4.5}, {"text": "bad film", "label": 1}] * 4
TAGGED: list[Row] = [
    {"tokens": ["the", "plot"], "ner_tags": ["O", "B-X"]},
    {"tokens": ["a", "film"], "ner_tags": ["O", "O"]},
] * 4
CLASSES: list[Row] = [{"text": "good film", "label": 1}, {"text": "bad film", "label": 0}] * 4


def write(file: Path, rows: list[Row]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def load(source: Path, **options: Any) -> tuple[Dataset, str]:
    messages = io.StringIO()
    data = load_data(str(source), options.pop("columns", None), messages=messages, **options)
    return data, messages.getvalue()


BY_COLUMNS: dict[str, tuple[list[Row], str]] = {
    "lists of names": (LISTS, "multi-label-classification"),
    "lists of numbers": (
        [{"text": "a", "label": [0, 2]}, {"text": "b", "label": [1]}] * 4,
        "multi-label-class",
    ),
    "lists under labels": (
        [{"text": "a", "labels": ["x"]}, {"text": "b", "labels": ["y", "x"]}] * 4,
        "multi-label-classification",
    ),
    "the first list is empty": (LISTS[::-1], "multi-label-classification"),
    "fractions": (VALUES, "regression"),
    "whole floats": ([{"text": "a", "label": 1.0}, {"text": "b", "label": 0.0}] * 4, "classification"),
    "texts of fractions": (
        [{"text": "a", "label": "1.5"}, {"text": "b", "label": "2.5"}] * 4,
        "classification",
    ),
    "tokens and ner_tags": (TAGGED, "token-classification"),
    "tokens and tags": (
        [{"tokens": row["tokens"], "tags": row["ner_tags"]} for row in TAGGED],
        "token-classification",
    ),
    "tokens and labels": (
        [{"tokens": row["tokens"], "labels": row["ner_tags"]} for row in TAGGED],
        "token-classification",
    ),
    "words under text, tags under label": (
        [{"text": row["tokens"], "label": row["ner_tags"]} for row in TAGGED],
        "token-classification",
    ),
    "entities": (
        [
            {"text": "the plot", "entities": [{"start": 4, "end": 8, "label": "X"}]},
            {"text": "a film", "entities": []},
        ]
        * 4,
        "token-classification",
    ),
    "entities under label, as doccano writes them": (
        [{"text": "the plot", "label": [[4, 8, "X"]]}, {"text": "a film", "label": []}] * 4,
        "token-classification",
    ),
    "classes": (CLASSES, "classification"),
    "classes beside lists of words and tags": (
        [row | {"tokens": ["a"], "tags": ["x"], "labels": ["y"], "entities": []} for row in CLASSES],
        "classification",
    ),
}


@pytest.mark.parametrize("name", BY_COLUMNS)
def test_the_task_is_found_by_the_columns(tmp_path: Path, name: str) -> None:
    rows, task = BY_COLUMNS[name]
    data, printed = load(write(tmp_path / "a.jsonl", rows))
    assert data.task.startswith(task)
    assert (f"a.jsonl: {'words' if 'token' in task else 'labels'}" in printed) == (task != "classification")


@pytest.mark.parametrize(
    ("name", "task"),
    [("fractions.csv", "regression"), ("lists_of_labels.jsonl", "multi-label-classification")],
)
def test_a_line_tells_the_task_that_was_found(name: str, task: str) -> None:
    data, printed = load(FILES / name)
    assert data.task == task and f"{name}: labels are " in printed and f"read for {task}\n" in printed


def test_train_decides_on_the_task(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", CLASSES)
    write(tmp_path / "dev.jsonl", VALUES)
    with pytest.raises(BadData, match=r"dev\.jsonl, row 1: label 4\.5 is a fraction"):
        load(tmp_path)


def test_a_split_with_labels_decides_where_train_has_none(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a film\nthe plot\n")
    write(tmp_path / "test.jsonl", TAGGED)
    data, _ = load(tmp_path, labels_needed=False)
    assert data.task == "token-classification" and data.labels == ("O", "B-X")
    assert {split: rows.labelled for split, rows in data.splits.items()} == {
        "train": False,
        "dev": False,
        "test": True,
    }


def test_a_named_task_wins(tmp_path: Path) -> None:
    data, printed = load(write(tmp_path / "a.jsonl", CLASSES), task="regression")
    assert data.task == "regression" and data.labels == () and data.split("train").label.dtype == np.float32
    assert "read for" not in printed


def test_an_unknown_task_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"task 'ner': unknown; known: classification, .*token-class"):
        load(write(tmp_path / "a.jsonl", TAGGED), task="ner")


@pytest.mark.parametrize("rows", [CLASSES, LISTS, VALUES])
def test_an_embedding_reads_no_labels(tmp_path: Path, rows: list[Row]) -> None:
    data, printed = load(write(tmp_path / "a.jsonl", rows), task="sentence-embedding")
    assert data.labels == () and not any(split.labelled for split in data.splits.values())
    assert len(data.split("train")) == 7 and "1 of 8 train rows aside" in printed and "class" not in printed


@pytest.mark.parametrize("task", ["sentence-embedding", "token-classification"])
def test_a_second_text_is_refused_where_a_task_reads_one(tmp_path: Path, task: str) -> None:
    rows = [{"text": "a film", "text_b": "a plot", "entities": []}] * 4
    with pytest.raises(
        BadData, match=rf"a\.jsonl: a second text in column 'text_b', and {task} reads one text"
    ):
        load(write(tmp_path / "a.jsonl", rows), task=task)


@pytest.mark.parametrize("task", ["sentence-embedding", "token-classification"])
def test_images_are_refused_by_tasks_of_texts(tmp_path: Path, task: str) -> None:
    rows = [{"image": "a.png", "label": number} for number in range(4)]
    with pytest.raises(BadData, match=rf"a\.jsonl: images, and {task} is for texts"):
        load(write(tmp_path / "a.jsonl", rows), task=task)


IMAGES: list[tuple[list[Any], str, list[Any]]] = [
    (
        [["red", "warm"], [], ["red"], ["warm"]],
        "multi-label-classification",
        [[1, 1], [0, 0], [1, 0], [0, 1]],
    ),
    ([1.5, 2, 0.25, -4], "regression", [1.5, 2, 0.25, -4]),
]


@pytest.mark.parametrize(("labels", "task", "expected"), IMAGES)
def test_images_have_lists_of_labels_and_values_too(
    tmp_path: Path, labels: list[Any], task: str, expected: list[Any]
) -> None:
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.jsonl", [{"image": "a.png", "label": label} for label in labels])
    data, _ = load(tmp_path)
    assert data.task == task and data.has_images
    assert data.split("dev").label.tolist() == expected
    assert data.split("dev").take(np.array([3, 0])).label.tolist() == [expected[3], expected[0]]


def test_images_and_lists_of_a_parquet_file_go_together(tmp_path: Path) -> None:
    names = ["red", "warm"]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Sequence(datasets.ClassLabel(names=names))}
    )
    images = [{"bytes": tiny.png(0, number), "path": None} for number in range(4)]
    table = {"image": images, "label": [[1], [0, 1], [], [0]]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train.parquet")
    data, _ = load(tmp_path, dev_share=0.3)
    assert data.labels == ("red", "warm") and data.has_images and data.task == "multi-label-classification"


def test_rows_of_every_task_are_set_aside_as_dev_alike(tmp_path: Path) -> None:
    rows = [
        {"text": f"film {number}", "label": [number % 3], "value": number / 4, "entities": []}
        for number in range(20)
    ]
    rows[4]["entities"] = [{"start": 0, "end": 4, "label": "X"}]
    file = write(tmp_path / "a.jsonl", rows)
    chosen = {
        "multi-label-classification": Columns(),
        "regression": Columns(label="value"),
        "token-classification": Columns(label="entities"),
        "sentence-embedding": Columns(),
    }
    for task, columns in chosen.items():
        data, printed = load(file, task=task, columns=columns)
        assert data.split("dev").text == ["film 4", "film 19"], task
        assert "no dev split; set 2 of 20 train rows aside (seed 0)" in printed


UNLABELLED = ["multi-label-classification", "token-classification", "regression", "sentence-embedding"]


@pytest.mark.parametrize("task", UNLABELLED)
@pytest.mark.parametrize("name", ["lines.txt", "texts_alone.json", "all_unlabelled.csv"])
def test_rows_without_labels_are_read_for_every_task(task: str, name: str) -> None:
    data, _ = load(FILES / name, task=task, labels_needed=False)
    rows = data.split("train")
    assert data.labels == () and not rows.labelled and rows.has_label.tolist() == [False] * len(rows)
    assert len(rows.text) == len(rows) == len(rows.take(np.arange(len(rows))))


@pytest.mark.parametrize("task", UNLABELLED[:3])
def test_lines_of_text_are_refused_where_labels_are_needed(task: str) -> None:
    with pytest.raises(
        BadData, match=r"lines\.txt: lines of text without labels; needed here: a column 'label'"
    ):
        load(FILES / "lines.txt", task=task)


def test_a_task_names_the_columns_that_it_needs(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"words": ["a"], "kinds": ["O"]}] * 4)
    with pytest.raises(
        BadData, match=r"no column 'text'.*token-classification needs lists in 'tokens' and 'ner_t"
    ):
        load(file, task="token-classification")
    data, _ = load(
        file, columns=Columns(text="words", label="kinds"), task="token-classification", labels_needed=False
    )
    assert data.labels == ("O",)


def test_splits_without_labels_are_left_out_for_every_task(tmp_path: Path) -> None:
    splits = {"multi-label": (LISTS, None), "regression": (VALUES, -1), "token": (TAGGED, None)}
    for task, (rows, nothing) in splits.items():
        root = tmp_path / task
        root.mkdir()
        label = "ner_tags" if rows is TAGGED else "label"
        write(root / "train.jsonl", rows)
        write(root / "dev.jsonl", rows)
        write(root / "test.jsonl", [row | {label: nothing} for row in rows])
        data, printed = load(root)
        assert data.task.startswith(task) and sorted(data.splits) == ["dev", "train"]
        assert f"test.jsonl: no row has a label in column {label!r}; the split is left out" in printed
        with pytest.raises(BadData, match=r"test\.jsonl: no row has a label"):
            data.split("test")
        assert not load(root, labels_needed=False)[0].split("test").labelled


SAME: list[tuple[list[Row], str]] = [
    ([{"text": "a", "label": ["x", "y"]}] * 4, r"every row has the labels \['x', 'y'\]"),
    ([{"text": "a", "label": 2.5}] * 4, r"every row has the value 2\.5"),
    ([{"tokens": ["a", "b"], "tags": ["O", "O"]}] * 4, r"every word has the label 'O'"),
]


@pytest.mark.parametrize(("rows", "message"), SAME)
def test_labels_that_are_all_the_same_are_refused(tmp_path: Path, rows: list[Row], message: str) -> None:
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(BadData, match=r"a\.jsonl: " + message):
        load(file)
    assert len(load(file, labels_needed=False)[0].split("train")) == 3


def test_has_label_reads_the_labels_of_every_task() -> None:
    assert has_label(np.array([2, -1, 0])).tolist() == [True, False, True]
    assert has_label(np.array([[0, 0], [-1, -1], [0, 1]], np.float32)).tolist() == [True, False, True]
    assert has_label(np.array([-1, np.nan], np.float32)).tolist() == [True, False]
    assert has_label(np.empty((2, 0), np.float32)).tolist() == [False, False]
