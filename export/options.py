"""What ee-split is asked for, held against itself before seconds go by; what cannot be is a UserError."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import click


class UserError(click.ClickException):
    """One line on stderr, exit code 2: what the user gave cannot be used."""

    exit_code = 2


def agree(out: Path, monolith: Path | None, rivals: Path | None, truncate: str | None) -> None:
    """Refuse wishes that contradict each other; links and dots are seen through."""
    if truncate is not None and rivals is None:
        raise UserError(f"--truncate {truncate} says which rivals are cut off: say --rivals DIR too")
    given = {"--out": out, "--rivals": rivals, "--monolith": monolith}
    real = {f"{name} {path}": Path(os.path.realpath(path)) for name, path in given.items() if path}
    for (one, first), (two, second) in combinations(real.items(), 2):
        if first.is_relative_to(second) or second.is_relative_to(first):
            raise UserError(f"{one} and {two} are one place, or one lies inside the other; choose them apart")


def identity_of(path: Path) -> tuple[int, ...] | None:
    """Inode and device of what stands there: after a rename into its place they are others."""
    return path.stat()[1:3] if os.path.exists(path) else None


def outcome(before: Mapping[Path, tuple[int, ...] | None]) -> str:
    """What is true if all ends here; before: each target as it was found."""
    new = [path for path, was in before.items() if identity_of(path) not in (None, was)]
    old = [path for path in before if path not in new]
    said = f"written: {', '.join(map(str, new))}" if new else "no bundle was written"
    return said + (f"; not written: {', '.join(map(str, old))}" if new and old else "")


def blocks_of(wish: str | None, exits: Sequence[int], whose: str) -> list[int] | None:
    from offramp.export.baselines import parse_blocks

    try:
        return None if wish is None else parse_blocks(wish, exits, whose)
    except ValueError as problem:
        raise UserError(f"--truncate {problem}") from None


def variants_of(wish: str) -> tuple[str, ...]:
    from offramp.export.precision import VARIANTS

    names = tuple(word.strip() for word in wish.split(","))
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise UserError(f"--variants: {unknown[0]!r} is not known; choose among {', '.join(VARIANTS)}")
    if names[0] != "fp32" or len(set(names)) != len(names):
        raise UserError(f"--variants {wish}: fp32 comes first, as the others are made from it, and each once")
    return names


def lines_of(file: Path) -> Sequence[str]:
    try:
        found = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"--texts {file}: cannot be read as UTF-8 text: {problem}") from None
    if not found:
        raise UserError(f"--texts {file}: it has no line; give real text, one a line")
    return found
