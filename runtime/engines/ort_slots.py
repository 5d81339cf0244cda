"""Caches that graphs extend in place, of all sequences of an engine, and the steps that run on them.

Every sequence has a slot: one row in the keys and the values of every block. A graph is bound to the rows of
consecutive slots, to one array for the past and for what it becomes, so that the new keys and values are
written where they belong and nothing is copied. A cache has more places than tokens; a graph reads the length
of each row from `last_positions`.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from offramp.runtime.bundle.manifest import (
    CONTROLLER,
    EXIT_HIDDEN,
    GATE,
    LAST_POSITIONS,
    NEW,
    NEXT,
    PAST,
    PREVIOUS_HIDDEN,
    TOTAL_LENGTH,
    Segment,
)
from offramp.runtime.engines.base import Array
from offramp.runtime.engines.buffers import Run
from offramp.runtime.engines.decoder_graphs import DecoderGraphs
from offramp.runtime.engines.graphs import free_unused_memory
from offramp.runtime.engines.kv_cache import sequence_shape
from offramp.runtime.engines.rotation import rotation_tables
from offramp.runtime.errors import BadInput, OutOfMemory
from offramp.runtime.rules.base import Floats
from offramp.runtime.sequence import KEPT_TOKENS, CacheRunner, SegmentOutput

PLACES = 64  # places of new caches, and the least number by which they grow
RESERVED = 1024  # tokens for which a sequence makes room before they come
IDLE_BYTES = 64 * 2**20  # of caches that are kept while no sequence uses them
MAPPED_BYTES = 2**18  # of an array that has a mapping of its own
KEPT_STEPS = 128  # numbers of slots and tokens for which steps stay bound


class _Step(NamedTuple):
    """A bound graph of a segment: its run and its output."""

    run: Run
    output: SegmentOutput


class _Head(NamedTuple):
    """A bound head: its run, its input [1, n, hidden size] and its logits [n, ids]."""

    run: Run
    hidden: Floats
    logits: Floats


class CacheSlots:
    """The keys and values of all sequences of an engine; one slot for each sequence.

    arrays: by the names of the tensors, float32 [slots, kv heads, places, size]. filled: by slot and segment,
    the tokens that the cache holds. places: tokens of a slot for which there is room, and one more.
    """

    def __init__(self, graphs: DecoderGraphs) -> None:
        self.graphs = graphs
        self.segments = graphs.manifest.segments
        self.slots = self.places = 0
        self.arrays: dict[str, Array] = {}
        self.tables: dict[str, Floats] = {}
        self.filled: list[list[int]] = []
        self.version = 0  # of the arrays: graphs that are bound to those of an earlier version are bound anew
        self._shapes = {
            tensor.name: (int(tensor.shape[1]), int(tensor.shape[3]))  # kv heads, size
            for segment in self.segments
            for tensor in graphs.graph_of(segment).inputs
            if tensor.name.startswith(PAST)
        }
        self._held: set[int] = set()
        # A sequence may be dropped while another thread begins one. This thread may drop one, too, at any
        # moment: an answer that is garbage drops its sequence when it is collected.
        self._guard = threading.RLock()
        self._steps: dict[tuple[int, int, int], BoundSteps] = {}  # by first slot, slots, tokens
        self._heads: dict[tuple[int, bool], _Head] = {}  # by number of hidden states, and whether for drafts
        self._stems: dict[int, _Stem] = {}  # by number of tokens

    def acquire(self) -> int:
        """Take the lowest free slot, which holds no tokens."""
        with self._guard:
            slot = next(number for number in range(len(self._held) + 1) if number not in self._held)
            self._held.add(slot)  # first, as trim() may run in this thread when garbage is collected
            while len(self.filled) <= slot:
                self.filled.append([0] * len(self.segments))
            # In place: the runner of the slot refers to the list.
            self.filled[slot][:] = [0] * len(self.segments)
            try:
                if slot >= self.slots:
                    places = max(self.places, min(PLACES, self.graphs.longest + 1))
                    self._grow(max(1, 2 * self.slots), places)
            except BaseException:
                self._held.discard(slot)
                raise
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back; it may run when garbage is collected, so it only notes that the slot is free."""
        self._held.discard(slot)

    def trim(self) -> None:
        """Free the memory of large caches if no slot is in use."""
        with self._guard:
            if not self._held and sum(array.nbytes for array in list(self.arrays.values())) > IDLE_BYTES:
                self.slots = self.places = 0
                self.arrays.clear()
                self.tables.clear()
                self.filled.clear()
                self._steps.clear()
                self.version += 1
                free_unused_memory()

    def make_room(self, tokens: int) -> None:
        """Enlarge the caches to hold this many tokens of a sequence; BadInput for more than `longest`."""
        longest = self.graphs.longest
        if tokens > longest:
            raise BadInput(f"{tokens} tokens: this network reads {longest}, prompt and answer together")
        places = self.places
        while places < tokens + 1:  # one more: a slot that only lies between others writes there, too
            places += min(places, 4 * PLACES)
        if places > self.places:
            self._grow(self.slots, min(places, longest + 1))

    def reserve(self, tokens: int) -> None:
        """Enlarge the caches at once to hold this many tokens of a sequence; see CacheRunner.reserve.

        A cache that grows with a sequence is copied every few hundred tokens, and its last growth leaves
        places that are never used. Places that no token has reached are mostly not in physical memory yet.
        """
        places = min(tokens, RESERVED, self.graphs.longest) + 1
        if places > self.places:
            self._grow(self.slots, places)

    def run_together(
        self, segment: int, slots: Sequence[int], starts: Sequence[int], hidden: Floats
    ) -> SegmentOutput:
        """Run a segment on one new token of each of several sequences; returns outputs of n tokens.

        slots: in ascending order. starts: tokens that the segment's cache of each holds. hidden [n, hidden
        size]; it is not copied if it is the output of the segment before for the same slots. Slots between
        these run as well: they write to their next free place, which is overwritten later.
        """
        first, rows = slots[0], slots[-1] - slots[0] + 1
        steps = self.steps_of(first, rows, 1)
        everyone = rows == len(slots)
        at = np.subtract(slots, first)
        if rows == 1:
            steps.set_start(starts[0])
        else:
            if not everyone:
                steps.last[:] = [filled[segment] for filled in self.filled[first : first + rows]]
            steps.last[at] = starts
            steps.total[...] = steps.last.max() + 1
        if hidden is not steps.hidden[segment]:
            steps.hidden[segment][at] = hidden
        output = steps.run(segment)
        for slot, start in zip(slots, starts, strict=True):
            self.filled[slot][segment] = start + 1
        if everyone:
            return output
        exit_hidden = output.exit_hidden[at]
        return SegmentOutput(
            exit_hidden if output.exit_hidden is output.hidden else output.hidden[at],
            exit_hidden,
            None if output.gate is None else output.gate[at],
            None if output.controller is None else output.controller[at],
        )

    def embed_together(self, ids: Sequence[int], starts: Sequence[int]) -> Floats:
        """Run the stem on one token of each of several sequences; returns hidden [n, hidden size].

        starts: positions of the tokens. The next call with as many tokens overwrites the array.
        """
        stem = self._stems.get(len(ids))
        if stem is None:
            hidden = np.zeros((1, len(ids), self.graphs.manifest.hidden_size), np.float32)
            stem = self._stems[len(ids)] = _Stem(self.graphs, hidden)
        stem.positions[0] = starts
        stem.run(ids)
        return stem.hidden

    def logits(self, hidden: Floats, draft: bool = False) -> Floats:
        """Run the head, or the draft head, on hidden states [n, hidden size]; returns logits [n, ids].

        The next call with as many hidden states overwrites the array.
        """
        head = self._heads.get((len(hidden), draft))
        if head is None:
            head = self.bind_head(np.zeros((1, *hidden.shape), np.float32), draft)
            if len(hidden) <= max(KEPT_TOKENS, self.slots):
                self._heads[len(hidden), draft] = head
        head.hidden[0] = hidden
        self.run_head(head, draft)
        return head.logits

    def copy_prefix(self, source: int, target: int, tokens: int) -> None:
        """Copy the keys and values of the first tokens of a slot, in all blocks, to another slot."""
        for array in self.arrays.values():
            array[target, :, :tokens] = array[source, :, :tokens]
        self.filled[target][:] = [tokens] * len(self.segments)

    def steps_of(self, first: int, rows: int, tokens: int) -> BoundSteps:
        """The steps on so many tokens of each of consecutive slots."""
        key = (first, rows, tokens)
        steps = self._steps.get(key)
        if steps is None:
            for long_key in [key for key in self._steps if key[2] > KEPT_TOKENS]:
                del self._steps[long_key]  # a prompt is run once
            if len(self._steps) >= KEPT_STEPS:
                del self._steps[next(iter(self._steps))]
            steps = self._steps[key] = BoundSteps(self, first, rows, tokens)
        return steps

    def bind_head(self, hidden: Floats, draft: bool) -> _Head:
        """Bind the head, or the draft head, to hidden states [1, n, hidden size]."""
        head = self.graphs.head_of(draft)
        logits = np.zeros(
            (*hidden.shape[:2], int(self.graphs.graph_of(head).outputs[0].shape[2])), np.float32
        )
        return _Head(self.graphs.bind(head, {"hidden": hidden, "logits": logits}), hidden, logits[0])

    def run_head(self, head: _Head, draft: bool) -> None:
        """Run a bound head; raises BadBundle if it cannot be run."""
        try:
            head.run()
        except Exception as problem:  # ORT's error types share no base of their own
            raise self.graphs.broken(self.graphs.head_of(draft), problem) from problem

    def _grow(self, slots: int, places: int) -> None:
        """Replace the arrays by larger ones; without memory for all of these, nothing changes.

        Pages are written block by block (see _zeros), so that two whole caches are never in physical memory.
        """
        tables = self.tables
        if places > self.places:
            tables = rotation_tables(self.graphs.decoder.rotations, places)
        larger = {name: _zeros((slots, heads, places, size)) for name, (heads, size) in self._shapes.items()}
        held = [(slot, max(self.filled[slot])) for slot in list(self._held) if slot < self.slots]
        self.version += 1  # before an array is freed to which graphs are bound
        self.tables = tables
        for name, array in larger.items():
            for slot, tokens in held:
                array[slot, :, :tokens] = self.arrays[name][slot, :, :tokens]
            self.arrays[name] = array
        self.slots, self.places = slots, places
        if held:
            free_unused_memory()  # otherwise the C library keeps the memory of the smaller arrays


