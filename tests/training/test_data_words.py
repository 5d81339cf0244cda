"""Words with tags and texts with entities, as users bring them: each is read, or refused in one line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from offramp.training.data import NO_LABEL, BadData, Columns, Dataset, load_data

TASK = "token-classification"
Row = dict[str, Any]


def load(root: Path, rows: str | list[Row], name: str = "a.jsonl", **options: Any) -> tuple[Dataset, str]:
    """Data of one file, and what is printed about it."""
    content = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    (root / name).write_text(content)
    messages = io.StringIO()
    return load_data(str(root / name), messages=messages, task=TASK, **options), messages.getvalue()


def words(data: Dataset) -> list[list[tuple[str, str | None]]]:
    """The words of every row with the names of their labels, in the order of the texts."""
    names = [*data.labels, None]
    rows = [
        pair for split in data.splits.values() for pair in zip(split.text, split.words or [], strict=True)
    ]
    return [[(text[w.start : w.end], names[w.label]) for w in words] for text, words in sorted(rows)]


def tagged(*rows: tuple[str, str], names: tuple[str, str] = ("tokens", "ner_tags")) -> list[Row]:
    """Rows of words and tags, each written as one text."""
    return [{names[0]: texts.split(), names[1]: tags.split()} for texts, tags in rows]


def entities(text: str, *spans: tuple[int, int, str]) -> Row:
    return {
        "text": text,
        "entities": [dict(zip(("start", "end", "label"), span, strict=True)) for span in spans],
    }


EU: list[Row] = tagged(("EU rejects German call", "B-ORG O B-MISC O"), ("Peter Blackburn", "B-PER I-PER"))
EU_WORDS = [
    [("EU", "B-ORG"), ("rejects", "O"), ("German", "B-MISC"), ("call", "O")],
    [("Peter", "B-PER"), ("Blackburn", "I-PER")],
]
TEXTS: list[Row] = [
    entities("EU rejects German call", (0, 2, "ORG"), (11, 17, "MISC")),
    entities("Peter Blackburn", (0, 15, "PER")),
]
TEXT_WORDS = [
    [("EU", "B-ORG"), (" rejects ", "O"), ("German", "B-MISC"), (" call", "O")],
    [("Peter Blackburn", "B-PER")],
]


def test_a_text_is_the_words_joined_by_one_blank(tmp_path: Path) -> None:
    data, _ = load(tmp_path, EU)
    assert sorted(text for rows in data.splits.values() for text in rows.text) == [
        "EU rejects German call",
        "Peter Blackburn",
    ]
    assert words(data) == EU_WORDS
    assert all((rows.label == NO_LABEL).all() and rows.labelled for rows in data.splits.values())


@pytest.mark.parametrize("column", ["ner_tags", "tags", "labels", "label"])
def test_tags_have_one_of_the_usual_names(tmp_path: Path, column: str) -> None:
    rows = [{"tokens": row["tokens"], column: row["ner_tags"], "other_tags": row["tokens"]} for row in EU]
    assert words(load(tmp_path, rows)[0]) == EU_WORDS


def test_named_columns_hold_words_and_tags(tmp_path: Path) -> None:
    rows = [{"forms": row["tokens"], "kinds": row["ner_tags"], "tags": row["tokens"]} for row in EU]
    data, _ = load(tmp_path, rows, columns=Columns(text="forms", label="kinds"))
    assert words(data) == EU_WORDS


def test_tags_go_with_the_words_and_not_with_the_text_beside_them(tmp_path: Path) -> None:
    rows = [{"text": "".join(row["tokens"]), **row} for row in EU]
    assert words(load(tmp_path, rows)[0]) == EU_WORDS


def test_labels_stand_in_the_order_in_which_they_appear_with_o_first(tmp_path: Path) -> None:
    assert load(tmp_path, tagged(("a b c", "B-Z O B-A"), ("a b", "I-Z O")))[0].labels == (
        "O",
        "B-Z",
        "B-A",
        "I-Z",
    )
    assert load(tmp_path, tagged(("a b", "VERB NOUN"), ("a", "DET")))[0].labels == ("VERB", "NOUN", "DET")


def test_entities_have_the_labels_of_a_beginning_and_an_inner_word(tmp_path: Path) -> None:
    data, printed = load(tmp_path, TEXTS)
    assert data.labels == ("O", "B-ORG", "I-ORG", "B-MISC", "I-MISC", "B-PER", "I-PER")
    assert words(data) == TEXT_WORDS
    assert "I-PER" not in printed.split("dev has no row of")[0]  # it goes on with a B-PER


@pytest.mark.parametrize("form", ["lists", "out of order", "a struct of lists"])
def test_entities_may_be_written_in_other_forms(tmp_path: Path, form: str) -> None:
    keys = ("start", "end", "label")
    rows = []
    for row in TEXTS:
        spans: Any = row["entities"]
        if form == "lists":
            spans = [list(span.values()) for span in spans]
        elif form == "out of order":
            spans = spans[::-1]
        else:
            spans = {key: [span[key] for span in spans] for key in keys}
        rows.append({"text": row["text"], "entities": spans})
    assert words(load(tmp_path, rows)[0]) == TEXT_WORDS


def test_entities_under_a_named_column_are_read(tmp_path: Path) -> None:
    rows = [{"text": row["text"], "spans": row["entities"], "entities": "no list"} for row in TEXTS]
    assert words(load(tmp_path, rows, columns=Columns(label="spans"))[0]) == TEXT_WORDS


def test_an_entity_may_begin_inside_of_what_lies_between_blanks(tmp_path: Path) -> None:
    data, _ = load(tmp_path, [entities("(unhappy)", (3, 8, "MOOD")), entities("a film")])
    assert words(data)[0] == [("(un", "O"), ("happy", "B-MOOD"), (")", "O")]


def test_a_row_without_entities_is_labelled_and_one_with_null_is_not(tmp_path: Path) -> None:
    rows = [*TEXTS, entities("a film"), {"text": "the plot", "entities": None}]
    data, printed = load(tmp_path, rows, labels_needed=False)
    assert words(data)[2:] == [[("a film", "O")], []]
    assert "a.jsonl: rows without a label: 1 of 4" in printed
    with pytest.raises(
        BadData, match=r"row 4: no label; label the row, with \[\] if it has no entity, or take"
    ):
        load(tmp_path, rows)


def test_words_without_tags_are_read_where_labels_are_not_needed(tmp_path: Path) -> None:
    rows = [*EU, {"tokens": ["a", "film"], "ner_tags": None}, {"tokens": ["plot"]}]
    data, printed = load(tmp_path, rows, labels_needed=False)
    assert words(data) == [*EU_WORDS, [], []]
    assert "a.jsonl: rows without a label: 2 of 4" in printed
    with pytest.raises(BadData, match=r"a\.jsonl, row 3: no label; tag its words or take it out"):
        load(tmp_path, rows)


def test_words_without_a_tag_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [*EU, {"tokens": ["a", "film", "at", "all"], "ner_tags": ["O", -100, None, -1]}]
    data, printed = load(tmp_path, rows)
    assert words(data)[2] == [("a", "O"), ("film", None), ("at", None), ("all", None)]
    assert "a.jsonl: rows with words that have no tag and are not learned: 1" in printed


def test_space_around_tags_is_taken_off(tmp_path: Path) -> None:
    rows = [{"tokens": ["EU", "call"], "tags": [" B-ORG", "O "]}, {"tokens": ["a"], "tags": ["O"]}]
    assert load(tmp_path, rows)[0].labels == ("O", "B-ORG")


def test_a_scheme_of_other_prefixes_is_reported(tmp_path: Path) -> None:
    _, printed = load(tmp_path, tagged(("EU call", "S-ORG O"), ("a", "O")))
    assert "a.jsonl: tags such as S-ORG are read as kinds of their own; write B- at the first word" in printed


def conll(**more: Any) -> tuple[datasets.Features, dict[str, list[Any]]]:
    names = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    tags = datasets.Sequence(datasets.ClassLabel(names=names))
    features = {
        "tokens": datasets.Sequence(datasets.Value("string")),
        "pos_tags": tags,
        "ner_tags": tags,
        **more,
    }
    table = {"tokens": [["Peter", "was"], ["a"]], "pos_tags": [[3, 3], [3]], "ner_tags": [[1, 0], [-100]]}
    return datasets.Features(features), table


def test_names_of_numbers_in_a_parquet_file_are_kept(tmp_path: Path) -> None:
    features, table = conll()
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train.parquet")
    data = load_data(str(tmp_path), messages=io.StringIO(), labels_needed=False)
    assert data.task == TASK and data.labels == ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    assert words(data) == [[("Peter", "B-PER"), ("was", "O")], [("a", None)]]


def test_names_of_kinds_in_a_parquet_file_are_kept(tmp_path: Path) -> None:
    number = datasets.Value("int64")
    kinds = datasets.ClassLabel(names=["PER", "LOC"])
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "entities": [{"start": number, "end": number, "label": kinds}],
        }
    )
    spans = [[{"start": 0, "end": 5, "label": 0}], []]
    table = {"text": ["Peter was", "a film"], "entities": spans}
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train.parquet")
    data = load_data(str(tmp_path), messages=io.StringIO())
    assert data.labels == ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    assert words(data) == [[("Peter", "B-PER"), (" was", "O")], [("a film", "O")]]


def test_lists_in_cells_of_a_csv_file_are_read(tmp_path: Path) -> None:
    content = "tokens,ner_tags\n\"['EU', 'call']\",\"['B-ORG', 'O']\"\n['film'],['O']\n"
    assert words(load(tmp_path, content, "a.csv")[0]) == [[("EU", "B-ORG"), ("call", "O")], [("film", "O")]]


def test_columns_of_one_json_object_are_read(tmp_path: Path) -> None:
    columns = {key: [row[key] for row in EU] for key in ("tokens", "ner_tags")}
    assert words(load(tmp_path, json.dumps(columns), "a.json")[0]) == EU_WORDS
    assert words(load(tmp_path, json.dumps({"data": EU}), "b.json")[0]) == EU_WORDS


@pytest.mark.parametrize(("rows", "expected"), [(EU, EU_WORDS), (TEXTS, TEXT_WORDS)])
def test_a_split_of_one_row_is_one_row(tmp_path: Path, rows: list[Row], expected: list[Any]) -> None:
    for split, chosen in (("train", rows), ("dev", rows[:1])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    data = load_data(str(tmp_path), messages=io.StringIO())
    assert words(data) == [expected[0], expected[0], expected[1]]


REFUSED: dict[str, tuple[list[Row], tuple[str, ...]]] = {
    "more tags than words": (
        [*EU, {"tokens": ["a"], "ner_tags": ["O", "O"]}],
        (", row 3: 1 words in 'tokens' and 2 tags in 'ner_tags'; give each word one tag",),
    ),
    "fewer tags than words": ([*EU, {"tokens": ["a", "b"], "ner_tags": []}], (", row 3: 2 words", "0 tags")),
    "a tag that is a fraction": (
        [{"tokens": ["a", "b"], "ner_tags": ["O", 0.5]}],
        (", row 1, word 2: tag 0.5 is no name; write one such as B-PER or O",),
    ),
    "a tag that is a boolean": (
        [{"tokens": ["a"], "ner_tags": [True]}],
        (", row 1, word 1: tag True is no name",),
    ),
    "an empty tag": (
        [{"tokens": ["a", "b"], "ner_tags": ["O", " "]}],
        (", row 1, word 2: tag ' ' is no name",),
    ),
    "a tag that is an object": (
        [{"tokens": ["a"], "tags": [{"x": 1}]}],
        (", row 1, word 1: tag {'x': 1} is no",),
    ),
    "numbers without names": (
        [{"tokens": ["a", "b"], "ner_tags": [3, 0]}],
        (", row 1, word 1: tag 3 is a number without a name; write names such as B-PER and O", "as parquet"),
    ),
    "an empty word": (
        [*EU, {"tokens": ["a", ""], "ner_tags": ["O", "O"]}],
        (", row 3: word 2 of column 'tokens' must be a text, found ''; take it out with its tag",),
    ),
    "a word that is a number": (
        [{"tokens": ["a", 7], "ner_tags": ["O", "O"]}],
        (", row 1: word 2", "found 7"),
    ),
    "a word that is null": (
        [{"tokens": ["a", None], "ner_tags": ["O", "O"]}],
        (", row 1: word 2", "found None"),
    ),
    "no words": (
        [*EU, {"tokens": [], "ner_tags": []}],
        (", row 3: column 'tokens' must be a list of words, found []",),
    ),
    "words as a text": (
        [*EU, {"tokens": "a film", "ner_tags": ["O", "O"]}],
        (", row 3: column 'tokens' must be a list of words, found 'a film'",),
    ),
    "tags as a text": (
        [*EU, {"tokens": ["a"], "ner_tags": "O"}],
        (", row 3: column 'ner_tags' must be a list of tags, found 'O'",),
    ),
    "tags of a text": (
        [{"text": "a film", "ner_tags": ["O", "O"]}] * 2,
        (
            ", row 1: 'O' in column 'ner_tags' is no entity",
            "tags of words need the words, as a list in column 'tokens'",
        ),
    ),
    "half of a surrogate pair": (
        [{"tokens": ["a\ud83d"], "ner_tags": ["O"]}],
        (", row 1: half of a surrogate pair",),
    ),
    "a class for each row": (
        [{"text": "a film", "label": "good"}] * 2,
        (", row 1: column 'label' must be a list of entities, found 'good'",),
    ),
    "an entity beyond the text": (
        [entities("a film", (2, 9, "X"))],
        (", row 1: entity {'start': 2, 'end': 9, 'label': 'X'} is not within the text, which has 6 ch",),
    ),
    "an entity before the text": (
        [entities("a film", (-1, 2, "X"))],
        (", row 1: entity", "count them from 0"),
    ),
    "an entity without characters": (
        [entities("a film", (2, 2, "X"))],
        (", row 1: entity", "the one after the last"),
    ),
    "an entity without an end": (
        [{"text": "a film", "entities": [{"start": 2, "label": "X"}]}],
        (", row 1: entity",),
    ),
    "an entity with texts as places": (
        [{"text": "a film", "entities": [{"start": "2", "end": "6", "label": "X"}]}],
        (", row 1: entity {'start': '2'",),
    ),
    "an entity of white space": (
        [entities("a  film", (1, 3, "X"))],
        (", row 1: entity", "white space alone; take it"),
    ),
    "an entity without a label": (
        [{"text": "a film", "entities": [{"start": 2, "end": 6}]}],
        (", row 1: entity 'film' has no label; name its kind, such as PER",),
    ),
    "an entity with a number as label": (
        [{"text": "a film", "entities": [{"start": 2, "end": 6, "label": 3}]}],
        (", row 1, entity 'film': label 3 is a number without a name",),
    ),
    "entities that overlap": (
        [entities("New York City", (4, 13, "LOC"), (0, 8, "LOC"))],
        (", row 1: entities 'New York' and 'York City' overlap; keep one of them",),
    ),
    "entities in each other": (
        [entities("New York City", (0, 13, "LOC"), (4, 8, "PER"))],
        (", row 1: entities 'New York City' and 'York' overlap",),
    ),
    "an entity that is a text": (
        [{"text": "a film", "entities": ["film"]}],
        (", row 1: 'film' in column 'entities' is no entity such as",),
    ),
    "a text that is null": (
        [{"text": None, "entities": []}],
        (", row 1: column 'text' must be a non-empty text",),
    ),
    "no columns": (
        [{"sentence": "a"}],
        ("no column 'text'; it has: sentence", "token-classification needs lists"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_words_and_entities_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    rows, parts = REFUSED[name]
    with pytest.raises(BadData) as caught:
        load(tmp_path, rows)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(tmp_path / "a.jsonl")), message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("train", "dev", "message"),
    [
        (
            EU,
            tagged(("a film", "O O"), ("a film", "O B-ART")),
            r"dev\.jsonl, row 2: label 'B-ART' is not one of \['O'",
        ),
        (
            TEXTS,
            [entities("a film", (2, 6, "ART"))],
            r"dev\.jsonl, row 1: entity 'ART' is not one of: O, ORG, MISC, PER",
        ),
    ],
)
def test_a_label_that_train_lacks_is_named(
    tmp_path: Path, train: list[Row], dev: list[Row], message: str
) -> None:
    for split, rows in (("train", train), ("dev", dev)):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadData, match=message):
        load_data(str(tmp_path), messages=io.StringIO())


def test_train_may_hold_words_and_dev_entities(tmp_path: Path) -> None:
    for split, rows in (("train", EU), ("dev", TEXTS)):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_data(str(tmp_path), messages=io.StringIO())
    assert data.labels == ("O", "B-ORG", "B-MISC", "B-PER", "I-PER")
    dev = data.split("dev")
    assert dev.words is not None and [data.labels[word.label] for word in dev.words[1]] == ["B-PER"]


def test_classes_that_a_split_lacks_are_listed(tmp_path: Path) -> None:
    for split, rows in (("train", EU), ("dev", EU[1:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    messages = io.StringIO()
    load_data(str(tmp_path), messages=messages)
    assert f"{tmp_path}: dev has no row of 3 of 5 classes: O, B-ORG, B-MISC\n" in messages.getvalue()
