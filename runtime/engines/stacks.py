"""Keys, or values, of all blocks of a segment in one array: one assignment takes in what a token adds.

An assignment a block, sixty of them a token where there are thirty blocks, took as long as the seams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from offramp.runtime.engines import Array
from offramp.runtime.manifest import Tensor


class Stack:
    """Tensors of one form, of a past or of what is added to it: array [blocks, *shape], and a view of it with
    tokens first.
    """

    def __init__(self, tensors: Sequence[Tensor], axis: int, tokens: int, places: int) -> None:
        self.tensors, self._axis = tuple(tensors), axis
        self.array = np.zeros((len(tensors), *shape_of(tensors[0], tokens, places)), tensors[0].dtype)
        self.by_token: Array = np.moveaxis(self.array, 1 + axis, 0)

    def like(self, tokens: int, places: int) -> Stack:
        """One of as many blocks, empty."""
        return Stack(self.tensors, self._axis, tokens, places)

    def added(self, puts: Mapping[str, Tensor], tokens: int) -> Stack | None:
        """Memory for what a stage that puts out these tensors adds to this past; None: nothing."""
        names = [tensor.name.replace("past", "new", 1) for tensor in self.tensors]
        if any(name not in puts for name in names):
            return None
        return Stack([puts[name] for name in names], self._axis, tokens, 0)

    def parts(self) -> dict[str, Array]:
        """By name of the tensor."""
        return {tensor.name: part for tensor, part in zip(self.tensors, self.array, strict=True)}


def stacks_of(past: Sequence[Tensor], places: int) -> list[Stack]:
    """Of a segment's past, each with so many places."""
    alike: dict[Any, list[Tensor]] = {}
    for tensor in past:
        alike.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
    return [Stack(tensors, tensors[0].shape.index("past"), 1, places) for tensors in alike.values()]


def shape_of(tensor: Tensor, tokens: int, places: int) -> tuple[int, ...]:
    """In numbers, for one sequence."""
    sizes: dict[Any, int] = {"batch": 1, "seq": tokens, "past": places}
    return tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
