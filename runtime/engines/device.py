"""Walks on a GPU: states stay in its memory, and after a step the host reads a few bytes for each row.

This is the common part of TensorRT and ONNX Runtime on CUDA. Each (rows, length) has one piece of device
memory: two places for every tensor that segments update, which they read and write in turn; one place for the
other outputs of the stem; and one for signals. A step enqueues its segment and a copy of the signals to
pinned host memory, and waits once. Rows that stay after others have exited are gathered within the device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol
from weakref import finalize

import numpy as np

from offramp.runtime.bundle.manifest import NEXT, SIGNALS, Manifest, Tensor, TextInput, Variant
from offramp.runtime.engines.base import Array, Rows
from offramp.runtime.engines.buffers import BufferPool, Run, run_in_turn
from offramp.runtime.engines.cuda import ALIGNMENT, Cuda
from offramp.runtime.engines.tensors import Sides, row_signals, sides_of, updated_twice
from offramp.runtime.errors import DeviceFailed, OutOfMemory, SessionForked
from offramp.runtime.rules.base import RowSignals

Step = tuple[int, int]  # segment, variant
STEM: Step = (-1, 0)
Shape = tuple[int, ...]
LENGTH_STEP = (
    16  # tokens; lengths are rounded up to multiples, so that rows can be joined and there are few shapes
)


class TensorPlace(NamedTuple):
    """Address and shape of a tensor on the device."""

    address: int
    shape: Shape


Places = Mapping[str, TensorPlace]  # by name, for each input and output of a graph


def numeric_shape(tensor: Tensor, rows: int, tokens: int) -> Shape:
    """The shape of a tensor in numbers, for this many rows and tokens."""
    sizes = {"batch": rows, "seq": tokens}
    return tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)


def padded_length(tokens: int, longest: int) -> int:
    """Length in tokens to which a text is padded: a multiple of LENGTH_STEP, at most `longest`."""
    return min(-(-tokens // LENGTH_STEP) * LENGTH_STEP, longest)


@dataclass(frozen=True)
class Layout:
    """The tensors of a bundle, grouped by their use in a walk.

    inputs: the stem's inputs. pairs: tensors that segments read and update. shared: other outputs of the
    stem. signals: those of each segment. spares: those pairs that several graphs of one segment update.
    """

    inputs: tuple[Tensor, ...]
    pairs: tuple[Tensor, ...]
    shared: tuple[Tensor, ...]
    signals: tuple[tuple[Tensor, ...], ...]
    spares: tuple[Tensor, ...]

    @classmethod
    def from_manifest(cls, manifest: Manifest, updated: frozenset[str], inputs: Sequence[Tensor]) -> Layout:
        """Group the tensors of a manifest.

        updated: names of the pairs. inputs: the stem's, with the dtypes in which the engine reads them.
        """
        outputs = manifest.stem.variants[manifest.variants[0]].outputs
        segments = [next(iter(segment.variants.values())) for segment in manifest.segments]
        twice = updated_twice(manifest)
        return cls(
            tuple(inputs),
            tuple(tensor for tensor in outputs if tensor.name in updated),
            tuple(tensor for tensor in outputs if tensor.name not in updated),
            tuple(tuple(t for t in graph.outputs if t.name in SIGNALS) for graph in segments),
            tuple(tensor for tensor in outputs if tensor.name in twice),
        )


@dataclass(frozen=True)
class _Region:
    """The part of a piece of memory that holds one tensor; start, end: bytes from the piece's beginning."""

    start: int
    shape: Shape
    dtype: np.dtype[Any]

    @property
    def end(self) -> int:
        return self.start + int(np.prod(self.shape)) * self.dtype.itemsize


class _Packer:
    """Assigns aligned regions to tensors one after another; end: bytes so far."""

    def __init__(self, rows: int, length: int, end: int = 0) -> None:
        self.rows, self.length, self.end = rows, length, end

    def add(self, tensor: Tensor) -> _Region:
        start = _aligned(self.end)
        region = _Region(start, numeric_shape(tensor, self.rows, self.length), np.dtype(tensor.dtype))
        self.end = _aligned(region.end)
        return region


