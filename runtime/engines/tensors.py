"""Tensors of a walk: those of a manifest, the stem that belongs to a variant, and arrays of signals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from offramp.runtime.bundle.manifest import NEXT, Manifest, Tensor, Variant
from offramp.runtime.errors import BadBundle
from offramp.runtime.rules.base import Floats, RowSignals

SPARE = 2  # the third place of a tensor that several graphs of one segment update; 0 and 1 are the sides
Sides = Mapping[str, int]  # by the tensor's name


def stem_graph(manifest: Manifest, variant: str) -> Variant:
    """The stem's graph in a variant, or in the default variant if it has no other."""
    return manifest.stem.variants.get(variant) or manifest.stem.variants[manifest.variants[0]]


def walk_tensors(manifest: Manifest) -> dict[str, Tensor]:
    """All tensors of a walk by name: the stem's inputs and outputs, and the segments' signals."""
    graphs = [segment.first_graph for segment in (manifest.stem, *manifest.segments)]
    tensors = [*graphs[0].inputs, *(tensor for graph in graphs for tensor in graph.outputs)]
    return {tensor.name: tensor for tensor in tensors if not tensor.name.startswith(NEXT)}


def updated_tensors(manifest: Manifest) -> frozenset[str]:
    """Names of the tensors that every segment reads and replaces, such as hidden and evidence.

    Raises BadBundle if segments differ in them.
    """
    updated: frozenset[str] | None = None
    for segment in manifest.segments[:-1]:
        names = frozenset(segment.first_graph.updates)
        if updated is not None and names != updated:
            raise BadBundle(
                f"manifest: {segment.name} replaces {sorted(names)}, the segments before it {sorted(updated)}"
            )
        updated = names
    return updated or frozenset({"hidden"})


def updated_twice(manifest: Manifest) -> frozenset[str]:
    """Names of the tensors that several graphs of one segment replace, which therefore need SPARE."""
    counts = [Counter(graph.updates) for segment in manifest.segments for graph in segment.variants.values()]
    return frozenset(name for count in counts for name in count if count[name] > 1)


def sides_of(facts: Variant, side: int) -> Iterator[tuple[Variant, Sides, Sides]]:
    """The graphs of a segment, each with the sides on which it reads and writes the tensors that it updates.

    The segment begins on `side` and ends on the other one, however many of its graphs update a tensor: the
    last update writes the other side, and those before it write SPARE and the other side in turn.
    """
    left = Counter(facts.updates)
    newest = dict.fromkeys(left, side)
    for graph in facts.graphs:
        reads = {tensor.name: newest.get(tensor.name, side) for tensor in graph.inputs}
        for name in graph.updates:
            left[name] -= 1
            newest[name] = SPARE if left[name] % 2 else 1 - side
        yield graph, reads, dict(newest)


def row_signals(arrays: Mapping[str, Floats], rows: int) -> RowSignals:
    """The signals of a segment from its outputs by name; logits of no class if it has none."""
    return RowSignals(**{"logits": np.empty((rows, 0), np.float32), **arrays})
