"""Keys, or values, of all blocks in one array: one assignment takes in what a token adds to all of them.

An assignment a block, sixty of them a token where there are thirty blocks, took as long as the seams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from offramp.runtime.bundle.manifest import Tensor
from offramp.runtime.engines.base import Array


class Stack:
    """Tensors of one form, of a past or of what is added to it; parts: by name of the tensor, views of one
    array [blocks, *shape], which by_token shows with tokens first.
    """

    def __init__(self, names: Sequence[str], form: Tensor, axis: int, tokens: int, places: int) -> None:
        self._names, self._form, self._axis = tuple(names), form, axis
        array = np.zeros((len(self._names), *shape_of(form, tokens, places)), form.dtype)
        self.by_token: Array = np.moveaxis(array, 1 + axis, 0)  # [tokens, blocks, ...]
        self.parts: dict[str, Array] = dict(zip(self._names, array, strict=True))

    def like(self, places: int) -> Stack:
        """An empty one of the same tensors, for a past."""
        return Stack(self._names, self._form, self._axis, 0, places)

    def added(self, tokens: int) -> Stack:
        """For what is added to this past by so many tokens."""
        shape = list(self._form.shape)
        shape[self._axis] = "seq"
        names = [name.replace("past", "new", 1) for name in self._names]
        return Stack(names, Tensor("new", self._form.dtype, tuple(shape)), self._axis, tokens, 0)

    def rows(self, names: set[str]) -> slice | None:
        """Which blocks of by_token these tensors are, which stand in a row; None: none."""
        found = [at for at, name in enumerate(self._names) if name in names]
        return slice(found[0], found[-1] + 1) if found else None


def stacks_of(past: Sequence[Tensor], places: int) -> list[Stack]:
    """Of all blocks' past, each with so many places."""
    alike: dict[Any, list[Tensor]] = {}
    for tensor in past:
        alike.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
    return [
        Stack([tensor.name for tensor in tensors], tensors[0], tensors[0].shape.index("past"), 0, places)
        for tensors in alike.values()
    ]


def shape_of(tensor: Tensor, tokens: int, places: int) -> tuple[int, ...]:
    """In numbers, for one sequence."""
    sizes: dict[Any, int] = {"batch": 1, "seq": tokens, "past": places}
    return tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