def _zeros(shape: tuple[int, ...]) -> Floats:
    """A float32 array of zeros. Pages of a large one are in physical memory once they are written.

    Those of numpy may be written at once, and stay with the process when the array is freed. A private
    mapping does neither. Raises OutOfMemory.
    """
    size = 4 * math.prod(shape)
    flags = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)  # none on Windows
    try:
        if size < MAPPED_BYTES or not flags:
            return np.zeros(shape, np.float32)
        return np.frombuffer(mmap.mmap(-1, size, flags=flags), np.float32).reshape(shape)
    except (MemoryError, OSError) as problem:
        raise OutOfMemory(f"no {size} bytes of memory: generate fewer or shorter texts at once") from problem


class _Stem:
    """The stem, bound to ids and positions [1, n] and to hidden states; hidden [n, hidden size]."""

    def __init__(self, graphs: DecoderGraphs, hidden: Floats) -> None:
        self._graphs, count = graphs, hidden.shape[1]
        self._ids, self.positions = np.zeros((1, count), np.int64), np.zeros((1, count), np.int64)
        self.hidden: Floats = hidden[0]
        arrays: dict[str, Array] = {"input_ids": self._ids, "position_ids": self.positions, "hidden": hidden}
        self._run = graphs.bind(graphs.manifest.stem, arrays)

    def run(self, ids: Sequence[int]) -> None:
        """Write the hidden states of ids at the positions that were written before."""
        self._ids[0] = ids
        try:
            self._run()
        except Exception as problem:  # ORT's error types share no base of their own
            raise self._graphs.broken(self._graphs.manifest.stem, problem) from problem