class DeviceBuffers:
    """The device and host memory of a walk of `rows` rows of `length` tokens.

    It belongs to one state until that is dropped. pending: whether the device may still read the pinned
    inputs. bound: by (step, side), a run and its signals, which are valid once the host has waited.
    """

    def __init__(self, cuda: Cuda, layout: Layout, rows: int, length: int) -> None:
        self.rows, self.length, self.pending = rows, length, False
        self.bound: dict[tuple[Step, int], tuple[Run, RowSignals | None]] = {}
        self._cuda, self._layout = cuda, layout
        device = _Packer(rows, length)
        # The inputs have the same layout on the device and on the host, so that one copy uploads all of them.
        inputs = [device.add(tensor) for tensor in layout.inputs]
        self._input_bytes = device.end
        pairs = [(device.add(tensor), device.add(tensor)) for tensor in layout.pairs]
        shared = [device.add(tensor) for tensor in layout.shared]
        spares = {tensor.name: device.add(tensor) for tensor in layout.spares}
        # On the host every segment has its own memory for signals; on the device all share one.
        host = _Packer(rows, length, self._input_bytes)
        self._host_signals = [[host.add(tensor) for tensor in tensors] for tensors in layout.signals]
        signals_start = device.end
        device.end += max((_span(regions) for regions in self._host_signals), default=0)
        self._memory, self._pinned = cuda.memory(device.end), cuda.pinned(host.end)
        self.bytes = device.end
        base = self._memory.pointer
        self.inputs: dict[str, Array] = {
            tensor.name: self._host_view(region) for tensor, region in zip(layout.inputs, inputs, strict=True)
        }
        # Addresses on side 0 and 1, which are equal for inputs and shared tensors, and as SPARE.
        self._addresses: dict[str, tuple[int, ...]] = {
            tensor.name: (base + region.start, base + region.start)
            for tensor, region in zip((*layout.inputs, *layout.shared), (*inputs, *shared), strict=True)
        } | {
            tensor.name: tuple(
                base + region.start
                for region in (first, second, *([spares[tensor.name]] if tensor.name in spares else []))
            )
            for tensor, (first, second) in zip(layout.pairs, pairs, strict=True)
        }
        self._signals_address = base + signals_start

    def places(self, graph: Variant, segment: int, reads: Sides, writes: Sides) -> Places:
        """Places of the inputs and outputs of a graph, on sides as in sides_of; segment -1 is the stem."""
        signals = self._signal_addresses(segment) if segment >= 0 else {}
        places = {}
        for tensor in (*graph.inputs, *graph.outputs):
            if tensor.name in SIGNALS:
                address = signals[tensor.name]
            elif tensor.name.startswith(NEXT):
                name = tensor.name.removeprefix(NEXT)
                address = self._addresses[name][writes[name]]
            else:  # the stem writes side 0
                address = self._addresses[tensor.name][reads.get(tensor.name, 0)]
            places[tensor.name] = TensorPlace(address, numeric_shape(tensor, self.rows, self.length))
        return places

    def signals(self, segment: int) -> tuple[Run, RowSignals]:
        """A function that enqueues the copy of a segment's signals to the host, and arrays that hold them.

        The arrays are valid once the host has waited.
        """
        regions = self._host_signals[segment]
        start, size = regions[0].start, _span(regions)
        target, source, download = self._pinned.pointer + start, self._signals_address, self._cuda.download
        views = {
            tensor.name: self._host_view(region)
            for tensor, region in zip(self._layout.signals[segment], regions, strict=True)
        }
        signals = row_signals(views, self.rows)
        return lambda: download(target, source, size), signals

    def upload(self) -> None:
        """Enqueue the copy of the stem's inputs from the host to the device."""
        self.pending = True
        self._cuda.upload(self._memory.pointer, self._pinned.pointer, self._input_bytes)

    def gather(self, sources: Sequence[tuple[DeviceBuffers, int, Rows | None]]) -> None:
        """Copy rows of other buffers, one after another, to side 0 and the shared tensors.

        sources: (buffers, side, numbers of rows or None for all).
        """
        filled = 0
        for buffers, side, rows in sources:
            blocks = [(0, buffers.rows)] if rows is None else list(_neighbours(rows))
            for tensor in (*self._layout.pairs, *self._layout.shared):
                target, source = self._addresses[tensor.name][0], buffers._addresses[tensor.name][side]
                size = _bytes(tensor, self.rows, self.length)
                if not tensor.per_row:
                    self._cuda.copy(target, source, size)
                    continue
                row_bytes, row = size // self.rows, filled
                for first, count in blocks:
                    self._cuda.copy(target + row * row_bytes, source + first * row_bytes, count * row_bytes)
                    row += count
            filled += sum(count for _, count in blocks)

    def _signal_addresses(self, segment: int) -> dict[str, int]:
        regions = self._host_signals[segment]
        return {
            tensor.name: self._signals_address + region.start - regions[0].start
            for tensor, region in zip(self._layout.signals[segment], regions, strict=True)
        }

    def _host_view(self, region: _Region) -> Any:
        """The region in pinned memory, as an array."""
        data = self._pinned.array[region.start : region.end]
        return data.view(region.dtype).reshape(region.shape)


