"""Data files as users bring them: each is read as it stands, or refused in one line with its cure."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from offramp.training.data import BadData, Columns, Dataset, load_data, read_splits

FILES = Path(__file__).resolve().parents[1] / "data" / "user_files"
ONE_ZERO = [("bad film", "0"), ("good film", "1")]
CSV = "text,label\ngood film,1\nbad film,0\n"
LINES = '{"text": "good film", "label": 1}\n{"text": "bad film", "label": 0}\n'


def answers(data: Dataset) -> list[tuple[str, str | None]]:
    """Texts and names of labels of all rows, sorted by text."""
    names = [*data.labels, None]  # NO_LABEL is -1: the last
    return sorted(
        (text, names[label])
        for rows in data.splits.values()
        for text, label in zip(rows.text, rows.label, strict=True)
    )


def refusal(source: Path, **options: Any) -> str:
    """The message that refuses a source; it is one line and begins with the source."""
    with pytest.raises(BadData) as caught:
        load_data(str(source), messages=io.StringIO(), **options)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(source)), message
    return message.removeprefix(str(source))


READ: dict[str, list[tuple[str, str]]] = {
    "words_for_missing.csv": [
        ("a plot", "None"),
        ("bad film", "null"),
        ("good film", "NA"),
        ("the scene", "nan"),
    ],
    "words_for_missing_as_texts.csv": [("NA", "0"), ("nan", "0"), ("none", "1"), ("null", "1")],
    "na_among_integers.tsv": [("a plot", "NA"), *ONE_ZERO],
    "one_to_five.csv": [
        ("a plot", "3"),
        ("bad film", "1"),
        ("good film", "5"),
        ("the scene", "2"),
        ("very warm", "4"),
    ],
    "minus_one_and_one.jsonl": [("a plot", "1"), ("bad film", "-1"), ("good film", "1")],
    "ratings_with_texts.jsonl": [("a plot", "fair"), ("bad film", "bad"), ("good film", "good")],
    "whole_floats.csv": [("a plot", "2"), *ONE_ZERO],
    "booleans.jsonl": [("bad film", "False"), ("good film", "True")],
    "booleans.csv": [("a plot", "True"), ("bad film", "False"), ("good film", "True")],
    "yes_and_no.csv": [("bad film", "no"), ("good film", "yes")],
    "integers_and_texts.jsonl": [("a plot", "0"), *ONE_ZERO],
    "semicolons.csv": [("bad film, and cold", "0"), ("good film, and warm", "1")],
    "tabs.csv": [("bad film", "0"), ("good film, and warm", "1")],
    "bars.csv": [("bad film; cold", "0"), ("good film, and warm", "1")],
    "commas.tsv": ONE_ZERO,
    "quoted_newlines.csv": [("bad\nfilm", "0"), ("good film\nand a\n\nplot", "1")],
    "quoted_newlines.tsv": [("bad film", "0"), ("good film\nand\ta plot", "1")],
    "quotes_within.csv": [('the "good" film, at all', "1"), ('the 5" scene', "0")],
    "blank_lines.csv": ONE_ZERO,
    "blank_lines.jsonl": ONE_ZERO,
    "index_column.csv": ONE_ZERO,
    "trailing_commas.csv": ONE_ZERO,
    "spaces_in_header.csv": ONE_ZERO,
    "other_columns_twice.csv": ONE_ZERO,
    "spaces_around_labels.csv": [
        ("a plot", "pos"),
        ("bad film", "neg"),
        ("good film", "pos"),
        ("the scene", "neg"),
    ],
    "upper_and_lower_case.csv": [("a plot", "pos"), ("bad film", "neg"), ("good film", "Pos")],
    "numbers_as_texts.csv": [("12", "1"), ("7.50", "0")],
    "dates_as_texts.jsonl": [("2021-03-04 10:00:00", "1"), ("2021-03-05 10:00:00", "0")],
    "line_separators.jsonl": [("bad\u2029film", "0"), ("good\u2028film\u0085", "1")],
    "keys_in_any_order.jsonl": ONE_ZERO,
    "array.json": ONE_ZERO,
    "rows_under_data.json": ONE_ZERO,
    "columns_by_pandas.json": ONE_ZERO,
    "lists_by_column.json": [("bad film", "neg"), ("good film", "pos")],
    "objects_over_lines.json": ONE_ZERO,
}


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read_as_it_stands(name: str) -> None:
    assert answers(load_data(str(FILES / name), messages=io.StringIO())) == READ[name]


NOTED = {
    "one_to_five.csv": "integer labels 1, 2, 3, 4, 5 are numbered 0 to 4 in ascending order",
    "minus_one_and_one.jsonl": "integer labels -1, 1 are numbered 0 to 1",
    "na_among_integers.tsv": "label 'NA' among integers is read as a class",
    "spaces_around_labels.csv": "space around it, which is taken off: 2, first row 3: 'pos '",
    "upper_and_lower_case.csv": "labels Pos, pos differ only by case",
    "quoted_newlines.tsv": "rows that span several lines: 1, first row 1: a cell that begins with a quote",
}


@pytest.mark.parametrize("name", NOTED)
def test_one_line_tells_what_is_read_otherwise(name: str) -> None:
    messages = io.StringIO()
    load_data(str(FILES / name), messages=messages)
    printed = [line for line in messages.getvalue().splitlines() if NOTED[name] in line]
    assert len(printed) == 1 and name in printed[0], messages.getvalue()


REFUSED: dict[str, tuple[str, ...]] = {
    "empty_label.csv": (", row 3: no label; label the row or take it out",),
    "empty_integer_label.csv": (", row 2: no label",),
    "short_row.tsv": (", row 2: no label",),
    "null_label.jsonl": (", row 3: no label",),
    "absent_label.jsonl": (", row 2: no label",),
    "fractions.csv": (", row 2: label 1.5 is a fraction", "of the task regression", "classes by name"),
    "lists_of_labels.jsonl": (
        ", row 1: label ['warm', 'good'] is a list",
        "of the task multi-label-classification; give one",
    ),
    "objects_as_labels.jsonl": (", row 2: label {'name': 'neg'}", "a name or a whole number"),
    "word_among_integers.jsonl": (", row 3: label 'pos' is not one of ['0', '1']",),
    "one_class.csv": ("every row has the label 'pos'", "two labels at least"),
    "one_row.csv": ("too few train rows (1)", "add rows or a dev split"),
    "all_unlabelled.csv": ("no row has a label in column 'label'",),
    "too_many_cells.csv": (", row 2 (line 4): 3 cells, the header has 2", "between double quotes"),
    "unclosed_quote.csv": (", row 2 (line 3): a quote is not closed", "double quotes"),
    "no_header.csv": ("no column 'text'; it has: good film, 1", "put one above it, such as text,label"),
    "header_names_text_twice.csv": ("the header names 'text' twice; rename",),
    "header_alone.csv": ("no rows",),
    "empty.csv": ("the file is empty",),
    "empty.jsonl": ("the file is empty",),
    "blank_lines_alone.csv": ("blank lines alone; it needs a header and rows",),
    "blank_lines_alone.jsonl": ("no rows in it",),
    "blank_lines_alone.txt": ("blank lines alone; it needs a text on each line",),
    "other_names.csv": ("no column 'text'; it has: review, sentiment", "--text-column"),
    "other_names_semicolons.csv": ("it has: review, sentiment, stars",),
    "no_label_column.jsonl": ("no column 'label'; it has: text, target", "--label-column"),
    "empty_text.csv": (", row 2: column 'text' must be a non-empty text, found None",),
    "spaces_as_text.jsonl": (", row 2: column 'text' must be a non-empty text",),
    "number_as_text.jsonl": (", row 2: column 'text' must be a non-empty text, found 5",),
    "null_second_text.jsonl": (", row 2: column 'text_b' must be a text, found None",),
    "half_a_surrogate_pair.jsonl": (", row 2: half of a surrogate pair",),
    "broken_line.jsonl": (", row 2 (line 3): not JSON",),
    "broken_array.json": ("(line 3): not JSON: Expecting value at column 33",),
    "number_as_row.jsonl": (", row 2: expected a JSON object such as", "found 7"),
    "same_key_twice.jsonl": (", row 2 (line 2)", "the same key twice"),
    "splits_in_one_file.json": ("lists of rows under train, test", "a file of its own"),
    "columns_of_unequal_length.json": ("columns of unequal length", "one object for each row"),
    "empty_array.json": ("no rows in it",),
    "texts_alone.json": ("no column 'label'",),
    "lines.txt": ("lines of text without labels; needed here: a column 'label'", "CSV or JSON lines"),
}


# Without a task they are read for another one: test_data_tasks.
OTHER_TASKS = {"fractions.csv", "lists_of_labels.jsonl"}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_in_one_line(name: str) -> None:
    message = refusal(FILES / name, task="classification" if name in OTHER_TASKS else None)
    assert all(part in message for part in REFUSED[name]), message


def test_every_checked_in_file_is_tried() -> None:
    assert {file.name for file in FILES.iterdir()} == READ.keys() | REFUSED.keys()


ENCODED: dict[str, Callable[[], bytes]] = {
    "marked_utf8.csv": lambda: codecs.BOM_UTF8 + CSV.encode(),
    "marked_utf8.jsonl": lambda: codecs.BOM_UTF8 + LINES.encode(),
    "utf16.csv": lambda: CSV.encode("utf-16"),
    "utf16.tsv": lambda: CSV.replace(",", "\t").encode("utf-16"),
    "utf16be.jsonl": lambda: codecs.BOM_UTF16_BE + LINES.encode("utf-16-be"),
    "utf32.csv": lambda: CSV.encode("utf-32"),
    "windows.csv": lambda: CSV.replace("\n", "\r\n").encode(),
    "windows.jsonl": lambda: LINES.replace("\n", "\r\n").encode(),
    "carriage_returns.csv": lambda: CSV.replace("\n", "\r").encode(),
    "no_last_line_end.csv": lambda: CSV.rstrip().encode(),
    "UPPER.CSV": CSV.encode,
    "UPPER.JSONL": LINES.encode,
    "rows.jsonl.gz": lambda: gzip.compress(LINES.encode()),
    "rows.csv.gz": lambda: gzip.compress(CSV.encode()),
    "rows.CSV.GZ": lambda: gzip.compress(CSV.replace(",", ";").encode("utf-16")),
    "rows.json.gz": lambda: gzip.compress(f"[{LINES.strip()}]".replace("\n", ",").encode()),
    "rows.csv.bz2": lambda: bz2.compress(CSV.encode()),
    "rows.tsv.xz": lambda: lzma.compress(CSV.replace(",", "\t").encode()),
    "decompressed_by_the_browser.csv.gz": CSV.encode,
    "compressed_without_saying_so.csv": lambda: gzip.compress(CSV.encode()),
}


@pytest.mark.parametrize("name", ENCODED)
def test_encodings_and_compressed_files_read_the_same(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(ENCODED[name]())
    assert answers(load_data(str(tmp_path / name), messages=io.StringIO())) == ONE_ZERO


BYTES: dict[str, tuple[Callable[[], bytes], str]] = {
    "latin1.csv": (
        lambda: "text,label\ngood film,1\ncafé,0\n".encode("latin-1"),
        ", line 3: not UTF-8: byte 0xe9; convert the file, if it is Western European with iconv -f latin1",
    ),
    "cp1252.jsonl": (
        lambda: '{"text": "a “good” film", "label": 1}\n'.encode("cp1252"),
        ", line 1: not UTF-8: byte 0x93",
    ),
    "latin1.txt.gz": (
        lambda: gzip.compress("a plot\ncafé\n".encode("latin-1")),
        ", line 2: not UTF-8: byte 0xe9",
    ),
    "utf16_without_mark.csv": (
        lambda: CSV.encode("utf-16-le"),
        "UTF-16 without its mark; convert it with iconv -f utf-16le",
    ),
    "odd_utf16.csv": (lambda: CSV.encode("utf-16") + b"\xd8", "begins as utf-16 and is not"),
    "cut.csv.gz": (lambda: gzip.compress(CSV.encode())[:-12], "cannot be decompressed"),
    "sheet.csv": (lambda: b"PK\x03\x04" + bytes(40), "a zip archive or a spreadsheet; unpack it, or save it"),
    "sheet.xlsx": (lambda: b"PK\x03\x04" + bytes(40), "unknown kind of file; known: .jsonl, .json, .csv"),
    "no.parquet": (lambda: b"PAR1 and no more", "cannot be read"),
}


@pytest.mark.parametrize("name", BYTES)
def test_other_bytes_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BYTES[name][0]())
    assert BYTES[name][1] in refusal(tmp_path / name)


def test_a_cell_may_be_longer_than_the_limit_of_csv(tmp_path: Path) -> None:
    long = "film " * 40_000
    (tmp_path / "a.csv").write_text(f"text,label\n{long},1\nbad film,0\n")
    data = load_data(str(tmp_path / "a.csv"), messages=io.StringIO())
    assert answers(data) == [("bad film", "0"), (long, "1")]


def test_named_columns_choose_the_delimiter(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("the review;stars, given\ngood film;1\nbad film;0\n")
    columns = Columns(text="the review", label="stars, given")
    assert answers(load_data(str(tmp_path / "a.csv"), columns, messages=io.StringIO())) == ONE_ZERO


def test_a_missing_file_is_not_searched_on_the_hub(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere.csv") == ": no such file or folder"


UNLABELLED = ["lines.txt", "texts_alone.json", "no_label_column.jsonl", "all_unlabelled.csv"]


@pytest.mark.parametrize("name", UNLABELLED)
def test_rows_without_labels_are_read_where_none_are_needed(name: str) -> None:
    data = load_data(str(FILES / name), labels_needed=False, messages=io.StringIO())
    assert data.labels == () and not any(rows.labelled for rows in data.splits.values())
    assert {label for _, label in answers(data)} == {None} and len(answers(data)) >= 2


def test_blank_lines_of_text_are_left_out_and_counted(tmp_path: Path) -> None:
    for name, content in (("a.txt", (FILES / "lines.txt").read_bytes()), ("b.txt.gz", b"")):
        (tmp_path / name).write_bytes(content or gzip.compress((FILES / "lines.txt").read_bytes()))
        messages = io.StringIO()
        data = load_data(str(tmp_path / name), labels_needed=False, messages=messages)
        assert [text for text, _ in answers(data)] == ["  a plot", "bad film, and cold", "good film"]
        assert f"{name}: blank lines left out: 2 of 5" in messages.getvalue()


def test_a_partly_labelled_file_is_read_where_labels_are_not_needed() -> None:
    messages = io.StringIO()
    data = load_data(str(FILES / "empty_label.csv"), labels_needed=False, messages=messages)
    assert [name for _, name in answers(data)] == [None, "neg", "pos", "pos"]
    assert "empty_label.csv: rows without a label: 1 of 4" in messages.getvalue()


def folder(root: Path, **contents: str) -> Path:
    """A folder of files; names with _ for a full stop."""
    root.mkdir(exist_ok=True)
    for name, content in contents.items():
        (root / name.replace("_", ".")).write_text(content)
    return root


def test_forms_may_differ_by_split(tmp_path: Path) -> None:
    folder(tmp_path, train_CSV=CSV.replace(",", ";"), Validation_tsv=CSV)
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    data = load_data(str(tmp_path), messages=io.StringIO())
    assert sorted(data.splits) == ["dev", "test", "train"]
    assert all(rows.text == ["good film", "bad film"] for rows in data.splits.values())


def test_of_several_files_for_a_split_the_plain_one_is_read(tmp_path: Path) -> None:
    folder(tmp_path, train_csv=CSV, train_txt="a plot\n", dev_csv=CSV, Train_jsonl="{}")
    (tmp_path / "train.csv.gz").write_bytes(b"")
    messages = io.StringIO()
    assert load_data(str(tmp_path), messages=messages).split("train").text == ["good film", "bad film"]
    for other in ("Train.jsonl", "train.csv.gz", "train.txt"):
        assert f"{other}: not read, since train.csv is the train split" in messages.getvalue()


def test_two_files_for_a_split_are_refused(tmp_path: Path) -> None:
    folder(tmp_path, train_csv=CSV, train_jsonl=LINES)
    message = refusal(tmp_path)
    assert "train.csv" in message and "train.jsonl" in message and "both a train split; keep one" in message


def test_a_folder_without_split_files_says_what_it_has(tmp_path: Path) -> None:
    folder(tmp_path, reviews_csv=CSV, README_md="")
    message = refusal(tmp_path)
    assert "neither a train/dev/test file" in message
    assert "it has reviews.csv: name that file, or call it train.csv" in message


def test_unlabelled_train_and_labelled_test_go_together_where_labels_are_not_needed(tmp_path: Path) -> None:
    folder(tmp_path, train_txt="a plot\nthe scene\n", dev_txt="a film\n", test_jsonl=LINES)
    data = load_data(str(tmp_path), labels_needed=False, messages=io.StringIO())
    assert data.labels == ("0", "1")
    assert {split: rows.labelled for split, rows in data.splits.items()} == {
        "train": False,
        "dev": False,
        "test": True,
    }
    with pytest.raises(BadData, match=r"train\.txt: lines of text without labels"):
        load_data(str(tmp_path), messages=io.StringIO())


@pytest.mark.parametrize("inside", ["", "train"])
def test_images_without_class_folders_are_unlabelled(tmp_path: Path, inside: str) -> None:
    place = tmp_path / inside
    place.mkdir(exist_ok=True)
    for number in range(3):
        (place / f"{number}.PNG").write_bytes(tiny.png(0, number))
    (place / "notes.md").touch()
    data = load_data(str(tmp_path), labels_needed=False, dev_share=0.3, messages=io.StringIO())
    assert data.has_images and data.labels == () and len(data.split("train")) == 2
    assert "images without labels; needed here: a folder of images for each label" in refusal(tmp_path)


def test_lists_beside_folders_of_images_are_not_read(tmp_path: Path) -> None:
    tiny.image_folder(tmp_path, 4, 2, 2)
    folder(tmp_path, train_txt="blue/001\n", classes_txt="blue\nred\n")
    data = load_data(str(tmp_path))
    assert data.has_images and data.labels == ("blue", "red") and len(data.split("train")) == 4


def test_data_of_language_models_is_text_as_it_stands(tmp_path: Path) -> None:
    folder(tmp_path, train_csv="prompt,completion\nis it good,NA\n7,42\n", dev_txt="a plot\n\nthe scene\n")
    messages = io.StringIO()
    tables = read_splits(str(tmp_path), messages=messages)
    assert list(tables["train"][0]["completion"]) == ["NA", "42"]
    assert list(tables["train"][0]["prompt"]) == ["is it good", "7"]
    assert list(tables["dev"][0]["text"]) == ["a plot", "the scene"]
    assert "blank lines left out: 1 of 3" in messages.getvalue()
