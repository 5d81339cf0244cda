"""Open graphs with ONNX Runtime; engines that run the same file with the same settings share its weights.

ONNX Runtime's sessions may run in several threads at once and keep nothing between two runs. Bound arrays are
not shared: each engine keeps its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.graph_checks import check_graph
from offramp.runtime.bundle.manifest import Variant
from offramp.runtime.engines.threads import Pool, apply_pool
from offramp.runtime.errors import BadBundle, EngineUnavailable
from offramp.runtime.forks import after_fork
from offramp.runtime.pipeline import BackgroundTask

CPU = "CPUExecutionProvider"
Providers = Sequence[
    tuple[str, Mapping[str, str]]
]  # ONNX Runtime's providers with their options, the required one first
# Operators that may stay on the CPU when a graph runs on a GPU: arithmetic on sizes, which ONNX Runtime
# assigns to it.
_ON_SIZES = {
    *("Shape", "Size", "Gather", "Concat", "Slice", "Squeeze", "Unsqueeze", "Cast", "Range", "Constant"),
    *("Add", "Sub", "Mul", "Div", "Equal", "Where", "ConstantOfShape", "Reshape"),
}
_DTYPES = {"float": "float32", "double": "float64"}  # ORT's names where they differ from numpy's

_NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"  # a variable that ONNX Runtime reads while it is imported

_arena = False  # whether this process has an arena that its sessions share
_known: WeakValueDictionary[tuple[Hashable, ...], OpenGraph] = WeakValueDictionary()
_guard = threading.Lock()  # for both


class OpenGraph:
    """A graph's file and its ONNX Runtime session; freed when no engine refers to it.

    session: None until it is opened. lock: held while it is opened, so that it is opened once.
    """

    __slots__ = ("__weakref__", "lock", "session")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.session: Any = None


class BundleGraphs:
    """Opens the graphs of one bundle on one provider and thread pool; thread-safe.

    early: files that are being read already, by name; each is used once. share: share graphs with other
    objects of this class in the process. providers: the first is required, the others run what it cannot run.
    """

    def __init__(
        self,
        ort: ModuleType,
        bundle: Bundle,
        device: str,
        pool: Pool,
        early: Mapping[str, BackgroundTask[str, bytes]],
        share: bool = True,
        providers: Providers = ((CPU, {}),),
    ) -> None:
        self._ort, self._bundle, self._device, self._pool = ort, bundle, device, pool
        self._providers = providers
        self._early = dict(early)
        # The whole manifest, with the hashes of its files: a bundle that was written again in the same place
        # must not share graphs with the old one.
        facts = hashlib.sha256(repr(bundle.manifest).encode("utf-8", "surrogatepass")).digest()
        # A new object equals no other.
        self._sharing_key = (str(bundle.folder.resolve()), facts, device, pool, None if share else object())

    def read(self, facts: Variant) -> tuple[Variant, OpenGraph, bytes | None]:
        """Read a graph's file; returns the arguments of open(), with None for bytes if it is open already."""
        with _guard:
            graph = _known.setdefault((*self._sharing_key, facts), OpenGraph())
        early = self._early.pop(facts.file, None)
        if graph.session is not None:
            return facts, graph, None
        return facts, graph, self._bundle.read(facts.file) if early is None else early.result()

    def open(self, facts: Variant, graph: OpenGraph, data: bytes | None) -> OpenGraph:
        """Open the session of a graph from the bytes of its file.

        Raises BadBundle, which names the file, and EngineUnavailable if the device cannot be used.
        """
        with graph.lock:
            if graph.session is None:
                graph.session = self._session(facts, self._bundle.read(facts.file) if data is None else data)
        return graph

    def _session(self, facts: Variant, data: bytes) -> Any:
        path = self._bundle.folder / facts.file
        options = self._ort.SessionOptions()
        apply_pool(self._pool, options)
        if self._device == "cpu":
            _share_arena(self._ort, options)
        options.log_severity_level = 3
        # ONNX Runtime keeps a memory pattern for every shape; with free batch and length that memory only
        # grows.
        options.enable_mem_pattern = False
        required = self._providers[0][0]
        if required != CPU:
            if hasattr(self._ort.InferenceSession, "get_provider_graph_assignment_info"):
                options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            elif any(tensor.name == "hidden" for tensor in facts.inputs):  # the stem may compute with sizes
                options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        providers = [(name, dict(settings)) for name, settings in self._providers]
        weights = self._add_weights(facts.file, data, options)  # kept until the session has copied them
        try:
            # enable_fallback: ORT's Python layer would print on stdout and try the CPU instead.
            session = self._ort.InferenceSession(data, options, providers=providers, enable_fallback=0)
        except Exception as problem:  # ORT's error types share no base of their own
            raise self._refused(path, problem) from problem
        finally:
            del weights
        # The Python layer keeps the file's bytes to open them again on other providers, which never happens
        # here; they double the memory of the weights.
        if hasattr(session, "_model_bytes"):
            session._model_bytes = None
        real = session.get_providers()[0]
        if real != required:
            raise EngineUnavailable(
                f"engine ort: {required} was requested, but {real} runs: a library is missing or of "
                "another version; use --device cpu if that is enough"
            )
        if required != CPU:
            _check_assignment(str(path), session, required)
        _check_interface(str(path), facts, session)
        return session

    def _add_weights(self, graph: str, data: bytes, options: Any) -> object:
        """Give ONNX Runtime the verified bytes of a graph's file of weights, if it has one.

        data: the graph's own bytes. Returns what has to be kept until the session is open, which then has its
        own copy. ONNX Runtime never opens the file itself. Given as a file in memory, it refuses a tensor of
        2 GiB; tensors one by one have no limit (1.32).
        """
        known = self._bundle.weights_of(graph)
        if known is None:
            return None
        facts = check_graph(data, str(self._bundle.folder / graph), weights=known)
        weights = self._bundle.read(known[0])
        arrays = [
            np.frombuffer(weights, tensor.dtype, math.prod(tensor.shape), tensor.offset).reshape(tensor.shape)
            for tensor in facts.outside.values()
        ]
        values = [self._ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]
        options.add_external_initializers(list(facts.outside), values)
        return weights, arrays, values

    def _refused(self, path: Path, problem: Exception) -> BadBundle | EngineUnavailable:
        if "use_per_session_threads" in str(problem):
            return EngineUnavailable(
                "engine ort: the application has made ONNX Runtime's global pool, beside which there can "
                "be no other; leave threads and global_pool out to walk on that pool"
            )
        if self._device != "cpu":
            cure = "check the driver and the CUDA libraries that onnxruntime-gpu names, or use --device cpu"
            return EngineUnavailable(f"engine ort cannot use device {self._device}: {problem}; {cure}")
        return BadBundle(f"{path}: ONNX Runtime cannot open it: {problem}")


