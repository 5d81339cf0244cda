"""Find the files of a data set's splits and read each by its form, or folders of images, or ask the hub."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path

import datasets
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from offramp.training.data_csv import read_csv
from offramp.training.data_json import read_json
from offramp.training.data_open import (
    COMPRESSED,
    BadData,
    Columns,
    PlainTable,
    Table,
    Tell,
    form_of,
    is_compressed,
    open_text,
    stem_of,
)

SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}
LINES = ".txt"  # the form without columns
IMAGE_ENDINGS = frozenset(ImageFolder.EXTENSIONS)

PLAIN = (False, False, False)  # the rank of rows in a file that is not compressed

# The table of a split, and its name in messages.
NamedTable = tuple[Table, str]


def read_tables(source: str, columns: Columns, tell: Tell) -> dict[str, NamedTable]:
    """Read a data set with any columns; gives by split its table and its name for messages.

    source: a file, which is the split train; a folder of split files or of images; or a hub name. Images of
    folders are given as absolute paths in columns.image, the names of their class folders in columns.label.
    tell: takes lines for the user. Raises BadData naming the file.
    """
    datasets.disable_progress_bars()
    path = Path(source)
    if path.is_file():
        return {"train": (_read_file(path, columns, tell), str(path))}
    if path.is_dir():
        files = _split_files(path, tell)
        if not any(_rank(file) == PLAIN for file in files.values()) and _holds_images(path):
            return _read_images(path, columns)  # files beside them may list the images of a split
        tables = {split: (_read_file(file, columns, tell), str(file)) for split, file in files.items()}
        return tables or _read_images(path, columns)
    if path.is_absolute() or (form_of(path) in READERS and path.parent.is_dir()):
        raise BadData(f"{source}: no such file or folder")
    return _read_hub(source)


def _split_files(folder: Path, tell: Tell) -> dict[str, Path]:
    """The file of each split that exists; tell: takes a line about files that others take the place of."""
    split_files = {}
    files = sorted(file for file in folder.iterdir() if file.is_file() and form_of(file) in READERS)
    for split, aliases in SPLIT_NAMES.items():
        ranked = sorted(
            (_rank(file), aliases.index(stem_of(file)), file) for file in files if stem_of(file) in aliases
        )
        best = [file for rank, _, file in ranked if rank == ranked[0][0]]
        if len(best) > 1:
            raise BadData(f"{folder}: {best[0].name} and {best[1].name} are both a {split} split; keep one")
        if best:
            split_files[split] = best[0]
        for _, _, other in ranked[1:]:
            tell(f"{other}: not read, since {best[0].name} is the {split} split")
    return split_files


def _rank(file: Path) -> tuple[bool, bool, bool]:
    """The lowest is read if several files are one split: rows before lines, as they are before compressed."""
    return form_of(file) == LINES, is_compressed(file), file.name != file.name.lower()


def _holds_images(folder: Path) -> bool:
    """Whether any folder in this one, or in one of those, holds an image."""
    inside = chain(folder.glob("*/*"), folder.glob("*/*/*"))
    return any(file.suffix.lower() in IMAGE_ENDINGS for file in inside)


def _read_images(folder: Path, columns: Columns) -> dict[str, NamedTable]:
    """Tables of image paths from folders train, dev and test, or from `folder` itself.

    Each holds folders named by class, or images without classes.
    """
    split_folders = {
        split: folder / alias
        for split, aliases in SPLIT_NAMES.items()
        for alias in aliases
        if (folder / alias).is_dir()
    }
    tables: dict[str, NamedTable] = {}
    for split, split_folder in (split_folders or {"train": folder}).items():
        entries = sorted(entry for entry in split_folder.iterdir() if entry.name[0] != ".")
        files = [
            file.absolute()
            for entry in entries
            if entry.is_dir()
            for file in sorted(entry.iterdir())
            if file.name[0] != "."
        ]
        values = {columns.image: [str(file) for file in files], columns.label: [f.parent.name for f in files]}
        if not files:
            images = [entry for entry in entries if entry.suffix.lower() in IMAGE_ENDINGS]
            values = {columns.image: [str(image.absolute()) for image in images]}
        if not values[columns.image]:
            raise BadData(f"{split_folder}: {_why_nothing(entries)}")
        tables[split] = PlainTable(dict(values)), str(split_folder)
    return tables


def _why_nothing(entries: list[Path]) -> str:
    known = ", ".join(READERS)
    reason = f"neither a train/dev/test file ({known}) nor a folder of images for each label"
    files = [entry.name for entry in entries if form_of(entry) in READERS]
    if files:
        reason += (
            f"; it has {', '.join(files[:5])}: name that file, or call it train{form_of(Path(files[0]))}"
        )
    return reason


def _read_hub(source: str) -> dict[str, NamedTable]:
    name, _, configuration = source.partition(":")
    try:
        hub_splits = datasets.load_dataset(name, configuration or None, trust_remote_code=False)
    except Exception as problem:
        raise BadData(
            f"{source}: neither a file nor a folder here, and the hub did not give it: {_root_cause(problem)}"
        ) from problem
    tables: dict[str, NamedTable] = {
        split: (hub_splits[alias], f"{source}[{split}]")
        for split, aliases in SPLIT_NAMES.items()
        for alias in aliases
        if alias in hub_splits
    }
    if not tables:
        raise BadData(f"{source}: it has no split train, dev or test, but {', '.join(hub_splits)}")
    return tables


def _read_file(file: Path, columns: Columns, tell: Tell) -> Table:
    """Read a file as columns by the ending of its name.

    tell: takes a line about what is read otherwise than it stands in the file. Raises BadData naming file,
    row and cure; rows are counted without header and blank lines.
    """
    reader = READERS.get(form_of(file))
    if reader is None:
        raise BadData(
            f"{file}: unknown kind of file; known: {', '.join(READERS)} (also with {', '.join(COMPRESSED)}); "
            "save a table as CSV"
        )
    if file.stat().st_size == 0:
        raise BadData(f"{file}: the file is empty; it needs rows with a text and a label")
    return reader(file, columns, tell)


def _read_lines(file: Path, columns: Columns, tell: Tell) -> Table:
    with open_text(file, None) as lines:
        texts = [line.rstrip("\n") for line in lines]
    rows = [text for text in texts if text.strip()]
    if not rows:
        raise BadData(f"{file}: it holds blank lines alone; it needs a text on each line")
    if len(rows) < len(texts):
        tell(f"{file}: blank lines left out: {len(texts) - len(rows)} of {len(texts)}")
    return PlainTable({columns.text: rows})


def _read_parquet(file: Path, columns: Columns, tell: Tell) -> Table:
    try:
        table: Table = datasets.load_dataset(
            "parquet", data_files=str(file), split="train", trust_remote_code=False
        )
    except Exception as problem:  # datasets wraps any error of its readers
        raise BadData(f"{file}: cannot be read: {_root_cause(problem)}") from problem
    return table


def _root_cause(problem: BaseException) -> str:
    """The first line of the error that an error was raised from."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    return f"{type(problem).__name__}: {problem}".splitlines()[0]


READERS: dict[str, Callable[[Path, Columns, Tell], Table]] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_lines,
}
