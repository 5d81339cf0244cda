"""Checks that stem, segments with a cache, cache fills and heads of a decoder fit together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from offramp.runtime.bundle import fields
from offramp.runtime.bundle.manifest import (
    APPENDED,
    CONTROLLER,
    EXIT_HIDDEN,
    GATE,
    IN_PLACE,
    LAST_POSITIONS,
    NEW,
    NEXT,
    PAST,
    PREVIOUS_HIDDEN,
    TOTAL_LENGTH,
    DecoderFacts,
    Manifest,
    Segment,
    Tensor,
    table_names,
)
from offramp.runtime.bundle.rule_checks import check_controllers

MOST_ROTATIONS = 16
MOST_FREQUENCIES = 2**12  # of a rotation, which has a number for each of them at every position
_IDS, _POSITIONS = (Tensor(name, "int64", ("batch", "seq")) for name in ("input_ids", "position_ids"))
_APPENDED_STEM_INPUTS = (_IDS, _POSITIONS, Tensor("past_valid", "int64", ("batch", "past")))
_DRAFT_BLOCK = "decoder.draft_block"  # its path for messages


class _Readable(NamedTuple):
    """The tensors that segments and cache fills may read, besides a segment's past, by name."""

    segments: Mapping[str, Tensor]
    cache_fills: Mapping[str, Tensor]


def decoder_graphs(manifest: Manifest) -> list[tuple[str, Segment]]:
    """All graphs of a decoder's manifest, each with its path for messages."""
    parts = [("stem", manifest.stem), *_segments(manifest), *_fills(manifest), *_heads(manifest)]
    block = None if manifest.decoder is None else manifest.decoder.draft_block
    return parts if block is None else [*parts, (_DRAFT_BLOCK, block)]


def check_decoder(manifest: Manifest) -> None:
    """Raise ValueError if two parts of a decoder's manifest contradict each other."""
    decoder = manifest.decoder
    assert decoder is not None  # checked before this call
    if bad := [token for token in decoder.stop if not 0 <= token < manifest.vocab_size]:
        raise ValueError(f"decoder.stop: {bad[0]} is not in a vocabulary of {manifest.vocab_size}")
    stem_outputs = {tensor.name: tensor for tensor in manifest.stem.first_graph.outputs}
    if "hidden" not in stem_outputs:
        raise ValueError("stem: it has no output 'hidden'")
    in_place = decoder.cache == IN_PLACE
    readable = _in_place(manifest) if in_place else _appended(manifest)
    segments, cache_fills = _segments(manifest), _fills(manifest)
    for where, segment in segments:
        _check_segment(where, segment, readable.segments, in_place=in_place)
    if decoder.draft_block is not None:
        _check_draft_block(decoder.draft_block, readable.segments, manifest, in_place=in_place)
    _check_exits(manifest)
    check_controllers(manifest)
    if cache_fills and [fill.blocks for _, fill in cache_fills] != [
        segment.blocks for _, segment in segments[1:]
    ]:
        raise ValueError("decoder.cache_fills: their blocks must be those of the segments after the first")
    for (where, fill), (_, segment) in zip(cache_fills, segments[1:], strict=False):
        _check_fill(where, fill, segment, readable.cache_fills)
    for where, head in _heads(manifest):
        all_ids = head is decoder.head
        _check_head(where, head, stem_outputs["hidden"], manifest.vocab_size, all_ids=all_ids)


def _segments(manifest: Manifest) -> list[tuple[str, Segment]]:
    return [(f"segments[{n}]", segment) for n, segment in enumerate(manifest.segments)]


def _fills(manifest: Manifest) -> list[tuple[str, Segment]]:
    assert manifest.decoder is not None
    return [(f"decoder.cache_fills[{n}]", fill) for n, fill in enumerate(manifest.decoder.cache_fills)]


def _heads(manifest: Manifest) -> list[tuple[str, Segment]]:
    assert manifest.decoder is not None
    heads = [("decoder.head", manifest.decoder.head)]
    return heads if manifest.decoder.draft is None else [*heads, ("decoder.draft", manifest.decoder.draft)]