class DeviceState:
    """The state of rows between two segments; side: which of each pair of places has the current values."""

    __slots__ = ("buffers", "length", "rows", "side")

    def __init__(self, buffers: DeviceBuffers, side: int) -> None:
        self.buffers, self.side = buffers, side
        self.rows, self.length = buffers.rows, buffers.length


class GraphOpener(Protocol):
    """Opens graphs and binds them to device addresses; the only part in which engines on a GPU differ."""

    def open(self, graphs: Sequence[Variant]) -> None:
        """Open those of these graphs that are not open yet."""
        ...

    def bind(self, graph: Variant, use: Hashable, places: Places, rows: int, length: int) -> Run:
        """Make a function that enqueues one run of an open graph, at these places, on the stream.

        use: for what the graph is run; most runs of one use are at the same places.
        """
        ...

    @property
    def captures(self) -> bool:
        """Whether DeviceEngine has to capture each run as a CUDA graph."""
        ...

    def close(self) -> None:
        """Free all graphs and their memory."""
        ...


class DeviceEngine:
    """Base of the engines on a GPU; implements the protocol engines.base.Engine. Not thread-safe.

    graph: a function from a step to its graph.
    """

    device = "cuda"

    def __init__(
        self,
        cuda: Cuda,
        opener: GraphOpener,
        layout: Layout,
        graph: Callable[[Step], Variant],
        manifest: Manifest,
    ) -> None:
        self._cuda, self._opener, self._layout, self._graph = cuda, opener, layout, graph
        reads = manifest.input
        self._pad = {"input_ids": reads.pad_id} if isinstance(reads, TextInput) else {}
        self._longest = reads.longest if isinstance(reads, TextInput) else 0  # 0: images
        (hidden,) = (tensor for tensor in layout.pairs if tensor.name == "hidden")
        self._image_tokens = hidden.shape[1] if isinstance(hidden.shape[1], int) else 0
        self._buffer_pool = BufferPool(lambda rows, length: DeviceBuffers(cuda, layout, rows, length))

    def prepare(self, variant: int, segments: Sequence[int]) -> None:
        """Open the stem and these segments (0-based) in one variant; see Engine.prepare."""
        steps = [STEM, *((segment, variant) for segment in segments)]
        self._opener.open([graph for step in steps for graph in self._graph(step).graphs])

    def begin(self, inputs: Mapping[str, Array]) -> DeviceState:
        """Run the stem on new rows, padded to a multiple of LENGTH_STEP; see Engine.begin."""
        rows, width = inputs[self._layout.inputs[0].name].shape[:2]
        buffers = self._buffers(rows, self._image_tokens or padded_length(width, self._longest))
        if buffers.pending:
            self._cuda.wait()
        for name, array in buffers.inputs.items():
            if self._longest:
                array[:, width:] = self._pad.get(name, 0)
                array[:, :width] = inputs[name]
            else:
                array[...] = inputs[name]
        buffers.upload()
        run, _ = self._bound(STEM, buffers, 0)
        run()
        return DeviceState(buffers, 0)

    def step(self, segment: int, variant: int, state: DeviceState) -> RowSignals:
        """Run one segment on a state and wait for its signals; see Engine.step."""
        run, signals = self._bound((segment, variant), state.buffers, state.side)
        run()
        self._cuda.wait()
        state.buffers.pending = False
        state.side = 1 - state.side
        assert signals is not None  # None only for the stem
        return signals

    def skip(self, segment: int, state: DeviceState) -> None:
        """Move past a segment, for which nothing has to be done on the device; see Engine.skip."""

    def take(self, state: DeviceState, rows: Rows) -> DeviceState:
        """Copy some rows of a state into a new state; see Engine.take."""
        buffers = self._buffers(len(rows), state.length)
        buffers.gather([(state.buffers, state.side, rows)])
        return DeviceState(buffers, 0)

    def join(self, states: Sequence[DeviceState]) -> DeviceState:
        """Copy the rows of several states into one new state; see Engine.join."""
        buffers = self._buffers(sum(state.rows for state in states), states[0].length)
        buffers.gather([(state.buffers, state.side, None) for state in states])
        return DeviceState(buffers, 0)

    def drop(self, state: DeviceState) -> None:
        """Return a state's buffers to the pool of idle buffers; see Engine.drop."""
        self._buffer_pool.put(state.buffers)

    def close(self) -> None:
        """Wait for the device, then free buffers, graphs and stream."""
        with suppress(DeviceFailed):  # the walk that failed has raised it already
            self._cuda.wait()
        self._buffer_pool.clear()
        self._opener.close()
        self._cuda.close()

    def after_fork(self) -> None:
        """Raise SessionForked: what CUDA has opened belongs to the parent; see Engine.after_fork."""
        raise SessionForked(
            "the process was forked after this session was opened on a GPU, which CUDA does not allow; call "
            "load() in the child, or start it with multiprocessing's spawn"
        )

    def _buffers(self, rows: int, length: int) -> DeviceBuffers:
        try:
            return self._buffer_pool.get(rows, length)
        except OutOfMemory:
            self._buffer_pool.clear()  # buffers of this state are needed now, idle ones perhaps later
            return self._buffer_pool.get(rows, length)

    def _bound(self, step: Step, buffers: DeviceBuffers, side: int) -> tuple[Run, RowSignals | None]:
        """A function that enqueues the step on these buffers, and its signals, valid after a wait."""
        bound = buffers.bound.get((step, side))
        if bound is None:
            facts, segment = self._graph(step), step[0]
            self._opener.open(facts.graphs)
            runs: list[Run] = []
            for number, (graph, reads, writes) in enumerate(sides_of(facts, side)):
                places = buffers.places(graph, segment, reads, writes)
                runs.append(self._opener.bind(graph, (step, number), places, buffers.rows, buffers.length))
            signals: RowSignals | None = None
            if segment >= 0:
                copy, signals = buffers.signals(segment)
                runs.append(copy)
            run = run_in_turn(runs)
            if self._opener.captures:
                run = CapturedRun(self._cuda, run)
            bound = buffers.bound[step, side] = run, signals
        return bound


