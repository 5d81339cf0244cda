"""Engine ort for decoders on a CPU: segments that extend a cache, and a head that runs when logits are read.

A cache has more places than tokens, so that a further token changes no shape. Graphs of bundles whose cache
grows in place write their new keys and values themselves (ort_slots). Those of others read the cache in
place, and their new keys and values, a few hundred numbers a block, are written after the existing ones.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import (
    CONTROLLER,
    EXIT_HIDDEN,
    GATE,
    IN_PLACE,
    NEXT,
    PAST,
    PREVIOUS_HIDDEN,
    Segment,
    Tensor,
    TextInput,
    Variant,
)
from offramp.runtime.engines.base import Array, EngineOptions, Rows
from offramp.runtime.engines.buffers import Run, make_run, run_in_turn
from offramp.runtime.engines.graphs import (
    BundleGraphs,
    OpenGraph,
    cannot_run,
    forget_threads,
    free_unused_memory,
)
from offramp.runtime.engines.kv_cache import past_arrays, sequence_shape
from offramp.runtime.engines.ort_slots import CacheSlots, SlotRunner
from offramp.runtime.engines.threads import Pool
from offramp.runtime.errors import BadBundle, BadInput, BadSetting, EngineUnavailable
from offramp.runtime.rules.base import Floats
from offramp.runtime.sequence import KEPT_TOKENS, SegmentOutput, TokenSequence, TokenSignals

PLACES = 64  # places of a new cache, and the least number by which it grows
# The oldest onnxruntime that runs graphs whose cache grows in place, and the oldest one that attends to as
# many tokens as a window says: before, it was one more. And the oldest one that reads embeddings of 8 bits,
# with which a stem has a graph for a variant.
LEAST_VERSION, LEAST_FOR_WINDOWS, LEAST_FOR_SMALL_STEM = (1, 20), (1, 24), (1, 23)

# A prompt needs memory for values between operators that later tokens do not need (27 MB for 512 tokens of
# SmolLM2-135M). After a prompt of at least LONG_PROMPT tokens, ONNX Runtime's arena gives it back.
FREE_ARENA = {"memory.enable_memory_arena_shrinkage": "cpu:0"}
LONG_PROMPT = 128


class OrtDecoderEngine:
    """Runs a decoder's segments with ONNX Runtime on a CPU; its states are sequences.

    It implements engines.base.Engine. Not thread-safe: the session that uses it holds a lock.
    """

    name, device = "ort", "cpu"
    max_rows = 1  # sequences are not joined

    def __init__(
        self, ort: ModuleType, bundle: Bundle, variant: str, pool: Pool, options: EngineOptions
    ) -> None:
        manifest = bundle.manifest
        assert manifest.decoder is not None and isinstance(manifest.input, TextInput)
        if manifest.decoder.cache == IN_PLACE:
            is_small = variant != manifest.variants[0] and variant in manifest.stem.variants
            least = max(
                LEAST_VERSION,
                LEAST_FOR_WINDOWS if manifest.decoder.windows else LEAST_VERSION,
                LEAST_FOR_SMALL_STEM if is_small else LEAST_VERSION,
            )
            _check_version(ort, bundle, least)
        self.ort, self.manifest, self.decoder = ort, manifest, manifest.decoder
        self.folder = bundle.folder
        self.longest = manifest.input.longest
        self.positions = np.arange(self.longest)  # position ids, sliced for every step
        self.fill_graphs = {fill.blocks: fill for fill in manifest.decoder.cache_fills}
        self._pool, self._variant = pool, variant
        self._number, self._propagate = manifest.variants.index(variant), options.exit_kv == "propagate"
        self._graphs = BundleGraphs(ort, bundle, "cpu", pool, {}, options.share)
        self._open: dict[str, OpenGraph] = {}
        self._slots: CacheSlots | None = None  # made for the first sequence
        self._draft_engine: OrtDecoderEngine | None = None  # see draft_runner

    @property
    def facts(self) -> Mapping[str, str]:
        """Version of onnxruntime, number of threads, and the thread pool that is really used."""
        threads = str(self._pool.threads or "the application's")
        return {"onnxruntime": self.ort.__version__, "threads": threads, "pool": self._pool.kind}

    def prepare(self, variant: int, segments: Sequence[int]) -> None:
        """Open the stem, these segments (0-based) and the head; see Engine.prepare."""
        self._check_variant(variant)
        for segment in (self.manifest.stem, *(self.manifest.segments[n] for n in segments)):
            self.session(segment)
        self.session(self.decoder.head)

    def begin(self, inputs: Mapping[str, Array]) -> TokenSequence:
        """Create a sequence from a prompt, input_ids int64 [1, seq]; see Engine.begin."""
        sequence = TokenSequence(self._new_cache(), propagate=self._propagate)
        try:
            sequence.feed(inputs["input_ids"][0].tolist())
        except BaseException:  # its traceback refers to the sequence
            self.drop(sequence)
            raise
        return sequence

    def step(self, segment: int, variant: int, state: TokenSequence) -> TokenSignals:
        """Run one segment on all tokens that wait for it and return the signals; see Engine.step."""
        if variant != self._number:
            self._check_variant(variant)
        return TokenSignals(state.runner, state.advance(segment), state.rows)

    def skip(self, segment: int, state: TokenSequence) -> None:
        """Move all tokens that wait for a segment past it, without running it; see Engine.skip."""
        state.skip(segment)

    def take(self, state: TokenSequence, rows: Rows) -> TokenSequence:
        """Raise BadSetting: rows cannot be taken out of a sequence; see Engine.take."""
        raise BadSetting("sequences walk one by one: give the walker one at a time")

    def join(self, states: Sequence[TokenSequence]) -> TokenSequence:
        """Raise BadSetting: sequences cannot be joined; see Engine.join."""
        raise BadSetting("sequences walk one by one: give the walker one at a time")

    def drop(self, state: TokenSequence) -> None:
        """Give the slot of a sequence back; other caches are freed with the last reference to them."""
        if isinstance(state.runner, SlotRunner):
            state.runner.release()

    def close(self) -> None:
        """Free caches, and graphs that no other engine uses."""
        self._open.clear()
        self._slots = None
        self._draft_engine = None

    def after_fork(self) -> None:
        """Forget graphs that have threads; see Engine.after_fork. Sequences from before the fork are lost."""
        self._pool.check_forked()
        if self._pool.has_workers:
            forget_threads()
            self.close()
        self._slots = self._draft_engine = None  # another thread of the parent may have held their lock

    def graph_of(self, segment: Segment) -> Variant:
        """A segment's graph in the engine's variant, or in its only variant."""
        return segment.variants.get(self._variant) or segment.first_graph

    def session(self, segment: Segment) -> Any:
        """ONNX Runtime's session of a segment's graph, which is opened at the first use."""
        if segment.name not in self._open:
            self._open[segment.name] = self._graphs.open(*self._graphs.read(self.graph_of(segment)))
            free_unused_memory()  # after every file, so that the next file's bytes use the freed memory
        return self._open[segment.name].session

    def head_of(self, draft: bool) -> Segment:
        """The head, or for drafts the draft head if there is one."""
        return self.decoder.draft if draft and self.decoder.draft is not None else self.decoder.head

    def bind(self, segment: Segment, arrays: Mapping[str, Array]) -> Run:
        """Bind a segment's graph to arrays by name, which the caller keeps alive."""
        session, graph = self.session(segment), self.graph_of(segment)
        binding = self.ort.IOBinding(session)
        for bind, tensors in ((binding.bind_input, graph.inputs), (binding.bind_output, graph.outputs)):
            for tensor in tensors:
                array = arrays[tensor.name]
                bind(tensor.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        if segment is self.manifest.segments[-1] and arrays["hidden"].shape[1] >= LONG_PROMPT:
            return run_in_turn([make_run(self.ort, session, binding, FREE_ARENA), free_unused_memory])
        return make_run(self.ort, session, binding)

    def broken(self, segment: Segment, problem: Exception) -> BadBundle:
        """The error for a segment whose graph ONNX Runtime cannot run."""
        return cannot_run(self.folder, segment.name, self.graph_of(segment), problem)

    def slots(self) -> CacheSlots:
        """The caches of all sequences, for a bundle whose graphs extend a cache in place."""
        if self._slots is None:
            self._slots = CacheSlots(self)
        return self._slots

    def draft_runner(self) -> KVCache | SlotRunner | None:
        """A cache of the draft block for one sequence; see CacheRunner.draft_runner."""
        if self.decoder.draft_block is None:
            return None
        if self._draft_engine is None:
            # The same graphs, of which the draft block is the only segment.
            engine = self._draft_engine = copy.copy(self)
            engine.manifest = dataclasses.replace(self.manifest, segments=(self.decoder.draft_block,))
            engine._slots = None
        return self._draft_engine._new_cache()

    def _new_cache(self) -> KVCache | SlotRunner:
        return SlotRunner(self.slots()) if self.decoder.cache == IN_PLACE else KVCache(self)

    def _check_variant(self, variant: int) -> None:
        if variant != self._number:
            name = self.manifest.variants[variant]
            raise BadSetting(f"this engine was opened in {self._variant}; open another session in {name}")


def _check_version(ort: ModuleType, bundle: Bundle, least: tuple[int, int]) -> None:
    """Raise EngineUnavailable for an onnxruntime older than `least`."""
    numbers = [re.match(r"\d*", part) for part in ort.__version__.split(".")[:2]]
    if tuple(int(number[0] or 0) for number in numbers if number) < least:
        name = ".".join(map(str, least))
        raise EngineUnavailable(
            f"engine ort: {bundle.folder} needs onnxruntime {name} or newer, this is {ort.__version__}; "
            f"install a newer one, or write the bundle with ee-split --portable"
        )


class KVCache:
    """The cache of keys and values of one sequence, and the steps that read and extend it; see CacheRunner.

    places: tokens for which there is room; doubled up to 4 * PLACES, then increased by that number.
    A step on tokens from `start` on reads the places before `start`.
    """

    def __init__(self, engine: OrtDecoderEngine) -> None:
        manifest, self.engine = engine.manifest, engine
        self.longest, self.hidden_size = engine.longest, manifest.hidden_size
        self.blocks = [len(segment.blocks) for segment in manifest.segments]
        self.places = min(PLACES, self.longest)
        inputs = [tensor for segment in manifest.segments for tensor in engine.graph_of(segment).inputs]
        self.past = past_arrays([tensor for tensor in inputs if tensor.name.startswith(PAST)], self.places)
        # By number of tokens, and of places that they read; bound to the arrays of self.past.
        self._steps: dict[tuple[int, int], _BoundSteps] = {}
        self._current: _BoundSteps | None = None  # of the last run

    def make_room(self, tokens: int) -> None:
        """Enlarge the cache to hold this many tokens; raises BadInput for more than `longest`."""
        if tokens > self.longest:
            raise BadInput(f"{tokens} tokens: this network reads {self.longest}, prompt and answer together")
        if tokens <= self.places:
            return
        held = self.places
        while self.places < tokens:
            self.places += min(self.places, 4 * PLACES)
        self.places = min(self.places, self.longest)
        self.write_pending()
        self._steps.clear()  # they are bound to the smaller arrays
        self._current = None
        for number, old in enumerate(self.past):
            larger = old.empty_past(self.places)
            larger.by_token[:held] = old.by_token
            self.past[number] = larger
        free_unused_memory()  # otherwise the C library keeps the memory of the smaller arrays

    def reserve(self, tokens: int) -> None:
        """Do nothing: a step reads all places, so empty ones take time; see CacheRunner.reserve."""

    def embed(self, ids: Sequence[int], start: int) -> Floats:
        """Run the stem on tokens and return their hidden states; see CacheRunner.embed."""
        return self._steps_for(len(ids), start).embed(ids, start)

    def run(self, segment: int, ids: Sequence[int], start: int, hidden: Floats | None) -> SegmentOutput:
        """Run a segment on tokens and add their keys and values to the cache; see CacheRunner.run."""
        steps = self._steps_for(len(ids), start)
        return steps.run(segment, ids, start, hidden)

    def run_next(self, segment: int) -> SegmentOutput:
        """Run a segment on the tokens of the previous step; see CacheRunner.run_next."""
        assert self._current is not None
        return self._current.run_step(segment)

    def fill(self, segment: int, ids: Sequence[int], start: int, hidden: Floats) -> None:
        """Fill the cache of a segment that is not run from hidden states; see CacheRunner.fill."""
        self._steps_for(len(ids), start).run(segment, ids, start, hidden, fill=True)

    def draft_runner(self) -> KVCache | SlotRunner | None:
        """A runner of the draft block; see CacheRunner.draft_runner."""
        return self.engine.draft_runner()

    def write_pending(self) -> None:
        """Write the keys and values of the last steps into the cache, if that has not been done yet."""
        if self._current is not None:
            self._current.write_pending()

    def logits(self, hidden: Floats, draft: bool = False) -> Floats:
        """Run the head, or the draft head, on hidden states; see CacheRunner.logits."""
        return self._bound(len(hidden)).logits(hidden, draft)

    def _steps_for(self, tokens: int, start: int) -> _BoundSteps:
        """The bound steps for tokens from `start` on, after other bound steps have written their results."""
        steps = self._bound(tokens, start)
        if steps is not self._current:
            self.write_pending()
            self._current = steps
        return steps

    def _bound(self, tokens: int, start: int = -1) -> _BoundSteps:
        # A prompt has no past: its graphs read one masked place instead of all places that the prompt will
        # fill.
        places = 1 if start == 0 and tokens > KEPT_TOKENS else self.places
        steps = self._steps.get((tokens, places))
        if steps is None:
            for long_key in [key for key in self._steps if key[0] > KEPT_TOKENS]:
                del self._steps[long_key]  # a prompt is run once
            steps = self._steps[tokens, places] = _BoundSteps(self.engine, self, tokens, places)
        return steps


class _BoundStep(NamedTuple):
    """A bound graph: its run and its output."""

    run: Run
    output: SegmentOutput


class _BoundSteps:
    """Memory for steps on a number of tokens, bound to the graphs and to one cache at the first use.

    The hidden state between two segments has one array, which one step writes and the next step reads.

    New keys and values are written into the cache later, before the next tokens run: those of consecutive
    segments in one assignment. One a segment took longer than all other lines between two segments.
    """

    def __init__(self, engine: OrtDecoderEngine, cache: KVCache, tokens: int, places: int) -> None:
        self._engine, self._cache, self._tokens, self._places = engine, cache, tokens, places
        stem, segments = engine.graph_of(engine.manifest.stem), engine.manifest.segments
        arrays = {tensor.name: self._array(tensor) for tensor in (*stem.inputs, *stem.outputs)}
        self._ids, self._positions = arrays["input_ids"], arrays["position_ids"]
        self._valid, embedded = arrays["past_valid"], arrays.pop("hidden")
        self._previous = arrays[PREVIOUS_HIDDEN] = np.zeros_like(embedded)  # for a draft block
        self._between = [embedded, *(np.zeros_like(embedded) for _ in segments)]  # each [1, tokens, hidden]
        self._head_input = np.zeros_like(embedded)
        self._new = [past.for_new_tokens(tokens) for past in cache.past]
        read = [past if places == cache.places else past.empty_past(places) for past in cache.past]
        for kv_array in (*read, *self._new):
            arrays |= kv_array.by_name
        self._shared = arrays
        self._steps: dict[tuple[int, bool], _BoundStep] = {}
        self._heads: dict[tuple[int, bool], tuple[Run, Floats]] = {}
        self._output: SegmentOutput | None = None  # of the last step
        self._output_segment = -1
        self._stem = self._bind(engine.manifest.stem, {"hidden": embedded})
        self._embedded_start, self._embedded_ids = -1, list[int]()  # of the stem's last run
        self._valid_places = 0  # places that past_valid marks as filled
        self._pending = (0, 0)  # first segment, and the one after the last, with results to write
        self._writes: dict[tuple[int, int], list[tuple[Array, Array]]] = {}  # by such a pair: (cache, new)

    def embed(self, ids: Sequence[int], start: int) -> Floats:
        """Run the stem unless its last run was on the same tokens; returns hidden [tokens, hidden size]."""
        if self._embedded_start != start or self._embedded_ids != ids:
            self.write_pending()
            self._ids[0], self._positions[0] = ids, self._engine.positions[start : start + self._tokens]
            if start < self._valid_places:
                self._valid[0, start:] = 0
            else:
                self._valid[0, self._valid_places : start] = 1
            self._valid_places = start
            try:
                self._stem()
            except Exception as problem:  # ORT's error types share no base of their own
                raise self._broken(self._engine.manifest.stem, problem) from problem
            self._embedded_start, self._embedded_ids = start, list(ids)
        hidden: Floats = self._between[0][0]
        return hidden

    def run(
        self, segment: int, ids: Sequence[int], start: int, hidden: Floats | None, fill: bool = False
    ) -> SegmentOutput:
        """Run a segment, or its cache fill, and note that its keys and values are to be written."""
        self.embed(ids, start)  # the stem's masks and rotations are read by every segment
        if hidden is not None:
            read = self._between[segment] if segment else self._previous
            read[0] = hidden
        return self.run_step(segment, fill)

    def run_step(self, segment: int, fill: bool = False) -> SegmentOutput:
        """Run a segment, or its cache fill, on the tokens that the stem ran on last."""
        step = self._steps.get((segment, fill))
        if step is None:
            step = self._steps[segment, fill] = self._bind_segment(segment, fill)
        if self._pending[1] != segment:
            self.write_pending()
            self._pending = (segment, segment)
        try:
            step.run()
        except Exception as problem:  # see embed()
            raise self._broken(self._segment(segment, fill), problem) from problem
        self._pending = (self._pending[0], segment + 1)
        self._output, self._output_segment = step.output, segment
        return step.output

    def write_pending(self) -> None:
        """Write the keys and values of the steps since the last call into the cache."""
        if self._pending[0] == self._pending[1]:
            return
        writes = self._writes.get(self._pending)
        if writes is None:
            writes = self._writes[self._pending] = self._writes_of(*self._pending)
        start = self._embedded_start
        for cache, new in writes:
            cache[start : start + self._tokens] = new
        self._pending = (0, 0)

    def _writes_of(self, first: int, end: int) -> list[tuple[Array, Array]]:
        """Pairs (cache, new keys or values) of segments from `first` to before `end`, with tokens first."""
        names = {
            tensor.name
            for segment in self._engine.manifest.segments[first:end]
            for tensor in self._engine.graph_of(segment).outputs
        }
        writes = []
        for past, new in zip(self._cache.past, self._new, strict=True):
            if (blocks := new.block_range(names)) is not None:
                writes.append((past.by_token[:, blocks], new.by_token[:, blocks]))
        return writes

    def logits(self, hidden: Floats, draft: bool) -> Floats:
        """Run the head, or the draft head, on hidden states; returns logits [tokens, ids].

        If `hidden` is the array of the last step's output, the head reads it in place.
        """
        in_place = self._output is not None and hidden is self._output.exit_hidden
        key = (self._output_segment if in_place else -1, draft)
        bound = self._heads.get(key)
        if bound is None:
            bound = self._heads[key] = self._bind_head(hidden[None] if in_place else self._head_input, draft)
        run, logits = bound
        if not in_place:
            self._head_input[0] = hidden
        try:
            run()
        except Exception as problem:  # see embed()
            raise self._broken(self._engine.head_of(draft), problem) from problem
        return logits

    def _segment(self, number: int, fill: bool) -> Segment:
        segment = self._engine.manifest.segments[number]
        return self._engine.fill_graphs[segment.blocks] if fill else segment

    def _bind_head(self, hidden: Floats, draft: bool) -> tuple[Run, Floats]:
        head = self._engine.head_of(draft)
        logits = self._array(self._engine.graph_of(head).outputs[0])
        return self._bind(head, {"hidden": hidden, "logits": logits}), logits[0]

    def _bind_segment(self, number: int, fill: bool) -> _BoundStep:
        segment = self._segment(number, fill)
        outputs = {tensor.name: tensor for tensor in self._engine.graph_of(segment).outputs}
        before, after = self._between[number : number + 2]
        arrays = {"hidden": before, f"{NEXT}hidden": after}
        for name in (EXIT_HIDDEN, GATE, CONTROLLER):
            if name in outputs:
                arrays[name] = self._array(outputs[name])
        run = self._bind(segment, arrays)
        hidden = before if fill else after  # a fill leaves hidden as it is
        gate, controller = arrays.get(GATE), arrays.get(CONTROLLER)
        output = SegmentOutput(
            hidden[0],
            arrays.get(EXIT_HIDDEN, hidden)[0],
            None if gate is None else gate[0],
            None if controller is None else controller[0],
        )
        return _BoundStep(run, output)

    def _bind(self, segment: Segment, own_arrays: Mapping[str, Array]) -> Run:
        """Bind a graph to these arrays and the shared ones, all of which this object has to keep alive."""
        return self._engine.bind(segment, {**self._shared, **own_arrays})

    def _broken(self, segment: Segment, problem: Exception) -> BadBundle:
        return self._engine.broken(segment, problem)

    def _array(self, tensor: Tensor) -> Any:
        return np.zeros(sequence_shape(tensor, self._tokens, self._places), tensor.dtype)
