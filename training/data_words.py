"""Labels of the words of a text: lists of words and their tags, or entities by their characters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from offramp.runtime.rules.entities import BEGIN, INSIDE, OUTSIDE, entity_words
from offramp.training.data_labels import NO_LABEL, RowLabels, Word, class_names, no_labels, report_missing
from offramp.training.data_lists import first_list, read_cells
from offramp.training.data_open import WORDS, BadData, Columns, SplitTable, Table, Tell, check_text

TAGS = ("ner_tags", "tags", "labels")  # columns of tags, where the label column is not there
ENTITIES = "entities"  # and of entities
NO_TAG = (NO_LABEL, -100)  # -100: as transformers writes it
OTHER_SCHEMES = ("S-", "E-", "L-", "U-")  # prefixes of BIOES and BILOU

TAGS_CURE = "tag its words or take it out"
ENTITIES_CURE = "label the row, with [] if it has no entity, or take it out"

# First character, the one after the last, and the tag of a word or the kind of an entity; None without a tag.
Tagged = tuple[int, int, str | None]


@dataclass(frozen=True)
class TaggedSplit:
    """The texts of one split, and what is tagged in them: words, or entities; None in rows without labels.

    names: of tags that are numbers, if the file has them.
    """

    texts: list[str]
    tagged: list[list[Tagged] | None]
    has_entities: bool
    names: tuple[str, ...] | None

    @property
    def tags(self) -> Iterable[str]:
        """The different tags in the order in which they appear."""
        tags = (tag for row in self.tagged for *_, tag in row or ())
        return dict.fromkeys(tag for tag in tags if tag is not None)


def word_columns(table: Table, columns: Columns) -> Columns:
    """The columns with those that hold words and tags, or a text and entities, as text and label."""
    usual = columns.label == Columns().label
    names = [columns.label, *((*TAGS, ENTITIES) if usual else ())]
    names = [name for name in names if name in table.column_names]
    lists = {name: first for name in names if (first := first_list(table, name)) is not None}
    tags = [name for name, first in lists.items() if name != ENTITIES and not _is_entity(*first[:1])]
    entities = [name for name, first in lists.items() if name == ENTITIES or _is_entity(*first[:1])]
    words = [name for name in (columns.text, WORDS) if first_list(table, name) is not None]
    if words and (tags or not entities):
        return dataclasses.replace(columns, text=words[0], label=(tags or names or [columns.label])[0])
    return dataclasses.replace(columns, label=(entities or names or [columns.label])[0])


def has_tagged_words(table: Table, columns: Columns) -> bool:
    """Whether a table has lists of words and of tags, or texts and entities, and no other labels."""
    own = word_columns(table, columns)
    labels = first_list(table, own.label)
    if labels is None or (columns.label in table.column_names and columns.label != own.label):
        return False
    words = first_list(table, own.text)
    of_entities = own.label == ENTITIES or _is_entity(*labels[:1])
    return own.text in table.column_names and of_entities == (words is None)


def read_words(
    source: str, splits: Mapping[str, SplitTable], tell: Tell, *, needed: bool
) -> tuple[tuple[str, ...], dict[str, RowLabels]]:
    """Names of the labels of words, and by split the words of every row with their labels.

    Names stand in the order in which they appear, O first, or as the file names numbers. Entities of a kind X
    have the labels B-X and I-X; each is one word here, and so is what lies between two. needed: a split with
    labels has to have them in every row. Raises BadData naming file and row.
    """
    read = {split: _read_split(table) for split, table in splits.items()}
    labelled = {split: rows for split, rows in read.items() if any(row is not None for row in rows.tagged)}
    if not labelled:
        return (), {split: _with_words(read[split], (), table) for split, table in splits.items()}
    names = _names(labelled.get("train") or next(iter(labelled.values())))
    if others := [name for name in names if name.startswith(OTHER_SCHEMES)]:
        tell(
            f"{source}: tags such as {others[0]} are read as kinds of their own; write B- at the first word "
            "of an entity and I- at the others"
        )
    labels = {split: _with_words(read[split], names, table) for split, table in splits.items()}
    for split, table in splits.items():
        missing = np.flatnonzero(~labels[split].present) + 1
        if 0 < len(missing) < len(table):
            rows = missing.tolist()
            cure = ENTITIES_CURE if read[split].has_entities else TAGS_CURE
            report_missing(table.name, rows, len(table), tell, needed=needed, cure=cure)
        if untagged := [row for row in read[split].tagged if row and None in [tag for *_, tag in row]]:
            tell(f"{table.name}: rows with words that have no tag and are not learned: {len(untagged)}")
    return names, labels


def same_tag(labels: RowLabels, names: Sequence[str]) -> str:
    """Why nothing can be learned from words that all have the same label; empty if they have not."""
    numbers = {word.label for words in labels.words or () for word in words} - {NO_LABEL}
    if len(numbers) > 1:
        return ""
    return f"every word has the label {names[numbers.pop()]!r}; training needs words of two labels at least"


def _is_entity(value: Any = None) -> bool:
    """Whether a value looks like an entity, as an object or as start, end and kind."""
    if isinstance(value, (list, tuple)):
        return len(value) == 3 and isinstance(value[0], int) and isinstance(value[1], int)
    return isinstance(value, dict) and {"start", "end"} <= set(value)


def _read_split(split: SplitTable) -> TaggedSplit:
    """The texts, words and tags of one split, checked row by row."""
    columns = split.columns
    places = [f"{split.name}, row {row}" for row in range(1, len(split) + 1)]
    labels = [None if cell in NO_TAG else cell for cell in read_cells(split, columns.label)]
    names = class_names(split.table.features.get(columns.label))
    texts, tagged = list[str](), list[list[Tagged] | None]()
    if first_list(split.table, columns.text) is None:
        texts = list(split.table[columns.text])
        for place, text, entities in zip(places, texts, labels, strict=True):
            check_text(text, place, columns.text)
            row = None if entities is None else _entities(text, entities, place, columns, names)
            tagged.append(row)
        return TaggedSplit(texts, tagged, True, names)
    for place, words, tags in zip(places, read_cells(split, columns.text), labels, strict=True):
        _check_words(words, place, columns.text)
        ends = np.cumsum([len(word) + 1 for word in words]).tolist()  # one blank after each word
        spans = [(end - 1 - len(word), end - 1) for end, word in zip(ends, words, strict=True)]
        texts.append(" ".join(words))
        names_of = None if tags is None else _tags(words, tags, place, columns, names)
        tagged.append(
            None if names_of is None else [(*span, tag) for span, tag in zip(spans, names_of, strict=True)]
        )
    return TaggedSplit(texts, tagged, False, names)


def _check_words(words: Any, place: str, column: str) -> None:
    if not isinstance(words, list) or not words:
        raise BadData(f"{place}: column {column!r} must be a list of words, found {words!r:.60}")
    for number, word in enumerate(words, 1):
        if not isinstance(word, str) or not word.strip():
            raise BadData(
                f"{place}: word {number} of column {column!r} must be a text, found {word!r:.60}; take it "
                "out with its tag"
            )


def _tags(
    words: Sequence[str], tags: Any, place: str, columns: Columns, names: Sequence[str] | None
) -> list[str | None]:
    """The tags of one row's words."""
    if not isinstance(tags, list):
        raise BadData(f"{place}: column {columns.label!r} must be a list of tags, found {tags!r:.60}")
    if len(tags) != len(words):
        raise BadData(
            f"{place}: {len(words)} words in {columns.text!r} and {len(tags)} tags in {columns.label!r}; "
            "give each word one tag"
        )
    return [_name(tag, "tag", f"{place}, word {number}", names) for number, tag in enumerate(tags, 1)]


