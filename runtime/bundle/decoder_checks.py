"""What must fit together in a decoder's manifest: a stem, segments with a cache, and a head."""

from __future__ import annotations

from offramp.runtime.bundle.checks import _at_least, _check_variant
from offramp.runtime.bundle.manifest import GATE, LEAVING, NEW, NEXT, PAST, Manifest, Stage, Tensor, Variant

STEM_INPUTS = {"input_ids", "position_ids", "past_valid"}


def check_stages(manifest: Manifest) -> None:
    """Raise ValueError naming the first stage that does not fit to those before it."""
    facts = manifest.decoder
    assert facts is not None  # check() has seen it
    segments = [(f"segments[{n}]", stage) for n, stage in enumerate(manifest.segments)]
    fills = [(f"decoder.cache_fills[{n}]", stage) for n, stage in enumerate(facts.cache_fills)]
    heads = [("decoder.head", facts.head)]
    if facts.draft is not None:
        heads.append(("decoder.draft", facts.draft))
    for where, stage in (("stem", manifest.stem), *segments, *fills, *heads):
        _check_stage(where, stage, manifest)
    if bad := [token for token in facts.stop if not 0 <= token < manifest.vocab_size]:
        raise ValueError(f"decoder.stop: {bad[0]} is not in a vocabulary of {manifest.vocab_size}")
    made = {tensor.name: tensor for tensor in _first(manifest.stem).outputs}
    if "hidden" not in made:
        raise ValueError("stem: it has no output 'hidden'")
    if (found := {tensor.name for tensor in _first(manifest.stem).inputs}) != STEM_INPUTS:
        raise ValueError(f"stem: it reads {sorted(found)}, a decoder's reads {sorted(STEM_INPUTS)}")
    for where, stage in segments:
        _check_segment(where, stage, made)
    _check_leaving(manifest)
    if fills and [stage.blocks for _, stage in fills] != [stage.blocks for _, stage in segments[1:]]:
        raise ValueError("decoder.cache_fills: their blocks must be those of the segments behind the first")
    for (where, stage), (_, segment) in zip(fills, segments[1:], strict=False):
        _check_fill(where, stage, segment, made)
    for where, stage in heads:
        _check_head(where, stage, made["hidden"], manifest.vocab_size, all_ids=stage is facts.head)


def _check_leaving(manifest: Manifest) -> None:
    """Where tokens may leave, all segments say so or none; the last one never does."""
    for name, shape in ((LEAVING, ("batch", "seq", manifest.hidden_size)), (GATE, ("batch", "seq"))):
        wanted = Tensor(name, "float32", shape)
        have = [wanted in _first(stage).outputs for stage in manifest.segments]
        if have != [True] * (len(have) - 1) + [False] and any(name in _names(s) for s in manifest.segments):
            raise ValueError(f"segments: all but the last put out {name} {list(shape)}, or none does")


def _check_fill(where: str, stage: Stage, segment: Stage, made: dict[str, Tensor]) -> None:
    """It makes of hidden what the segment adds to the caches of its blocks."""
    for tensor in _first(stage).inputs:
        if made.get(tensor.name) != tensor:
            raise ValueError(f"{where}: its input {tensor.name} {list(tensor.shape)} is not made by the stem")
    added = [tensor for tensor in _first(segment).outputs if tensor.name.startswith(NEW)]
    if list(_first(stage).outputs) != added:
        raise ValueError(f"{where}: it must put out what {segment.name} adds to its cache, and nothing else")


def _check_head(where: str, stage: Stage, hidden: Tensor, ids: int, *, all_ids: bool) -> None:
    """Logits of hidden, of all ids or of the first so many."""
    facts = _first(stage)
    size = facts.outputs[0].shape[-1] if facts.outputs and facts.outputs[0].shape else 0
    fits = size == ids if all_ids else isinstance(size, int) and 0 < size < ids
    wanted = (Tensor("logits", "float32", ("batch", "seq", size)),)
    if not fits or facts.inputs != (hidden,) or facts.outputs != wanted:
        count = ids if all_ids else f"fewer than {ids}"
        raise ValueError(f"{where}: it must make logits [batch, seq, {count}] of hidden")


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
    names = _names(stage) - {LEAVING, GATE}
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


def _names(stage: Stage) -> set[str]:
    return {tensor.name for tensor in _first(stage).outputs}


def _first(stage: Stage) -> Variant:
    return next(iter(stage.variants.values()))
