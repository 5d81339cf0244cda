"""Decoders on ONNX Runtime's CPU: segments that extend a cache, and a head run only where it is asked.

A cache has more places than it holds tokens, so that a token more changes no shape: segments read it where it
lies, and what they add, a few hundred numbers a block, is written behind what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import GATE, LEAVING, NEXT, PAST, Stage, Tensor, Variant
from offramp.runtime.engines.base import Array
from offramp.runtime.engines.buffers import Run, runner
from offramp.runtime.engines.graphs import Graph, Graphs, give_back
from offramp.runtime.engines.kv_cache import shape_of, stacks_of
from offramp.runtime.engines.threads import Pool
from offramp.runtime.errors import BadInput

PLACES = 64  # of a fresh cache, and what it grows by at least
KEPT = 16  # bindings are kept for steps of up to so many tokens; prompts come once


class Made(NamedTuple):
    """What a segment made of n tokens; the arrays are used again by the next run of it, or of the segment
    behind it, on as many tokens.

    hidden [n, hidden]. leaving: what the head reads where a token leaves here [n, hidden], hidden itself if
    there is no translator. gate: logits of P(exit) [n], or None. logits: of the head [n, vocabulary] where it
    was asked at once, or None.
    """

    hidden: Array
    leaving: Array
    gate: Array | None
    logits: Array | None = None


class DecoderEngine:
    """Opens a decoder's graphs, and runs them on a Cache. Not thread-safe."""

    name, device = "ort", "cpu"

    def __init__(self, ort: ModuleType, bundle: Bundle, variant: str, pool: Pool, share: bool = True) -> None:
        self.ort, self._pool, manifest = ort, pool, bundle.manifest
        assert manifest.decoder is not None
        self.manifest, self.variant = manifest, variant
        self._graphs = Graphs(ort, bundle, "cpu", pool, {}, share)
        self._open: dict[str, Graph] = {}
        self.fills = {stage.blocks: stage for stage in manifest.decoder.cache_fills}
        self.positions = np.arange(manifest.input.longest)  # type: ignore[union-attr]  # a decoder reads text
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
        past = [tensor for tensor in inputs if tensor.name.startswith(PAST)]
        self.stacks = stacks_of(past, self.places)
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
        self._bound.clear()  # they hold the smaller arrays
        for at, old in enumerate(self.stacks):
            new = old.like(self.places)
            new.by_token[:held] = old.by_token
            self.stacks[at] = new
        give_back()  # the smaller arrays lie between others, where the C library would keep them

    def embed(self, ids: Sequence[int], start: int) -> Array:
        """Hidden [n, hidden] of these tokens from the stem, for which those before `start` count."""
        return self._of(len(ids), start).look(ids, start)

    def segment(self, number: int, ids: Sequence[int], start: int, hidden: Array) -> Made:
        """Run a segment on tokens that stand from `start` on, with hidden [n, hidden] of them; the cache of
        its blocks takes in what they add.
        """
        return self._of(len(ids), start).run(number, number + 1, ids, start, hidden)

    def through(
        self, first: int, ids: Sequence[int], start: int, hidden: Array | None, head: bool = False
    ) -> Made:
        """Run all segments from `first` on, each on what the one before it made, and the head where it is
        asked; hidden as for segment, None if the stem's is meant. Gives what the last one made.
        """
        end = len(self.engine.manifest.segments)
        return self._of(len(ids), start).run(first, end, ids, start, hidden, head=head)

    def fill(self, number: int, ids: Sequence[int], start: int, hidden: Array) -> None:
        """Put keys and values into a segment's cache for tokens that go past it with this hidden state."""
        self._of(len(ids), start).run(number, number + 1, ids, start, hidden, fill=True)

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


class _Stretch(NamedTuple):
    """Runs of bound segments, one after another, or of what fills the cache of one.

    made: by the last of them. added: places in the cache, tokens first, and what they put there.
    """

    runs: tuple[Run, ...]
    made: Made
    added: list[tuple[Array, Array]]