def _name(value: Any, what: str, place: str, names: Sequence[str] | None) -> str | None:
    """The name of a tag or of an entity's kind; None for those that stand for no tag."""
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or (not isinstance(value, bool) and value in NO_TAG):
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        if names is None:
            raise BadData(
                f"{place}: {what} {value} is a number without a name; write names such as B-PER and O, or "
                "save the data set with its names, as parquet"
            )
        if 0 <= value < len(names):
            return names[value]
        raise BadData(
            f"{place}: {what} {value} is not one of the numbers 0 to {len(names) - 1} that have names"
        )
    raise BadData(f"{place}: {what} {value!r:.60} is no name; write one such as B-PER or O")


def _entities(
    text: str, entities: Any, place: str, columns: Columns, names: Sequence[str] | None
) -> list[Tagged]:
    """The entities of one row in the order of the text."""
    if not isinstance(entities, list):
        raise BadData(f"{place}: column {columns.label!r} must be a list of entities, found {entities!r:.60}")
    read: list[tuple[int, int, str | None]] = []
    for entity in entities:
        values = list(entity) if _is_entity(entity) and not isinstance(entity, dict) else None
        if isinstance(entity, dict):
            values = [entity.get(key) for key in ("start", "end", "label")]
        if values is None:
            raise BadData(
                f"{place}: {entity!r:.60} in column {columns.label!r} is no entity such as "
                '{"start": 0, "end": 5, "label": "PER"}; tags of words need the words, as a list in column '
                f"{WORDS!r}"
            )
        start, end, kind = values
        if type(start) is not int or type(end) is not int or not 0 <= start < end <= len(text):
            raise BadData(
                f"{place}: entity {entity!r:.80} is not within the text, which has {len(text)} characters; "
                "count them from 0, and let end be the one after the last"
            )
        name = _name(kind, "label", f"{place}, entity {text[start:end]!r:.40}", names)
        if name is None:
            raise BadData(f"{place}: entity {text[start:end]!r:.40} has no label; name its kind, such as PER")
        if not text[start:end].strip():
            raise BadData(f"{place}: entity {entity!r:.80} is white space alone; take it out")
        read.append((start, end, name))
    read.sort(key=lambda entity: entity[:2])
    for (before, end_before, _), (start, end, _) in pairwise(read):
        if start < end_before:
            raise BadData(
                f"{place}: entities {text[before:end_before]!r:.40} and {text[start:end]!r:.40} overlap; "
                "keep one of them"
            )
    return read


