"""Reading rows: every kind of file, and the messages about wrong rows."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from offramp.runtime.bundle.row_samples import row_hashes
from offramp.runtime.tuning.labelled import read_perhaps_labelled
from offramp.training.batches import encode_texts, shuffled_batches
from offramp.training.checkpoint import TextFacts
from offramp.training.data import BadData, Columns, load_data


def _write(file: Path, rows: list[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_folder_of_json_lines(tmp_path: Path) -> None:
    data = load_data(str(tiny.data_folder(tmp_path / "d")))
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 64, "dev": 32, "test": 32}
    assert data.labels == ("0", "1")


def test_one_file_gives_a_dev_split_and_reports_it(tmp_path: Path) -> None:
    messages = io.StringIO()
    data = load_data(str(_write(tmp_path / "a.jsonl", tiny.rows(50))), messages=messages)
    assert len(data.split("train")) == 45 and len(data.split("dev")) == 5
    assert "5 of 50" in messages.getvalue()


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_other_files_read_the_same(tmp_path: Path, suffix: str) -> None:
    import datasets

    rows = tiny.rows(20)
    table = datasets.Dataset.from_list(rows)
    file = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        table.to_parquet(str(file))
    else:
        table.to_csv(str(file), sep="\t" if suffix == "tsv" else ",")
    data = load_data(str(file), messages=io.StringIO())
    assert sorted(data.split("train").text + data.split("dev").text) == sorted(
        str(row["text"]) for row in rows
    )


def test_string_labels_and_named_columns(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"sentence": "x y", "kind": "spam"},
        {"sentence": "z", "kind": "ham"},
    ] * 5
    file = _write(tmp_path / "a.jsonl", rows)
    data = load_data(str(file), Columns("sentence", "other", "kind"), messages=io.StringIO())
    assert data.labels == ("ham", "spam")


def test_pairs_reach_the_tokenizer_with_types(tmp_path: Path) -> None:
    file = _write(
        tmp_path / "a.jsonl", [{"text": "good film", "text_b": "bad", "label": i % 2} for i in range(10)]
    )
    rows = load_data(str(file), messages=io.StringIO()).split("train")
    encoded = encode_texts(rows, tiny.tokenizer(), TextFacts("", 0, 64))
    assert encoded.types[0] == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": 0}, {"text": "", "label": 1}], r"row 2.*non-empty"),
        ([{"text": "a", "label": 0}, {"text": "b"}], r"row 2: no label"),
        ([{"txt": "a", "label": 0}], r"no column 'text'.*--text-column"),
        ([{"text": "a", "label": 0}, {"text": None, "label": 1}], r"row 2"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, rows: list[dict[str, object]], message: str) -> None:
    file = _write(tmp_path / "a.jsonl", rows)
    with pytest.raises(BadData, match=message) as caught:
        load_data(str(file))
    assert str(file) in str(caught.value)


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(BadData, match=r"a\.jsonl: the file is empty"):
        load_data(str(tmp_path / "a.jsonl"))


def test_broken_json_is_named_by_row(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a", "label": 0}\n{"text": "b", "la\n')
    with pytest.raises(BadData, match="row 2"):
        load_data(str(file))


def test_label_unknown_in_train_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "train.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    _write(tmp_path / "dev.jsonl", [{"text": "a", "label": "z"}])
    with pytest.raises(BadData, match=r"dev.jsonl, row 1: label 'z'"):
        load_data(str(tmp_path))


def test_a_missing_split_lists_the_existing_ones(tmp_path: Path) -> None:
    data = load_data(str(_write(tmp_path / "a.jsonl", tiny.rows(20))), messages=io.StringIO())
    with pytest.raises(BadData, match="train, dev"):
        data.split("test")


def test_batches_contain_every_row_once_and_repeat_exactly() -> None:
    lengths = np.arange(101) % 13
    batches = shuffled_batches(lengths, 8, seed=3, epoch=1)
    assert sorted(np.concatenate(batches)) == list(range(101))
    again = shuffled_batches(lengths, 8, seed=3, epoch=1)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))
    other = shuffled_batches(lengths, 8, seed=3, epoch=2)
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(batches, other, strict=True))


def hashed(source: Path, task: str | None = None) -> set[str]:
    """Hashes of all rows of training data."""
    data = load_data(str(source), task=task, labels_needed=False, messages=io.StringIO())
    return {each for rows in data.splits.values() for each in row_hashes(rows.items)}


@pytest.mark.parametrize(
    ("kind", "task", "rows"),
    [
        ("classification", None, [{"text": " a\u00e9 \U0001f600\t"}, {"text": "b"}]),
        ("classification", None, [{"text": "a", "text_b": "b "}, {"text": "b", "text_b": "a"}]),
        ("sentence-embedding", "sentence-embedding", [{"text": "a"}, {"text": "b"}]),
        (
            "token-classification",
            "token-classification",
            [{"tokens": ["a", "b c"], "tags": ["O", "B-X"]}, {"tokens": ["d"], "tags": ["O"]}],
        ),
        (
            "token-classification",
            "token-classification",
            [
                {"text": "a  b", "entities": [{"start": 0, "end": 1, "label": "X"}]},
                {"text": "b", "entities": []},
            ],
        ),
    ],
    ids=["text", "pair", "embedding", "words", "entities"],
)
def test_rows_are_hashed_as_calibration_reads_them(
    tmp_path: Path, kind: str, task: str | None, rows: list[dict[str, object]]
) -> None:
    file = _write(tmp_path / "a.jsonl", rows)
    read, _ = read_perhaps_labelled(file, ("O", "B-X", "I-X"), kind=kind)
    assert hashed(file, task) == row_hashes(read.items) and len(row_hashes(read.items)) == 2


def test_lines_of_text_are_hashed_as_calibration_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone line \r\n\ntwo\n")
    read, _ = read_perhaps_labelled(file, ())
    assert hashed(file) == row_hashes(read.items) and len(row_hashes(read.items)) == 2


def test_images_are_hashed_by_the_bytes_of_their_files(tmp_path: Path) -> None:
    import datasets

    images = [tiny.png(number % 2, number) for number in range(3)]
    structs = [{"bytes": data, "path": None} for data in images]
    datasets.Dataset.from_dict({"image": structs}).to_parquet(tmp_path / "a.parquet")
    for number, data in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(data)
    rows = _write(tmp_path / "a.jsonl", [{"image": f"{number}.png"} for number in range(3)])
    read, _ = read_perhaps_labelled(rows, (), images=True)
    files = row_hashes(Path(str(item)) for item in read.items)
    assert hashed(tmp_path / "a.parquet") == hashed(rows) == files and len(files) == 3
