"""The ONNX Runtime engine: sessions on one thread pool, hidden states between two pre-bound buffers.

Names, dtypes and shapes come from the manifest; the graphs are held to them when they are opened. A row's
tensors live in buffers of its (rows, length) that are bound once and used again: a step copies and allocates
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from offramp.runtime.bundle import Bundle
from offramp.runtime.engines import Array, Rows
from offramp.runtime.engines.buffers import Bound, Buffers, Shelf
from offramp.runtime.engines.threads import Pool, apply, claim
from offramp.runtime.errors import BadBundle, EngineUnavailable
from offramp.runtime.manifest import NEXT, Manifest, Tensor, Variant
from offramp.runtime.rules import Signals

_arena = False  # whether this process has an arena that its sessions share
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_DTYPES = {"float": "float32", "double": "float64"}  # ORT's names where they differ from numpy's


class OrtState:
    """Rows between two segments: their buffers, and which of each pair of buffers holds the newest values."""

    __slots__ = ("buffers", "length", "rows", "side")

    def __init__(self, buffers: Buffers, side: int) -> None:
        self.buffers = buffers
        self.rows, self.length = buffers.rows, buffers.length
        self.side = side


class OrtEngine:
    """See offramp.runtime.engines.Engine. Not thread-safe: the session in front of it holds a lock."""

    name = "ort"

    def __init__(self, ort: ModuleType, bundle: Bundle, device: str, variant: str, pool: Pool) -> None:
        self.device = device
        self._ort, self._bundle, self._pool = ort, bundle, pool
        manifest = bundle.manifest
        self._variants = manifest.variants
        self._sessions: dict[tuple[int, int], Any] = {}
        number = self._variants.index(variant)
        stem = variant if variant in manifest.stem.variants else manifest.variants[0]
        self._stem_facts = manifest.stem.variants[stem]
        self._stem = self._open(self._stem_facts)
        for segment in range(len(manifest.segments)):
            self._session(segment, number)
        self._shelf = Shelf(
            ort, device, tensors_of(manifest), flows_of(manifest), _names(self._stem_facts.inputs)
        )

    @property
    def facts(self) -> dict[str, str]:
        """Version of onnxruntime, threads and the pool that really runs."""
        threads = str(self._pool.threads) if self._pool.threads else "the application's"
        return {"onnxruntime": self._ort.__version__, "threads": threads, "pool": self._pool.kind}

    def begin(self, inputs: Mapping[str, Array]) -> OrtState:
        """Run the stem; see Engine.begin."""
        rows, length = inputs["input_ids"].shape
        buffers = self._shelf.get(rows, length)
        for name, array in buffers.inputs.items():
            array[...] = inputs[name]
        binding = buffers.stem
        if binding is None:
            binding = buffers.stem = buffers.bind_stem(self._stem, self._stem_facts)
        try:
            self._stem.run_with_iobinding(binding)
        except Exception as problem:  # ORT's error types share no base of their own
            raise self._broken(self._stem_facts, problem) from problem
        return OrtState(buffers, 0)

    def step(self, segment: int, variant: int, state: OrtState) -> Signals:
        """Run one segment; see Engine.step."""
        key = (segment, variant, state.side)
        bound = state.buffers.bound.get(key)
        if bound is None:
            bound = self._bind(key, state.buffers)
        session, binding, facts, signals = bound
        try:
            session.run_with_iobinding(binding)
        except Exception as problem:  # as above
            raise self._broken(facts, problem) from problem
        state.side = 1 - state.side
        return signals

    def take(self, state: OrtState, rows: Rows) -> OrtState:
        """A new state of those rows alone; see Engine.take."""
        buffers = self._shelf.get(len(rows), state.length)
        buffers.gather([(state.buffers, state.side, rows)])
        return OrtState(buffers, 0)

    def join(self, states: Sequence[OrtState]) -> OrtState:
        """One new state of all rows; see Engine.join."""
        buffers = self._shelf.get(sum(state.rows for state in states), states[0].length)
        buffers.gather([(state.buffers, state.side, None) for state in states])
        return OrtState(buffers, 0)

    def drop(self, state: OrtState) -> None:
        """The state's buffers may be used again; see Engine.drop."""
        self._shelf.put(state.buffers)

    def close(self) -> None:
        """Free sessions and buffers (the process's thread pool stays)."""
        self._shelf.clear()
        self._sessions.clear()
        self._stem = None

    def _bind(self, key: tuple[int, int, int], buffers: Buffers) -> Bound:
        segment, variant, side = key
        facts = self._bundle.manifest.segments[segment].variants[self._variants[variant]]
        bound = buffers.bound[key] = buffers.bind(self._session(segment, variant), facts, side)
        return bound

    def _session(self, segment: int, variant: int) -> Any:
        session = self._sessions.get((segment, variant))
        if session is None:
            stage = self._bundle.manifest.segments[segment]
            session = self._sessions[segment, variant] = self._open(stage.variants[self._variants[variant]])
        return session

    def _broken(self, facts: Variant, problem: Exception) -> BadBundle:
        return BadBundle(f"{self._bundle.folder / facts.file}: ONNX Runtime cannot run it: {problem}")

    def _open(self, facts: Variant) -> Any:
        path = self._bundle.folder / facts.file
        data = self._bundle.read(facts.file)
        options = self._ort.SessionOptions()
        apply(self._pool, options)
        if self.device == "cpu":
            _share_arena(self._ort, options)
        options.log_severity_level = 3
        # Patterns are kept for every shape ever met; with free batch and length that is memory that only
        # grows.
        options.enable_mem_pattern = False
        provider = _PROVIDERS[self.device]
        if self.device != "cpu":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            # enable_fallback: ORT's Python layer would print on stdout and try the CPU instead.
            session = self._ort.InferenceSession(data, options, providers=[provider], enable_fallback=0)
        except Exception as problem:  # ORT's error types share no base of their own
            if "use_per_session_threads" in str(problem):
                raise EngineUnavailable(
                    "engine ort: the application has made ONNX Runtime's global pool, beside which there can "
                    "be no other; leave threads and global_pool out to walk on that pool"
                ) from problem
            if self.device != "cpu":
                cure = (
                    "check the driver and the CUDA libraries that onnxruntime-gpu names, or use --device cpu"
                )
                raise EngineUnavailable(
                    f"engine ort cannot use device {self.device}: {problem}; {cure}"
                ) from problem
            raise BadBundle(f"{path}: ONNX Runtime cannot open it: {problem}") from problem
        real = session.get_providers()[0]
        if real != provider:
            raise EngineUnavailable(
                f"engine ort: {provider} was asked for, {real} came; use --device cpu if that is enough"
            )
        _hold(str(path), facts, session)
        return session


