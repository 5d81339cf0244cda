"""Engine ort for classifiers on a CPU: sessions on one thread pool, states in two pre-bound sets of buffers.

Names, dtypes and shapes come from the manifest, and graphs are compared with them when they are opened. The
tensors of rows are in buffers for their (rows, length) that are bound once and used again: a step neither
copies nor allocates.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import Tensor, Variant
from offramp.runtime.engines.base import Array, Engine, EngineOptions, Rows
from offramp.runtime.engines.buffers import Bound, BufferPool, Buffers
from offramp.runtime.engines.graphs import (
    BundleGraphs,
    OpenGraph,
    cannot_run,
    forget_threads,
    import_onnxruntime,
)
from offramp.runtime.engines.tensors import stem_graph, updated_tensors, walk_tensors
from offramp.runtime.engines.threads import Pool, claim_pool
from offramp.runtime.pipeline import BackgroundTask, prefetch
from offramp.runtime.rules.base import RowSignals

Step = tuple[int, int]  # segment, variant; the stem's segment is -1 and its variant 0
_STEM: Step = (-1, 0)


class OrtState:
    """The state of rows between two segments; side: which of each pair of buffers has the current values."""

    __slots__ = ("buffers", "length", "rows", "side")

    def __init__(self, buffers: Buffers, side: int) -> None:
        self.buffers = buffers
        self.rows, self.length = buffers.rows, buffers.length
        self.side = side


class OrtEngine:
    """Runs a classifier's segments with ONNX Runtime on a CPU; see engines.base.Engine.

    Not thread-safe: the session that uses it holds a lock.
    """

    name, device = "ort", "cpu"
    max_rows = 1 << 20  # no limit but memory

    def __init__(
        self,
        ort: ModuleType,
        bundle: Bundle,
        variant: str,
        pool: Pool,
        early: Mapping[str, BackgroundTask[str, bytes]],
        share: bool,
    ) -> None:
        self._ort, self._bundle, self._pool = ort, bundle, pool
        manifest = bundle.manifest
        self._variants = manifest.variants
        self._stem_facts = stem_graph(manifest, variant)
        # Rows of images have as many tokens as the stem's output, rows of text as many as its input.
        (hidden,) = (tensor for tensor in self._stem_facts.outputs if tensor.name == "hidden")
        self._length = hidden.shape[1] if isinstance(hidden.shape[1], int) else 0
        self._stem: Any = None
        self._graphs = BundleGraphs(ort, bundle, "cpu", pool, early, share)
        self._open: dict[Step, list[OpenGraph]] = {}  # those that run one after another in a step
        forms = walk_tensors(manifest), updated_tensors(manifest), _names(self._stem_facts.inputs)
        self._buffer_pool = BufferPool(lambda rows, length: Buffers(ort, *forms, rows, length))

    @property
    def facts(self) -> dict[str, str]:
        """Version of onnxruntime, number of threads, and the thread pool that is really used."""
        threads = str(self._pool.threads) if self._pool.threads else "the application's"
        return {"onnxruntime": self._ort.__version__, "threads": threads, "pool": self._pool.kind}

    def prepare(self, variant: int, segments: Sequence[int]) -> None:
        """Open the stem and these segments (0-based) in one variant; see Engine.prepare."""
        steps = [step for step in (_STEM, *((s, variant) for s in segments)) if step not in self._open]
        graphs = {step: self._facts(step).graphs for step in steps}
        each = dict.fromkeys(graph for step in steps for graph in graphs[step])  # several steps may run one
        # While ONNX Runtime opens one file, a thread reads and hashes the next; bytes are freed as soon as
        # the graph is open, so that at most two files are in memory.
        files = prefetch(each, self._graphs.read)
        opened = {graph: self._graphs.open(*next(files)) for graph in each}
        for step in steps:
            self._open[step] = [opened[graph] for graph in graphs[step]]
        (stem,) = self._open[_STEM]
        self._stem = stem.session

    def begin(self, inputs: Mapping[str, Array]) -> OrtState:
        """Run the stem on new rows and return their state; see Engine.begin."""
        rows = len(inputs[self._stem_facts.inputs[0].name])
        length = self._length or inputs[self._stem_facts.inputs[0].name].shape[1]
        buffers = self._buffer_pool.get(rows, length)
        for name, array in buffers.inputs.items():
            array[...] = inputs[name]
        run = buffers.stem
        if run is None:
            if self._stem is None:  # after a fork
                self.prepare(0, ())
            run = buffers.stem = buffers.bind_stem(self._stem, self._stem_facts)
        try:
            run()
        except Exception as problem:  # ORT's error types share no base of their own
            raise cannot_run(self._bundle.folder, "stem", self._stem_facts, problem) from problem
        return OrtState(buffers, 0)

    def step(self, segment: int, variant: int, state: OrtState) -> RowSignals:
        """Run one segment on a state and return its signals; see Engine.step."""
        key = (segment, variant, state.side)
        bound = state.buffers.bound.get(key)
        if bound is None:
            bound = self._bind(key, state.buffers)
        run, signals = bound
        try:
            run()
        except Exception as problem:  # see begin()
            facts = self._facts((segment, variant))
            name = self._bundle.manifest.segments[segment].name
            raise cannot_run(self._bundle.folder, name, facts, problem) from problem
        state.side = 1 - state.side
        return signals

    def skip(self, segment: int, state: OrtState) -> None:
        """Move past a segment: the next step reads the same hidden state; see Engine.skip."""

    def take(self, state: OrtState, rows: Rows) -> OrtState:
        """Copy some rows of a state into a new state; see Engine.take."""
        buffers = self._buffer_pool.get(len(rows), state.length)
        buffers.gather([(state.buffers, state.side, rows)])
        return OrtState(buffers, 0)

    def join(self, states: Sequence[OrtState]) -> OrtState:
        """Copy the rows of several states into one new state; see Engine.join."""
        buffers = self._buffer_pool.get(sum(state.rows for state in states), states[0].length)
        buffers.gather([(state.buffers, state.side, None) for state in states])
        return OrtState(buffers, 0)

    def drop(self, state: OrtState) -> None:
        """Return a state's buffers to the pool of idle buffers; see Engine.drop."""
        self._buffer_pool.put(state.buffers)

    def close(self) -> None:
        """Free buffers, and graphs that no other engine uses; the process's thread pool stays."""
        self._buffer_pool.clear()
        self._open.clear()
        self._stem = None

    def after_fork(self) -> None:
        """Forget graphs that have threads, and what is bound to them; see Engine.after_fork."""
        self._pool.check_forked()
        if self._pool.has_workers:
            forget_threads()
            self.close()

    def _bind(self, key: tuple[int, int, int], buffers: Buffers) -> Bound:
        segment, variant, side = key
        step = (segment, variant)
        if step not in self._open:
            self.prepare(variant, [segment])
        sessions = [graph.session for graph in self._open[step]]
        bound = buffers.bound[key] = buffers.bind(sessions, self._facts(step), side)
        return bound

    def _facts(self, step: Step) -> Variant:
        if step == _STEM:
            return self._stem_facts
        segment, variant = step
        return self._bundle.manifest.segments[segment].variants[self._variants[variant]]


