"""A double of cuda-python's runtime bindings on host memory; a stream runs only when somebody waits for it.

A program that is correct on a GPU gives the same results here. Mistakes show: what is read before a wait is
POISON, and an access to freed memory or out of bounds makes every later call fail, as on a GPU.
"""

from __future__ import annotations

import traceback
from bisect import bisect_right, insort
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import wraps
from operator import index
from types import SimpleNamespace
from typing import Any

import numpy as np

# Every byte of fresh and of freed memory. As float32 it is 3.4e38, as int64 beyond every index: it shows in
# whatever is computed from it.
POISON = 0x7F
ALIGNMENT = 256
Op = Callable[[], object]
cudaError_t = IntEnum(
    "cudaError_t",
    {
        **{"cudaSuccess": 0, "cudaErrorInvalidValue": 1, "cudaErrorMemoryAllocation": 2},
        **{"cudaErrorNoDevice": 100, "cudaErrorInvalidResourceHandle": 400, "cudaErrorIllegalState": 401},
        **{"cudaErrorIllegalAddress": 700, "cudaErrorMisalignedAddress": 716, "cudaErrorLaunchFailure": 719},
        "cudaErrorStreamCaptureUnsupported": 900,
    },
)
_TEXTS = {2: "out of memory", 100: "no CUDA-capable device", 700: "an illegal memory access was encountered"}
cudaMemcpyKind = IntEnum(
    "cudaMemcpyKind",
    [f"cudaMemcpy{sides}" for sides in ("HostToHost", "HostToDevice", "DeviceToHost", "DeviceToDevice")],
    start=0,
)
cudaStreamCaptureMode = IntEnum(
    "cudaStreamCaptureMode",
    [f"cudaStreamCaptureMode{name}" for name in ("Global", "ThreadLocal", "Relaxed")],
    start=0,
)


class Fault(Exception):
    """A CUDA error by its name, with the reason, which CUDA itself would not give."""

    def __init__(self, error: str, reason: str = "") -> None:
        super().__init__(f"{error}: {reason}")
        self.error = cudaError_t[error]


@dataclass
class Allocation:
    """A piece of memory; kept after it was freed, so that its addresses are not handed out again."""

    base: int
    bytes: np.ndarray
    kind: str  # device, pinned, or tensorrt: what TensorRT allocates for itself
    live: bool = True


@dataclass
class Stream:
    """Enqueued operations that have not run; captured: what a capture has recorded so far."""

    queue: deque[Op] = field(default_factory=deque)
    captured: list[Op] | None = None


@dataclass
class Event:
    """The stream on which it was recorded last."""

    stream: Stream | None = None


@dataclass
class Graph:
    """Operations of a capture; executable: whether it was instantiated."""

    ops: list[Op]
    executable: bool = False


