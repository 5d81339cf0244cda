"""Engine trt: every segment is compiled for this GPU with TensorRT, and states stay in its memory.

It uses TensorRT or TensorRT-RTX, whichever is installed; versions 8.6 to 11. Names, dtypes and shapes come
from the manifest, and each compiled engine is checked against them. Compiled engines are kept on disk
(trt_cache); a session builds those that are missing.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import Manifest, Variant
from offramp.runtime.engines import trt_versions
from offramp.runtime.engines.base import EngineOptions
from offramp.runtime.engines.buffers import Run
from offramp.runtime.engines.cuda import Cuda, DeviceMemory, driver_problem, import_cuda_runtime
from offramp.runtime.engines.device import STEM, DeviceEngine, Layout, Places, Step
from offramp.runtime.engines.tensors import updated_tensors
from offramp.runtime.engines.trt_build import (
    MAX_ROWS,
    ErrorLog,
    build_engine,
    build_profiles,
    check_tensors,
    find_profile,
)
from offramp.runtime.engines.trt_cache import EngineCache, default_cache_folder
from offramp.runtime.errors import BadBundle, BadSetting, DeviceFailed, EngineUnavailable, OutOfMemory

VARIANTS = ("fp32", "fp16")  # int8 and int4 graphs hold operators that only ONNX Runtime has
_MODULES = ("tensorrt", "tensorrt_rtx")
_RUNTIMES = ("tensorrt_lean", "tensorrt_dispatch")  # they run engines and cannot build them

_opened: WeakValueDictionary[Hashable, OpenEngine] = WeakValueDictionary()
_opened_lock = threading.Lock()


class TrtEngine(DeviceEngine):
    """Runs segments with TensorRT on a GPU; see engines.base.Engine."""

    name, max_rows = "trt", MAX_ROWS

    def __init__(
        self, trt: Any, cuda: Cuda, bundle: Bundle, cache: EngineCache, options: EngineOptions
    ) -> None:
        manifest = bundle.manifest
        stem = manifest.stem.variants[manifest.variants[0]]
        inputs = [trt_versions.as_tensorrt_reads(trt, tensor) for tensor in stem.inputs]
        layout, graph = Layout.from_manifest(manifest, updated_tensors(manifest), inputs), _graph_of(manifest)
        opener = TrtOpener(trt, cuda, bundle, cache, options)
        super().__init__(cuda, opener, layout, graph, manifest)
        self._trt_opener = opener
        self._facts = {
            trt.__name__: trt.__version__,
            "gpu": f"{cuda.gpu}, {cuda.capability}",
            "driver": cuda.driver,
            "cuda graphs": "on" if options.cuda_graphs else "off",
        }

    @property
    def facts(self) -> dict[str, str]:
        """Version of TensorRT, GPU, driver, use of CUDA graphs, and numbers of engines built or found."""
        return self._facts | {"engines": self._trt_opener.origin}


def open_engine(bundle: Bundle, variant: str, options: EngineOptions) -> TrtEngine:
    """Create engine trt; no graph is opened yet.

    Raises EngineUnavailable, which names the first missing piece; engine ort is never used instead.
    """
    if options.real_device != "cuda":
        raise BadSetting(f"engine trt runs on device cuda alone, not {options.device}: leave the device out")
    for name, value in (("provider", options.provider), ("threads", options.threads)):
        if value is not None:
            raise BadSetting(f"{name} {value} is for engine ort; leave it out with engine trt")
    if variant not in VARIANTS:
        raise BadSetting(
            f"variant {variant} is ONNX Runtime's own; engine trt walks {' or '.join(VARIANTS)}: write a "
            "bundle with ee-split --variants fp32,fp16"
        )
    trt = import_tensorrt()
    try:
        cuda = Cuda(import_cuda_runtime())
    except EngineUnavailable as problem:
        raise EngineUnavailable(f"engine trt: {problem}, or use --engine ort") from problem
    return TrtEngine(trt, cuda, bundle, EngineCache(default_cache_folder() / "trt"), options)


def import_tensorrt() -> ModuleType:
    """Import the TensorRT module of this machine.

    Raises EngineUnavailable, which names the first missing piece and its cure. The driver is checked before
    any tensorrt module is imported: without a driver, TensorRT's objects crash the process.
    """
    installed = [name for name in _MODULES if find_spec(name) is not None]
    module = "" if installed else " (the Python module tensorrt is not installed either)"
    driver = driver_problem()
    if driver is not None:
        raise EngineUnavailable(
            f"engine trt: {driver}{module}; TensorRT needs an NVIDIA GPU: install its driver, or use "
            "--engine ort"
        )
    if not installed:
        runtimes = [name for name in _RUNTIMES if find_spec(name) is not None]
        beside = f" ({runtimes[0]} is installed: it runs engines and cannot build them)" if runtimes else ""
        raise EngineUnavailable(
            f"engine trt: no Python module tensorrt or tensorrt_rtx{beside}; pip install 'offramp[trt]' (on "
            "a Jetson: make the virtual environment with --system-site-packages: JetPack brings it), or use "
            "--engine ort"
        )
    problems = []
    for name in installed:
        try:
            return import_module(name)
        except (ImportError, OSError) as problem:  # e.g. the bindings without their libraries
            problems.append(f"{name} cannot be imported: {problem}")
    cure = "reinstall with: pip install --force-reinstall 'offramp[trt]', or use --engine ort"
    raise EngineUnavailable(f"engine trt: {'; '.join(problems)}; {cure}")


class OpenEngine:
    """A deserialized TensorRT engine with its logger and runtime, shared by the sessions that use it."""

    __slots__ = ("__weakref__", "engine", "log", "runtime")

    def __init__(self, log: ErrorLog, runtime: Any, engine: Any) -> None:
        self.log, self.runtime, self.engine = log, runtime, engine


class _Context:
    """An execution context of TensorRT; owner: the run whose shapes and addresses are set in it."""

    __slots__ = ("context", "owner")

    def __init__(self, context: Any) -> None:
        self.context, self.owner = context, object()


class TrtOpener:
    """Opens graphs with TensorRT, from the cache or by building them; see device.GraphOpener.

    captures: every run has its own context, which a captured graph needs.
    """

    def __init__(
        self,
        trt: Any,
        cuda: Cuda,
        bundle: Bundle,
        cache: EngineCache,
        options: EngineOptions,
    ) -> None:
        self._trt, self._cuda, self._bundle, self._cache = trt, cuda, bundle, cache
        self._profiles, self.captures = build_profiles(bundle.manifest), options.cuda_graphs
        self._private = None if options.share else object()  # differs from every other opener's
        self._log = ErrorLog(trt)
        self._engines: dict[str, OpenEngine] = {}  # by the graph's file
        self._contexts: dict[tuple[str, Hashable, int], _Context] = {}  # by file, use and profile
        self._captured_contexts: list[_Context] = []
        self._scratch: list[DeviceMemory] = []  # the last is in use; captured runs still use earlier ones
        self._built, self._seconds = 0, 0.0

    @property
    def origin(self) -> str:
        """Text for users: how many engines were built, in how many seconds, and how many were found built."""
        others = len(self._engines) - self._built
        return f"{self._built} built in {self._seconds:.1f} s, {others} found built"

    def open(self, graphs: Sequence[Variant]) -> None:
        """Open those of these graphs that are not open yet."""
        missing = {graph.file: graph for graph in graphs if graph.file not in self._engines}
        for number, (file, graph) in enumerate(missing.items(), 1):
            self._engines[file] = self._open(graph, f"{number} of {len(missing)}")

    def bind(self, graph: Variant, use: Hashable, places: Places, rows: int, length: int) -> Run:
        """Make a function that enqueues one run of an open graph at these places; see GraphOpener.bind."""
        entry = self._context(graph.file, use, find_profile(self._profiles, rows, length))
        context, stream = entry.context, self._cuda.stream
        this_run, log = object(), self._engines[graph.file].log

        def run() -> None:
            if entry.owner is not this_run:
                _set_tensors(context, graph, places, log)
                entry.owner = this_run
            if not context.execute_async_v3(stream):
                raise DeviceFailed(f"{graph.file}: TensorRT cannot run {rows} x {length}: {log.take()}")

        return run

    def close(self) -> None:
        """Free everything: contexts first, then the engines to which they belong."""
        self._contexts.clear()
        self._captured_contexts.clear()
        self._engines.clear()
        self._scratch.clear()

    def _open(self, graph: Variant, progress: str) -> OpenEngine:
        facts = self._facts(graph)
        key = (json.dumps(facts, sort_keys=True), id(self._trt), self._private)
        with _opened_lock:
            engine = _opened.get(key)
        if engine is None:
            engine = self._deserialize(graph, facts, progress)
            with _opened_lock:
                engine = _opened.setdefault(key, engine)
        return engine

    def _deserialize(self, graph: Variant, facts: dict[str, str], progress: str) -> OpenEngine:
        runtime = self._trt.Runtime(self._log.logger)
        kept = self._cache.get(facts)
        engine = None if kept is None else runtime.deserialize_cuda_engine(kept)
        if engine is None:  # none is kept, or TensorRT does not accept it any more
            engine = runtime.deserialize_cuda_engine(self._build(graph, facts, progress, refused=kept))
        if engine is None:
            reason = self._log.take()
            kind = OutOfMemory if "memory" in reason.lower() else EngineUnavailable
            raise kind(f"{graph.file}: TensorRT does not take the engine that it built: {reason}")
        self._log.take()
        check_tensors(self._trt, engine, graph)
        return OpenEngine(self._log, runtime, engine)

    def _build(self, graph: Variant, facts: dict[str, str], progress: str, refused: bytes | None) -> bytes:
        """Build an engine and keep its bytes in the cache; refused: kept bytes that cannot be used."""
        data = self._bundle.read(graph.file)
        with self._cache.lock(facts):
            kept = self._cache.get(facts)
            if kept is not None and kept != refused:
                return kept  # another process built it while this one waited
            gpu = self._cuda.gpu
            sys.stderr.write(
                f"engine trt: building {graph.file} for {gpu} ({progress}), kept for next time\n"
            )
            started = time.perf_counter()
            timing_facts = {key: facts[key] for key in facts if key not in ("graph", "profiles")}
            timing_facts["kind"] = "timings"
            timings = self._cache.get(timing_facts) or b""
            try:
                blob, timings = build_engine(self._trt, self._log, data, graph, self._profiles, timings)
            except BadBundle as problem:
                if "memory" in str(problem).lower():
                    raise OutOfMemory(
                        f"{problem}; close other programs on the GPU and try again"
                    ) from problem
                raise BadBundle(f"{self._bundle.folder / graph.file}: {problem}") from problem
            self._cache.put(facts, blob)
            self._cache.put(timing_facts, timings)
        self._built += 1
        self._seconds += time.perf_counter() - started
        return blob

    def _facts(self, graph: Variant) -> dict[str, str]:
        """All facts on which an engine depends: if one of them changes, another engine is built."""
        return {
            "kind": "engine",
            "graph": self._bundle.manifest.files[graph.file].sha256,
            "profiles": hashlib.sha256(repr((self._profiles, graph.inputs)).encode()).hexdigest(),
            "tensorrt": f"{self._trt.__name__} {self._trt.__version__}",
            "gpu": f"{self._cuda.gpu} {self._cuda.capability}",
            "driver": self._cuda.driver,
        }

    def _context(self, file: str, use: Hashable, profile: int) -> _Context:
        """The context of a file, use and profile; a new one for each run if runs are captured."""
        entry = None if self.captures else self._contexts.get((file, use, profile))
        if entry is not None:
            return entry
        opened = self._engines[file]
        context = trt_versions.create_context(self._trt, opened.engine)
        if context is None:
            raise OutOfMemory(f"{file}: TensorRT makes no context: {opened.log.take()}")
        if len(self._profiles) > 1 and not context.set_optimization_profile_async(profile, self._cuda.stream):
            raise DeviceFailed(f"{file}: profile {profile} is refused: {opened.log.take()}")
        self._lend(context)  # before it is kept for other runs, as there may be no memory for it
        entry = _Context(context)
        if self.captures:
            self._captured_contexts.append(entry)
        else:
            self._contexts[file, use, profile] = entry
        return entry

    def _lend(self, context: Any) -> None:
        """Set the scratch memory of a context; all contexts use one piece, as they run one after another.

        Its size is that of the largest need among open engines.
        """
        size = max(trt_versions.scratch_bytes(opened.engine) for opened in self._engines.values())
        if not self._scratch or self._scratch[-1].bytes < size:
            memory = self._cuda.memory(size)
            if not self.captures:
                self._scratch.clear()
            self._scratch.append(memory)
            for other in (*self._contexts.values(), *self._captured_contexts):
                trt_versions.set_scratch_memory(other.context, memory.pointer, memory.bytes)
        trt_versions.set_scratch_memory(context, self._scratch[-1].pointer, self._scratch[-1].bytes)


def _set_tensors(context: Any, graph: Variant, places: Places, log: ErrorLog) -> None:
    """Set shapes and addresses in a context, and check TensorRT's shapes of the outputs."""
    refused = [
        tensor.name
        for tensor in graph.inputs
        if not context.set_input_shape(tensor.name, places[tensor.name].shape)
    ]
    refused += [name for name, place in places.items() if not context.set_tensor_address(name, place.address)]
    try:
        refused += context.infer_shapes()
    except RuntimeError as problem:  # sizes that contradict each other
        raise DeviceFailed(f"{graph.file}: TensorRT refuses the shapes: {problem}; {log.take()}") from problem
    if refused:
        raise DeviceFailed(f"{graph.file}: TensorRT refuses {', '.join(refused)}: {log.take()}")
    for tensor in graph.outputs:
        shape, expected = tuple(context.get_tensor_shape(tensor.name)), places[tensor.name].shape
        if shape != expected:
            raise BadBundle(f"{graph.file}: {tensor.name} would be {shape}, the manifest has {expected}")


def _graph_of(manifest: Manifest) -> Callable[[Step], Variant]:
    """Make a function from a step to its graph, which raises BadSetting for variants TensorRT cannot run."""

    def graph(step: Step) -> Variant:
        if step == STEM:
            return manifest.stem.variants[manifest.variants[0]]
        segment, number = step
        name = manifest.variants[number]
        if name not in VARIANTS:
            raise BadSetting(
                f"the rule goes on in {name}, which is ONNX Runtime's own: use --engine ort, or a rule that "
                f"stays in {' or '.join(VARIANTS)}"
            )
        return manifest.segments[segment].variants[name]

    return graph
