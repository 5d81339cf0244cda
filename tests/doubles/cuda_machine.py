"""What lies under cuda_double: memory that is watched, and streams that run only when somebody waits."""

from __future__ import annotations

import threading
import traceback
from bisect import bisect_right, insort
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from operator import index
from typing import Any

import numpy as np

# Fresh and freed memory is full of it. As float32 it is 3.4e38, as float16 NaN, as int64 beyond every index:
# it shows in whatever is computed from it.
POISON = 0x7F
ALIGNMENT = 256
Op = Callable[[], object]
cudaError_t = IntEnum(
    "cudaError_t",
    {
        **{"cudaSuccess": 0, "cudaErrorInvalidValue": 1, "cudaErrorMemoryAllocation": 2},
        **{"cudaErrorNoDevice": 100, "cudaErrorInvalidDevice": 101},
        **{"cudaErrorInvalidResourceHandle": 400, "cudaErrorIllegalState": 401, "cudaErrorNotReady": 600},
        **{"cudaErrorIllegalAddress": 700, "cudaErrorMisalignedAddress": 716, "cudaErrorLaunchFailure": 719},
        **{"cudaErrorStreamCaptureUnsupported": 900, "cudaErrorStreamCaptureInvalidated": 901},
        **{"cudaErrorCapturedEvent": 907},
    },
)
cudaMemcpyKind = IntEnum(
    "cudaMemcpyKind",
    "cudaMemcpyHostToHost cudaMemcpyHostToDevice cudaMemcpyDeviceToHost cudaMemcpyDeviceToDevice "
    "cudaMemcpyDefault",
    start=0,
)
cudaStreamCaptureMode = IntEnum(
    "cudaStreamCaptureMode",
    [f"cudaStreamCaptureMode{m}" for m in ("Global", "ThreadLocal", "Relaxed")],
    start=0,
)


class Fault(Exception):
    """An error of CUDA's with its reason, which the real one would not tell."""

    def __init__(self, error: str, reason: str = "") -> None:
        super().__init__(f"{error}: {reason}")
        self.error = cudaError_t[error]


@dataclass
class Allocation:
    """A stretch of memory; it is kept after it was freed, so that its addresses are never given again."""

    base: int
    bytes: np.ndarray
    kind: str  # device, pinned, or tensorrt: TensorRT's own
    live: bool = True


