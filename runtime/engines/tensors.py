"""What engines read from a manifest: its tensors, and which stem belongs to a variant."""

from __future__ import annotations

from offramp.runtime.bundle.manifest import NEXT, Manifest, Tensor, Variant
from offramp.runtime.errors import BadBundle


def stem_of(manifest: Manifest, variant: str) -> Variant:
    """The stem's graph in a variant, or in the default variant where it has no other."""
    return manifest.stem.variants.get(variant) or manifest.stem.variants[manifest.variants[0]]


def tensors_of(manifest: Manifest) -> dict[str, Tensor]:
    """The stem's inputs and outputs and every segment's signals, by name."""
    graphs = [segment.first_graph for segment in (manifest.stem, *manifest.segments)]
    tensors = [*graphs[0].inputs, *(tensor for graph in graphs for tensor in graph.outputs)]
    return {tensor.name: tensor for tensor in tensors if not tensor.name.startswith(NEXT)}


def updated_tensors(manifest: Manifest) -> frozenset[str]:
    """Tensors that every segment reads and replaces (hidden, evidence); BadBundle where segments differ."""
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
