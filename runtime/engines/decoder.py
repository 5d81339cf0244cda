"""Decoders on ONNX Runtime's CPU: segments that extend a cache, and a head run only where it is asked.

A cache has more places than it holds tokens, so that a token more changes no shape: segments read it where it
lies, and what they add, a few hundred numbers a block, is written behind what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from offramp.runtime.bundle import Bundle
from offramp.runtime.engines import Array
from offramp.runtime.engines.buffers import Run, runner
from offramp.runtime.engines.graphs import Graph, Graphs, give_back
from offramp.runtime.engines.threads import Pool
from offramp.runtime.errors import BadInput
from offramp.runtime.manifest import GATE, LEAVING, NEXT, PAST, Stage, Tensor, Variant

PLACES = 64  # of a fresh cache, and what it grows by at least
KEPT = 16  # bindings are kept for steps of up to so many tokens; prompts come once


class Made(NamedTuple):
    """What a segment made of n tokens; the arrays are used again by its next run on as many tokens.

    hidden [n, hidden]. leaving: what the head reads where a token leaves here [n, hidden], hidden itself if
    there is no translator. gate: logits of P(exit) [n], or None.
    """

    hidden: Array
    leaving: Array
    gate: Array | None


class DecoderEngine:
    """Opens a decoder's graphs, and runs them on a Cache. Not thread-safe."""

    name, device = "ort", "cpu"

    def __init__(self, ort: ModuleType, bundle: Bundle, variant: str, pool: Pool, share: bool = True) -> None:
        self.ort, self._pool, manifest = ort, pool, bundle.manifest
        assert manifest.decoder is not None
        self.manifest, self.variant = manifest, variant
        self._graphs = Graphs(ort, bundle, "cpu", pool, {}, share)
        self._open: dict[str, Graph] = {}
        self.fills = {stage.blocks: stage for stage in manifest.decoder.fills}
        for stage in (manifest.stem, *manifest.segments, manifest.decoder.head):
            self.session(stage)

    @property
    def facts(self) -> dict[str, str]:
        """Version of onnxruntime, threads and the pool that really runs."""
        return {
            "onnxruntime": self.ort.__version__,
            "threads": str(self._pool.threads or "the application's"),
            "pool": self._pool.kind,
        }

    def cache(self) -> Cache:
        """An empty one."""
        return Cache(self)

    def facts_of(self, stage: Stage) -> Variant:
        """A stage in the engine's variant, or in the one that it has."""
        return stage.variants.get(self.variant) or next(iter(stage.variants.values()))

    def session(self, stage: Stage) -> Any:
        """The stage's graph; fills and a head that drafts, which not every way asks, are opened here."""
        if stage.name not in self._open:
            self._open[stage.name] = self._graphs.open(*self._graphs.read(self.facts_of(stage)))
            give_back()  # each time: the next file's bytes then take the place of this one's
        return self._open[stage.name].session

    def close(self) -> None:
        """Free graphs that no other engine runs."""
        self._open.clear()


class Cache:
    """Keys and values of one sequence, and the runs that read and extend them.

    places: tokens for which there is room; growing doubles it up to 4 * PLACES and adds that much from there
    on. Which places count is said with every run: a run on tokens from `start` on sees those before it.
    """

    def __init__(self, engine: DecoderEngine) -> None:
        reads, self.engine = engine.manifest.input, engine
        self.longest: int = reads.longest  # type: ignore[union-attr]  # a decoder reads text
        self.places = min(PLACES, self.longest)
        inputs = [t for stage in engine.manifest.segments for t in engine.facts_of(stage).inputs]
        self.tensors = [tensor for tensor in inputs if tensor.name.startswith(PAST)]
        self.arrays: dict[str, Array] = {tensor.name: self._empty(tensor) for tensor in self.tensors}
        # By number of tokens and of places that they read; to these very arrays.
        self._bound: dict[tuple[int, int], _Bound] = {}

    def make_room(self, tokens: int) -> None:
        """Room for so many tokens in all; BadInput where the network does not reach so far."""
        if tokens > self.longest:
            raise BadInput(f"{tokens} tokens: this network reads {self.longest}, prompt and answer together")
        if tokens <= self.places:
            return
        held = self.places
        while self.places < tokens:
            self.places += min(self.places, 4 * PLACES)
        self.places = min(self.places, self.longest)
        for tensor in self.tensors:
            old, new = self.arrays[tensor.name], self._empty(tensor)
            new[_at(tensor, 0, held)] = old
            self.arrays[tensor.name] = new
        self._bound.clear()
        give_back()  # the smaller arrays lie between others, where the C library would keep them

    def embed(self, ids: Sequence[int], start: int) -> Array:
        """Hidden [n, hidden] of these tokens from the stem, for which those before `start` count."""
        return self._of(len(ids), start).look(ids, start)

    def segment(self, number: int, ids: Sequence[int], start: int, hidden: Array) -> Made:
        """Run a segment on tokens that stand from `start` on, with hidden [n, hidden] of them; the cache of
        its blocks takes in what they add.
        """
        return self._of(len(ids), start).run(self.engine.manifest.segments[number], ids, start, hidden)

    def fill(self, number: int, ids: Sequence[int], start: int, hidden: Array) -> None:
        """Put keys and values into a segment's cache for tokens that go past it with this hidden state."""
        stage = self.engine.fills[self.engine.manifest.segments[number].blocks]
        self._of(len(ids), start).run(stage, ids, start, hidden)

    def logits(self, hidden: Array, draft: bool = False) -> Array:
        """What the head makes of hidden [n, hidden]: [n, vocabulary], or fewer ids, those that a draft knows;
        the memory is used again by the next run.
        """
        return self._of(len(hidden)).head(hidden, draft)

    def _of(self, tokens: int, start: int = -1) -> _Bound:
        # A prompt has nothing before it: one place, which does not count, stands for the past that a graph
        # has to read, and not as many as the prompt is about to fill.
        places = 1 if start == 0 and tokens > KEPT else self.places
        bound = self._bound.get((tokens, places))
        if bound is None:
            for long in [key for key in self._bound if key[0] > KEPT]:
                del self._bound[long]  # a prompt's; they come once
            bound = self._bound[tokens, places] = _Bound(self.engine, self, tokens, places)
        return bound

    def _empty(self, tensor: Tensor) -> Array:
        return np.zeros(_shape(tensor, 1, self.places), tensor.dtype)


