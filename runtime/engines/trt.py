"""The TensorRT engine: every segment compiled on this GPU, and its state never leaves it.

TensorRT or TensorRT-RTX, whichever is installed; versions 8.6 to 11. Names, dtypes and shapes come from the
manifest, and each engine is checked against them. Engines are kept on disk (trt_cache); a session that finds
none builds them.
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
from offramp.runtime.engines.cuda import Cuda, Memory, cuda_python, missing_driver
from offramp.runtime.engines.device import STEM, DeviceEngine, Layout, Places, Step
from offramp.runtime.engines.tensors import updated_tensors
from offramp.runtime.engines.trt_build import (
    MAX_ROWS,
    Log,
    build,
    check_tensors,
    profile_of,
    profiles,
)
from offramp.runtime.engines.trt_cache import EngineCache, default_folder
from offramp.runtime.errors import BadBundle, BadSetting, DeviceFailed, EngineUnavailable, OutOfMemory

VARIANTS = ("fp32", "fp16")  # int8 and int4 graphs hold operators of ONNX Runtime's own
_MODULES = ("tensorrt", "tensorrt_rtx")
_RUNTIMES = ("tensorrt_lean", "tensorrt_dispatch")  # they run engines and cannot build them

_opened: WeakValueDictionary[Hashable, OpenEngine] = WeakValueDictionary()
_opened_lock = threading.Lock()


class TrtEngine(DeviceEngine):
    """See offramp.runtime.engines.base.Engine."""

    name, max_rows = "trt", MAX_ROWS

    def __init__(
        self, trt: Any, cuda: Cuda, bundle: Bundle, cache: EngineCache, options: EngineOptions
    ) -> None:
        manifest = bundle.manifest
        stem = manifest.stem.variants[manifest.variants[0]]
        inputs = [trt_versions.as_read(trt, tensor) for tensor in stem.inputs]
        layout, graph = Layout.of(manifest, updated_tensors(manifest), inputs), _graph_of(manifest)
        opener = TrtOpener(trt, cuda, bundle, cache, graph, options)
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
        """Version, GPU, driver, and how many engines were built or found on disk."""
        return self._facts | {"engines": self._trt_opener.origin}


def open_engine(bundle: Bundle, variant: str, options: EngineOptions) -> TrtEngine:
    """The engine, no graph opened yet. EngineUnavailable names the first missing piece; never takes ORT."""
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
    trt = find_tensorrt()
    try:
        cuda = Cuda(cuda_python())
    except EngineUnavailable as problem:
        raise EngineUnavailable(f"engine trt: {problem}, or use --engine ort") from problem
    return TrtEngine(trt, cuda, bundle, EngineCache(default_folder() / "trt"), options)


def find_tensorrt() -> ModuleType:
    """The TensorRT module of this machine. EngineUnavailable names the first missing piece and its cure.

    The driver is looked for before any tensorrt module is imported: without one, TensorRT's own objects crash
    the process.
    """
    installed = [name for name in _MODULES if find_spec(name) is not None]
    module = "" if installed else " (the Python module tensorrt is not installed either)"
    driver = missing_driver()
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
    """One deserialized engine with what must outlive it; shared by the sessions that walk on it."""

    __slots__ = ("__weakref__", "engine", "log", "runtime")

    def __init__(self, log: Log, runtime: Any, engine: Any) -> None:
        self.log, self.runtime, self.engine = log, runtime, engine


class _Context:
    """An execution context; owner: the run whose shapes and addresses are set in it."""

    __slots__ = ("context", "owner")

    def __init__(self, context: Any) -> None:
        self.context, self.owner = context, object()


class TrtOpener:
    """Opens graphs on TensorRT, from the cache or by building; see offramp.runtime.engines.device.Opener.

    captures: every run has a context of its own, which a captured graph needs.
    """

    def __init__(
        self,
        trt: Any,
        cuda: Cuda,
        bundle: Bundle,
        cache: EngineCache,
        graph: Callable[[Step], Variant],
        options: EngineOptions,
    ) -> None:
        self._trt, self._cuda, self._bundle, self._cache, self._graph = trt, cuda, bundle, cache, graph
        self._profiles, self.captures = profiles(bundle.manifest), options.cuda_graphs
        self._private = None if options.share else object()  # equal to no other opener's
        self._log = Log(trt)
        self._engines: dict[Step, OpenEngine] = {}
        self._contexts: dict[tuple[Step, int], _Context] = {}  # by step and profile
        self._captured_contexts: list[_Context] = []
        self._scratch: list[Memory] = []  # the last is lent out; captured runs still use those before it
        self._built, self._seconds = 0, 0.0

    @property
    def origin(self) -> str:
        """How many engines this process built, how long that took, and how many were on disk or open."""
        others = len(self._engines) - self._built
        return f"{self._built} built in {self._seconds:.1f} s, {others} found built"

    def open(self, steps: Sequence[Step]) -> None:
        """Open the graphs of these steps, those that are not open yet."""
        missing = [step for step in steps if step not in self._engines]
        for number, step in enumerate(missing, 1):
            self._engines[step] = self._open(self._graph(step), f"{number} of {len(missing)}")

    def bind(self, step: Step, places: Places, rows: int, length: int) -> Run:
        """One run on these addresses; see Opener.bind."""
        entry = self._context(step, profile_of(self._profiles, rows, length))
        context, stream, graph = entry.context, self._cuda.stream, self._graph(step)
        this_run, log = object(), self._engines[step].log

        def run() -> None:
            if entry.owner is not this_run:
                _set_tensors(context, graph, places, log)
                entry.owner = this_run
            if not context.execute_async_v3(stream):
                raise DeviceFailed(f"{graph.file}: TensorRT cannot run {rows} x {length}: {log.take()}")

        return run

    def close(self) -> None:
        """Free everything: contexts before the engines that they came from."""
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
        if engine is None:  # none is kept, or TensorRT does not take it any more
            engine = runtime.deserialize_cuda_engine(self._build(graph, facts, progress, refused=kept))
        if engine is None:
            reason = self._log.take()
            kind = OutOfMemory if "memory" in reason.lower() else EngineUnavailable
            raise kind(f"{graph.file}: TensorRT does not take the engine that it built: {reason}")
        self._log.take()
        check_tensors(self._trt, engine, graph)
        return OpenEngine(self._log, runtime, engine)

    def _build(self, graph: Variant, facts: dict[str, str], progress: str, refused: bytes | None) -> bytes:
        """The bytes of an engine, kept for next time; refused: kept bytes that cannot be used."""
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
                blob, timings = build(self._trt, self._log, data, graph, self._profiles, timings)
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
        """All that an engine depends on: when one of them changes, another engine is built."""
        return {
            "kind": "engine",
            "graph": self._bundle.manifest.files[graph.file].sha256,
            "profiles": hashlib.sha256(repr((self._profiles, graph.inputs)).encode()).hexdigest(),
            "tensorrt": f"{self._trt.__name__} {self._trt.__version__}",
            "gpu": f"{self._cuda.gpu} {self._cuda.capability}",
            "driver": self._cuda.driver,
        }

    def _context(self, step: Step, profile: int) -> _Context:
        """The context of a step and profile; a new one each time where runs are captured."""
        entry = None if self.captures else self._contexts.get((step, profile))
        if entry is not None:
            return entry
        file, opened = self._graph(step).file, self._engines[step]
        context = trt_versions.context(self._trt, opened.engine)
        if context is None:
            raise OutOfMemory(f"{file}: TensorRT makes no context: {opened.log.take()}")
        if len(self._profiles) > 1 and not context.set_optimization_profile_async(profile, self._cuda.stream):
            raise DeviceFailed(f"{file}: profile {profile} is refused: {opened.log.take()}")
        self._lend(context)  # before it is kept for others: there may be no memory to lend
        entry = _Context(context)
        if self.captures:
            self._captured_contexts.append(entry)
        else:
            self._contexts[step, profile] = entry
        return entry

    def _lend(self, context: Any) -> None:
        """Give a context scratch memory: one piece serves all, as they run one after another.

        It grows with the largest engine that is open.
        """
        size = max(trt_versions.scratch_bytes(opened.engine) for opened in self._engines.values())
        if not self._scratch or self._scratch[-1].bytes < size:
            memory = self._cuda.memory(size)
            if not self.captures:
                self._scratch.clear()
            self._scratch.append(memory)
            for other in (*self._contexts.values(), *self._captured_contexts):
                trt_versions.lend(other.context, memory.pointer, memory.bytes)
        trt_versions.lend(context, self._scratch[-1].pointer, self._scratch[-1].bytes)


def _set_tensors(context: Any, graph: Variant, places: Places, log: Log) -> None:
    """Set shapes and addresses; the outputs that TensorRT announces must have the shapes of their places."""
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
    """Gives the graph of a step; BadSetting for a variant that TensorRT does not walk."""

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
