"""Decoders on ONNX Runtime's CPU: segments that extend a cache, and a head run only where it is asked.

A cache has more places than it holds tokens, so that a token more changes no shape: segments read it where it
lies, and what they add, a few hundred numbers a block, is written behind what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from offramp.runtime.bundle import Bundle
from offramp.runtime.engines import Array
from offramp.runtime.engines.buffers import Run, runner
from offramp.runtime.engines.graphs import Graph, Graphs
from offramp.runtime.engines.threads import Pool
from offramp.runtime.errors import BadInput
from offramp.runtime.manifest import NEXT, PAST, Stage, Tensor, Variant

PLACES = 64  # of a fresh cache, and what it grows by at least


class Cache:
    """What one sequence has read: keys and values by the names under which segments read them.

    length: tokens in it. places: tokens for which there is room; growing doubles it up to 4 * PLACES and adds
    that much from there on.
    """

    def __init__(self, tensors: Sequence[Tensor], longest: int) -> None:
        self.length, self.places, self.longest = 0, min(PLACES, longest), longest
        self._tensors = tensors
        self.arrays: dict[str, Array] = {tensor.name: self._empty(tensor) for tensor in tensors}
        self.valid = np.zeros((1, self.places), np.int64)
        self.bound: dict[int, _Bound] = {}  # by number of tokens; to these very arrays

    def make_room(self, tokens: int) -> None:
        """Room for so many more tokens; BadInput where the network does not reach so far."""
        need = self.length + tokens
        if need > self.longest:
            raise BadInput(f"{need} tokens: this network reads {self.longest}, prompt and answer together")
        if need <= self.places:
            return
        while self.places < need:
            self.places += min(self.places, 4 * PLACES)
        self.places = min(self.places, self.longest)
        for tensor in self._tensors:
            old, new = self.arrays[tensor.name], self._empty(tensor)
            new[_at(tensor, 0, self.length)] = old[_at(tensor, 0, self.length)]
            self.arrays[tensor.name] = new
        valid = np.zeros((1, self.places), np.int64)
        valid[:, : self.length] = 1
        self.valid = valid
        self.bound.clear()

    def _empty(self, tensor: Tensor) -> Array:
        return np.zeros(_shape(tensor, 1, self.places), tensor.dtype)


class DecoderState:
    """Tokens on their way through the segments: where they begin in the cache, on which side hidden is."""

    __slots__ = ("bound", "cache", "side", "start", "tokens")

    def __init__(self, cache: Cache, bound: _Bound, tokens: int) -> None:
        self.cache, self.bound, self.tokens, self.start, self.side = cache, bound, tokens, cache.length, 0


class DecoderEngine:
    """Runs stem, segments and head of one sequence at a time. Not thread-safe."""

    name, device = "ort", "cpu"

    def __init__(self, ort: ModuleType, bundle: Bundle, variant: str, pool: Pool, share: bool = True) -> None:
        self._ort, self._pool, manifest = ort, pool, bundle.manifest
        assert manifest.decoder is not None
        self.manifest, self._variant = manifest, variant
        self._graphs = Graphs(ort, bundle, "cpu", pool, {}, share)
        self._open: dict[str, Graph] = {}
        self._cached = [
            tensor
            for stage in manifest.segments
            for tensor in _facts(stage, variant).inputs
            if tensor.name.startswith(PAST)
        ]
        for stage in (manifest.stem, *manifest.segments, manifest.decoder.head):
            self._open[stage.name] = self._graphs.open(*self._graphs.read(_facts(stage, variant)))

    @property
    def facts(self) -> dict[str, str]:
        """Version of onnxruntime, threads and the pool that really runs."""
        return {
            "onnxruntime": self._ort.__version__,
            "threads": str(self._pool.threads or "the application's"),
            "pool": self._pool.kind,
        }

    def cache(self) -> Cache:
        """An empty one."""
        reads = self.manifest.input
        return Cache(self._cached, reads.longest)  # type: ignore[union-attr]  # a decoder reads text

    def begin(self, ids: Sequence[int], cache: Cache) -> DecoderState:
        """Run the stem on these tokens, which stand behind what is in the cache."""
        cache.make_room(len(ids))
        bound = cache.bound.get(len(ids))
        if bound is None:
            bound = _Bound(self, cache, len(ids))
            if len(ids) == 1:  # prompts come once
                cache.bound[1] = bound
        bound.ids[0], bound.positions[0] = ids, np.arange(cache.length, cache.length + len(ids))
        bound.stem()
        return DecoderState(cache, bound, len(ids))

    def step(self, segment: int, state: DecoderState) -> None:
        """Run one segment (0-based): hidden advances, and the cache of its blocks takes in what it adds."""
        run, added = state.bound.segment(segment, state.side)
        run()
        end = state.start + state.tokens
        for tensor, new in added:
            state.cache.arrays[tensor.name][_at(tensor, state.start, end)] = new
        state.side = 1 - state.side

    def logits(self, state: DecoderState) -> Array:
        """What the head makes of the last token [vocabulary]; the memory is used again by the next run."""
        return state.bound.head(state.side)

    def keep(self, state: DecoderState) -> None:
        """The tokens have run through every segment: from now on they are part of the past."""
        cache = state.cache
        cache.valid[:, state.start : state.start + state.tokens] = 1
        cache.length = state.start + state.tokens

    def close(self) -> None:
        """Free graphs that no other engine runs."""
        self._open.clear()


class _Bound:
    """Memory for so many tokens, bound to the graphs and to one cache's arrays when first needed."""

    def __init__(self, engine: DecoderEngine, cache: Cache, tokens: int) -> None:
        self._engine, self._cache, self._tokens = engine, cache, tokens
        manifest = engine.manifest
        stem = _facts(manifest.stem, engine._variant)
        made = {tensor.name: self._array(tensor) for tensor in (*stem.inputs[:2], *stem.outputs)}
        self.ids, self.positions = made["input_ids"], made["position_ids"]
        hidden = made.pop("hidden")
        self._sides = hidden, np.zeros_like(hidden)
        self._shared = made | {"past_valid": cache.valid} | cache.arrays
        self._segments: dict[tuple[int, int], tuple[Run, list[tuple[Tensor, Array]]]] = {}
        self._heads: dict[int, Run] = {}
        assert manifest.decoder is not None
        self._head = _facts(manifest.decoder.head, engine._variant)
        self._logits = np.zeros((1, 1, manifest.vocab_size), np.float32)
        self.stem = self._run(manifest.stem.name, stem, {"hidden": hidden})

    def segment(self, number: int, side: int) -> tuple[Run, list[tuple[Tensor, Array]]]:
        """One run that reads hidden on `side`; and what it adds to the cache, by what that continues."""
        found = self._segments.get((number, side))
        if found is None:
            stage = self._engine.manifest.segments[number]
            facts = _facts(stage, self._engine._variant)
            new = {t.name: self._array(t) for t in facts.outputs if not t.name.startswith(NEXT)}
            own = {"hidden": self._sides[side], f"{NEXT}hidden": self._sides[1 - side], **new}
            pasts = [tensor for tensor in facts.inputs if tensor.name.startswith(PAST)]
            added = [(tensor, new[tensor.name.replace("past", "new", 1)]) for tensor in pasts]
            found = self._segments[number, side] = self._run(stage.name, facts, own), added
        return found

    def head(self, side: int) -> Array:
        """Logits of the last token alone: a vocabulary is large."""
        run = self._heads.get(side)
        if run is None:
            last = self._sides[side][:, -1:]  # contiguous, as there is one sequence
            assert self._engine.manifest.decoder is not None
            name = self._engine.manifest.decoder.head.name
            own = {"hidden": last, "logits": self._logits}
            run = self._heads[side] = self._run(name, self._head, own)
        run()
        logits: Array = self._logits[0, 0]
        return logits

    def _run(self, name: str, facts: Variant, own: dict[str, Array]) -> Run:
        engine = self._engine
        session = engine._open[name].session
        binding = engine._ort.IOBinding(session)
        for bind, tensors in ((binding.bind_input, facts.inputs), (binding.bind_output, facts.outputs)):
            for tensor in tensors:
                array = own.get(tensor.name)
                array = self._shared[tensor.name] if array is None else array
                bind(tensor.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return runner(engine._ort, session, binding)

    def _array(self, tensor: Tensor) -> Array:
        return np.zeros(_shape(tensor, self._tokens, self._cache.places), tensor.dtype)


def _facts(stage: Stage, variant: str) -> Variant:
    """Stem and head have one precision, segments all."""
    return stage.variants.get(variant) or next(iter(stage.variants.values()))


def _shape(tensor: Tensor, tokens: int, places: int) -> tuple[int, ...]:
    sizes: dict[Any, int] = {"batch": 1, "seq": tokens, "past": places}
    return tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)


def _at(tensor: Tensor, start: int, end: int) -> tuple[Any, ...]:
    """The places from start to end of an array of that tensor."""
    axis = tensor.shape.index("past")
    return (slice(None),) * axis + (slice(start, end),)


__all__ = ["Cache", "DecoderEngine", "DecoderState"]
