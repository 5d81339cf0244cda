"""Execution contexts in the double of TensorRT; trt_double.make cuts the class to a version's names."""

from __future__ import annotations

import math
from operator import index
from typing import Any
from weakref import finalize, ref

import numpy as np
from doubles.cuda_machine import ALIGNMENT, Fault
from doubles.trt_graph import NUMPY, Shape
from doubles.trt_things import Dims, Thing, plain

_SCRIBBLE = 0x5A  # on scratch memory, before and after a run


class IExecutionContext(Thing):
    _plain = plain(
        name="",
        debug_sync=False,
        error_recorder=None,
        profiler=None,
        nvtx_verbosity=None,
        enqueue_emits_profile=True,
        persistent_cache_limit=0,
    )

    def __init__(self, engine: Any, lent: bool) -> None:
        self._start(engine._logger)
        self._engine, self._lent = engine, lent
        cudart = self._trt._cudart
        self._memory, most = (0, 0), max(engine._needs)  # address and size; size 0: nobody said it
        if not lent:
            self._memory = cudart.reserve(most), most
            finalize(self, cudart.release, self._memory[0]).atexit = False
        # The first context has profile 0; one profile may be had by several only if it was built so.
        shared = engine._facts["sharing"] and len(engine._profiles) == 1
        self._profile = 0 if shared or not engine._contexts else -1
        self._addresses: dict[str, int] = {}
        self._warm: Any = None  # the shapes of the last run, until they change
        self._forget()
        engine._contexts.add(self)

    @property
    def engine(self) -> Any:
        return self._engine

    @property
    def active_optimization_profile(self) -> int:
        return self._profile

    @property
    def all_binding_shapes_specified(self) -> bool:
        return not self._missing()

    @property
    def device_memory(self) -> int:
        return self._memory[0]

    @device_memory.setter
    def device_memory(self, memory: int) -> None:
        self._lend(index(memory), 0)

    def set_device_memory(self, memory: int, size: int) -> None:
        need = self._required()
        if index(memory) % ALIGNMENT or size < need:
            return self._refuse(3, f"memory {index(memory):#x} of {size} bytes; {need}, aligned, are needed")
        return self._lend(index(memory), size)

    def update_device_memory_size_for_shapes(self) -> int:
        if self._missing() or self._engine._graph.problem(self._shapes):
            self._refuse(3, "not all shapes are set")
            return 0
        self._need = self._engine._graph.scratch(self._shapes)
        return self._need

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < len(self._engine._profiles):
            return self._fail(f"no profile {profile_index}")
        others = {one._profile for one in self._engine._contexts if one is not self}
        if not self._engine._facts["sharing"] and profile_index in others:
            return self._fail(
                f"Profile {profile_index} has been chosen by another IExecutionContext. Use another index"
            )
        self._profile = profile_index
        self._forget()
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        sizes: Shape = tuple(index(size) for size in shape)
        if name not in self._engine._inputs:
            return self._fail(f"{name} is no input")
        if self._profile < 0:
            return self._fail("no optimization profile was chosen")
        least, _, most = self._engine._profiles[self._profile][name]
        if len(sizes) != len(least) or not all(
            a <= b <= c for a, b, c in zip(least, sizes, most, strict=True)
        ):
            return self._fail(f"{name}: {sizes} is not in profile {self._profile}: {least} to {most}")
        if self._shapes.get(name) != sizes:
            self._warm = self._need = None
        self._shapes[name] = sizes
        return True

    def infer_shapes(self) -> list[str]:
        missing = self._missing()
        if not missing and (problem := self._engine._graph.problem(self._shapes)):
            raise RuntimeError(problem)
        return missing

    def get_tensor_shape(self, name: str) -> Dims:
        io = self._engine._tensor(name)
        if io is None:
            return Dims((-1,))
        if name in self._engine._inputs:
            return Dims(self._shapes.get(name, io.shape))
        if self._missing() or self._engine._graph.problem(self._shapes):
            return Dims(io.shape)
        return Dims(self._engine._graph.shapes_of_outputs(self._shapes)[name])

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._tensors or not index(memory):
            return self._fail(f"{name!r} is no tensor, or its address {memory} is none")
        self._addresses[name] = index(memory)
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def execute_async_v3(self, stream_handle: int) -> bool:
        stream, cudart = index(stream_handle), self._trt._cudart
        if problem := self._unready():
            return self._fail(problem)
        shapes, memory = frozenset(self._shapes.items()), self._memory[0]
        captures = cudart.capturing(stream)
        if captures and self._warm != shapes:
            cudart.invalidate(stream)
            return self._fail(
                "operation not permitted when stream is capturing: no run at these shapes before"
            )
        pending = (memory, memory + self._required(), stream)
        for start, end, other in self._trt._pending:
            if other != stream and start < pending[1] and memory < end:
                self._refuse(3, "another context with this device memory is enqueued on another stream")
        try:
            cudart.enqueue(stream, self._work(None if captures else pending))
        except Fault as problem:
            return self._fail(f"Cuda Runtime ({problem})")
        if not captures:
            self._trt._pending.append(pending)
            self._warm = shapes
        return True

    def _forget(self) -> None:
        """Shapes and what hangs on them, as after a change of profile; those that are fixed stay known."""
        self._shapes: dict[str, Shape] = {
            io.name: io.shape for io in self._engine._graph.inputs if not io.free
        }
        self._warm = self._need = None

    def _required(self) -> int:
        return self._need or self._engine._needs[max(0, self._profile)]

    def _lend(self, memory: int, size: int) -> None:
        if not self._lent:
            return self._refuse(3, "the context was created with device memory of its own")
        self._memory = (memory, size)
        return None

    def _missing(self) -> list[str]:
        return [name for name in self._engine._inputs if name not in self._shapes]

    def _fail(self, text: str) -> bool:
        self._refuse(3, text)
        return False

    def _unready(self) -> str:
        """Why nothing can run; "" where it can."""
        (memory, size), need = self._memory, self._required()
        if self._profile < 0:
            return "no optimization profile was chosen"
        if missing := self._missing():
            return f"input dimensions of {missing} are not specified"
        if problem := self._engine._graph.problem(self._shapes):
            return str(problem)
        if unset := [name for name in self._engine._tensors if name not in self._addresses]:
            return f"address is not set for {unset}"
        if memory == 0 or memory % ALIGNMENT or 0 < size < need:
            return f"device memory {memory:#x} of {size} bytes; {need} bytes, aligned, are needed"
        return ""

    def _work(self, pending: tuple[int, int, int] | None) -> Any:
        """What the device does: on the shapes and addresses of now, and on what lies there when it runs."""
        graph, cudart, held = self._engine._graph, self._trt._cudart, self._trt._pending
        shapes = {**self._shapes, **graph.shapes_of_outputs(self._shapes)}
        places, scratch, need, alive = dict(self._addresses), self._memory[0], self._required(), ref(self)
        types = {io.name: np.dtype(NUMPY[io.kind]) for io in (*graph.inputs, *graph.outputs)}
        sizes = {name: math.prod(shapes[name]) * types[name].itemsize for name in types}
        inputs, outputs = ([io.name for io in side] for side in (graph.inputs, graph.outputs))

        def work() -> None:
            if pending is not None:
                held.remove(pending)
            if alive() is None:
                raise Fault("cudaErrorIllegalAddress", "the context was destroyed before it ran")
            memory = cudart.check(scratch, need, ("device", "tensorrt"))
            views = {name: cudart.view(places[name], shapes[name], types[name]) for name in types}
            _apart(places, sizes, outputs)
            memory[:] = _SCRIBBLE
            made = graph.run({name: views[name].copy() for name in inputs})
            for name in outputs:
                views[name][...] = made[name]
            memory[:] = _SCRIBBLE

        return work


def _apart(places: dict[str, int], sizes: dict[str, int], outputs: list[str]) -> None:
    """Fault where an output lies over another tensor: a kernel may write it before another reads that."""
    for output in outputs:
        for name, at in places.items():
            if name != output and at < places[output] + sizes[output] and places[output] < at + sizes[name]:
                raise Fault("cudaErrorIllegalAddress", f"{output} lies over {name}")