def _share_arena(ort: ModuleType, options: Any) -> None:
    """Let all sessions of the process allocate from one arena.

    With one each, every segment writes its intermediate values to memory of its own, which a full walk finds
    cold in the cache: 6 % of the time at 128 tokens, 12 x 384. A segment that uses what the one before it has
    just freed works in the same few hundred kilobytes all the way, as a single graph does.
    """
    global _arena
    if not hasattr(ort, "create_and_register_allocator"):
        return
    if not _arena:
        place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        # ORT's own error types share no base; it refuses where the application has registered an arena: then
        # that one serves.
        with suppress(Exception):
            ort.create_and_register_allocator(place, None)
        _arena = True
    options.add_session_config_entry("session.use_env_allocators", "1")


def open(bundle: Bundle, *, device: str, variant: str, threads: int | None, global_pool: bool) -> OrtEngine:
    """Open the engine; EngineUnavailable where onnxruntime or the device is missing."""
    extra = "gpu" if device == "cuda" else "cpu"
    try:
        ort = import_module("onnxruntime")
    except ImportError as problem:
        raise EngineUnavailable(
            f"engine ort: onnxruntime cannot be imported ({problem}); pip install 'offramp[{extra}]'"
        ) from problem
    if not hasattr(ort, "InferenceSession"):
        # What is left after onnxruntime or onnxruntime-gpu was removed while both were installed.
        raise EngineUnavailable(
            "engine ort: the installation of onnxruntime is broken; pip uninstall onnxruntime "
            f"onnxruntime-gpu, then pip install 'offramp[{extra}]'"
        )
    if _PROVIDERS[device] not in ort.get_available_providers():
        raise EngineUnavailable(
            f"engine ort: this onnxruntime {ort.__version__} has no {_PROVIDERS[device]}; "
            "pip uninstall onnxruntime, then pip install 'offramp[gpu]' "
            "(both packages own the same module), or use --device cpu"
        )
    return OrtEngine(ort, bundle, device, variant, claim(ort, threads, global_pool))


def tensors_of(manifest: Manifest) -> dict[str, Tensor]:
    """The stem's inputs and outputs and every segment's signals, by name."""
    stages = [next(iter(stage.variants.values())) for stage in (manifest.stem, *manifest.segments)]
    tensors = [*stages[0].inputs, *(tensor for stage in stages for tensor in stage.outputs)]
    return {tensor.name: tensor for tensor in tensors if not tensor.name.startswith(NEXT)}


def flows_of(manifest: Manifest) -> frozenset[str]:
    """Tensors that segments make anew: hidden, evidence. BadBundle where segments disagree on which."""
    flows: frozenset[str] | None = None
    for stage in manifest.segments[:-1]:
        facts = next(iter(stage.variants.values()))
        found = frozenset(t.name.removeprefix(NEXT) for t in facts.outputs if t.name.startswith(NEXT))
        if flows is not None and found != flows:
            raise BadBundle(
                f"manifest: {stage.name} makes {sorted(found)} anew, segments before it {sorted(flows)}"
            )
        flows = found
    return flows or frozenset({"hidden"})


def _names(tensors: Sequence[Tensor]) -> frozenset[str]:
    return frozenset(tensor.name for tensor in tensors)


def _hold(path: str, facts: Variant, session: Any) -> None:
    """The graph's inputs and outputs must be the manifest's: names, dtypes, sizes where both are numbers."""
    for side, tensors, found in (
        ("input", facts.inputs, session.get_inputs()),
        ("output", facts.outputs, session.get_outputs()),
    ):
        real = {node.name: node for node in found}
        if set(real) != {tensor.name for tensor in tensors}:
            raise BadBundle(
                f"{path}: {side}s {sorted(real)}, the manifest says {sorted(t.name for t in tensors)}"
            )
        for tensor in tensors:
            node = real[tensor.name]
            dtype = node.type.removeprefix("tensor(").removesuffix(")")
            if _DTYPES.get(dtype, dtype) != np.dtype(tensor.dtype).name:
                raise BadBundle(f"{path}: {side} {tensor.name} is {dtype}, the manifest says {tensor.dtype}")
            sizes = list(zip(node.shape, tensor.shape, strict=False))
            clash = [1 for a, b in sizes if isinstance(a, int) and isinstance(b, int) and a != b]
            if clash or (node.shape and len(node.shape) != len(tensor.shape)):
                raise BadBundle(
                    f"{path}: {side} {tensor.name} is {node.shape}, the manifest says {list(tensor.shape)}"
                )