def check_cache(decoder: DecoderFacts) -> None:
    """Raise ValueError for an unknown way in which a cache grows, and for rotations that do not fit it."""
    fields.one_of("decoder.cache", decoder.cache, (APPENDED, IN_PLACE))
    if decoder.rotations and decoder.cache != IN_PLACE:
        raise ValueError(f"decoder.rotations: they are for cache {IN_PLACE!r}; here the stem rotates")
    if decoder.windows and decoder.cache != IN_PLACE:
        raise ValueError(f"decoder.windows: they are for cache {IN_PLACE!r}; here the stem makes masks")
    for window in decoder.windows:
        fields.within("decoder.windows", window, 1, fields.LONGEST_INPUT)
    fields.within("decoder.rotations: their number", len(decoder.rotations), 0, MOST_ROTATIONS)
    for name, rotation in decoder.rotations.items():
        where = f"decoder.rotations[{name!r:.80}]"
        fields.within(f"{where}.frequencies: their number", len(rotation.frequencies), 1, MOST_FREQUENCIES)
        for value in (*rotation.frequencies, rotation.factor):
            fields.within(where, abs(value), 0, fields.LARGEST_PARAMETER)


def _appended(manifest: Manifest) -> _Readable:
    """What segments read whose stem makes masks and rotations: all outputs of the stem."""
    stem = manifest.stem.first_graph
    if set(stem.inputs) != set(_APPENDED_STEM_INPUTS):
        raise ValueError(
            f"stem: it reads {_described(stem.inputs)}; of cache {APPENDED!r} it reads "
            f"{_described(_APPENDED_STEM_INPUTS)}"
        )
    outputs = {tensor.name: tensor for tensor in stem.outputs}
    return _Readable(outputs, outputs)


def _in_place(manifest: Manifest) -> _Readable:
    """What segments read whose cache grows in place: hidden, lengths, and tables of the rotations."""
    assert manifest.decoder is not None
    stem = manifest.stem.first_graph
    if stem.inputs not in ((_IDS,), (_IDS, _POSITIONS)):
        raise ValueError(
            f"stem: of cache {IN_PLACE!r} it reads {_IDS.name} and perhaps {_POSITIONS.name}, both int64 "
            f"[batch, seq], found {_described(stem.inputs)}"
        )
    hidden = Tensor("hidden", "float32", ("batch", "seq", manifest.hidden_size))
    if stem.outputs != (hidden,):
        raise ValueError(
            f"stem: of cache {IN_PLACE!r} it puts out {_described([hidden])} alone, found "
            f"{_described(stem.outputs)}"
        )
    tables = [
        Tensor(table, "float32", ("places", len(rotation.frequencies)))
        for name, rotation in manifest.decoder.rotations.items()
        for table in table_names(name)
    ]
    segments = [hidden, LAST_POSITIONS, TOTAL_LENGTH, *tables]
    return _Readable(
        {tensor.name: tensor for tensor in segments},
        {tensor.name: tensor for tensor in (hidden, _POSITIONS, *tables)},
    )


def _check_segment(
    where: str,
    segment: Segment,
    readable: Mapping[str, Tensor],
    *,
    in_place: bool,
    result: str = f"{NEXT}hidden",
) -> None:
    """Check that a segment reads what it may read and the past of its blocks.

    Outputs are the result, by default the new hidden state, and the new keys and values of its blocks; if the
    cache grows in place, those of all places.
    """
    graph = segment.first_graph
    past = {f"{name}{block}" for block in segment.blocks for name in PAST}
    _check_reads(where, [tensor for tensor in graph.inputs if tensor.name not in past], readable)
    added = {f"{name}{block}" for block in segment.blocks for name in NEW}
    names = _output_names(segment) - ({EXIT_HIDDEN, GATE, CONTROLLER} - {result})
    if missing := past - {tensor.name for tensor in graph.inputs} or added - names:
        raise ValueError(f"{where}: {sorted(missing)[0]} is missing")
    if names != {result, *added}:
        raise ValueError(f"{where}: it puts out {sorted(names)}, expected {result} and {sorted(added)}")
    tensors = {tensor.name: tensor for tensor in (*graph.inputs, *graph.outputs)}
    for name in past:
        kind, block = name[len("past_")], name.rpartition("_")[2]
        old, new = tensors[name], tensors[f"new_{kind}_{block}"]
        if in_place:
            _check_places(where, old, new)
            continue
        grown = tuple("seq" if size == "past" else size for size in old.shape)
        if new.shape != grown or old.shape.count("past") != 1:
            raise ValueError(f"{where}: {new.name} does not continue {name} {list(old.shape)}")


