"""Engines: what opens a segment's file, runs it, and says where it really runs. One file each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.errors import BadSetting
from offramp.runtime.rules import Signals

Array = NDArray[Any]
Rows = NDArray[np.int64]

# name: module with open(bundle, *, device, variant, threads, global_pool, share, provider, cuda_graphs) ->
# Engine, imported when asked for
ENGINES = {"ort": "offramp.runtime.engines.ort", "trt": "offramp.runtime.engines.trt"}
DEVICES = ("cpu", "cuda")
HOME = {"ort": "cpu", "trt": "cuda"}  # the device of an engine for which none is named
PROVIDERS = ("cuda", "tensorrt")  # of ONNX Runtime on a GPU


class State(Protocol):
    """Rows between two segments; the walker reads these two and hands the rest back to the engine unseen."""

    @property
    def rows(self) -> int:
        """Rows in it."""
        ...

    @property
    def length(self) -> int:
        """Tokens a row, padding included."""
        ...


class Engine(Protocol):
    """Runs stem and segments. name, device and facts say what REALLY runs, e.g. "ort", "cpu"."""

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def facts(self) -> Mapping[str, str]:
        """For people: version, threads, which thread pool was to be had."""
        ...

    def prepare(self, variant: int, segments: Sequence[int]) -> None:
        """Open the stem and these segments (0-based) in one variant, those that are not open yet.

        What is not prepared is opened when a row first gets there.
        """
        ...

    def begin(self, inputs: Mapping[str, Array]) -> State:
        """Run the stem on input_ids, attention_mask (and token_type_ids), int64 [batch, seq], or on
        pixel_values float32 [batch, 3, height, width].
        """
        ...

    def step(self, segment: int, variant: int, state: Any) -> Signals:
        """Run one segment (0-based) in the manifest's variant of that number; the state advances in place.

        The signals are the state's own memory: they hold until the state is dropped or runs that segment
        again. Asked to run the last segment, the state is used up: it can only be dropped.
        """
        ...

    def take(self, state: Any, rows: Rows) -> State:
        """A new state of those rows alone (compaction); the old one stays as it is."""
        ...

    def join(self, states: Sequence[Any]) -> State:
        """One new state of all rows in order, lengths equal; the old ones stay as they are."""
        ...

    def drop(self, state: Any) -> None:
        """Nobody will use this state again: its buffers may be."""
        ...

    def close(self) -> None:
        """Give everything back; the engine cannot be used after it."""
        ...


def open_engine(
    name: str,
    bundle: Bundle,
    *,
    device: str | None = None,
    variant: str | None = None,
    threads: int | None = None,
    global_pool: bool = True,
    lazy: bool = False,
    share: bool = True,
    provider: str | None = None,
    cuda_graphs: bool = False,
) -> Engine:
    """Open an engine by name with the stem and one variant of every segment (others when first stepped).

    device: None is cpu for ort, cuda for trt. lazy: the stem alone is opened now, a segment when a row first
    gets there. share: the weights, with other engines of this process on the same bundle. global_pool: see
    offramp.runtime.engines.threads. provider: what ONNX Runtime uses on a GPU, "cuda" or "tensorrt".
    cuda_graphs: launch a step as one CUDA graph.
    Raises EngineUnavailable where engine or device is not there (never
    another in its place), BadSetting for names that do not exist, BadBundle where a file is not what the
    manifest says.
    """
    if name not in ENGINES:
        raise BadSetting(f"engine {name!r} is not known; choose one of: {', '.join(ENGINES)}")
    if provider is not None and provider not in PROVIDERS:
        raise BadSetting(f"provider {provider!r} is not known; choose one of: {', '.join(PROVIDERS)}")
    if device is None:
        device = "cuda" if provider is not None or cuda_graphs else HOME[name]
    if device not in DEVICES:
        raise BadSetting(f"device {device!r} is not known; choose one of: {', '.join(DEVICES)}")
    known = bundle.manifest.variants
    variant = known[0] if variant is None else variant
    if variant not in known:
        raise BadSetting(f"variant {variant!r} is not in {bundle.folder}; it offers: {', '.join(known)}")
    if threads is not None and threads < 1:
        raise BadSetting(f"threads {threads}: expected 1 or more")
    if device != "cuda" and (provider is not None or cuda_graphs):
        wish = f"provider {provider}" if provider is not None else "cuda_graphs"
        raise BadSetting(f"{wish} is for device cuda, not {device}: leave one of them out")
    engine: Engine = import_module(ENGINES[name]).open(
        bundle,
        device=device,
        variant=variant,
        threads=threads,
        global_pool=global_pool,
        share=share,
        provider=provider,
        cuda_graphs=cuda_graphs,
    )
    try:
        engine.prepare(known.index(variant), range(0 if lazy else len(bundle.manifest.segments)))
    except BaseException:
        engine.close()
        raise
    return engine