class BoundSteps:
    """Memory for steps on some tokens of each of consecutive slots, bound to the graphs at the first use.

    hidden: by segment, what it reads [slots * tokens, hidden size], then what the last one writes. previous
    [slots * tokens, hidden size]: what a draft block reads beside it, see PREVIOUS_HIDDEN. last: the
    position of each slot's last token, total: the largest of them and 1, which the caller writes before a
    step. start: position of the first token, where there is one slot.
    """

    def __init__(self, slots: CacheSlots, first: int, rows: int, tokens: int) -> None:
        size = slots.graphs.manifest.hidden_size
        self._slots, self._rows, self._tokens = slots, slice(first, first + rows), tokens
        shape = (rows, tokens, size)
        self._between = [_zeros(shape) for _ in range(len(slots.segments) + 1)]
        self.hidden: list[Floats] = [array.reshape(-1, size) for array in self._between]
        self._previous = _zeros(shape)
        self.previous: Floats = self._previous.reshape(-1, size)
        self.last, self.total = np.zeros(rows, np.int32), np.zeros((), np.int32)
        self.start = self.end = -1
        self._signals: dict[int, dict[str, Floats]] = {}
        self._stem: _Stem | None = None
        self._steps: list[_Step | None] = [None] * len(slots.segments)
        self._version = slots.version
        self._fills: dict[int, tuple[Run, Floats, dict[str, Array]]] = {}
        self._fill_positions = np.zeros((1, tokens), np.int64)
        self._heads: dict[tuple[int, bool], _Head] = {}
        self._output: SegmentOutput | None = None  # of the last step
        self._output_segment = -1

    def set_start(self, start: int) -> None:
        """Set the position of the first token of the one slot."""
        if start != self.start:
            self.start, self.end = start, start + self._tokens
            self.last[0] = self.end - 1
            self.total[...] = self.end

    def embed(self, ids: Sequence[int], start: int) -> Floats:
        """Run the stem on the tokens of the one slot; returns hidden [tokens, hidden size]."""
        if self._stem is None:
            self._stem = _Stem(self._slots.graphs, self._between[0])
        self._stem.positions[0] = range(start, start + self._tokens)
        self._stem.run(ids)
        return self.hidden[0]

    def run(self, segment: int) -> SegmentOutput:
        """Run a segment on the hidden states in `hidden`, which adds keys and values to the caches."""
        if self._version != self._slots.version:
            self._forget_bindings()
        step = self._steps[segment]
        if step is None:
            step = self._steps[segment] = self._bind(segment)
        try:
            step.run()
        except Exception as problem:  # ORT's error types share no base of their own
            raise self._slots.graphs.broken(self._slots.segments[segment], problem) from problem
        self._output, self._output_segment = step.output, segment
        return step.output

    def fill(self, segment: int, start: int, hidden: Floats) -> None:
        """Write keys and values that are computed from hidden states into the cache of the one slot."""
        if self._version != self._slots.version:
            self._forget_bindings()
        facts = self._slots.graphs.fill_graphs[self._slots.segments[segment].blocks]
        if segment not in self._fills:
            self._fills[segment] = self._bind_fill(facts)
        run, read, written = self._fills[segment]
        read[0] = hidden
        self._fill_positions[0] = range(start, start + self._tokens)
        try:
            run()
        except Exception as problem:  # see run()
            raise self._slots.graphs.broken(facts, problem) from problem
        for name, new in written.items():
            cache = self._slots.arrays[name.replace("new", "past", 1)]
            cache[self._rows, :, start : start + self._tokens] = new

    def logits(self, hidden: Floats, draft: bool) -> Floats:
        """Run the head; it reads the output of the last step in place. See CacheSlots.logits."""
        if self._output is None or hidden is not self._output.exit_hidden:
            return self._slots.logits(hidden, draft)
        key = (self._output_segment, draft)
        head = self._heads.get(key)
        if head is None:
            head = self._heads[key] = self._slots.bind_head(hidden[None], draft)
        self._slots.run_head(head, draft)
        return head.logits

    def _bind(self, segment: int) -> _Step:
        slots, before, after = self._slots, self._between[segment], self._between[segment + 1]
        facts = slots.segments[segment]
        signals = self._signals.setdefault(segment, {})  # the same arrays when it is bound again
        for tensor in slots.graphs.graph_of(facts).outputs:
            if tensor.name in (EXIT_HIDDEN, GATE, CONTROLLER) and tensor.name not in signals:
                sizes = [size for size in tensor.shape[2:] if isinstance(size, int)]
                signals[tensor.name] = np.zeros((*after.shape[:2], *sizes), np.float32)
        arrays: dict[str, Array] = {
            **self._slots.tables,
            **signals,
            "hidden": before,
            f"{NEXT}hidden": after,
            PREVIOUS_HIDDEN: self._previous,
            LAST_POSITIONS.name: self.last,
            TOTAL_LENGTH.name: self.total,
        }
        for past, new in zip(PAST, NEW, strict=True):
            for block in facts.blocks:
                cache = slots.arrays[f"{past}{block}"][self._rows]
                arrays[f"{past}{block}"] = arrays[f"{new}{block}"] = cache
        hidden = self.hidden[segment + 1]
        by_token = {name: signal.reshape(len(hidden), *signal.shape[2:]) for name, signal in signals.items()}
        output = SegmentOutput(
            hidden, by_token.get(EXIT_HIDDEN, hidden), by_token.get(GATE), by_token.get(CONTROLLER)
        )
        return _Step(slots.graphs.bind(facts, arrays), output)

    def _bind_fill(self, facts: Segment) -> tuple[Run, Floats, dict[str, Array]]:
        hidden = np.zeros_like(self._between[0])
        written: dict[str, Array] = {
            tensor.name: np.zeros(sequence_shape(tensor, self._tokens, 0), np.float32)
            for tensor in self._slots.graphs.graph_of(facts).outputs
        }
        arrays = {**self._slots.tables, **written, "hidden": hidden, "position_ids": self._fill_positions}
        return self._slots.graphs.bind(facts, arrays), hidden, written

    def _forget_bindings(self) -> None:
        """Forget graphs that are bound to arrays in whose place there are others."""
        self._steps = [None] * len(self._steps)
        self._fills.clear()
        self._version = self._slots.version