def _binding(body: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """One function of the bindings: it is counted, and gives a tuple whose first item is the error code."""

    @wraps(body)
    def call(self: Cudart, *args: Any) -> tuple[Any, ...]:
        self.calls[body.__name__] += 1
        try:
            self.check_device()
            result = body(self, *args)
            self.check_device()  # a call that waits reports what went wrong on the device
        except Fault as fault:
            return (fault.error,)
        return (cudaError_t.cudaSuccess, *(result if isinstance(result, tuple) else (result,)))

    return call


class Cudart:
    """Stands in for the module cuda.bindings.runtime.

    limit: bytes of device memory in all. used: bytes of it that are allocated. calls: how often each function
    was called. faults: what went wrong on the device. default_stream_uses: calls with no stream of their own.
    """

    cudaStreamNonBlocking, cudaEventDisableTiming, cudaHostAllocDefault = 1, 2, 0
    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode

    def __init__(
        self,
        *,
        devices: int = 1,
        name: str = "Double GPU",
        capability: tuple[int, int] = (8, 6),
        limit: int = 8 * 2**30,
    ) -> None:
        self.devices, self.name, self.capability, self.limit = devices, name, capability, limit
        self.calls: Counter[str] = Counter()
        self.faults: list[str] = []
        self.default_stream_uses = self.used = 0
        self._sticky: cudaError_t | None = None  # after a fault on the device, every call gives this error
        self._bases: list[int] = []
        self._allocations: dict[int, Allocation] = {}
        self._handles: dict[int, Stream | Event | Graph] = {}
        self._last_handle = 0x10000

    # For tests and for the double of TensorRT.

    def check_device(self) -> None:
        """Fault where there is no device, or where an earlier fault broke it."""
        if not self.devices:
            raise Fault("cudaErrorNoDevice")
        if self._sticky is not None:
            raise Fault(self._sticky.name)

    def enqueue(self, stream: Any, op: Op) -> None:
        """Have op run in its turn, or record it while the stream captures."""
        self.check_device()
        target = self._stream(stream)
        (target.queue if target.captured is None else target.captured).append(op)

    def capturing(self, stream: Any) -> bool:
        """Whether a capture is open on the stream."""
        return self._stream(stream).captured is not None

    def check(self, address: int, nbytes: int, kinds: Sequence[str] = ("device", "pinned")) -> np.ndarray:
        """The bytes at an address; Fault where they are not wholly within one live allocation."""
        at = bisect_right(self._bases, address)
        memory = self._allocations[self._bases[at - 1]] if at else None
        if memory is None or address - memory.base + nbytes > len(memory.bytes):
            raise Fault("cudaErrorIllegalAddress", f"{nbytes} bytes at {address:#x} are in no allocation")
        if not memory.live or memory.kind not in kinds:
            kind = memory.kind if memory.live else "freed"
            raise Fault("cudaErrorIllegalAddress", f"{address:#x} is {kind} memory, not {kinds}")
        return memory.bytes[address - memory.base :][:nbytes]

    def view(self, address: int, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """Memory as an array, as it is now: nobody waits for what is enqueued."""
        dtype = np.dtype(dtype)
        if address % dtype.itemsize:
            raise Fault("cudaErrorMisalignedAddress", f"{address:#x} for {dtype}")
        count = int(np.prod(shape, dtype=np.int64))
        return self.check(address, count * dtype.itemsize).view(dtype).reshape(shape)

    def live(self) -> dict[str, list[int]]:
        """Sizes of the allocations that are held, by kind; kinds with none are left out."""
        sizes: dict[str, list[int]] = {}
        for memory in self._allocations.values():
            if memory.live:
                sizes.setdefault(memory.kind, []).append(len(memory.bytes))
        return sizes

    def handles(self) -> Counter[str]:
        """How many streams, events and graphs there are."""
        return Counter(type(thing).__name__ for thing in self._handles.values())

    def reserve(self, size: int, kind: str = "tensorrt") -> int:
        """Allocate; Fault where no memory is left or a capture is open."""
        self.check_device()
        if any(isinstance(thing, Stream) and thing.captured is not None for thing in self._handles.values()):
            raise Fault("cudaErrorStreamCaptureUnsupported", "memory is allocated during a capture")
        if kind != "pinned":
            if self.used + size > self.limit:
                raise Fault("cudaErrorMemoryAllocation", f"{self.used} bytes are used, {size} more wanted")
            self.used += size
        raw = np.full(size + ALIGNMENT, POISON, np.uint8)
        base = raw.ctypes.data + -raw.ctypes.data % ALIGNMENT
        insort(self._bases, base)
        self._allocations[base] = Allocation(base, raw[base - raw.ctypes.data :][:size], kind)
        return base

    def release(self, address: int, kind: str = "tensorrt") -> None:
        """Free; Fault where the address is no live memory of that kind."""
        memory = self._allocations.get(address)
        if memory is None or not memory.live or memory.kind != kind:
            raise Fault("cudaErrorInvalidValue", f"{address:#x} is no {kind} memory")
        memory.live = False
        memory.bytes[:] = POISON
        self.used -= len(memory.bytes) if kind != "pinned" else 0

    # The bindings: device and memory.

    @_binding
    def cudaSetDevice(self, device: int) -> None: ...

    @_binding
    def cudaGetDeviceProperties(self, device: int) -> Any:
        major, minor = self.capability
        return SimpleNamespace(name=self.name.encode(), major=major, minor=minor)

    def cudaDriverGetVersion(self) -> tuple[cudaError_t, int]:
        return cudaError_t.cudaSuccess, 13000

    def cudaRuntimeGetVersion(self) -> tuple[cudaError_t, int]:
        return cudaError_t.cudaSuccess, 13000

    def cudaGetErrorString(self, error: cudaError_t) -> tuple[cudaError_t, bytes]:
        return cudaError_t.cudaSuccess, _TEXTS.get(int(error), error.name).encode()

    @_binding
    def cudaMalloc(self, size: int) -> int:
        return self.reserve(index(size), "device")

    @_binding
    def cudaFree(self, pointer: int) -> None:
        for thing in list(self._handles.values()):
            if isinstance(thing, Stream):
                self._run(thing)
        self.release(pointer, "device")

    @_binding
    def cudaHostAlloc(self, size: int, flags: int) -> int:
        return self.reserve(index(size), "pinned")

    @_binding
    def cudaFreeHost(self, pointer: int) -> None:
        self.release(pointer, "pinned")

    @_binding
    def cudaMemGetInfo(self) -> tuple[int, int]:
        return self.limit - self.used, self.limit

    @_binding
    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: Any) -> None:
        source, target = kind.name.removeprefix("cudaMemcpy").split("To")
        memory = {"Host": ("pinned",), "Device": ("device",)}

        def copy() -> None:
            self.check(dst, count, memory[target])[:] = self.check(src, count, memory[source]).copy()

        self.enqueue(stream, copy)

    # Streams, events and graphs.

    @_binding
    def cudaStreamCreateWithFlags(self, flags: int) -> int:
        return self._handle(Stream())

    @_binding
    def cudaStreamDestroy(self, stream: int) -> None:
        self._run(self._stream(stream))
        del self._handles[stream]

    @_binding
    def cudaEventCreateWithFlags(self, flags: int) -> int:
        return self._handle(Event())

    @_binding
    def cudaEventRecord(self, event: int, stream: Any) -> None:
        self._thing(event, Event).stream = self._stream(stream)

    @_binding
    def cudaEventSynchronize(self, event: int) -> None:
        stream = self._thing(event, Event).stream
        if stream is not None:
            self._run(stream)

    @_binding
    def cudaEventDestroy(self, event: int) -> None:
        self._thing(event, Event)
        del self._handles[event]

    @_binding
    def cudaStreamBeginCapture(self, stream: Any, mode: cudaStreamCaptureMode) -> None:
        target = self._stream(stream)
        if target.captured is not None:
            raise Fault("cudaErrorIllegalState", "the stream captures already")
        target.captured = []

    @_binding
    def cudaStreamEndCapture(self, stream: Any) -> int:
        target = self._stream(stream)
        if target.captured is None:
            raise Fault("cudaErrorIllegalState", "the stream does not capture")
        ops, target.captured = target.captured, None
        return self._handle(Graph(ops))

    @_binding
    def cudaGraphInstantiate(self, graph: int, flags: int) -> int:
        return self._handle(Graph(list(self._thing(graph, Graph).ops), executable=True))

    @_binding
    def cudaGraphLaunch(self, graph: int, stream: Any) -> None:
        executable = self._thing(graph, Graph)
        if not executable.executable:
            raise Fault("cudaErrorInvalidResourceHandle", "the graph was not instantiated")
        self.enqueue(stream, lambda: [op() for op in executable.ops])

    @_binding
    def cudaGraphDestroy(self, graph: int) -> None:
        self._thing(graph, Graph)
        del self._handles[graph]

    cudaGraphExecDestroy = cudaGraphDestroy

    # Inside.

    def _handle(self, thing: Stream | Event | Graph) -> int:
        self._last_handle += 16
        self._handles[self._last_handle] = thing
        return self._last_handle

    def _thing(self, handle: Any, kind: type) -> Any:
        thing = self._handles.get(index(handle))
        if not isinstance(thing, kind):
            raise Fault("cudaErrorInvalidResourceHandle", f"no {kind.__name__} {index(handle):#x}")
        return thing

    def _stream(self, stream: Any) -> Stream:
        if not stream:
            self.default_stream_uses += 1
            raise Fault("cudaErrorInvalidResourceHandle", "the default stream is never to be used")
        target: Stream = self._thing(stream, Stream)
        return target

    def _run(self, stream: Stream) -> None:
        """Run what is enqueued, in turn; after a fault nothing runs any more."""
        if stream.captured is not None:
            raise Fault("cudaErrorStreamCaptureUnsupported", "a wait during a capture")
        while stream.queue:
            op = stream.queue.popleft()
            try:
                if self._sticky is None:
                    op()
            except Fault as fault:
                self._sticky = fault.error
                self.faults.append(str(fault))
            except Exception:  # whatever the operation's own code could not do
                self._sticky = cudaError_t["cudaErrorLaunchFailure"]
                self.faults.append(traceback.format_exc())
