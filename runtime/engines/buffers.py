"""Buffers for one (rows, length), bound once to every segment that uses them, and a pool of idle buffers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from offramp.runtime.bundle.manifest import NEXT, SIGNALS, Tensor, Variant
from offramp.runtime.engines.base import Array, Rows
from offramp.runtime.engines.tensors import SPARE, row_signals, sides_of
from offramp.runtime.rules.base import RowSignals

_IDLE_BYTES = 64 * 2**20
_IDLE_COUNT = 64  # each also holds two bindings a segment, some kilobytes of ORT's own memory


Run = Callable[[], None]
Bound = tuple[Run, RowSignals]  # one run of a bound session, and where its signals are written


def make_run(ort: ModuleType, session: Any, binding: Any, entries: Mapping[str, str] | None = None) -> Run:
    """Make a function without arguments that runs an ONNX Runtime session on bound arrays.

    entries: of the run options. The Python layer of ONNX Runtime makes new options and checks for other
    devices in every run, which takes 20 us a segment when the cache is cold. Therefore the function calls the
    object below that layer, or the public method in a version without such an object.
    """
    options = ort.RunOptions()
    options.log_severity_level = 4  # errors are raised; ONNX Runtime would also print them
    for key, value in (entries or {}).items():
        options.add_run_config_entry(key, value)
    inner, bound = getattr(session, "_sess", None), getattr(binding, "_iobinding", None)
    if inner is None or bound is None:
        return partial(session.run_with_iobinding, binding, options)
    return partial(inner.run_with_iobinding, bound, options)


def run_in_turn(runs: Sequence[Run]) -> Run:
    """One function that calls several; the function itself if there is one."""
    if len(runs) == 1:
        return runs[0]

    def run() -> None:
        for run_graph in runs:
            run_graph()

    return run


class Buffers:
    """The arrays of a walk of `rows` rows of `length` tokens, bound to the segments that use them.

    pairs: tensors that every segment reads and replaces (hidden, evidence): two arrays, one for each side of
    a step. spares: third arrays of those that several graphs of one segment replace. shared: the stem's other
    outputs (mask, pool, position_bias). inputs: the stem's inputs. bound: runs by (segment, variant, side),
    each with its own memory for signals, so that a step copies nothing.
    """

    def __init__(
        self,
        ort: ModuleType,
        tensors: Mapping[str, Tensor],
        updated: frozenset[str],
        stem_inputs: frozenset[str],
        rows: int,
        length: int,
    ) -> None:
        self.rows, self.length = rows, length
        self._ort, self._tensors = ort, tensors
        self.pairs: dict[str, tuple[Array, Array]] = {}
        self.spares: dict[str, Array] = {}  # made by bind()
        self.shared: dict[str, Array] = {}
        self.inputs: dict[str, Array] = {}
        self.stem: Run | None = None
        self.bound: dict[tuple[int, int, int], Bound] = {}
        for name, tensor in tensors.items():
            shape, dtype = self._form(tensor)
            if name in SIGNALS:
                continue  # allocated by bind(): segments differ in the shape of their signals
            if name in stem_inputs:
                self.inputs[name] = np.empty(shape, dtype)
            elif name in updated:
                self.pairs[name] = (np.zeros(shape, dtype), np.zeros(shape, dtype))
            else:
                self.shared[name] = np.zeros(shape, dtype)
        arrays = [*self.shared.values(), *(array for pair in self.pairs.values() for array in pair)]
        self.bytes = sum(array.nbytes for array in arrays)

    def bind_stem(self, session: Any, facts: Variant) -> Run:
        """Bind the stem, which reads `inputs` and writes side 0 and the shared tensors; returns its run."""
        binding = self._ort.IOBinding(session)
        for tensor in facts.inputs:
            _bind(binding.bind_input, tensor.name, self.inputs[tensor.name])
        for tensor in facts.outputs:
            _bind(binding.bind_output, tensor.name, self._array(tensor.name, 0))
        return make_run(self._ort, session, binding)

    def bind(self, sessions: Sequence[Any], facts: Variant, side: int) -> Bound:
        """Bind a segment that reads `side` (0 or 1) and writes the other; returns its run and its signals.

        sessions: of facts.graphs.
        """
        runs: list[Run] = []
        signal_arrays: dict[str, Any] = {}
        for session, (graph, reads, writes) in zip(sessions, sides_of(facts, side), strict=True):
            binding = self._ort.IOBinding(session)
            for tensor in graph.inputs:
                _bind(binding.bind_input, tensor.name, self._array(tensor.name, reads[tensor.name]))
            for tensor in graph.outputs:
                if tensor.name in SIGNALS:
                    array = signal_arrays[tensor.name] = np.empty(*self._form(tensor))
                    self.bytes += array.nbytes  # answers of all tokens are as large as a hidden state
                else:
                    name = tensor.name.removeprefix(NEXT)
                    array = self._array(name, writes[name])
                _bind(binding.bind_output, tensor.name, array)
            runs.append(make_run(self._ort, session, binding))
        return run_in_turn(runs), row_signals(signal_arrays, self.rows)

    def gather(self, sources: Sequence[tuple[Buffers, int, Rows | None]]) -> None:
        """Copy rows of other buffers, one after another, to side 0 and the shared tensors.

        sources: (buffers, side, numbers of rows or None for all).
        """
        at = 0
        for buffers, side, rows in sources:
            until = at + (buffers.rows if rows is None else len(rows))
            for name in (*self.pairs, *self.shared):
                source, target = buffers._array(name, side), self._array(name, 0)
                if not self._tensors[name].per_row:
                    target[...] = source
                elif rows is None:
                    target[at:until] = source
                else:  # mode: the default would copy through one more buffer
                    np.take(source, rows, axis=0, out=target[at:until], mode="clip")
            at = until

    def _form(self, tensor: Tensor) -> tuple[tuple[int, ...], np.dtype[Any]]:
        sizes = {"batch": self.rows, "seq": self.length}
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
        return shape, np.dtype(tensor.dtype)

    def _array(self, name: str, side: int) -> Array:
        pair = self.pairs.get(name)
        if pair is None:
            return self.shared[name]
        if side != SPARE:
            return pair[side]
        if name not in self.spares:
            self.spares[name] = np.zeros_like(pair[0])
            self.bytes += pair[0].nbytes
        return self.spares[name]


def _bind(bind: Any, name: str, array: Array) -> None:
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


class PooledBuffers(Protocol):
    """Buffers that a BufferPool can keep: their rows, length in tokens, and size in bytes."""

    rows: int
    length: int
    bytes: int


B = TypeVar("B", bound=PooledBuffers)


class BufferPool(Generic[B]):
    """A pool of idle buffers by (rows, length), which makes new buffers if it has none of a shape.

    If there are too many idle buffers, the least recently used are dropped first.
    """

    def __init__(self, make: Callable[[int, int], B]) -> None:
        self._make = make
        self._idle: OrderedDict[int, B] = OrderedDict()  # by id, in the order in which they came back
        self._by_shape: dict[tuple[int, int], list[B]] = {}
        self._bytes = 0

    def get(self, rows: int, length: int) -> B:
        """Get buffers of a shape, which belong to the caller until they are put back."""
        waiting = self._by_shape.get((rows, length))
        if not waiting:
            return self._make(rows, length)
        buffers = waiting.pop()
        del self._idle[id(buffers)]
        self._bytes -= buffers.bytes
        return buffers

    def put(self, buffers: B) -> None:
        """Return buffers to the pool, which keeps or drops them."""
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
        """Free all idle buffers."""
        self._idle.clear()
        self._by_shape.clear()
        self._bytes = 0
