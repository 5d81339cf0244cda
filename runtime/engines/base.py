"""The protocol of an engine, which opens a segment's graph, runs it, and reports where it really runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.errors import BadSetting
from offramp.runtime.rules.base import Signals

Array = NDArray[np.generic]  # of any dtype; the manifest names it
Rows = NDArray[np.int64]

# name: module with open_engine(bundle, variant, options) -> Engine, imported when the engine is opened
ENGINES = {"ort": "offramp.runtime.engines.ort", "trt": "offramp.runtime.engines.trt"}
DEVICES = ("cpu", "cuda")
DEFAULT_DEVICE = {"ort": "cpu", "trt": "cuda"}
MAX_THREADS = 1024
PROVIDERS = ("cuda", "tensorrt")  # of ONNX Runtime on a GPU


@dataclass(frozen=True)
class EngineOptions:
    """Options of the engine that a caller can choose; see offramp.runtime.load.

    device: None is cpu for ort, cuda for trt. lazy: open a segment when a row first reaches it. share: share
    weights with engines of this process on the same bundle. global_pool: see engines.threads. provider: what
    ONNX Runtime uses on a GPU. cuda_graphs: launch a step as one CUDA graph from the second run of a shape
    on. exit_kv: for decoders, what the cache holds of a token after its exit (rules.resolve.EXIT_KV). Raises
    BadSetting for unknown names, for numbers out of range and for options that contradict each other.
    """

    engine: str = "ort"
    device: str | None = None
    provider: str | None = None
    threads: int | None = None
    global_pool: bool = False
    lazy: bool = False
    share: bool = True
    cuda_graphs: bool = False
    exit_kv: str = "deferred"

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise BadSetting(f"engine {self.engine!r} is not known; choose one of: {', '.join(ENGINES)}")
        if self.provider is not None and self.provider not in PROVIDERS:
            raise BadSetting(
                f"provider {self.provider!r} is not known; choose one of: {', '.join(PROVIDERS)}"
            )
        if self.device is not None and self.device not in DEVICES:
            raise BadSetting(f"device {self.device!r} is not known; choose one of: {', '.join(DEVICES)}")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise BadSetting(f"threads {self.threads}: expected 1 to {MAX_THREADS}")
        if self.real_device != "cuda" and (self.provider is not None or self.cuda_graphs):
            option = f"provider {self.provider}" if self.provider is not None else "cuda_graphs"
            raise BadSetting(f"{option} is for device cuda, not {self.device}: leave one of them out")

    @property
    def real_device(self) -> str:
        """The device that these options select: "cpu" or "cuda"."""
        if self.device is not None:
            return self.device
        return "cuda" if self.provider is not None or self.cuda_graphs else DEFAULT_DEVICE[self.engine]


class State(Protocol):
    """The state of rows, or of the tokens of one sequence, between two segments of a walk.

    The walker reads the two properties and passes the state back to the engine.
    """

    @property
    def rows(self) -> int:
        """Number of rows; for a sequence, number of newest tokens whose signals are needed."""
        ...

    @property
    def length(self) -> int:
        """Number of tokens of each row, padding included; 0 for groups of sequences of any length."""
        ...


S = TypeVar("S", bound=State)


class Engine(Protocol[S]):
    """Opens and runs the stem and the segments of a bundle on one device."""

    @property
    def name(self) -> str:
        """Name of the engine that really runs, such as "ort"."""
        ...

    @property
    def device(self) -> str:
        """Device on which it really runs: "cpu" or "cuda"."""
        ...

    @property
    def facts(self) -> Mapping[str, str]:
        """Further facts as text by name, for users: version, number of threads, thread pool."""
        ...

    @property
    def max_rows(self) -> int:
        """Most rows that one state can have."""
        ...

    def prepare(self, variant: int, segments: Sequence[int]) -> None:
        """Open the stem and these segments (0-based) in one variant, if they are not open yet.

        Other segments are opened when a row first reaches them.
        """
        ...

    def begin(self, inputs: Mapping[str, Array]) -> S:
        """Run the stem on inputs, and return the state of the new rows.

        inputs: input_ids, attention_mask (and token_type_ids, word_starts), int64 [batch, seq], or
        pixel_values float32 [batch, 3, height, width]; for a decoder, input_ids [1, seq] of a prompt, whose
        sequence is the state.
        """
        ...

    def step(self, segment: int, variant: int, state: S) -> Signals:
        """Run one segment (0-based) in a variant (number in Manifest.variants) and return its signals.

        The state advances in place. Only the walker calls this. The signals are memory of the state: they are
        valid until the state is dropped or runs that segment again. After the last segment a state of rows
        can only be dropped; a sequence accepts more tokens.
        """
        ...

    def skip(self, segment: int, state: S) -> None:
        """Move the state past a segment without running it: hidden states stay as they are."""
        ...

    def take(self, state: S, rows: Rows) -> S:
        """Copy some rows of a state into a new state (compaction); the old state stays as it is."""
        ...

    def join(self, states: Sequence[S]) -> S:
        """Copy all rows of several states of equal length, in order, into a new state; the old ones stay."""
        ...

    def drop(self, state: S) -> None:
        """Free a state, whose buffers may be used again."""
        ...

    def close(self) -> None:
        """Free everything; the engine cannot be used afterwards."""
        ...

    def after_fork(self) -> None:
        """In a process that was forked, forget what has threads of the parent; steps open it again.

        States from before the fork are lost. Raises SessionForked if the engine cannot go on in the child.
        """
        ...


class EngineModule(Protocol):
    """The protocol of a module that implements an engine; see ENGINES."""

    def open_engine(self, bundle: Bundle, variant: str, options: EngineOptions) -> Engine[State]:
        """Create the engine; no segment is opened yet."""
        ...


def open_engine(bundle: Bundle, variant: str, options: EngineOptions) -> Engine[State]:
    """Open the engine that the options name, with the stem and, unless lazy, every segment in one variant.

    Raises EngineUnavailable if engine or device is missing (another is never used instead), BadSetting for a
    variant that the bundle lacks, BadBundle if a file differs from the manifest.
    """
    variants = bundle.manifest.variants
    if variant not in variants:
        raise BadSetting(f"variant {variant!r} is not in {bundle.folder}; it offers: {', '.join(variants)}")
    module = cast(EngineModule, import_module(ENGINES[options.engine]))
    engine = module.open_engine(bundle, variant, options)
    try:
        segments = range(0 if options.lazy else len(bundle.manifest.segments))
        engine.prepare(variants.index(variant), segments)
    except BaseException:
        engine.close()
        raise
    return engine
