"""What the manifest says of a split: stages, rule, operating points, where it comes from."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from offramp.export.split import Segment
from offramp.export.verify import file_name
from offramp.models.precision import bit_operations
from offramp.runtime.bundle.manifest import (
    FORMAT,
    ImageInput,
    Manifest,
    OperatingPoint,
    RuleSpec,
    Stage,
    StepCosts,
    TextInput,
    Variant,
)
from offramp.training.checkpoint import TOKENIZER, Checkpoint, TextFacts

TOKENS = 32  # the length that costs are stated for where training did not say its own
PACKAGES = ("offramp", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")


def describe(
    checkpoint: Checkpoint,
    segments: Sequence[Segment],
    variants: Sequence[str],
    facts: Mapping[str, Any] | None = None,
) -> Manifest:
    """The manifest, all but its files. facts: what else provenance should say of this export, JSON values."""
    network = checkpoint.network
    points = operating_points(checkpoint, segments, variants)
    return Manifest(
        format=FORMAT,
        task="text-classification" if network.family.vision is None else "image-classification",
        labels=network.spec.labels,
        input=_input(checkpoint.input),
        hidden_size=network.hidden_size,
        vocab_size=network.vocab_size,
        blocks=network.block_count,
        stem=stage_of(segments[0], variants[:1]),
        segments=tuple(stage_of(segment, variants) for segment in segments[1:]),
        rule=_rule(segments, points),
        points=points,
        files={},
        provenance=_provenance(checkpoint, facts or {}),
        costs=_costs(checkpoint, segments, variants),
    )


def _input(facts: TextFacts | ImageInput) -> TextInput | ImageInput:
    if isinstance(facts, ImageInput):
        return facts
    return TextInput(TOKENIZER, facts.prefix, facts.pad_id, facts.longest)


def operating_points(
    checkpoint: Checkpoint, segments: Sequence[Segment], variants: Sequence[str]
) -> tuple[OperatingPoint, ...]:
    """The checkpoint's operating points, those whose variant is there; none where exits were dropped.

    They were measured with every exit: an exit number or a threshold means something else when some are gone.
    Nor are those of a rule that chose between more variants than are written.
    """
    spec = checkpoint.network.spec
    if len(segments) - 1 != len(spec.exits) or set(spec.forecast) - set(variants):
        return ()
    name = _mapping(checkpoint.training.get("data")).get("name", "")
    return tuple(
        OperatingPoint(
            point["name"],
            RuleSpec(
                point["rule"]["name"], {key: float(v) for key, v in point["rule"]["parameters"].items()}
            ),
            point["variant"],
            point["data"] or name,
            point["split"],
            {key: float(value) for key, value in point["measured"].items()},
        )
        for point in checkpoint.training.get("operating_points", [])
        if point["variant"] in variants
    )


def _rule(segments: Sequence[Segment], points: Sequence[OperatingPoint]) -> RuleSpec:
    """What decides when the caller wishes nothing: the point "default", the learned gate, the first point."""
    for point in points:
        if point.name == "default":
            return point.rule
    if len(segments) == 2:
        return RuleSpec("never", {})  # one segment: there is nothing to decide
    if any(tensor.name == "gate" for tensor in segments[1].outputs):
        return RuleSpec("gate", {"threshold": 0.5})
    return points[0].rule if points else RuleSpec("max_probability", {"threshold": 0.9})


def stage_of(segment: Segment, variants: Sequence[str]) -> Stage:
    """A segment's place in a manifest, with a file for each of these variants."""
    graphs = {
        name: Variant(file_name(segment.name, name), segment.inputs, segment.outputs) for name in variants
    }
    return Stage(segment.name, segment.blocks, segment.macs, graphs)


def _costs(
    checkpoint: Checkpoint, segments: Sequence[Segment], variants: Sequence[str]
) -> dict[str, StepCosts]:
    """Bit operations of every step, for a network that chooses between variants by their cost."""
    if not checkpoint.network.spec.forecast:
        return {}
    tokens = int(checkpoint.training.get("dev", {}).get("tokens", TOKENS))
    steps = {v: tuple(bit_operations(part.macs, v, tokens) for part in segments[1:]) for v in variants}
    return {"bops": StepCosts(tokens, steps)}


def _provenance(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> dict[str, Any]:
    training = checkpoint.training
    told: dict[str, Any] = {
        key: training[key] for key in ("recipe", "settings", "data", "seed", "dev") if key in training
    }
    return told | {
        "backbone": checkpoint.network.config.model_type,
        "network": {"pooling": checkpoint.network.spec.pooling, "policy": checkpoint.network.spec.policy},
        "trained_with": _mapping(training.get("versions")),
        "exported_with": exported_with(),
        **facts,
    }


def exported_with() -> dict[str, str | None]:
    """Versions of what makes graphs here."""
    return {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout, or another build of the package
        return None