def _names(first: TaggedSplit) -> tuple[str, ...]:
    """The names of the labels in the split that all others follow."""
    if first.has_entities:
        kinds = first.tags if first.names is None else first.names
        return (OUTSIDE, *(prefix + kind for kind in kinds for prefix in (BEGIN, INSIDE)))
    if first.names is not None:
        return first.names
    return tuple(sorted(first.tags, key=lambda tag: tag != OUTSIDE))


def _with_words(split: TaggedSplit, names: Sequence[str], table: SplitTable) -> RowLabels:
    """The words of a split's rows with the numbers of their labels."""
    numbers = {name: number for number, name in enumerate(names)}
    words: list[list[Word]] = []
    for row, (text, tagged) in enumerate(zip(split.texts, split.tagged, strict=True), 1):
        try:
            if split.has_entities and tagged is not None:
                entities = [(start, end, str(kind)) for start, end, kind in tagged]
                words.append([Word(*word) for word in entity_words(text, entities, names)])
            else:
                words.append(
                    [
                        Word(start, end, NO_LABEL if tag is None else numbers[tag])
                        for start, end, tag in tagged or ()
                    ]
                )
        except KeyError as unknown:
            raise BadData(
                f"{table.name}, row {row}: label {unknown.args[0]!r} is not one of {list(names)[:20]}"
            ) from unknown
        except ValueError as unknown:
            raise BadData(f"{table.name}, row {row}: {unknown}") from unknown
    return RowLabels(no_labels(table).label, words, None if split.has_entities else split.texts)