class CapturedRun:
    """A run that is captured as one CUDA graph and then launched as a whole instead of as dozens of kernels.

    The first call runs without a graph, since TensorRT defers work to the first run at a shape; the second
    call captures the graph.
    """

    __slots__ = ("__weakref__", "_cuda", "_graph", "_run", "_was_run")

    def __init__(self, cuda: Cuda, run: Run) -> None:
        self._cuda, self._run, self._was_run = cuda, run, False
        self._graph: Any = None  # cuda-python's handle

    def __call__(self) -> None:
        if not self._was_run:
            self._was_run = True
            self._run()
            return
        if self._graph is None:
            with self._cuda.capture() as graphs:
                self._run()
            (self._graph,) = graphs
            finalize(self, self._cuda.free_graph, self._graph).atexit = False
        self._cuda.launch(self._graph)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _span(regions: Sequence[_Region]) -> int:
    """Bytes from the start of the first region to the end of the last."""
    return regions[-1].end - regions[0].start if regions else 0


def _bytes(tensor: Tensor, rows: int, length: int) -> int:
    return int(np.prod(numeric_shape(tensor, rows, length))) * np.dtype(tensor.dtype).itemsize


def _neighbours(rows: Rows) -> Iterator[tuple[int, int]]:
    """Blocks of consecutive rows as (first, count), each of which needs one copy."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for block in np.split(rows, breaks):
        yield int(block[0]), len(block)
