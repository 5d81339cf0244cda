"""Options of an export, checked against each other before time is spent; a contradiction is a UserError."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import click


class UserError(click.ClickException):
    """One line on stderr, exit code 2: the user's input cannot be used."""

    exit_code = 2


@dataclass(frozen=True)
class ExportOptions:
    """How graphs are written.

    variants: precisions, fp32 first. reduce_range: 7 bits for int8 weights, None: as this machine needs.
    overwrite: replace folders that an earlier run wrote.
    """

    variants: tuple[str, ...] = ("fp32",)
    reduce_range: bool | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class SplitOptions:
    """The options of ee-split, as given; see its help."""

    checkpoint: Path
    out: Path
    segments: str | None
    dev: Path | None
    engine: str
    device: str | None
    variants: str
    texts: Path | None
    int8_range: str
    monolith: Path | None
    baselines: Path | None
    truncate: str | None
    overwrite: bool

    def __post_init__(self) -> None:
        if self.truncate is not None and self.baselines is None:
            raise UserError(
                f"--truncate {self.truncate} names baselines that are cut off: give --baselines DIR, too"
            )
        places = {"--out": self.out, "--baselines": self.baselines, "--monolith": self.monolith}
        real = {f"{name} {path}": Path(os.path.realpath(path)) for name, path in places.items() if path}
        for (first, one), (second, other) in combinations(real.items(), 2):
            if one.is_relative_to(other) or other.is_relative_to(one):
                raise UserError(
                    f"{first} and {second} are one place, or one lies inside the other; choose them apart"
                )

    @property
    def targets(self) -> tuple[Path, ...]:
        """What will be written, in this order."""
        return tuple(path for path in (self.out, self.monolith, self.baselines) if path)

    def export(self) -> ExportOptions:
        """How graphs are written; UserError for variants that do not exist."""
        reduced = {"auto": None, "full": False, "reduced": True}[self.int8_range]
        return ExportOptions(parse_variants(self.variants), reduced, self.overwrite)


def parse_variants(text: str) -> tuple[str, ...]:
    """Variants from "fp32,int8"; UserError for unknown ones and where fp32 is not the first."""
    from offramp.export.precision import VARIANTS

    names = tuple(word.strip() for word in text.split(","))
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise UserError(f"--variants: {unknown[0]!r} is not known; choose among {', '.join(VARIANTS)}")
    if names[0] != "fp32" or len(set(names)) != len(names):
        raise UserError(
            f"--variants {text}: fp32 comes first, as the others are written from it, and each once"
        )
    return names


def parse_blocks(text: str | None, exits: Sequence[int], owner: str) -> list[int] | None:
    """Blocks to truncate after, from "3,4"; UserError for blocks that are no exits of the owner."""
    if text is None:
        return None
    try:
        blocks = [int(word) for word in text.split(",")]
    except ValueError:
        blocks = []
    if not blocks or any(block not in exits for block in blocks):
        known = ", ".join(map(str, exits))
        raise UserError(f"--truncate {text}: expected blocks such as 3,4; {owner} has exits after {known}")
    return blocks


def read_texts(file: Path) -> Sequence[str]:
    """The lines of --texts that are not blank."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"--texts {file}: cannot be read as UTF-8 text: {problem}") from None
    if not lines:
        raise UserError(f"--texts {file}: it has no line; give real text, one a line")
    return lines


def identity_of(path: Path) -> tuple[int, ...] | None:
    """Inode and device of a path, which a rename into its place changes; None where nothing is."""
    return path.stat()[1:3] if os.path.exists(path) else None


def outcome(before: Mapping[Path, tuple[int, ...] | None]) -> str:
    """Which targets are written if the run ends now; before: the identity of each at the start."""
    new = [path for path, old in before.items() if identity_of(path) not in (None, old)]
    missing = [path for path in before if path not in new]
    written = f"written: {', '.join(map(str, new))}" if new else "no bundle was written"
    return written + (f"; not written: {', '.join(map(str, missing))}" if new and missing else "")
