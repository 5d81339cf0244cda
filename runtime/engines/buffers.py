"""Buffers of one (rows, length), bound once to every segment that meets them, and the shelf of idle ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from offramp.runtime.engines import Array, Rows
from offramp.runtime.manifest import NEXT, SIGNALS, Tensor, Variant
from offramp.runtime.rules import Signals

_IDLE_BYTES = 64 * 2**20
_IDLE_COUNT = 64  # each also holds two bindings a segment, some kilobytes of ORT's own memory


class Slot:
    """Memory of one tensor on the engine's device: on the CPU an array, elsewhere read and written whole."""

    __slots__ = ("array", "pointer", "shape", "value")

    def __init__(self, ort: ModuleType, device: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape = shape
        self.array: Array = np.zeros(shape, dtype)
        if device == "cpu":
            self.value, self.pointer = None, self.array.ctypes.data
        else:
            self.value = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, device, 0)
            self.pointer = self.value.data_ptr()

    def read(self) -> Array:
        """The values: a view on the CPU, a copy from elsewhere."""
        return self.array if self.value is None else self.value.numpy()

    def written(self) -> None:
        """The array was filled: bring it to the device."""
        if self.value is not None:
            self.value.update_inplace(self.array)


Run = Callable[[], None]
Bound = tuple[Run, Signals]  # one run of a bound session, and where its signals are written


def runner(ort: ModuleType, session: Any, binding: Any) -> Run:
    """One run of a session on what was bound, as a call without arguments.

    The Python layer of ONNX Runtime looks at every run for what concerns other devices, and makes options
    anew: 20 us a segment when the cache is cold. So its own object is called; where a version of it has no
    such object, the public call serves.
    """
    inner, bound = getattr(session, "_sess", None), getattr(binding, "_iobinding", None)
    if inner is None or bound is None:
        return partial(session.run_with_iobinding, binding)
    return partial(inner.run_with_iobinding, bound, ort.RunOptions())


