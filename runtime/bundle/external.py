"""Weights of a graph in a file beside it (external data), for graphs of more bytes than protobuf can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

SUFFIX = ".data"  # behind a graph's file name: the one file that may hold its weights
KEYS = frozenset({b"location", b"offset", b"length"})  # of the entries that say where a tensor is
DTYPES = {
    1: "<f4",
    2: "u1",
    3: "i1",
    6: "<i4",
    7: "<i8",
    10: "<f2",
    11: "<f8",
}  # numpy's, by TensorProto.DataType
FEWEST = 65  # numbers of a tensor outside; smaller ones may be shapes, which are checked in the graph
_DIGITS = 15  # of a place


class OutsideTensor(NamedTuple):
    """An initializer in a graph's file of weights: numpy's name of its type, its shape, its first byte."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


def outside_tensor(
    weights: tuple[str, int] | None,
    place: Mapping[bytes, bytes],
    kind: int,
    shape: tuple[int, ...],
    size: int,
) -> OutsideTensor:
    """A tensor of `size` bytes from the entries that say where it is; raises ValueError for other places.

    weights: name and bytes of the graph's file of weights, None if it has none. kind: TensorProto.DataType.
    """
    if weights is None:
        raise ValueError("it is in another file (external data), and the manifest lists no file of weights")
    name, held = weights
    if kind not in DTYPES:
        raise ValueError(f"numbers of data type {kind} belong into the graph (external data)")
    if place.get(b"location") != name.encode():
        shown = ascii(place.get(b"location", b"")[:80].decode("utf-8", "replace"))
        raise ValueError(f"it is in file {shown} (external data); {name} alone is allowed")
    numbers = [place.get(key, b"") for key in (b"offset", b"length")]
    if not all(number.isdigit() and len(number) <= _DIGITS for number in numbers):
        raise ValueError("offset or length of its external data is no number")
    offset, length = map(int, numbers)
    if length != size or offset + length > held:
        raise ValueError(
            f"bytes {offset} to {offset + length} of {name} (external data), which has {held}; its "
            f"sizes need {size}"
        )
    return OutsideTensor(DTYPES[kind], shape, offset)
