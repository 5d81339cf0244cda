"""The part of a decoder's engine that steps on its caches use."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Protocol

from offramp.runtime.bundle.manifest import DecoderFacts, Manifest, Segment, Variant
from offramp.runtime.engines.base import Array
from offramp.runtime.engines.buffers import Run
from offramp.runtime.errors import BadBundle
from offramp.runtime.sequence import CacheRunner


class DecoderGraphs(Protocol):
    """The part of an engine that steps use: it opens the graphs of one bundle in one variant."""

    @property
    def ort(self) -> ModuleType:
        """The module onnxruntime."""
        ...

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        ...

    @property
    def decoder(self) -> DecoderFacts:
        """The part of the manifest that only decoders have."""
        ...

    @property
    def longest(self) -> int:
        """Most tokens of prompt and answer together."""
        ...

    @property
    def fill_graphs(self) -> Mapping[tuple[int, ...], Segment]:
        """Cache fills by their blocks."""
        ...

    def graph_of(self, segment: Segment) -> Variant:
        """A segment's graph in the variant that runs."""
        ...

    def head_of(self, draft: bool) -> Segment:
        """The head, or the draft head if there is one."""
        ...

    def bind(self, segment: Segment, arrays: Mapping[str, Array]) -> Run:
        """Bind a segment's graph to arrays by name, which the caller keeps alive."""
        ...

    def broken(self, segment: Segment, problem: Exception) -> BadBundle:
        """The error for a graph that cannot be run."""
        ...

    def draft_runner(self) -> CacheRunner | None:
        """A runner of the draft block for one sequence; see CacheRunner.draft_runner."""
        ...
