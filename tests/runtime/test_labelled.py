"""Rows for calibration and benchmarks: what is read, and that every error names file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offramp.runtime.bundle.manifest import EMBEDDING, MULTI_LABEL, REGRESSION, TOKENS
from offramp.runtime.errors import BadInput
from offramp.runtime.tuning.labelled import (
    label_number,
    read_labelled,
    read_pairs,
    read_perhaps_labelled,
    read_rows,
)

NAMES = ("negative", "positive")


def written(folder: Path, *rows: Any) -> Path:
    file = folder / "dev.jsonl"
    file.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return file


def test_names_and_numbers_texts_and_pairs(tmp_path: Path) -> None:
    rows = read_labelled(
        written(
            tmp_path,
            {"text": "good", "label": "positive", "more": 1},
            "",
            {"text": "a", "text_b": "b", "label": 0},
        ),
        NAMES,
    )
    assert rows.items == ("good", ("a", "b")) and rows.labels.tolist() == [1, 0]
    assert rows.name == "dev.jsonl"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": "neutral"}, "label 'neutral' is not one of: negative, positive"),
        ({"text": "a", "label": 2}, "label 2 is not one of"),
        ({"text": "a", "label": True}, "label True is not one of"),
        ({"text": "a"}, 'no "label"'),
        ({"text": "", "label": 1}, '"text" is not a text'),
        ({"text": "a", "text_b": 3, "label": 1}, '"text_b" is not a text: 3'),
        ("[1]", "expected a JSON object, found list"),
        ("{", "not JSON"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    file = written(tmp_path, {"text": "good", "label": 1}, row)
    with pytest.raises(BadInput) as error:
        read_labelled(file, NAMES)
    assert str(error.value).startswith(f"{file}, line 2: ") and message in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        read_labelled(tmp_path / "none.jsonl", NAMES)
    with pytest.raises(BadInput, match="it is empty"):
        read_labelled(written(tmp_path), NAMES)
    file = tmp_path / "latin.jsonl"
    file.write_bytes(b'{"text": "caf\xe9", "label": 1}\n')
    with pytest.raises(BadInput, match="cannot be read as UTF-8"):
        read_labelled(file, NAMES)


def test_images_by_lines_and_by_folders(tmp_path: Path) -> None:
    for name in ("no", "yes"):
        (tmp_path / "dev" / name).mkdir(parents=True)
        (tmp_path / "dev" / name / "a.png").write_bytes(b"")
    (tmp_path / "dev" / "yes" / ".hidden").write_bytes(b"")
    file = tmp_path / "dev.jsonl"
    file.write_text('{"image": "dev/no/a.png", "label": "no"}\n{"image": "dev/yes/a.png", "label": 1}\n')
    lines, folders = (read_labelled(place, ("no", "yes"), images=True) for place in (file, tmp_path / "dev"))
    assert lines.items == folders.items == tuple(str(tmp_path / f"dev/{n}/a.png") for n in ("no", "yes"))
    assert lines.labels.tolist() == folders.labels.tolist() == [0, 1]


def test_missing_images_are_named(tmp_path: Path) -> None:
    file = tmp_path / "dev.jsonl"
    file.write_text('{"image": "nowhere.png", "label": 0}\n')
    with pytest.raises(BadInput, match=r"dev\.jsonl, line 1: no such image file: .*nowhere\.png"):
        read_labelled(file, ("no", "yes"), images=True)
    file.write_text('{"text": "a", "label": 0}\n')
    with pytest.raises(BadInput, match='"image" is not a path'):
        read_labelled(file, ("no", "yes"), images=True)
    (tmp_path / "strange").mkdir()
    with pytest.raises(BadInput, match="'strange' is not one of: no, yes"):
        read_labelled(tmp_path, ("no", "yes"), images=True)
    with pytest.raises(BadInput, match="a folder"):
        read_labelled(tmp_path, ("no", "yes"))


def test_rows_with_labels_by_name_or_number(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"text": "a", "label": "positive"},
        {"text": "b", "text_b": "c", "label": 0},
        {"text": "d", "label": 1},
    )
    items, labels, rows_there = read_rows(path, NAMES, 2)
    assert items == ["a", ("b", "c")] and rows_there == 3
    assert labels is not None and labels.tolist() == [1, 0]


@pytest.mark.parametrize("label", ["neutral", 2, -1, True, 1.0, []])
def test_an_unknown_label_is_named(tmp_path: Path, label: object) -> None:
    path = written(tmp_path, {"text": "a", "label": 0}, {"text": "b", "label": label})
    with pytest.raises(BadInput, match=r"dev.jsonl:2: label .* is not one of: negative, positive"):
        read_rows(path, NAMES, 9)


def test_files_without_usable_rows(tmp_path: Path) -> None:
    path = tmp_path / "dev.jsonl"
    for text, message in (
        ("", "no lines"),
        ("\n\n", "no lines"),
        ('{"text": "a"}\n\n{"text": 3}\n', r"dev.jsonl:3: .*expected a string"),
        ('{"text": "a", "label": 1}\n{"text": "a"}\n', r'dev.jsonl:2: "label" must be on every line'),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(BadInput, match=message):
            read_rows(path, NAMES, 9)
    with pytest.raises(BadInput, match="--data"):
        read_rows(tmp_path / "none", NAMES, 9)


def test_names_that_are_numbers_are_never_taken_for_places(tmp_path: Path) -> None:
    names = ("1", "2", "3")
    assert [label_number(value, names, "here") for value in (1, "2", 3)] == [0, 1, 2]
    with pytest.raises(BadInput, match=r"label 0 is not one of: 1, 2, 3$"):
        label_number(0, names, "here")
    assert label_number(True, ("false", "true"), "here") == 1


def test_rows_of_other_tasks(tmp_path: Path) -> None:
    several = read_labelled(written(tmp_path, {"text": "a", "labels": [1]}), NAMES, kind=MULTI_LABEL)
    assert several.labels.tolist() == [[False, True]]
    numbers = written(tmp_path, {"text": "a", "text_b": "b", "label": 2.5}, {"text": "c", "label": -1})
    assert read_labelled(numbers, (), kind=REGRESSION).labels.tolist() == [2.5, -1.0]
    rows, labelled = read_perhaps_labelled(numbers, (), kind=EMBEDDING)
    assert rows.items == (("a", "b"), "c") and not labelled


@pytest.mark.parametrize("form", ["labelled", "rows"])
def test_words_with_tags_and_texts_with_entities(tmp_path: Path, form: str) -> None:
    entities = [{"start": 4, "end": 9, "label": "LOC"}]
    file = written(
        tmp_path,
        {"tokens": ["In", "Paris", "."], "tags": ["O", "B-LOC", 0]},
        {"text": "Not Paris", "entities": entities},
    )
    names = ("O", "B-LOC", "I-LOC")
    if form == "labelled":
        rows, labelled = read_perhaps_labelled(file, names, kind=TOKENS)
        assert labelled
        items, labels = rows.items, rows.labels
    else:
        items, read, there = read_rows(file, names, 9, kind=TOKENS)
        assert read is not None and there == 2
        items, labels = tuple(items), read
    assert items == ("In Paris .", "Not Paris")
    assert labels.tolist() == [[(0, 2, 0), (3, 8, 1), (9, 10, 0)], [(0, 4, 0), (4, 9, 1)]]


def test_words_without_tags_are_rows_without_labels(tmp_path: Path) -> None:
    file = written(tmp_path, {"tokens": ["In", "Paris"]}, {"text": "Not Paris"})
    rows, labelled = read_perhaps_labelled(file, ("O", "B-LOC"), kind=TOKENS)
    assert not labelled and rows.items == ("In Paris", "Not Paris") and rows.labels.tolist() == [-1, -1]


def test_errors_of_other_tasks_name_the_line(tmp_path: Path) -> None:
    file = written(tmp_path, {"text": "a", "labels": ["positive"]}, {"text": "b"})
    with pytest.raises(BadInput, match=r'dev\.jsonl, line 2: no "labels"; every row needs one'):
        read_labelled(file, NAMES, kind=MULTI_LABEL)
    with pytest.raises(BadInput, match=r'dev\.jsonl:2: "labels" must be on every line or on none'):
        read_rows(file, NAMES, 9, kind=MULTI_LABEL)
    with pytest.raises(BadInput, match="a folder; give a file of JSON lines with image and labels"):
        read_labelled(tmp_path, NAMES, kind=MULTI_LABEL, images=True)
    file = written(tmp_path, {"tokens": [], "tags": []})
    with pytest.raises(BadInput, match=r'dev\.jsonl, line 1: "tokens" is not a list of words'):
        read_labelled(file, NAMES, kind=TOKENS)
    with pytest.raises(BadInput, match=r'dev\.jsonl:1: "tokens" is not a list of words'):
        read_rows(file, NAMES, 9, kind=TOKENS)


@pytest.mark.parametrize(
    "row", [{"text": "label"}, {"text": "a film", "label": None}, {"title": "label", "text": "a"}]
)
def test_rows_whose_label_is_null_or_a_word_have_none(tmp_path: Path, row: dict[str, Any]) -> None:
    rows, labelled = read_perhaps_labelled(written(tmp_path, row, {"text": "good"}), NAMES)
    assert not labelled and rows.items == (row["text"], "good")
    with pytest.raises(BadInput, match='line 1: no "label"'):
        read_perhaps_labelled(written(tmp_path, row, {"text": "good", "label": 1}), NAMES)


@pytest.mark.parametrize("longest", [4, 63, 64, 65, 200])
def test_prompt_and_completion_fit_into_what_a_network_reads(tmp_path: Path, longest: int) -> None:
    rows = [{"prompt": "x" * count, "completion": "y" * 90} for count in (1, 3, 50, 70, 90, 100, 150, 300)]
    pairs = read_pairs(
        written(tmp_path, *rows), longest, lambda text: [0] * len(text), lambda text: [1] * len(text)
    )
    for (before, after), row in zip(pairs, rows, strict=True):
        assert 2 <= len(after) == min(64, longest // 2)
        assert len(before) == min(len(row["prompt"]), longest - len(after))
