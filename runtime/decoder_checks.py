"""What must fit together in a decoder's manifest: a stem, segments with a cache, and a head."""

from __future__ import annotations

from offramp.runtime.checks import _at_least, _check_variant
from offramp.runtime.manifest import NEW, NEXT, PAST, Manifest, Stage, Tensor, Variant

STEM_INPUTS = {"input_ids", "position_ids", "past_valid"}


def check_stages(manifest: Manifest) -> None:
    """Raise ValueError naming the first stage that does not fit to those before it."""
    assert manifest.decoder is not None  # check() has seen it
    head = manifest.decoder.head
    stages = [("stem", manifest.stem), *((f"segments[{n}]", s) for n, s in enumerate(manifest.segments))]
    for where, stage in (*stages, ("decoder.head", head)):
        _check_stage(where, stage, manifest)
    if bad := [token for token in manifest.decoder.stop if not 0 <= token < manifest.vocab_size]:
        raise ValueError(f"decoder.stop: {bad[0]} is not in a vocabulary of {manifest.vocab_size}")
    made = {tensor.name: tensor for tensor in _first(manifest.stem).outputs}
    if "hidden" not in made:
        raise ValueError("stem: it has no output 'hidden'")
    if (found := {tensor.name for tensor in _first(manifest.stem).inputs}) != STEM_INPUTS:
        raise ValueError(f"stem: it reads {sorted(found)}, a decoder's reads {sorted(STEM_INPUTS)}")
    for where, stage in stages[1:]:
        _check_segment(where, stage, made)
    facts = _first(head)
    if [tensor.name for tensor in facts.inputs] != ["hidden"] or facts.outputs != (
        Tensor("logits", "float32", ("batch", "seq", manifest.vocab_size)),
    ):
        raise ValueError(f"decoder.head: it must make logits [batch, seq, {manifest.vocab_size}] of hidden")


def _check_stage(where: str, stage: Stage, manifest: Manifest) -> None:
    for field in ("token", "pair", "row"):
        _at_least(f"{where}.macs.{field}", getattr(stage.macs, field), 0)
    if stage.blocks and tuple(stage.variants) != manifest.variants:
        raise ValueError(f"{where}.variants: all segments offer {list(manifest.variants)}, in that order")
    if manifest.variants[0] not in stage.variants:
        raise ValueError(f"{where}.variants: the default variant {manifest.variants[0]!r} is missing")
    first = _first(stage)
    for name, facts in stage.variants.items():
        _check_variant(f"{where}.variants[{name!r}]", facts, manifest)
        if (facts.inputs, facts.outputs) != (first.inputs, first.outputs):
            raise ValueError(f"{where}.variants[{name!r}]: tensors other than those of the first variant")


def _check_segment(where: str, stage: Stage, made: dict[str, Tensor]) -> None:
    """It reads what the stem made and the past of its blocks, and makes hidden anew and what they add."""
    facts = _first(stage)
    cached = {f"{name}{block}" for block in stage.blocks for name in PAST}
    for tensor in facts.inputs:
        if tensor.name not in cached and made.get(tensor.name) != tensor:
            raise ValueError(f"{where}: its input {tensor.name} {list(tensor.shape)} is not made by the stem")
    added = {f"{name}{block}" for block in stage.blocks for name in NEW}
    names = {tensor.name for tensor in facts.outputs}
    if missing := cached - {tensor.name for tensor in facts.inputs} or added - names:
        raise ValueError(f"{where}: {sorted(missing)[0]} is missing")
    if names != {f"{NEXT}hidden", *added}:
        raise ValueError(f"{where}: it puts out {sorted(names)}, expected {NEXT}hidden and {sorted(added)}")
    shapes = {tensor.name: tensor.shape for tensor in (*facts.inputs, *facts.outputs)}
    for name in cached:
        kind, block = name[len("past_")], name.rpartition("_")[2]
        grown = tuple("seq" if size == "past" else size for size in shapes[name])
        if shapes[f"new_{kind}_{block}"] != grown or shapes[name].count("past") != 1:
            raise ValueError(f"{where}: new_{kind}_{block} does not continue {name} {list(shapes[name])}")


def _first(stage: Stage) -> Variant:
    return next(iter(stage.variants.values()))
