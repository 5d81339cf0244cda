"""Tensors of a walk: those of a manifest, the stem that belongs to a variant, and arrays of signals."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from offramp.runtime.bundle.manifest import NEXT, Manifest, Tensor, Variant
from offramp.runtime.errors import BadBundle
from offramp.runtime.rules.base import Floats, RowSignals


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
        outputs = segment.first_graph.outputs
        names = frozenset(t.name.removeprefix(NEXT) for t in outputs if t.name.startswith(NEXT))
        if updated is not None and names != updated:
            raise BadBundle(
                f"manifest: {segment.name} replaces {sorted(names)}, the segments before it {sorted(updated)}"
            )
        updated = names
    return updated or frozenset({"hidden"})


def row_signals(arrays: Mapping[str, Floats], rows: int) -> RowSignals:
    """The signals of a segment from its outputs by name; logits of no class if it has none."""
    return RowSignals(**{"logits": np.empty((rows, 0), np.float32), **arrays})