class Handle:
    """A stream, event or graph; like the real ones it is no int, but has one."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __int__(self) -> int:
        return self._number

    __index__ = __hash__ = __int__

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and int(other) == self._number  # type: ignore[call-overload]


cudaStream_t, cudaEvent_t, cudaGraph_t, cudaGraphExec_t = (
    type(f"cuda{name}_t", (Handle,), {}) for name in ("Stream", "Event", "Graph", "GraphExec")
)


@dataclass
class Stream:
    """What was enqueued and has not run; added and done count, for events."""

    queue: deque[Op] = field(default_factory=deque)
    added: int = 0
    done: int = 0
    captured: list[Op] | None = None
    mode: int = 0
    broken: bool = False  # the capture, by a call that is not allowed in it


@dataclass
class Event:
    """Where it was recorded last, and when that was reached."""

    flags: int
    stream: Stream | None = None
    at: int = 0
    time: float | None = None
    captured: bool = False


class Machine:
    """Memory, streams and what was broken; the double of CUDA's runtime is this under CUDA's names."""

    def __init__(
        self,
        *,
        devices: int = 1,
        name: str = "Double GPU",
        capability: tuple[int, int] = (8, 6),
        limit: int | None = None,
    ) -> None:
        self.devices, self.name, self.capability, self.limit = devices, name, capability, limit
        self.calls: Counter[str] = Counter()
        self.faults: list[str] = []
        self.sticky: cudaError_t | None = None
        self.default_stream_uses = self.used = 0  # used: bytes of device memory
        self._lock = threading.RLock()
        self._bases: list[int] = []
        self._allocations: dict[int, Allocation] = {}
        self._default = Stream()
        self._streams: dict[int, Stream] = {}
        self._gone: list[Stream] = []  # destroyed with work left: the real ones finish it
        self._others: dict[int, Any] = {}  # events and graphs
        self._last = 0x10000

    # For tests and for the double of TensorRT.

    def enqueue(self, stream: Any, op: Op) -> None:
        """Have op run in its turn, or record it while the stream captures; Fault where that cannot be."""
        with self._lock:
            self._ready(False)
            self._enqueue(self._stream(stream), op)

    def capturing(self, stream: Any) -> bool:
        return index(stream) in self._streams and self._streams[index(stream)].captured is not None

    def invalidate(self, stream: Any) -> None:
        """The capture that the stream is in cannot be used."""
        self._streams[index(stream)].broken = True

    def check(self, address: int, nbytes: int, kinds: Sequence[str] = ("device", "pinned")) -> np.ndarray:
        """The bytes at an address; Fault where they are not wholly within one live allocation."""
        found = self._find(address)
        if found is None:
            raise Fault("cudaErrorIllegalAddress", f"{address:#x} is in no allocation")
        at = address - found.base
        if not found.live:
            raise Fault("cudaErrorIllegalAddress", f"{address:#x} was freed")
        if found.kind not in kinds:
            raise Fault("cudaErrorIllegalAddress", f"{address:#x} is {found.kind} memory, not {kinds}")
        if (there := len(found.bytes) - at) < nbytes:
            raise Fault("cudaErrorIllegalAddress", f"{nbytes} bytes at {address:#x}, there are {there}")
        return found.bytes[at : at + nbytes]

    def view(self, address: int, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """Memory as an array, as it is now: nobody waits for what is enqueued."""
        dtype = np.dtype(dtype)
        if address % dtype.itemsize:
            raise Fault("cudaErrorMisalignedAddress", f"{address:#x} for {dtype}")
        count = int(np.prod(shape, dtype=np.int64))
        return self.check(address, count * dtype.itemsize).view(dtype).reshape(shape)

    def live(self) -> dict[str, list[int]]:
        """Sizes of the allocations that are held, by kind; kinds of which there are none are left out."""
        sizes: dict[str, list[int]] = {}
        for one in self._allocations.values():
            if one.live:
                sizes.setdefault(one.kind, []).append(len(one.bytes))
        return sizes

    def handles(self) -> Counter[str]:
        """How many streams, events, graphs and executable graphs there are."""
        names = [{Event: "event", tuple: "exec", list: "graph"}[type(one)] for one in self._others.values()]
        return Counter(names) + Counter({"stream": len(self._streams)})

    def reserve(self, size: int, kind: str = "tensorrt") -> int:
        """Allocate; Fault where there is no memory left or a capture forbids it."""
        with self._lock:
            self._ready(True)
            used = self.used + (size if kind != "pinned" else 0)
            if self.limit is not None and self.used < used > self.limit:
                raise Fault("cudaErrorMemoryAllocation", f"{self.used} bytes are used, {size} wanted")
            self.used = used
            raw = np.full(size + ALIGNMENT, POISON, np.uint8)
            base = raw.ctypes.data + -raw.ctypes.data % ALIGNMENT
            insort(self._bases, base)
            self._allocations[base] = Allocation(base, raw[base - raw.ctypes.data :][:size], kind)
            return base

    def release(self, address: int, kind: str = "tensorrt") -> None:
        """Free; Fault where there is nothing of that kind."""
        with self._lock:
            found = self._allocations.get(address)
            if found is None or not found.live or found.kind != kind:
                raise Fault("cudaErrorInvalidValue", f"{address:#x} is no {kind} memory")
            found.live = False
            found.bytes[:] = POISON
            self.used -= len(found.bytes) if kind != "pinned" else 0

    # Inside.

    def _ready(self, unsafe: bool) -> None:
        if not self.devices:
            raise Fault("cudaErrorNoDevice")
        if self.sticky is not None:
            raise Fault(self.sticky.name)
        strict = [s for s in self._streams.values() if s.captured is not None and s.mode != 2]
        if unsafe and strict:
            for stream in strict:
                stream.broken = True
            raise Fault("cudaErrorStreamCaptureUnsupported")

    def _device(self, device: int) -> None:
        if not 0 <= device < self.devices:
            raise Fault("cudaErrorInvalidDevice")

    def _total(self) -> int:
        return 8 * 2**30 if self.limit is None else self.limit

    def _number(self) -> int:
        self._last += 16
        return self._last

    def _find(self, address: int) -> Allocation | None:
        at = bisect_right(self._bases, address)
        found = self._allocations[self._bases[at - 1]] if at else None
        return found if found is not None and address < found.base + max(1, len(found.bytes)) else None

    def _side(self, place: Any, count: int, way: str, end: str) -> tuple[int, tuple[str, ...]]:
        """Address and kinds of memory that may lie there; no kinds: pageable memory."""
        if not (place is None or isinstance(place, (int, np.integer))):
            held = np.frombuffer(place, np.uint8)
            if len(held) < count:
                raise Fault("cudaErrorInvalidValue", f"{count} bytes of a buffer of {len(held)}")
            return held.ctypes.data, ()
        address = index(place or 0)
        found = self._find(address)
        if not address:
            raise Fault("cudaErrorInvalidValue", "a null pointer")
        if way == "Default":
            return address, () if found is None else ("device", "pinned")
        if end in way:
            return address, ("device",)
        return address, () if found is None else ("pinned",)

    def _stream(self, stream: Any) -> Stream:
        number = 0 if stream is None else index(stream)
        if number == 0:
            self.default_stream_uses += 1
            return self._default
        if number not in self._streams:
            raise Fault("cudaErrorInvalidResourceHandle", f"no stream {number:#x}")
        return self._streams[number]

    def _other(self, handle: Any, kind: type) -> Any:
        found = self._others.get(index(handle))
        if not isinstance(found, kind):
            raise Fault("cudaErrorInvalidResourceHandle", f"no {kind.__name__} {index(handle):#x}")
        return found

    def _enqueue(self, stream: Stream, op: Op) -> None:
        if stream.captured is None:
            stream.queue.append(op)
            stream.added += 1
        elif stream.broken:
            raise Fault("cudaErrorStreamCaptureInvalidated")
        else:
            stream.captured.append(op)

    def _run_all(self) -> None:
        for stream in (self._default, *self._gone, *self._streams.values()):
            self._run(stream)
        self._gone.clear()

    def _run(self, stream: Stream, until: int | None = None) -> None:
        """Run what is enqueued, in turn; after a fault nothing runs any more."""
        if stream.captured is not None:
            stream.broken = True
            raise Fault("cudaErrorStreamCaptureUnsupported", "waiting in a capture")
        while stream.queue and (until is None or stream.done < until):
            op = stream.queue.popleft()
            stream.done += 1
            try:
                if self.sticky is None:
                    op()
            except Fault as problem:
                self.sticky = problem.error
                self.faults.append(str(problem))
            except Exception:  # whatever the op's own code could not do
                self.sticky = cudaError_t["cudaErrorLaunchFailure"]
                self.faults.append(traceback.format_exc())
