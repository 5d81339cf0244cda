"""What engines read off a manifest: its tensors, which are made anew, which stem goes with what."""

from __future__ import annotations

from offramp.runtime.bundle.manifest import NEXT, Manifest, Tensor, Variant
from offramp.runtime.errors import BadBundle


def stem_of(manifest: Manifest, variant: str) -> Variant:
    """The stem that goes with a variant: its own, or that of the default."""
    return manifest.stem.variants.get(variant) or manifest.stem.variants[manifest.variants[0]]


def tensors_of(manifest: Manifest) -> dict[str, Tensor]:
    """The stem's inputs and outputs and every segment's signals, by name."""
    stages = [next(iter(stage.variants.values())) for stage in (manifest.stem, *manifest.segments)]
    tensors = [*stages[0].inputs, *(tensor for stage in stages for tensor in stage.outputs)]
    return {tensor.name: tensor for tensor in tensors if not tensor.name.startswith(NEXT)}


def flows_of(manifest: Manifest) -> frozenset[str]:
    """Tensors that segments make anew: hidden, evidence. BadBundle where segments disagree on which."""
    flows: frozenset[str] | None = None
    for stage in manifest.segments[:-1]:
        facts = next(iter(stage.variants.values()))
        found = frozenset(t.name.removeprefix(NEXT) for t in facts.outputs if t.name.startswith(NEXT))
        if flows is not None and found != flows:
            raise BadBundle(
                f"manifest: {stage.name} makes {sorted(found)} anew, segments before it {sorted(flows)}"
            )
        flows = found
    return flows or frozenset({"hidden"})