class _Bound:
    """Memory for so many tokens, bound to the graphs and to one cache's arrays when first needed.

    Hidden states stand between segments, where one writes them and the next reads them.
    """

    def __init__(self, engine: DecoderEngine, cache: Cache, tokens: int, places: int) -> None:
        self._engine, self._cache, self._tokens, self._places = engine, cache, tokens, places
        stem, segments = engine.facts_of(engine.manifest.stem), engine.manifest.segments
        made = {tensor.name: self._array(tensor) for tensor in (*stem.inputs, *stem.outputs)}
        self._ids, self._positions = made["input_ids"], made["position_ids"]
        self._valid, embedded = made["past_valid"], made.pop("hidden")
        self._between = [embedded, *(np.zeros_like(embedded) for _ in segments)]  # each [1, tokens, hidden]
        self._leaving = np.zeros_like(embedded)  # what a head reads
        self._new = [kept.added(tokens) for kept in cache.stacks]
        past = [kept if places == cache.places else kept.like(places) for kept in cache.stacks]
        for stack in (*past, *self._new):
            made |= stack.parts
        self._shared = made
        self._stretches: dict[tuple[int, int, bool, bool], _Stretch] = {}
        self._said: dict[tuple[int, str], Array] = {}
        self._heads: dict[bool, tuple[Run, Array]] = {}
        self._stem = self._run(engine.manifest.stem, {"hidden": embedded})
        self._seen: tuple[int, Sequence[int]] = (-1, ())
        self._counted = 0  # places, of which past_valid says so

    def look(self, ids: Sequence[int], start: int) -> Array:
        """Run the stem, unless it has just been run on the same."""
        if self._seen != (start, ids):
            self._ids[0], self._positions[0] = ids, self._engine.positions[start : start + self._tokens]
            if start < self._counted:
                self._valid[0, start:] = 0
            else:
                self._valid[0, self._counted : start] = 1
            self._counted = start
            self._stem()
            self._seen = start, list(ids)
        hidden: Array = self._between[0][0]
        return hidden

    def run(
        self,
        first: int,
        end: int,
        ids: Sequence[int],
        start: int,
        hidden: Array | None,
        fill: bool = False,
        head: bool = False,
    ) -> Made:
        """Run segments from `first` to before `end`, or what fills the cache of the one, and the head where
        it is asked; hidden: None for the stem's.
        """
        self.look(ids, start)
        if hidden is not None:
            self._between[first][0] = hidden
        found = self._stretches.get((first, end, fill, head))
        if found is None:
            found = self._stretches[first, end, fill, head] = self._bind(first, end, fill, head)
        for run in found.runs:
            run()
        for kept, new in found.added:
            kept[start : start + self._tokens] = new
        return found.made

    def head(self, hidden: Array, draft: bool) -> Array:
        """Run the head, or the one that drafts, of n tokens."""
        found = self._heads.get(draft)
        if found is None:
            found = self._heads[draft] = self._bind_head(self._leaving, draft)
        run, logits = found
        self._leaving[0] = hidden
        run()
        return logits

    def _bind_head(self, hidden: Array, draft: bool) -> tuple[Run, Array]:
        facts = self._engine.manifest.decoder
        assert facts is not None
        stage = facts.draft if draft and facts.draft is not None else facts.head
        logits = self._array(self._engine.facts_of(stage).outputs[0])
        return self._run(stage, {"hidden": hidden, "logits": logits}), logits[0]

    def _bind(self, first: int, end: int, fill: bool, head: bool) -> _Stretch:
        runs, puts = [], set[str]()
        for number, segment in enumerate(self._engine.manifest.segments[first:end], first):
            stage = self._engine.fills[segment.blocks] if fill else segment
            outputs = {tensor.name: tensor for tensor in self._engine.facts_of(stage).outputs}
            before, behind = self._between[number : number + 2]
            own = {"hidden": before, f"{NEXT}hidden": behind}
            for name in (LEAVING, GATE):
                if name in outputs:  # held by this object: a binding holds nothing
                    own[name] = self._said.setdefault((number, name), self._array(outputs[name]))
            runs.append(self._run(stage, own))
            puts |= set(outputs)
        added = []
        for kept, new in zip(self._cache.stacks, self._new, strict=True):
            if (rows := new.rows(puts)) is not None:
                added.append((kept.by_token[:, rows], new.by_token[:, rows]))
        out, gate = before if fill else behind, own.get(GATE)  # a fill leaves hidden as it is
        made = Made(out[0], own.get(LEAVING, out)[0], None if gate is None else gate[0])
        if head:
            run, logits = self._bind_head(out, draft=False)
            runs, made = [*runs, run], made._replace(logits=logits)
        return _Stretch(tuple(runs), made, added)

    def _run(self, stage: Stage, own: dict[str, Array]) -> Run:
        session, facts = self._engine.session(stage), self._engine.facts_of(stage)
        binding = self._engine.ort.IOBinding(session)
        known = self._shared | own
        for bind, tensors in ((binding.bind_input, facts.inputs), (binding.bind_output, facts.outputs)):
            for tensor in tensors:
                array = known[tensor.name]
                bind(tensor.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return runner(self._engine.ort, session, binding)

    def _array(self, tensor: Tensor) -> Array:
        return np.zeros(shape_of(tensor, self._tokens, self._places), tensor.dtype)


__all__ = ["Cache", "DecoderEngine", "Made"]
