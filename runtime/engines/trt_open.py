"""Opens graphs on TensorRT, from the cache or by building them, and binds them to addresses."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakValueDictionary

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import Variant
from offramp.runtime.engines import trt_versions
from offramp.runtime.engines.buffers import Run
from offramp.runtime.engines.cuda import Cuda, Memory
from offramp.runtime.engines.device_buffers import Places, Step
from offramp.runtime.engines.profiles import Profile, choose
from offramp.runtime.engines.trt_build import Log, build, hold
from offramp.runtime.engines.trt_cache import EngineCache
from offramp.runtime.errors import BadBundle, DeviceFailed, EngineUnavailable, OutOfMemory

_known: WeakValueDictionary[Hashable, Opened] = WeakValueDictionary()
_guard = threading.Lock()


class Opened:
    """One deserialized engine with what must outlive it; it lives as long as somebody walks on it."""

    __slots__ = ("__weakref__", "engine", "log", "runtime")

    def __init__(self, log: Log, runtime: Any, engine: Any) -> None:
        self.log, self.runtime, self.engine = log, runtime, engine


class _Context:
    """An execution context; current: whose shapes and addresses are set in it."""

    __slots__ = ("context", "current")

    def __init__(self, context: Any) -> None:
        self.context, self.current = context, object()


class TrtOpener:
    """See offramp.runtime.engines.device.Opener.

    captures: every run has a context of its own, which a captured graph needs.
    """

    def __init__(
        self,
        trt: Any,
        cuda: Cuda,
        bundle: Bundle,
        cache: EngineCache,
        known: Sequence[Profile],
        graph: Callable[[Step], Variant],
        share: bool,
        captures: bool,
    ) -> None:
        self._trt, self._cuda, self._bundle, self._cache = trt, cuda, bundle, cache
        self._profiles, self._graph, self.captures = known, graph, captures
        self._owner = None if share else object()  # an object is like no other
        self._log = Log(trt)
        self._opened: dict[Step, Opened] = {}
        self._contexts: dict[tuple[Step, int], _Context] = {}
        self._alone: list[_Context] = []  # those of captured runs
        self._scratch: list[Memory] = []  # the last is lent out; captured runs still use those before it
        self._built, self._seconds = 0, 0.0

    @property
    def origin(self) -> str:
        """How many were built in this process, how long that took, and how many were there."""
        kept = len(self._opened) - self._built
        return f"{self._built} built in {self._seconds:.1f} s, {kept} found built"

    def open(self, steps: Sequence[Step]) -> None:
        """Open the graphs of these steps, those that are not open yet."""
        missing = [step for step in steps if step not in self._opened]
        for number, step in enumerate(missing):
            self._opened[step] = self._open(self._graph(step), f"{number + 1} of {len(missing)}")

    def bind(self, step: Step, places: Places, rows: int, length: int) -> Run:
        """One run on these addresses; see Opener.bind."""
        held = self._context(step, choose(self._profiles, rows, length))
        context, stream, graph = held.context, self._cuda.stream, self._graph(step)
        mine, log = object(), self._opened[step].log

        def run() -> None:
            if held.current is not mine:
                _set(context, graph, places, log)
                held.current = mine
            if not context.execute_async_v3(stream):
                raise DeviceFailed(f"{graph.file}: TensorRT cannot run {rows} x {length}: {log.take()}")

        return run

    def close(self) -> None:
        """Give everything back: contexts before the engines that they came from."""
        self._contexts.clear()
        self._alone.clear()
        self._opened.clear()
        self._scratch.clear()

    def _open(self, graph: Variant, place: str) -> Opened:
        facts = self._facts(graph)
        key = (json.dumps(facts, sort_keys=True), id(self._trt), self._owner)
        with _guard:
            found = _known.get(key)
        if found is None:
            found = self._deserialized(graph, facts, place)
            with _guard:
                found = _known.setdefault(key, found)
        return found

    def _deserialized(self, graph: Variant, facts: dict[str, str], place: str) -> Opened:
        runtime = self._trt.Runtime(self._log.logger)
        kept = self._cache.get(facts)
        engine = None if kept is None else runtime.deserialize_cuda_engine(kept)
        if engine is None:  # nothing there, or TensorRT does not take it any more
            engine = runtime.deserialize_cuda_engine(self._build(graph, facts, place, refused=kept))
        if engine is None:
            said = self._log.take()
            kind = OutOfMemory if "memory" in said.lower() else EngineUnavailable
            raise kind(f"{graph.file}: TensorRT does not take the engine that it built: {said}")
        self._log.take()
        hold(self._trt, engine, graph)
        return Opened(self._log, runtime, engine)

    def _build(self, graph: Variant, facts: dict[str, str], place: str, refused: bytes | None) -> bytes:
        data = self._bundle.read(graph.file)
        with self._cache.lock(facts):
            kept = self._cache.get(facts)
            if kept is not None and kept != refused:
                return kept  # another process built it while this one waited
            gpu = self._cuda.gpu
            sys.stderr.write(f"engine trt: building {graph.file} for {gpu} ({place}), kept for next time\n")
            started = time.perf_counter()
            timing = {k: v for k, v in facts.items() if k not in ("graph", "profiles")} | {"kind": "timings"}
            try:
                made, timings = build(
                    self._trt, self._log, data, graph, self._profiles, self._cache.get(timing) or b""
                )
            except BadBundle as problem:
                if "memory" in str(problem).lower():
                    raise OutOfMemory(
                        f"{problem}; close other programs on the GPU and try again"
                    ) from problem
                raise BadBundle(f"{self._bundle.folder / graph.file}: {problem}") from problem
            self._cache.put(facts, made)
            self._cache.put(timing, timings)
        self._built += 1
        self._seconds += time.perf_counter() - started
        return made

    def _facts(self, graph: Variant) -> dict[str, str]:
        """All that an engine depends on: change one, and another engine is built."""
        return {
            "kind": "engine",
            "graph": self._bundle.manifest.files[graph.file].sha256,
            "profiles": hashlib.sha256(repr((self._profiles, graph.inputs)).encode()).hexdigest(),
            "tensorrt": f"{self._trt.__name__} {self._trt.__version__}",
            "gpu": f"{self._cuda.gpu} {self._cuda.capability}",
            "driver": self._cuda.driver,
        }

    def _context(self, step: Step, profile: int) -> _Context:
        found = None if self.captures else self._contexts.get((step, profile))
        if found is not None:
            return found
        file, opened = self._graph(step).file, self._opened[step]
        context = trt_versions.context(self._trt, opened.engine)
        if context is None:
            raise OutOfMemory(f"{file}: TensorRT makes no context: {opened.log.take()}")
        if len(self._profiles) > 1 and not context.set_optimization_profile_async(profile, self._cuda.stream):
            raise DeviceFailed(f"{file}: profile {profile} is refused: {opened.log.take()}")
        self._lend(context)  # before anybody can find it: there may be no memory to lend
        found = _Context(context)
        if self.captures:
            self._alone.append(found)
        else:
            self._contexts[step, profile] = found
        return found

    def _lend(self, context: Any) -> None:
        """One piece of scratch memory for all contexts, as they run one after another; it grows with the
        largest engine that lies open.
        """
        need = max(trt_versions.scratch_bytes(opened.engine) for opened in self._opened.values())
        if not self._scratch or self._scratch[-1].bytes < need:
            memory = self._cuda.memory(need)
            if not self.captures:
                self._scratch.clear()
            self._scratch.append(memory)
            for other in (*self._contexts.values(), *self._alone):
                trt_versions.lend(other.context, memory.pointer, memory.bytes)
        trt_versions.lend(context, self._scratch[-1].pointer, self._scratch[-1].bytes)


def _set(context: Any, graph: Variant, places: Places, log: Log) -> None:
    """Set shapes and addresses; what TensorRT will put out must be as large as the place for it."""
    refused = [
        tensor.name
        for tensor in graph.inputs
        if not context.set_input_shape(tensor.name, places[tensor.name][1])
    ]
    refused += [name for name, (at, _) in places.items() if not context.set_tensor_address(name, at)]
    try:
        refused += context.infer_shapes()
    except RuntimeError as problem:  # sizes that contradict each other
        raise DeviceFailed(f"{graph.file}: TensorRT refuses the shapes: {problem}; {log.take()}") from problem
    if refused:
        raise DeviceFailed(f"{graph.file}: TensorRT refuses {', '.join(refused)}: {log.take()}")
    for tensor in graph.outputs:
        found, expected = tuple(context.get_tensor_shape(tensor.name)), places[tensor.name][1]
        if found != expected:
            raise BadBundle(f"{graph.file}: {tensor.name} would be {found}, the manifest says {expected}")
