"""A thin layer over cuda-python: device memory, one stream, one event, and graphs.

cuda-python returns every result as a tuple whose first item is an error code; here an error code is raised as
an error that names a cure. Nothing of CUDA is imported before the driver was checked: see driver_problem.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.errors import DeviceFailed, EngineUnavailable, OutOfMemory

ALIGNMENT = 256  # bytes; alignment of cudaMalloc, which TensorRT requires of its scratch memory
_DRIVERS = ("libcuda.so.1", "nvcuda.dll")
_MODULES = (
    "cuda.bindings.runtime",
    "cuda.cudart",
)  # newer first; the older name is that of cuda-python < 12.8


def driver_problem() -> str | None:
    """Describe what is wrong with the CUDA driver of this machine; None if it starts and finds a GPU.

    This needs no package of CUDA or TensorRT, whose objects crash the process without a driver.
    """
    for name in _DRIVERS:
        try:
            driver = _load(name)
        except OSError:
            continue
        code = driver.cuInit(0)
        if code == 0:
            return None
        return f"the CUDA driver {name} does not start (cuInit gives {code}, no usable GPU)"
    return f"no CUDA driver on this machine ({_DRIVERS[0]} is not found)"


def import_cuda_runtime() -> Any:
    """Import the module of CUDA's runtime; raises EngineUnavailable, which names what to install."""
    problem = ""
    for name in _MODULES:
        try:
            return import_module(name)
        except ImportError as missing:
            problem = problem or str(missing)
    raise EngineUnavailable(
        f"cuda-python cannot be imported ({problem}); pip install cuda-python, of the CUDA major version "
        "that the driver has (nvidia-smi shows it): 'cuda-python>=13,<14' or 'cuda-python>=12.8,<13'"
    )


class DeviceMemory:
    """A piece of device memory (pointer, bytes), freed when it is no longer referenced."""

    __slots__ = ("__weakref__", "bytes", "pointer")

    def __init__(self, pointer: int, size: int) -> None:
        self.pointer, self.bytes = pointer, size


class PinnedMemory:
    """A piece of page-locked host memory, which the device can read and write; array: its bytes, uint8."""

    __slots__ = ("__weakref__", "array", "pointer")

    def __init__(self, pointer: int, size: int) -> None:
        self.pointer = pointer
        self.array: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))


class Cuda:
    """The first GPU that the process may use (CUDA_VISIBLE_DEVICES selects another), and one stream on it.

    The stream runs enqueued work in order; the host waits only in wait(). Raises EngineUnavailable if the GPU
    cannot be used, OutOfMemory, and DeviceFailed for later failures.
    """

    def __init__(self, cudart: Any) -> None:
        self._api = cudart
        try:
            self._checked("cudaSetDevice", 0)
            properties = self._checked("cudaGetDeviceProperties", 0)
            self.driver = _version(self._checked("cudaDriverGetVersion"))
            stream = self._checked("cudaStreamCreateWithFlags", cudart.cudaStreamNonBlocking)
            event = self._checked("cudaEventCreateWithFlags", cudart.cudaEventDisableTiming)
        except DeviceFailed as problem:
            raise EngineUnavailable(
                f"the GPU cannot be used: {problem}; is the driver as new as cuda-python "
                f"({_version(self._checked('cudaRuntimeGetVersion'))})? If not, install an older cuda-python"
            ) from problem
        name = properties.name
        self.gpu = name.decode() if isinstance(name, bytes) else str(name)
        self.capability = f"{properties.major}.{properties.minor}"
        self._stream, self._event = stream, event
        self.stream = int(stream)
        self._closers = [
            finalize(self, cudart.cudaEventDestroy, event),
            finalize(self, cudart.cudaStreamDestroy, stream),
        ]
        for closer in self._closers:
            closer.atexit = (
                False  # the end of the process frees it, and CUDA may be unloaded before Python ends
            )

    def memory(self, size: int) -> DeviceMemory:
        """Allocate device memory, aligned to ALIGNMENT; raises OutOfMemory, which states how much is free."""
        memory = DeviceMemory(int(self._checked("cudaMalloc", max(size, 1))), size)
        finalize(memory, self._api.cudaFree, memory.pointer).atexit = False
        return memory

    def pinned(self, size: int) -> PinnedMemory:
        """Allocate page-locked host memory, which copies need to run without a wait."""
        pointer = int(self._checked("cudaHostAlloc", max(size, 1), self._api.cudaHostAllocDefault))
        memory = PinnedMemory(pointer, size)
        finalize(memory, self._api.cudaFreeHost, pointer).atexit = False
        return memory

    def upload(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy of pinned host memory to the device; addresses, and size in bytes."""
        self._copy(target, source, size, self._api.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def copy(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy within the device; addresses, and size in bytes."""
        self._copy(target, source, size, self._api.cudaMemcpyKind.cudaMemcpyDeviceToDevice)

    def download(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy from the device to pinned host memory, which is complete once wait() returns."""
        self._copy(target, source, size, self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def wait(self) -> None:
        """Wait until all work enqueued so far is done; uses an event, which costs least."""
        self._checked("cudaEventRecord", self._event, self._stream)
        self._checked("cudaEventSynchronize", self._event)

    @contextmanager
    def capture(self) -> Iterator[list[Any]]:
        """Context manager that records enqueued work without running it.

        Afterwards the list that it yields holds one graph for launch().
        """
        graphs: list[Any] = []
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._checked("cudaStreamBeginCapture", self._stream, mode)
        try:
            yield graphs
        except BaseException:
            self._api.cudaStreamEndCapture(self._stream)  # or the stream would stay in the capture
            raise
        graph = self._checked("cudaStreamEndCapture", self._stream)
        try:
            graphs.append(self._checked("cudaGraphInstantiate", graph, 0))
        finally:
            self._api.cudaGraphDestroy(graph)

    def launch(self, graph: Any) -> None:
        """Enqueue a captured graph."""
        self._checked("cudaGraphLaunch", graph, self._stream)

    def free_graph(self, graph: Any) -> None:
        """Free a captured graph."""
        self._api.cudaGraphExecDestroy(graph)

    def close(self) -> None:
        """Free stream and event; nothing can be enqueued afterwards."""
        for closer in self._closers:
            closer()

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        if size:
            self._checked("cudaMemcpyAsync", target, source, size, kind, self._stream)

    def _checked(self, name: str, *args: Any) -> Any:
        code, *values = getattr(self._api, name)(*args)
        if int(code) == 0:
            return values[0] if values else None
        reason = self._api.cudaGetErrorString(code)[1]
        text = f"{name}: {reason.decode() if isinstance(reason, bytes) else reason} (CUDA error {int(code)})"
        if code == self._api.cudaError_t.cudaErrorMemoryAllocation:
            needed = f"{args[0] / 2**20:.1f} MiB wanted, " if name in ("cudaMalloc", "cudaHostAlloc") else ""
            raise OutOfMemory(
                f"{text}: {needed}{self._free()}; choose a smaller batch size, close other sessions, or end "
                "other programs on the GPU"
            )
        raise DeviceFailed(text)

    def _free(self) -> str:
        code, *values = self._api.cudaMemGetInfo()
        if int(code):
            return "CUDA does not say how much is free"
        return f"{values[0] / 2**20:.1f} of {values[1] / 2**20:.1f} MiB free"


def _load(name: str) -> Any:
    return ctypes.CDLL(name)


def _version(number: int) -> str:
    """The text of a CUDA version number: 13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"