def open_engine(bundle: Bundle, variant: str, options: EngineOptions) -> Engine[Any]:
    """Create engine ort for a bundle and a device; no file is opened yet.

    Raises EngineUnavailable if onnxruntime or the device is missing.
    """
    if bundle.manifest.decoder is not None:
        from offramp.runtime.engines.ort_decoder import (
            OrtDecoderEngine,  # here: a classifier does not need it
        )

        ort = import_onnxruntime("cpu")
        pool = claim_pool(ort, options.threads, options.global_pool)
        return OrtDecoderEngine(ort, bundle, variant, pool, options)
    if options.real_device == "cuda":
        from offramp.runtime.engines.ort_cuda import open_cuda  # here: the CPU does not need it

        return open_cuda(bundle, variant, options)
    early: dict[str, BackgroundTask[str, bytes]] = {}
    if "onnxruntime" not in sys.modules:
        # Its import takes about as long as reading the stem, whose embeddings make it the largest file.
        file = stem_graph(bundle.manifest, variant).file
        early[file] = BackgroundTask(bundle.read, file)
    ort = import_onnxruntime("cpu")
    return OrtEngine(
        ort, bundle, variant, claim_pool(ort, options.threads, options.global_pool), early, options.share
    )


def _names(tensors: Sequence[Tensor]) -> frozenset[str]:
    return frozenset(tensor.name for tensor in tensors)