class SlotRunner:
    """The cache of one sequence, in one slot, and the steps that read and extend it; see CacheRunner."""

    def __init__(self, slots: CacheSlots) -> None:
        manifest = slots.graphs.manifest
        self.slots, self.slot = slots, slots.acquire()
        self.longest, self.hidden_size = slots.graphs.longest, manifest.hidden_size
        self.blocks = [len(segment.blocks) for segment in manifest.segments]
        self._filled = slots.filled[self.slot]
        self._current: BoundSteps | None = None  # of the last run
        # A sequence that nobody drops gives its slot back when it is freed.
        self._release = weakref.finalize(self, slots.release, self.slot)
        self._release.atexit = False

    @property
    def places(self) -> int:
        """Tokens for which there is room, and one more."""
        return self.slots.places

    def release(self) -> None:
        """Give the slot back; the runner cannot be used afterwards. A second call does nothing."""
        self._release()
        self.slots.trim()

    def make_room(self, tokens: int) -> None:
        """Enlarge the cache to hold this many tokens; see CacheRunner.make_room."""
        self.slots.make_room(tokens)

    def reserve(self, tokens: int) -> None:
        """Enlarge the cache at once for tokens that may follow; see CacheRunner.reserve."""
        self.slots.reserve(tokens)

    def embed(self, ids: Sequence[int], start: int) -> Floats:
        """Run the stem on tokens and return their hidden states; see CacheRunner.embed."""
        return self.slots.steps_of(self.slot, 1, len(ids)).embed(ids, start)

    def run(self, segment: int, ids: Sequence[int], start: int, hidden: Floats | None) -> SegmentOutput:
        """Run a segment on tokens and add their keys and values to the cache; see CacheRunner.run."""
        steps = self._current = self.slots.steps_of(self.slot, 1, len(ids))
        steps.set_start(start)
        if segment == 0:
            steps.embed(ids, start)
        if hidden is not None:
            read = steps.hidden[segment] if segment else steps.previous
            read[:] = hidden
        return self.run_next(segment)

    def run_next(self, segment: int) -> SegmentOutput:
        """Run a segment on the tokens of the previous step; see CacheRunner.run_next."""
        steps = self._current
        assert steps is not None
        output = steps.run(segment)
        self._filled[segment] = steps.end
        if segment == len(self.blocks) - 1 and len(output.hidden) > KEPT_TOKENS:
            self._current = None  # of a prompt, which is run once: its hidden states are large
        return output

    def fill(self, segment: int, ids: Sequence[int], start: int, hidden: Floats) -> None:
        """Fill the cache of a segment that is not run from hidden states; see CacheRunner.fill."""
        self.slots.steps_of(self.slot, 1, len(ids)).fill(segment, start, hidden)
        self._filled[segment] = start + len(ids)

    def logits(self, hidden: Floats, draft: bool = False) -> Floats:
        """Run the head, or the draft head, on hidden states; see CacheRunner.logits."""
        if self._current is None:
            return self.slots.logits(hidden, draft)
        return self._current.logits(hidden, draft)

    def draft_runner(self) -> CacheRunner | None:
        """A runner of the draft block; see CacheRunner.draft_runner."""
        return self.slots.graphs.draft_runner()
