"""A double of cuda-python's runtime bindings: host memory, and streams that run only when somebody waits.

What is legal on a GPU gives the same results here; what merely happens to work there is caught: reading
before waiting shows POISON, and an access outside of a live allocation breaks the process for good.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import wraps
from operator import index
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
from doubles.cuda_machine import (
    POISON,
    Event,
    Fault,
    Machine,
    Stream,
    cudaError_t,
    cudaEvent_t,
    cudaGraph_t,
    cudaGraphExec_t,
    cudaMemcpyKind,
    cudaStream_t,
    cudaStreamCaptureMode,
)

__all__ = ["POISON", "Cudart", "Fault", "cudaError_t"]


def _call(results: int = 0, *, unsafe: bool = False, free: bool = False) -> Callable[[Any], Any]:
    """One function of the bindings: a tuple, error first. unsafe: not allowed while a stream captures.

    free: answers without a device and after a fault.
    """

    def wrap(body: Any) -> Any:
        @wraps(body)
        def call(self: Cudart, *args: Any) -> tuple[Any, ...]:
            with self._lock:
                self.calls[body.__name__] += 1
                try:
                    if not free:
                        self._ready(unsafe)
                    found = body(self, *args)
                    if not free and self.sticky is not None:
                        raise Fault(self.sticky.name)
                except Fault as problem:
                    return (problem.error, *[None] * results)
                return (cudaError_t.cudaSuccess, *(found if results > 1 else [found] * results))

        return call

    return wrap


class Cudart(Machine):
    """Stands in for the module cuda.bindings.runtime.

    limit, used: bytes of device memory, in all and held. calls: how often each function was called. faults:
    what went wrong on the device, in words. default_stream_uses: how often no stream of one's own was named.
    """

    cudaStreamDefault, cudaStreamNonBlocking = 0, 1
    cudaEventDefault, cudaEventDisableTiming = 0, 2
    cudaHostAllocDefault = 0
    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
    cudaStream_t, cudaEvent_t, cudaGraph_t, cudaGraphExec_t = (
        *(cudaStream_t, cudaEvent_t),
        *(cudaGraph_t, cudaGraphExec_t),
    )

    # Device and errors.

    @_call(1)
    def cudaGetDeviceCount(self) -> int:
        return self.devices

    @_call()
    def cudaSetDevice(self, device: int) -> None:
        self._device(device)

    @_call(1)
    def cudaGetDeviceProperties(self, device: int) -> Any:
        self._device(device)
        major, minor = self.capability
        return SimpleNamespace(
            name=self.name.encode(),
            major=major,
            minor=minor,
            totalGlobalMem=self._total(),
            multiProcessorCount=8,
        )

    @_call(1, free=True)
    def cudaDriverGetVersion(self) -> int:
        return 13000 if self.devices else 0

    @_call(1, free=True)
    def cudaRuntimeGetVersion(self) -> int:
        return 13000

    @_call(1, free=True)
    def cudaGetErrorName(self, error: cudaError_t) -> bytes:
        return error.name.encode()

    @_call(1, free=True)
    def cudaGetErrorString(self, error: cudaError_t) -> bytes:
        said = {
            2: "out of memory",
            700: "an illegal memory access was encountered",
            100: "no CUDA-capable device",
        }
        return said.get(int(error), error.name).encode()

    # Memory.

    @_call(1, unsafe=True)
    def cudaMalloc(self, size: int) -> int:
        return self.reserve(_size(size), "device") if size else 0

    @_call(unsafe=True)
    def cudaFree(self, pointer: int) -> None:
        self._run_all()
        if pointer:
            self.release(index(pointer), "device")

    @_call(1, unsafe=True)
    def cudaHostAlloc(self, size: int, flags: int) -> int:
        return self.reserve(_size(size), "pinned") if size else 0

    @_call(unsafe=True)
    def cudaFreeHost(self, pointer: int) -> None:
        if pointer:
            self.release(index(pointer), "pinned")

    @_call(2)
    def cudaMemGetInfo(self) -> tuple[int, int]:
        return self._total() - self.used, self._total()

    @_call()
    def cudaMemcpyAsync(self, dst: Any, src: Any, count: int, kind: cudaMemcpyKind, stream: Any) -> None:
        target = self._stream(stream)
        way, count = cudaMemcpyKind(int(kind)).name.removeprefix("cudaMemcpy"), _size(count)
        (to, to_kinds), (start, start_kinds) = (
            self._side(place, count, way, end) for place, end in ((dst, "ToDevice"), (src, "DeviceTo"))
        )
        if target.captured is not None and not (to_kinds and start_kinds):
            target.broken = True
            raise Fault("cudaErrorStreamCaptureUnsupported", "pageable memory")
        # Pageable memory is read when the call is made, and written before it returns.
        staged = None if start_kinds else ctypes.string_at(start, count)

        def copy() -> None:
            data = staged if staged is not None else self.check(start, count, start_kinds).tobytes()
            if to_kinds:
                self.check(to, count, to_kinds)[:] = np.frombuffer(data, np.uint8)
            else:
                ctypes.memmove(to, data, count)

        self._enqueue(target, copy)
        if not to_kinds:
            self._run(target)

    @_call()
    def cudaMemsetAsync(self, pointer: int, value: int, count: int, stream: Any) -> None:
        def fill() -> None:
            self.check(index(pointer), _size(count), ("device",))[:] = value & 0xFF

        self._enqueue(self._stream(stream), fill)

    # Streams and events.

    @_call(1)
    def cudaStreamCreateWithFlags(self, flags: int) -> cudaStream_t:
        self._streams[number := self._number()] = Stream()
        return cudaStream_t(number)

    @_call()
    def cudaStreamDestroy(self, stream: Any) -> None:
        self._gone.append(self._stream(stream))
        del self._streams[index(stream)]

    @_call()
    def cudaStreamSynchronize(self, stream: Any) -> None:
        self._run(self._stream(stream))

    @_call()
    def cudaStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> None:
        found = self._other(event, Event)
        of, at = found.stream, found.at
        if of is not None:
            self._enqueue(self._stream(stream), lambda: self._run(of, at))

    @_call(unsafe=True)
    def cudaDeviceSynchronize(self) -> None:
        self._run_all()

    @_call(1)
    def cudaEventCreateWithFlags(self, flags: int) -> cudaEvent_t:
        self._others[number := self._number()] = Event(flags)
        return cudaEvent_t(number)

    @_call()
    def cudaEventRecord(self, event: Any, stream: Any) -> None:
        found, target = self._other(event, Event), self._stream(stream)
        self._enqueue(target, lambda: setattr(found, "time", perf_counter()))
        found.captured = target.captured is not None
        if not found.captured:
            found.stream, found.at, found.time = target, target.added, None

    @_call()
    def cudaEventSynchronize(self, event: Any) -> None:
        found = self._other(event, Event)
        if found.captured:
            raise Fault("cudaErrorCapturedEvent")
        if found.stream is not None:
            self._run(found.stream, found.at)

    @_call()
    def cudaEventDestroy(self, event: Any) -> None:
        self._other(event, Event)
        del self._others[index(event)]

    @_call(1)
    def cudaEventElapsedTime(self, start: Any, end: Any) -> float:
        first, last = self._other(start, Event), self._other(end, Event)
        if (first.flags | last.flags) & self.cudaEventDisableTiming or None in (first.stream, last.stream):
            raise Fault("cudaErrorInvalidResourceHandle", "without timing, or never recorded")
        if first.time is None or last.time is None:
            raise Fault("cudaErrorNotReady")
        return 1000 * (last.time - first.time)

    # Graphs.

    @_call()
    def cudaStreamBeginCapture(self, stream: Any, mode: cudaStreamCaptureMode) -> None:
        target = self._stream(stream)
        if target is self._default:
            raise Fault("cudaErrorStreamCaptureUnsupported", "the default stream cannot capture")
        if target.captured is not None:
            raise Fault("cudaErrorIllegalState", "it captures already")
        target.captured, target.mode, target.broken = [], int(mode), False

    @_call(1)
    def cudaStreamEndCapture(self, stream: Any) -> cudaGraph_t:
        target = self._stream(stream)
        if (captured := target.captured) is None:
            raise Fault("cudaErrorIllegalState", "it does not capture")
        target.captured = None
        if target.broken:
            raise Fault("cudaErrorStreamCaptureInvalidated")
        self._others[number := self._number()] = captured
        return cudaGraph_t(number)

    @_call(1)
    def cudaGraphInstantiate(self, graph: Any, flags: int) -> cudaGraphExec_t:
        ops = tuple(self._other(graph, list))
        self._others[number := self._number()] = ops
        return cudaGraphExec_t(number)

    @_call()
    def cudaGraphLaunch(self, graph: Any, stream: Any) -> None:
        ops = self._other(graph, tuple)
        self._enqueue(self._stream(stream), lambda: [op() for op in ops])

    @_call()
    def cudaGraphExecDestroy(self, graph: Any) -> None:
        self._other(graph, tuple)
        del self._others[index(graph)]

    @_call()
    def cudaGraphDestroy(self, graph: Any) -> None:
        self._other(graph, list)
        del self._others[index(graph)]


def _size(count: int) -> int:
    if count < 0:
        raise OverflowError("can't convert negative value to size_t")
    return index(count)