class Buffers:
    """Everything a walk of `rows` rows of `length` tokens needs.

    pairs: tensors that every segment reads and writes anew (hidden, evidence): two slots, one for each side
    of a step.
    shared: what the stem made once (mask, pool, position_bias). inputs: the stem's own inputs. bound: by
    (segment, variant, side); each has memory of its own for its signals, so that nothing is copied in a step.
    """

    def __init__(
        self,
        ort: ModuleType,
        device: str,
        tensors: Mapping[str, Tensor],
        flows: frozenset[str],
        stem_inputs: frozenset[str],
        rows: int,
        length: int,
    ) -> None:
        self.rows, self.length = rows, length
        self._ort, self._device, self._tensors = ort, device, tensors
        self.pairs: dict[str, tuple[Slot, Slot]] = {}
        self.shared: dict[str, Slot] = {}
        self.inputs: dict[str, Array] = {}
        self.stem: Run | None = None
        self.bound: dict[tuple[int, int, int], Bound] = {}
        for name, tensor in tensors.items():
            shape, dtype = self._form(tensor)
            if name in SIGNALS:
                continue  # read on the host after every step, and not every segment's is of one shape
            if name in stem_inputs:
                self.inputs[name] = np.empty(shape, dtype)
            elif name in flows:
                self.pairs[name] = (Slot(ort, device, shape, dtype), Slot(ort, device, shape, dtype))
            else:
                self.shared[name] = Slot(ort, device, shape, dtype)
        slots = [*self.shared.values(), *(slot for pair in self.pairs.values() for slot in pair)]
        self.bytes = sum(slot.array.nbytes for slot in slots)

    def bind_stem(self, session: Any, facts: Variant) -> Run:
        """Bind the stem: inputs in, side 0 and the shared tensors out."""
        binding = self._ort.IOBinding(session)
        for tensor in facts.inputs:
            self._bind_array(binding.bind_input, tensor.name, self.inputs[tensor.name])
        for tensor in facts.outputs:
            self._bind_slot(binding.bind_output, tensor.name, self._slot(tensor.name, 0))
        return runner(self._ort, session, binding)

    def bind(self, session: Any, facts: Variant, side: int) -> Bound:
        """Bind a segment that reads `side` and writes the other."""
        binding = self._ort.IOBinding(session)
        for tensor in facts.inputs:
            self._bind_slot(binding.bind_input, tensor.name, self._slot(tensor.name, side))
        said: dict[str, Array] = {}
        for tensor in facts.outputs:
            if tensor.name in SIGNALS:
                said[tensor.name] = np.empty(*self._form(tensor))
                self._bind_array(binding.bind_output, tensor.name, said[tensor.name])
            else:
                new = self._slot(tensor.name.removeprefix(NEXT), 1 - side)
                self._bind_slot(binding.bind_output, tensor.name, new)
        signals = Signals(said["logits"], said.get("gate"), said.get("forecast"))
        return runner(self._ort, session, binding), signals

    def gather(self, sources: Sequence[tuple[Buffers, int, Rows | None]]) -> None:
        """Fill side 0 and the shared tensors with rows (None: all) of (buffers, side), one after another."""
        at = 0
        for buffers, side, rows in sources:
            until = at + (buffers.rows if rows is None else len(rows))
            for name in (*self.pairs, *self.shared):
                source, target = buffers._slot(name, side).read(), self._slot(name, 0).array
                if not self._tensors[name].per_row:
                    target[...] = source
                elif rows is None:
                    target[at:until] = source
                else:  # mode: the default would copy through one more buffer
                    np.take(source, rows, axis=0, out=target[at:until], mode="clip")
            at = until
        for name in (*self.pairs, *self.shared):
            self._slot(name, 0).written()

    def _form(self, tensor: Tensor) -> tuple[tuple[int, ...], np.dtype[Any]]:
        sizes = {"batch": self.rows, "seq": self.length}
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
        return shape, np.dtype(tensor.dtype)

    def _slot(self, name: str, side: int) -> Slot:
        pair = self.pairs.get(name)
        return self.shared[name] if pair is None else pair[side]

    def _bind_slot(self, bind: Any, name: str, slot: Slot) -> None:
        bind(name, self._device, 0, slot.array.dtype.type, slot.shape, slot.pointer)

    def _bind_array(self, bind: Any, name: str, array: Array) -> None:
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


class Shelf:
    """Idle buffers by (rows, length); the longest unused go first when there are too many."""

    def __init__(
        self,
        ort: ModuleType,
        device: str,
        tensors: Mapping[str, Tensor],
        flows: frozenset[str],
        stem_inputs: frozenset[str],
    ) -> None:
        self._make = (ort, device, tensors, flows, stem_inputs)
        self._idle: OrderedDict[int, Buffers] = OrderedDict()  # by id, in the order in which they came back
        self._by_shape: dict[tuple[int, int], list[Buffers]] = {}
        self._bytes = 0

    def get(self, rows: int, length: int) -> Buffers:
        """Buffers of that shape, for one owner until they are put back."""
        waiting = self._by_shape.get((rows, length))
        if not waiting:
            return Buffers(*self._make, rows, length)
        buffers = waiting.pop()
        del self._idle[id(buffers)]
        self._bytes -= buffers.bytes
        return buffers

    def put(self, buffers: Buffers) -> None:
        """Take buffers back."""
        self._idle[id(buffers)] = buffers
        self._by_shape.setdefault((buffers.rows, buffers.length), []).append(buffers)
        self._bytes += buffers.bytes
        while len(self._idle) > _IDLE_COUNT or (self._bytes > _IDLE_BYTES and len(self._idle) > 1):
            _, oldest = self._idle.popitem(last=False)
            waiting = self._by_shape[oldest.rows, oldest.length]
            waiting.remove(oldest)
            if not waiting:
                del self._by_shape[oldest.rows, oldest.length]
            self._bytes -= oldest.bytes

    def clear(self) -> None:
        """Free all that is idle."""
        self._idle.clear()
        self._by_shape.clear()
        self._bytes = 0
