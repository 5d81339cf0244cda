"""The memory of a cache: keys, or values, of all blocks in one array.

What a token adds to all blocks of a segment is then one assignment. One assignment a block, sixty a token in
a network of thirty blocks, took as long as the calls between segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from offramp.runtime.bundle.manifest import Tensor
from offramp.runtime.engines.base import Array


class KVArray:
    """Tensors of one form, of the past or of what a step adds to it.

    by_name: views of one array [blocks, *shape], by name of the tensor. by_token: the same array with tokens
    first [tokens, blocks, ...].
    """

    def __init__(self, names: Sequence[str], form: Tensor, axis: int, tokens: int, places: int) -> None:
        self._names, self._form, self._axis = tuple(names), form, axis
        array = np.zeros((len(self._names), *shape_of(form, tokens, places)), form.dtype)
        self.by_token: Array = np.moveaxis(array, 1 + axis, 0)
        self.by_name: dict[str, Array] = dict(zip(self._names, array, strict=True))

    def empty_past(self, places: int) -> KVArray:
        """An empty array of the same tensors with so many places."""
        return KVArray(self._names, self._form, self._axis, 0, places)

    def added_by(self, tokens: int) -> KVArray:
        """The array of what so many tokens add to this past."""
        shape = list(self._form.shape)
        shape[self._axis] = "seq"
        names = [name.replace("past", "new", 1) for name in self._names]
        return KVArray(names, Tensor("new", self._form.dtype, tuple(shape)), self._axis, tokens, 0)

    def block_range(self, names: set[str]) -> slice | None:
        """Which blocks of by_token these tensors are, which are consecutive; None for none."""
        numbers = [number for number, name in enumerate(self._names) if name in names]
        return slice(numbers[0], numbers[-1] + 1) if numbers else None


def kv_arrays(past: Sequence[Tensor], places: int) -> list[KVArray]:
    """Arrays for the past of all blocks, one for each form of tensor, with so many places."""
    by_form: dict[tuple[tuple[int | str, ...], str], list[Tensor]] = {}
    for tensor in past:
        by_form.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
    return [
        KVArray([tensor.name for tensor in tensors], tensors[0], tensors[0].shape.index("past"), 0, places)
        for tensors in by_form.values()
    ]


def shape_of(tensor: Tensor, tokens: int, places: int) -> tuple[int, ...]:
    """The tensor's shape in numbers, for one sequence."""
    sizes = {"batch": 1, "seq": tokens, "past": places}
    return tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