def import_onnxruntime(extra: str) -> ModuleType:
    """Import the module onnxruntime; raises EngineUnavailable, which names the extra that installs it."""
    try:
        with _without_telemetry():
            ort = import_module("onnxruntime")
    except ImportError as problem:
        raise EngineUnavailable(
            f"engine ort: onnxruntime cannot be imported ({problem}); pip install 'offramp[{extra}]'"
        ) from problem
    if not hasattr(ort, "InferenceSession"):
        # This remains if onnxruntime or onnxruntime-gpu was removed while both were installed.
        raise EngineUnavailable(
            "engine ort: the installation of onnxruntime is broken; pip uninstall onnxruntime "
            f"onnxruntime-gpu, then pip install 'offramp[{extra}]'"
        )
    return ort


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Keep ONNX Runtime from sending usage data, unless the variable is set to something already.

    From 1.29 on its import starts a thread for that. A process that is forked does not have the thread, and
    hangs or aborts when it ends (measured with 1.29 to 1.32).
    """
    if _NO_TELEMETRY in os.environ:
        yield
        return
    os.environ[_NO_TELEMETRY] = "1"
    try:
        yield
    finally:
        del os.environ[_NO_TELEMETRY]


def cannot_run(folder: Path, name: str, facts: Variant, problem: Exception) -> BadBundle:
    """The error for a segment (or stem, or head) of this name whose graph ONNX Runtime cannot run."""
    files = ", ".join(graph.file for graph in dict.fromkeys(facts.graphs))
    return BadBundle(f"{folder / files}: ONNX Runtime cannot run it ({name}): {problem}")


def free_unused_memory() -> None:
    """Return freed memory to the system: glibc keeps up to half of the memory freed after opening a graph.

    A file's bytes are freed once its graph is open. For a decoder of 650 MB, between 30 and 410 MB stayed
    with the process, a different amount in each run (trial).
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _share_arena(ort: ModuleType, options: Any) -> None:
    """Let all sessions of the process allocate from one arena.

    If each session has its own arena, every segment writes its intermediate values to other memory, which is
    not in the processor's cache: 6 % of the time of a full walk at 128 tokens, 12 x 384. With one arena for
    all, a segment uses the memory that the segment before it has just freed, and works in the same few
    hundred kilobytes, as a single graph does.
    """
    global _arena
    if not hasattr(ort, "create_and_register_allocator"):
        return
    with _guard:
        if not _arena:
            place = ort.OrtMemoryInfo(
                "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
            )
            # ORT's own error types share no base; it refuses if the application has registered an arena, and
            # then that arena is used.
            with suppress(Exception):
                ort.create_and_register_allocator(place, None)
            _arena = True
    options.add_session_config_entry("session.use_env_allocators", "1")


