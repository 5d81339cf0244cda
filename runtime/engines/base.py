"""The protocol of an engine: what opens a segment's graph, runs it, and reports where it really runs."""

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

# name: module with open_engine(bundle, variant, options) -> Engine, imported when the engine is asked for
ENGINES = {"ort": "offramp.runtime.engines.ort", "trt": "offramp.runtime.engines.trt"}
DEVICES = ("cpu", "cuda")
DEFAULT_DEVICE = {"ort": "cpu", "trt": "cuda"}
PROVIDERS = ("cuda", "tensorrt")  # of ONNX Runtime on a GPU


@dataclass(frozen=True)
class EngineOptions:
    """What a caller may choose about the engine; see offramp.runtime.load.

    device: None is cpu for ort, cuda for trt. lazy: open a segment when a row first reaches it. share: share
    weights with engines of this process on the same bundle. global_pool: see engines.threads. provider: what
    ONNX Runtime uses on a GPU. cuda_graphs: launch a step as one CUDA graph once its shape was seen. exit_kv:
    of decoders, what the cache gets of a token behind its exit (rules.resolve.EXIT_KV). Raises BadSetting for
    unknown names, for numbers out of range and for options that contradict.
    """

    engine: str = "ort"
    device: str | None = None
    provider: str | None = None
    threads: int | None = None
    global_pool: bool = True
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
        if self.threads is not None and self.threads < 1:
            raise BadSetting(f"threads {self.threads}: expected 1 or more")
        if self.real_device != "cuda" and (self.provider is not None or self.cuda_graphs):
            option = f"provider {self.provider}" if self.provider is not None else "cuda_graphs"
            raise BadSetting(f"{option} is for device cuda, not {self.device}: leave one of them out")

    @property
    def real_device(self) -> str:
        """The device that these options come to."""
        if self.device is not None:
            return self.device
        return "cuda" if self.provider is not None or self.cuda_graphs else DEFAULT_DEVICE[self.engine]


class State(Protocol):
    """Rows, or the tokens of one sequence, between two segments.

    The walker reads these two and gives the rest back to the engine unread.
    """

    @property
    def rows(self) -> int:
        """Rows in it; of a sequence, the newest tokens, whose signals are needed."""
        ...

    @property
    def length(self) -> int:
        """Tokens of each row, padding included."""
        ...


S = TypeVar("S", bound=State)


class Engine(Protocol[S]):
    """Runs stem and segments; name, device and facts describe what really runs, such as "ort", "cpu"."""

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def facts(self) -> Mapping[str, str]:
        """For people: version, threads, which thread pool is used."""
        ...

    @property
    def max_rows(self) -> int:
        """Rows of one state at most."""
        ...

    def prepare(self, variant: int, segments: Sequence[int]) -> None:
        """Open the stem and these segments (0-based) in one variant, those that are not open yet.

        What is not prepared is opened when a row first reaches it.
        """
        ...

    def begin(self, inputs: Mapping[str, Array]) -> S:
        """Run the stem, and return the state of new rows.

        inputs: input_ids, attention_mask (and token_type_ids), int64 [batch, seq], or pixel_values float32
        [batch, 3, height, width]; of a decoder, input_ids [1, seq]: a prompt, whose sequence is the state.
        """
        ...

    def step(self, segment: int, variant: int, state: S) -> Signals:
        """Run one segment (0-based) in the manifest's variant of that number; the state advances in place.

        Only the walker calls this. The signals are the state's own memory: they are valid until the state is
        dropped or runs that segment again. After the last segment a state of rows can only be dropped; a
        sequence takes more tokens.
        """
        ...

    def skip(self, segment: int, state: S) -> None:
        """Move the state to the next segment without running this one: hidden states stay as they are."""
        ...

    def take(self, state: S, rows: Rows) -> S:
        """A new state of those rows alone (compaction); the old one stays as it is."""
        ...

    def join(self, states: Sequence[S]) -> S:
        """One new state of all rows in order, lengths equal; the old ones stay as they are."""
        ...

    def drop(self, state: S) -> None:
        """Free a state; its buffers may be used again."""
        ...

    def close(self) -> None:
        """Free everything; the engine cannot be used after it."""
        ...


class EngineModule(Protocol):
    """A module of ENGINES."""

    def open_engine(self, bundle: Bundle, variant: str, options: EngineOptions) -> Engine[State]:
        """The engine, with no segment opened yet."""
        ...


def open_engine(bundle: Bundle, variant: str, options: EngineOptions) -> Engine[State]:
    """Open the engine that the options name, with the stem and, unless lazy, every segment in one variant.

    Raises EngineUnavailable where engine or device is not there (another is never taken instead), BadSetting
    for a variant that the bundle lacks, BadBundle where a file is not what the manifest describes.
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
