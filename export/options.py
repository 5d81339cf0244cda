"""Options of an export, checked against each other first; contradictions raise UserError."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import click


class UserError(click.ClickException):
    """The user's input cannot be used: one line on stderr and exit code 2."""

    exit_code = 2


@dataclass(frozen=True)
class ExportOptions:
    """Options for writing graphs.

    variants: precisions, fp32 first. reduce_range: 7 bits for int8 weights (None: if this machine needs it).
    overwrite: replace folders that an earlier run wrote.
    """

    variants: tuple[str, ...] = ("fp32",)
    reduce_range: bool | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class SplitOptions:
    """The options of command ee-split as the user gave them; see its help."""

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
    portable: bool = False

    def __post_init__(self) -> None:
        if self.truncate is not None and self.baselines is None:
            raise UserError(
                f"--truncate {self.truncate} names baselines that are cut off: give --baselines DIR, too"
            )
        if (self.checkpoint / "adapter_config.json").is_file():
            from offramp.training.pretrained import refuse_adapter  # here: loading transformers takes seconds

            try:
                refuse_adapter(self.checkpoint)
            except ValueError as problem:
                raise UserError(f"{self.checkpoint}: {problem}") from None
        places = {"--out": self.out, "--baselines": self.baselines, "--monolith": self.monolith}
        real = {f"{name} {path}": Path(os.path.realpath(path)) for name, path in places.items() if path}
        for (first, one), (second, other) in combinations(real.items(), 2):
            if one.is_relative_to(other) or other.is_relative_to(one):
                raise UserError(
                    f"{first} and {second} are one place, or one lies inside the other; choose them apart"
                )

    @property
    def targets(self) -> tuple[Path, ...]:
        """Paths that the command will write, in this order."""
        return tuple(path for path in (self.out, self.monolith, self.baselines) if path)

    def export(self) -> ExportOptions:
        """The options for writing graphs; raises UserError for variants that do not exist."""
        reduced = {"auto": None, "full": False, "reduced": True}[self.int8_range]
        return ExportOptions(parse_variants(self.variants), reduced, self.overwrite)


def parse_variants(text: str) -> tuple[str, ...]:
    """Parse option --variants, such as "fp32,int8".

    Raises UserError for unknown variants, and if fp32 is not the first.
    """
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
    """Parse option --truncate, such as "3,4", into blocks (1-based); None without the option.

    Raises UserError for blocks after which the owner has no exit.
    """
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
    """Read the lines of the file of --texts that are not blank; raises UserError if there are none."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"--texts {file}: cannot be read as UTF-8 text: {problem}") from None
    if not lines:
        raise UserError(f"--texts {file}: it has no line; give real text, one a line")
    return lines


def identity_of(path: Path) -> tuple[int, ...] | None:
    """Inode and device of a path, which change when another file replaces it; None if nothing is there."""
    return path.stat()[1:3] if os.path.exists(path) else None


def describe_written(before: Mapping[Path, tuple[int, ...] | None]) -> str:
    """Describe for the user which targets have been written so far and which have not.

    before: identity_of each target at the start of the run.
    """
    new = [path for path, old in before.items() if identity_of(path) not in (None, old)]
    missing = [path for path in before if path not in new]
    written = f"written: {', '.join(map(str, new))}" if new else "no bundle was written"
    return written + (f"; not written: {', '.join(map(str, missing))}" if new and missing else "")