def _check_draft_block(
    block: Segment, readable: Mapping[str, Tensor], manifest: Manifest, *, in_place: bool
) -> None:
    """Check that a draft block reads hidden states of the tokens before, and puts out those of the tokens."""
    if block.blocks != (manifest.blocks + 1,):
        raise ValueError(
            f"{_DRAFT_BLOCK}.blocks: expected [{manifest.blocks + 1}], found {list(block.blocks)}"
        )
    before, result = (
        Tensor(name, "float32", ("batch", "seq", manifest.hidden_size))
        for name in (PREVIOUS_HIDDEN, EXIT_HIDDEN)
    )
    graph = block.first_graph
    for what, tensor, tensors in (("reads", before, graph.inputs), ("puts out", result, graph.outputs)):
        if tensor not in tensors:
            raise ValueError(f"{_DRAFT_BLOCK}: it {what} no {_described([tensor])}")
    _check_segment(
        _DRAFT_BLOCK, block, {**readable, before.name: before}, in_place=in_place, result=EXIT_HIDDEN
    )


def _check_places(where: str, old: Tensor, new: Tensor) -> None:
    """Check the keys, or values, of a block that a graph extends in place."""
    fixed = [size for size in old.shape[1::2] if isinstance(size, int)]
    expected = ("batch", *fixed[:1], "places", *fixed[1:])
    if len(fixed) != 2 or old.shape != expected or old.dtype != "float32":
        raise ValueError(
            f"{where}: {old.name} must be float32 [batch, heads, places, size], found {_described([old])}"
        )
    if (new.shape, new.dtype) != (old.shape, old.dtype):
        raise ValueError(f"{where}: {new.name} must be as {old.name}, found {_described([new])}")


def _check_reads(where: str, tensors: Iterable[Tensor], readable: Mapping[str, Tensor]) -> None:
    for tensor in tensors:
        if readable.get(tensor.name) != tensor:
            source = (
                "a tensor of a cache in place" if LAST_POSITIONS.name in readable else "an output of the stem"
            )
            raise ValueError(f"{where}: its input {tensor.name} {list(tensor.shape)} is not {source}")


def _check_exits(manifest: Manifest) -> None:
    """Check that all segments but the last have the outputs that an exit needs, or that none has."""
    for name, shape in ((EXIT_HIDDEN, ("batch", "seq", manifest.hidden_size)), (GATE, ("batch", "seq"))):
        expected = Tensor(name, "float32", shape)
        present = [expected in segment.first_graph.outputs for segment in manifest.segments]
        has_any = any(name in _output_names(segment) for segment in manifest.segments)
        if has_any and present != [True] * (len(present) - 1) + [False]:
            raise ValueError(f"segments: all but the last put out {name} {list(shape)}, or none does")


def _check_fill(where: str, fill: Segment, segment: Segment, readable: Mapping[str, Tensor]) -> None:
    """Check that a cache fill computes from hidden the same keys and values as its segment."""
    _check_reads(where, fill.first_graph.inputs, readable)
    added = [
        Tensor(tensor.name, tensor.dtype, tuple("seq" if size == "places" else size for size in tensor.shape))
        for tensor in segment.first_graph.outputs
        if tensor.name.startswith(NEW)
    ]
    if list(fill.first_graph.outputs) != added:
        raise ValueError(f"{where}: it must put out what {segment.name} adds to its cache, and nothing else")


def _check_head(where: str, head: Segment, hidden: Tensor, ids: int, *, all_ids: bool) -> None:
    """Check that a head computes logits from hidden: of all ids, or of fewer ids for a draft head."""
    graph = head.first_graph
    size = graph.outputs[0].shape[-1] if graph.outputs and graph.outputs[0].shape else 0
    fits = size == ids if all_ids else isinstance(size, int) and 0 < size < ids
    expected = (Tensor("logits", "float32", ("batch", "seq", size)),)
    if not fits or graph.inputs != (hidden,) or graph.outputs != expected:
        count = ids if all_ids else f"fewer than {ids}"
        raise ValueError(f"{where}: it must make logits [batch, seq, {count}] of hidden")


def _output_names(segment: Segment) -> set[str]:
    return {tensor.name for tensor in segment.first_graph.outputs}


def _described(tensors: Iterable[Tensor]) -> str:
    return ", ".join(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}" for tensor in tensors) or "nothing"
