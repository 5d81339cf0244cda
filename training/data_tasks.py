"""The tasks of labelled data: which one a data set is for, and how its labels are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from offramp.models.tasks import CLASSIFICATION, EMBEDDING, MULTI_LABEL, REGRESSION, TOKENS
from offramp.training.data_files import NamedTable
from offramp.training.data_labels import RowLabels, listed, no_labels, read_classes, same_class
from offramp.training.data_lists import first_list, holds_zeros_and_ones, read_label_lists, same_labels
from offramp.training.data_open import BadData, Columns, SplitTable, Table, Tell
from offramp.training.data_values import holds_fractions, read_values, same_value
from offramp.training.data_words import has_tagged_words, read_words, same_tag, word_columns

LISTS = "labels"  # the column of lists of labels, where the label column is not there


class LabelReader(Protocol):
    """Reads the labels of a data set: their names, and those of every split's rows."""

    def __call__(
        self, source: str, splits: Mapping[str, SplitTable], tell: Tell, *, needed: bool
    ) -> tuple[tuple[str, ...], dict[str, RowLabels]]: ...


@dataclass(frozen=True)
class TaskData:
    """How the data of a task is read.

    columns: the columns of a table by those that the user names. same: why nothing can be learned from the
    labels of train; empty if something can. labels: whether rows have labels; images, pairs: whether rows may
    be images or pairs of texts. needs: columns that the task needs, for messages.
    """

    read: LabelReader
    same: Callable[[RowLabels, Sequence[str]], str]
    columns: Callable[[Table, Columns], Columns] = lambda table, columns: columns
    labels: bool = True
    images: bool = True
    pairs: bool = True
    needs: str = ""


def task_of(source: str, tables: Mapping[str, NamedTable], columns: Columns, tell: Tell) -> str:
    """The task that the columns of a data set are for; a line to `tell` reports any but classification."""
    for table, _ in tables.values():  # train first
        for task, is_for, why in KNOWN_BY:
            if is_for(table, columns):
                tell(f"{source}: {why}: read for {task}")
                return task
        if columns.label in table.column_names and any(value is not None for value in table[columns.label]):
            break
    return CLASSIFICATION


def check_task(task: str) -> TaskData:
    """How the data of a task is read; raises BadData for an unknown one."""
    if task not in TASK_DATA:
        raise BadData(f"task {task!r}: unknown; known: {', '.join(TASK_DATA)}")
    return TASK_DATA[task]


def check_inputs(task: str, split: SplitTable) -> None:
    """Raise BadData for images, or pairs of texts, where a task has none."""
    rules, text_b = TASK_DATA[task], split.columns.text_b
    if split.has_images and not rules.images:
        raise BadData(f"{split.name}: images, and {task} is for texts")
    if text_b in split.column_names and not rules.pairs:
        raise BadData(
            f"{split.name}: a second text in column {text_b!r}, and {task} reads one text for each row; take "
            "the column out, or give its texts rows of their own"
        )


def needs_of(task: str, split: SplitTable) -> str:
    """The end of a message about a missing column: what the task needs, or what to make of its columns."""
    others = [name for name in split.column_names if name != split.input]
    names = [name for name in others if holds_zeros_and_ones(split.table[name])]
    if len(names) > 1 and TASK_DATA[task].labels:
        return (
            f"; columns {listed(names)} hold 0 or 1 in every row: for {MULTI_LABEL}, write one column "
            f"{split.columns.label!r} that lists the names of those that are 1"
        )
    needs = TASK_DATA[task].needs
    return (
        f"; {task} needs {needs.format(text=split.columns.text, label=split.columns.label)}" if needs else ""
    )


def _list_columns(table: Table, columns: Columns) -> Columns:
    usual = columns.label == Columns().label and columns.label not in table.column_names
    return dataclasses.replace(columns, label=LISTS) if usual and LISTS in table.column_names else columns


def _has_lists(table: Table, columns: Columns) -> bool:
    return first_list(table, _list_columns(table, columns).label) is not None


def _has_fractions(table: Table, columns: Columns) -> bool:
    return columns.label in table.column_names and holds_fractions(list(table[columns.label]))


def _read_none(
    source: str, splits: Mapping[str, SplitTable], tell: Tell, *, needed: bool
) -> tuple[tuple[str, ...], dict[str, RowLabels]]:
    """No labels, whatever the columns hold; see LabelReader."""
    return (), {split: no_labels(table) for split, table in splits.items()}


# In this order: lists of tags would be lists of labels, too.
KNOWN_BY: tuple[tuple[str, Callable[[Table, Columns], bool], str], ...] = (
    (TOKENS, has_tagged_words, "words with tags, or texts with entities"),
    (MULTI_LABEL, _has_lists, "labels are lists"),
    (REGRESSION, _has_fractions, "labels are numbers that are not whole"),
)
TASK_DATA: Mapping[str, TaskData] = {
    CLASSIFICATION: TaskData(read_classes, same_class),
    MULTI_LABEL: TaskData(
        read_label_lists, same_labels, _list_columns, needs="a list of labels in column {label!r}"
    ),
    TOKENS: TaskData(
        read_words,
        same_tag,
        word_columns,
        images=False,
        pairs=False,
        needs="lists in 'tokens' and 'ner_tags', or texts in {text!r} and entities in 'entities'",
    ),
    REGRESSION: TaskData(read_values, same_value),
    EMBEDDING: TaskData(_read_none, lambda labels, names: "", labels=False, images=False, pairs=False),
}
