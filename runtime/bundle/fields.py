"""Checks of single fields of a manifest: plain file names, known words, numbers within limits.

The limits are far above what any network needs. They bound what a manifest can make a reader allocate before
a graph is compared with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from math import prod

LONGEST_INPUT = 2**20  # tokens
LONGEST_NAME = 200  # characters, of what messages and tables name: rules, variants, points, segments, tensors
LONGEST_PREFIX = 4096  # characters
LARGEST_IMAGE = 4096  # pixels of a side
LARGEST_SIZE = 2**24  # of one axis, and of a vocabulary
MOST_ELEMENTS = 2**28  # product of the fixed sizes of a tensor: 1 GiB of float32
MOST_BLOCKS = 10_000
LARGEST_PARAMETER = 3e38  # rules compute in float32
LARGEST_FILE = 2**28  # bytes, of a file that is no graph
LARGEST_WEIGHTS = 2**38  # bytes, of the file of weights of one graph


def plain(where: str, name: str) -> None:
    """Check that a name is a plain file name, so that nothing in a manifest can point out of the folder."""
    if not name or name in (".", "..") or any(c in name for c in "/\\:\0") or not name.isprintable():
        raise ValueError(f"{where}: {name!r:.100} is not a plain file name")


def short(where: str, names: Iterable[str]) -> None:
    """Check that no name is longer than any that a person gives, since messages repeat it."""
    for name in names:
        if len(name) > LONGEST_NAME:
            raise ValueError(f"{where}: a name of {len(name)} characters; at most {LONGEST_NAME} are read")


def listed(where: str, name: str, files: Collection[str]) -> None:
    """Check that a name is a plain file name among these files."""
    plain(where, name)
    if name not in files:
        raise ValueError(f"{where}: {name!r:.100} is not listed in files")


def one_of(where: str, value: object, known: Iterable[object]) -> None:
    """Check that a value is one of those that are known."""
    if value not in (known := list(known)):
        raise ValueError(f"{where}: {value!r:.100}; expected one of {', '.join(map(repr, known))}")


def within(where: str, value: float, least: float, largest: float = float("inf")) -> None:
    """Check that a number is neither below `least` nor above `largest`."""
    if value < least:
        raise ValueError(f"{where}: {value}; expected {least} or more")
    if value > largest:
        raise ValueError(f"{where}: {value}; expected at most {largest}")


def unique(where: str, names: Iterable[str]) -> None:
    """Check that no name is empty, and none there twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen or not name:
            raise ValueError(f"{where}: {name!r:.100} is {'there twice' if name else 'empty'}")
        seen.add(name)


def shape(where: str, sizes: tuple[int | str, ...], axes: Collection[str]) -> None:
    """Check the sizes of a tensor: names of these axes, and numbers that are not too large together."""
    for place, size in enumerate(sizes):
        if not isinstance(size, str):
            within(where, size, 1, LARGEST_SIZE)
            continue
        one_of(where, size, axes)
        if size == "batch" and place:
            raise ValueError(f"{where}: {list(sizes)}; the batch is the first axis")
    numbers = prod(size for size in sizes if isinstance(size, int))
    within(f"{where}: numbers of {list(sizes)}", numbers, 1, MOST_ELEMENTS)
