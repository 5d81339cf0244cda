"""A walk on a GPU: states stay in its memory, and after a step the host reads a few bytes a row.

What TensorRT and ONNX Runtime on CUDA have in common. For each (rows, length) there is one piece of device
memory with two places for what segments make anew, which they read and write in turn; what the stem made
once; and a place for signals. A step enqueues its segment and a copy of the signals to pinned host memory,
and waits once. Rows that stay are gathered within the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol
from weakref import finalize

from offramp.runtime.bundle.manifest import Manifest, TextInput, Variant
from offramp.runtime.engines.base import Array, Rows
from offramp.runtime.engines.buffers import Run, Shelf
from offramp.runtime.engines.cuda import Cuda
from offramp.runtime.engines.device_buffers import DeviceBuffers, Layout, Places, Step
from offramp.runtime.engines.profiles import rounded
from offramp.runtime.errors import DeviceFailed, OutOfMemory
from offramp.runtime.rules import Signals

STEM: Step = (-1, 0)


class Opener(Protocol):
    """Opens graphs and binds them to addresses; the one thing in which two engines on a GPU differ."""

    def open(self, steps: Sequence[Step]) -> None:
        """Open the graphs of these steps, those that are not open yet."""
        ...

    def bind(self, step: Step, places: Places, rows: int, length: int) -> Run:
        """One run of a graph that lies open, enqueued on the stream when called."""
        ...

    @property
    def captures(self) -> bool:
        """Whether runs are to be captured as CUDA graphs, one each."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class DeviceState:
    """Rows between two segments: their buffers, and which of each pair of places holds the newest values."""

    __slots__ = ("buffers", "length", "rows", "side")

    def __init__(self, buffers: DeviceBuffers, side: int) -> None:
        self.buffers, self.side = buffers, side
        self.rows, self.length = buffers.rows, buffers.length


class DeviceEngine:
    """What engines on a GPU share; see offramp.runtime.engines.Engine. Not thread-safe.

    graph: the facts of a step. longest: of texts, tokens; 0 for images, whose length is in the graphs.
    """

    device = "cuda"

    def __init__(
        self,
        cuda: Cuda,
        opener: Opener,
        layout: Layout,
        graph: Callable[[Step], Variant],
        manifest: Manifest,
    ) -> None:
        self._cuda, self._opener, self._layout, self._graph = cuda, opener, layout, graph
        reads = manifest.input
        self._pad = {"input_ids": reads.pad_id} if isinstance(reads, TextInput) else {}
        self._longest = reads.longest if isinstance(reads, TextInput) else 0
        (hidden,) = (tensor for tensor in layout.pairs if tensor.name == "hidden")
        self._tokens = hidden.shape[1] if isinstance(hidden.shape[1], int) else 0
        self._shelf = Shelf(lambda rows, length: DeviceBuffers(cuda, layout, rows, length))

    def prepare(self, variant: int, segments: Sequence[int]) -> None:
        """Open the stem and these segments; see Engine.prepare."""
        self._opener.open([STEM, *((segment, variant) for segment in segments)])

    def begin(self, inputs: Mapping[str, Array]) -> DeviceState:
        """Run the stem; texts are padded to a length that others have too; see Engine.begin."""
        rows, given = inputs[self._layout.inputs[0].name].shape[:2]
        length = self._tokens or rounded(given, self._longest)
        buffers = self._buffers(rows, length)
        if buffers.pending:
            self._cuda.wait()
        for name, array in buffers.inputs.items():
            if self._longest:
                array[:, given:] = self._pad.get(name, 0)
                array[:, :given] = inputs[name]
            else:
                array[...] = inputs[name]
        buffers.upload()
        run, _ = self._bound(STEM, buffers, 0)
        run()
        return DeviceState(buffers, 0)

    def step(self, segment: int, variant: int, state: DeviceState) -> Signals:
        """Run one segment; see Engine.step."""
        run, signals = self._bound((segment, variant), state.buffers, state.side)
        run()
        self._cuda.wait()
        state.buffers.pending = False
        state.side = 1 - state.side
        assert signals is not None  # only the stem's are
        return signals

    def take(self, state: DeviceState, rows: Rows) -> DeviceState:
        """A new state of those rows alone; see Engine.take."""
        buffers = self._buffers(len(rows), state.length)
        buffers.gather([(state.buffers, state.side, rows)])
        return DeviceState(buffers, 0)

    def join(self, states: Sequence[DeviceState]) -> DeviceState:
        """One new state of all rows; see Engine.join."""
        buffers = self._buffers(sum(state.rows for state in states), states[0].length)
        buffers.gather([(state.buffers, state.side, None) for state in states])
        return DeviceState(buffers, 0)

    def drop(self, state: DeviceState) -> None:
        """The state's buffers may be used again; see Engine.drop."""
        self._shelf.put(state.buffers)

    def close(self) -> None:
        """Give everything back, once the device is done with it."""
        with suppress(DeviceFailed):  # what failed has been told to whoever was walking
            self._cuda.wait()
        self._shelf.clear()
        self._opener.close()
        self._cuda.close()

    def _buffers(self, rows: int, length: int) -> DeviceBuffers:
        try:
            return self._shelf.get(rows, length)
        except OutOfMemory:
            self._shelf.clear()  # what is kept for later is worth less than what is needed now
            return self._shelf.get(rows, length)

    def _bound(self, step: Step, buffers: DeviceBuffers, side: int) -> tuple[Run, Signals | None]:
        found = buffers.bound.get((step, side))
        if found is None:
            self._opener.open([step])
            segment = step[0]
            places = buffers.places(self._graph(step), segment, side)
            run = self._opener.bind(step, places, buffers.rows, buffers.length)
            if segment < 0:
                found = run, None
            else:
                copy, signals = buffers.signals(segment)
                found = _both(run, copy), signals
            if self._opener.captures:
                found = Captured(self._cuda, found[0]), found[1]
            buffers.bound[step, side] = found
        return found


class Captured:
    """A run that becomes one CUDA graph: what is launched is one thing and no longer dozens of kernels.

    The first call runs it plainly, since TensorRT puts off work until the first run at a shape; the second
    captures it.
    """

    __slots__ = ("__weakref__", "_calls", "_cuda", "_graph", "_run")

    def __init__(self, cuda: Cuda, run: Run) -> None:
        self._cuda, self._run, self._calls = cuda, run, 0
        self._graph: Any = None

    def __call__(self) -> None:
        self._calls += 1
        if self._calls == 1:
            self._run()
            return
        if self._graph is None:
            with self._cuda.capture() as kept:
                self._run()
            (self._graph,) = kept
            finalize(self, self._cuda.forget, self._graph).atexit = False
        self._cuda.launch(self._graph)


def _both(first: Run, second: Run) -> Run:
    def run() -> None:
        first()
        second()

    return run