class _Bound:
    """Memory for so many tokens, bound to the graphs and to one cache's arrays when first needed."""

    def __init__(self, engine: DecoderEngine, cache: Cache, tokens: int, places: int) -> None:
        self._engine, self._cache, self._tokens, self._places = engine, cache, tokens, places
        stem = engine.facts_of(engine.manifest.stem)
        made = {tensor.name: self._array(tensor) for tensor in (*stem.inputs, *stem.outputs)}
        self._ids, self._positions = made["input_ids"], made["position_ids"]
        self._valid, self._embedded = made["past_valid"], made.pop("hidden")
        self._hidden = np.zeros_like(self._embedded)
        whole = places == cache.places
        past = cache.arrays if whole else {one.name: self._array(one) for one in cache.tensors}
        self._shared = made | past
        self._stages: dict[str, tuple[Run, Made, list[tuple[Array, Array]]]] = {}
        self._heads: dict[bool, tuple[Run, Array]] = {}
        self._stem = self._run(engine.manifest.stem, {"hidden": self._embedded})
        self._seen: tuple[int, Sequence[int]] = (-1, ())

    def look(self, ids: Sequence[int], start: int) -> Array:
        """Run the stem, unless it has just been run on the same."""
        if self._seen != (start, ids):
            self._ids[0], self._positions[0] = ids, np.arange(start, start + self._tokens)
            self._valid[0, :start], self._valid[0, start:] = 1, 0
            self._stem()
            self._seen = start, list(ids)
        hidden: Array = self._embedded[0]
        return hidden

    def run(self, stage: Stage, ids: Sequence[int], start: int, hidden: Array) -> Made:
        """Run a segment, or what fills its cache."""
        self.look(ids, start)
        found = self._stages.get(stage.name)
        if found is None:
            found = self._stages[stage.name] = self._bind(stage)
        run, made, added = found
        self._hidden[0] = hidden
        run()
        for kept, new in added:
            kept[start : start + self._tokens] = new
        return made

    def head(self, hidden: Array, draft: bool) -> Array:
        """Run the head, or the one that drafts, of n tokens."""
        found = self._heads.get(draft)
        if found is None:
            facts = self._engine.manifest.decoder
            assert facts is not None
            stage = facts.draft if draft and facts.draft is not None else facts.head
            logits = self._array(self._engine.facts_of(stage).outputs[0])
            found = self._heads[draft] = self._run(stage, {"logits": logits}), logits
        run, logits = found
        self._hidden[0] = hidden
        run()
        said: Array = logits[0]
        return said

    def _bind(self, stage: Stage) -> tuple[Run, Made, list[tuple[Array, Array]]]:
        outputs = {tensor.name: self._array(tensor) for tensor in self._engine.facts_of(stage).outputs}
        added = []
        for tensor in self._cache.tensors:
            if (new := outputs.get(tensor.name.replace("past", "new", 1))) is not None:
                kept, axis = self._cache.arrays[tensor.name], tensor.shape.index("past")
                # Views with tokens first, made once: every token writes to all of them.
                added.append((np.moveaxis(kept, axis, 0), np.moveaxis(new, axis, 0)))
        behind = outputs.get(f"{NEXT}hidden", self._hidden)  # a fill leaves hidden as it is
        gate = outputs.get(GATE)
        made = Made(behind[0], outputs.get(LEAVING, behind)[0], None if gate is None else gate[0])
        return self._run(stage, outputs), made, added

    def _run(self, stage: Stage, own: dict[str, Array]) -> Run:
        session, facts = self._engine.session(stage), self._engine.facts_of(stage)
        binding = self._engine.ort.IOBinding(session)
        known = self._shared | {"hidden": self._hidden} | own
        for bind, tensors in ((binding.bind_input, facts.inputs), (binding.bind_output, facts.outputs)):
            for tensor in tensors:
                array = known[tensor.name]
                bind(tensor.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return runner(self._engine.ort, session, binding)

    def _array(self, tensor: Tensor) -> Array:
        return np.zeros(_shape(tensor, self._tokens, self._places), tensor.dtype)


def _shape(tensor: Tensor, tokens: int, places: int) -> tuple[int, ...]:
    sizes: dict[Any, int] = {"batch": 1, "seq": tokens, "past": places}
    return tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)


def _at(tensor: Tensor, start: int, end: int) -> tuple[Any, ...]:
    """The places from start to end of an array of that tensor."""
    axis = tensor.shape.index("past")
    return (slice(None),) * axis + (slice(start, end),)


__all__ = ["Cache", "DecoderEngine", "Made"]
