"""The memory of a key-value cache: keys, or values, of all blocks in one array.

The new keys of a token are then written to all blocks of a segment by one assignment. One assignment for each
block, sixty a token in a network of thirty blocks, took as long as the calls between segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from offramp.runtime.bundle.manifest import Tensor
from offramp.runtime.engines.base import Array


class KVArray:
    """One array for keys or values of all blocks that have the same shape: of the past, or of new tokens.

    by_name: views of the array [blocks, *shape], by the tensor's name. by_token: the same array with tokens
    first, [tokens, blocks, ...].
    """

    def __init__(self, names: Sequence[str], form: Tensor, axis: int, tokens: int, places: int) -> None:
        self._names, self._form, self._axis = tuple(names), form, axis
        array = np.zeros((len(self._names), *sequence_shape(form, tokens, places)), form.dtype)
        self.by_token: Array = np.moveaxis(array, 1 + axis, 0)
        self.by_name: dict[str, Array] = dict(zip(self._names, array, strict=True))

    def empty_past(self, places: int) -> KVArray:
        """Make an array of zeros for the same tensors, with places for this many tokens."""
        return KVArray(self._names, self._form, self._axis, 0, places)

    def for_new_tokens(self, tokens: int) -> KVArray:
        """Make the array for the keys or values of this many new tokens, which are added to this past."""
        shape = list(self._form.shape)
        shape[self._axis] = "seq"
        names = [name.replace("past", "new", 1) for name in self._names]
        return KVArray(names, Tensor("new", self._form.dtype, tuple(shape)), self._axis, tokens, 0)

    def block_range(self, names: set[str]) -> slice | None:
        """Range of the (consecutive) blocks of by_token to which these tensors belong; None for none."""
        numbers = [number for number, name in enumerate(self._names) if name in names]
        return slice(numbers[0], numbers[-1] + 1) if numbers else None


def past_arrays(past: Sequence[Tensor], places: int) -> list[KVArray]:
    """Make the arrays for the past of all blocks, one for each shape, with places for this many tokens."""
    by_form: dict[tuple[tuple[int | str, ...], str], list[Tensor]] = {}
    for tensor in past:
        by_form.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
    return [
        KVArray([tensor.name for tensor in tensors], tensors[0], tensors[0].shape.index("past"), 0, places)
        for tensors in by_form.values()
    ]


def sequence_shape(tensor: Tensor, tokens: int, places: int) -> tuple[int, ...]:
    """The shape of a tensor in numbers, for one sequence with this many new tokens and past places."""
    sizes = {"batch": 1, "seq": tokens, "past": places}
    return tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