def _check_assignment(path: str, session: Any, required: str) -> None:
    """Raise EngineUnavailable if ONNX Runtime assigns an operator that computes on tensors to the CPU."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return
    on_cpu = {
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == CPU
        for node in part.get_nodes()
    }
    if on_cpu - _ON_SIZES:
        raise EngineUnavailable(
            f"{path}: {required} lacks {', '.join(sorted(on_cpu - _ON_SIZES))} and leaves it to the CPU; "
            "choose variant fp32 or fp16, or use --device cpu"
        )


def _check_interface(path: str, facts: Variant, session: Any) -> None:
    """Raise BadBundle unless inputs and outputs have the manifest's names, dtypes and fixed sizes."""
    for side, tensors, nodes in (
        ("input", facts.inputs, session.get_inputs()),
        ("output", facts.outputs, session.get_outputs()),
    ):
        real = {node.name: node for node in nodes}
        if set(real) != {tensor.name for tensor in tensors}:
            raise BadBundle(
                f"{path}: {side}s {sorted(real)}, the manifest has {sorted(t.name for t in tensors)}"
            )
        for tensor in tensors:
            node = real[tensor.name]
            dtype = node.type.removeprefix("tensor(").removesuffix(")")
            if _DTYPES.get(dtype, dtype) != np.dtype(tensor.dtype).name:
                raise BadBundle(f"{path}: {side} {tensor.name} is {dtype}, the manifest has {tensor.dtype}")
            sizes = list(zip(node.shape, tensor.shape, strict=False))
            clash = [1 for a, b in sizes if isinstance(a, int) and isinstance(b, int) and a != b]
            if clash or (node.shape and len(node.shape) != len(tensor.shape)):
                raise BadBundle(
                    f"{path}: {side} {tensor.name} is {node.shape}, the manifest has {list(tensor.shape)}"
                )


def forget_threads() -> None:
    """In a process that was forked, forget graphs with threads or on a GPU, which have to be opened again.

    Their sessions are never freed: ONNX Runtime would wait for threads that do not exist. Engines call it
    before they drop a graph, and the fork itself for graphs without an engine; a second call does nothing.
    """
    global _guard
    _guard = threading.Lock()
    for key, graph in list(_known.items()):
        graph.lock = threading.Lock()
        _, _, device, pool, *_ = key
        if device != "cpu" or (isinstance(pool, Pool) and pool.has_workers):
            if graph.session is not None:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(graph.session))
            del _known[key]


after_fork(forget_threads)
