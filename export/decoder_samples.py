"""Samples on which a decoder's bundle is verified: a prompt of random ids, and steps after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from offramp.export.cached_attention import rotations_at
from offramp.export.segments import Sample, Segment, SplitNetwork, Values
from offramp.models.controllers import run_probabilities
from offramp.models.decoder import DecoderNetwork, hidden_states, project_cache
from offramp.models.draft_head import draft_head_of, normed_before, normed_hidden, predict_hidden
from offramp.runtime.bundle.manifest import (
    CONTROLLER,
    EXIT_HIDDEN,
    GATE,
    IN_PLACE,
    LAST_POSITIONS,
    NEXT,
    PREVIOUS_HIDDEN,
    TOTAL_LENGTH,
)
from offramp.runtime.engines.rotation import rotation_tables

# Tokens of a prompt and of two steps; places of the cache beyond these.
CHUNKS, SPARE = (8, 1, 2), 3
# The value in unused places of an appended cache, which changes outputs if the mask is wrong. Caches in place
# have zeros there, as the operator writes them; these would take part of the attention, too.
UNUSED = 9.0


def decoder_samples(network: DecoderNetwork, split: SplitNetwork) -> Iterator[Sample]:
    """Samples to verify a split on: a prompt of random ids and two steps.

    The past of each is the network's own keys and values. Expected logits are those of the model that
    transformers loaded, so that a difference between it and the family's adapter is found, too; all others
    are computed by the network's own methods.
    """
    total = sum(CHUNKS)
    ids = torch.randint(0, network.vocab_size, (1, total), generator=torch.Generator().manual_seed(0))
    embedded = network.family.embed(network.model, ids, torch.arange(total)[None])
    states = [embedded, *hidden_states(network, ids)]  # by number of blocks that ran
    logits = network.model(input_ids=ids, use_cache=False).logits  # by transformers itself
    in_place, drafts = split.cache == IN_PLACE, _drafts(network, ids, states)
    read = [*states[: network.block_count], *drafts.read]  # by block, the draft head's last
    cache = _CacheInPlace(network, split, read) if in_place else _AppendedCache(network, read)
    start = 0
    for count in CHUNKS:
        here = slice(start, start + count)
        inputs, stem_outputs = cache.inputs(ids, here), cache.stem_outputs(ids, here)
        inputs[PREVIOUS_HIDDEN] = drafts.previous[:, here]
        expected = _expected(network, split, stem_outputs, states, drafts, cache, logits, here)
        yield Sample(inputs, torch.ones(1, count, dtype=torch.bool), expected)
        start += count


class _Drafts(NamedTuple):
    """What a draft head reads and predicts for all tokens, each [1, all tokens, hidden].

    previous: hidden states of the tokens before, after the last block. read: what the draft head's block
    reads, empty without a draft head. predicted: what the block puts out.
    """

    previous: torch.Tensor
    read: tuple[torch.Tensor, ...]
    predicted: torch.Tensor


def _drafts(network: DecoderNetwork, ids: torch.Tensor, states: Sequence[torch.Tensor]) -> _Drafts:
    previous = torch.cat([torch.zeros_like(states[-1][:, :1]), states[-1][:, :-1]], dim=1)
    draft_head = draft_head_of(network)
    if draft_head is None:
        return _Drafts(previous, (), previous)
    normed = normed_hidden(network, states[-1])
    joined = draft_head(states[0], normed_before(network, normed))
    return _Drafts(previous, (joined,), next(predict_hidden(network, draft_head, ids, normed, steps=1)))


def _layer(network: DecoderNetwork, block: int) -> nn.Module:
    """A block by its number (1-based); the draft head's has the number after the last."""
    if block <= network.block_count:
        return network.blocks[block - 1]
    draft_head = draft_head_of(network)
    assert draft_head is not None
    return draft_head.block


class _AppendedCache:
    """Keys and values of a network whose segments put out those of the new tokens alone."""

    def __init__(self, network: DecoderNetwork, read: Sequence[torch.Tensor]) -> None:
        """read: what each block reads [1, all tokens, hidden]."""
        self._network, self._total = network, read[0].shape[1]
        self._positions = torch.arange(self._total)[None]
        everything = slice(0, self._total)
        self._cache: Values = {}  # of all tokens, by the names of a segment's outputs
        for number, hidden in enumerate(read, 1):
            self._cache |= self.fill(number, hidden, everything)

    def inputs(self, ids: torch.Tensor, here: slice) -> Values:
        """Inputs of the stem and the past of all blocks, for some of the tokens."""
        past: Values = {}
        for name, new in self._cache.items():
            axis = _axis(name)
            shape = list(new.shape)
            shape[axis] = self._total + SPARE
            past[name.replace("new", "past")] = torch.full(shape, UNUSED)
            past[name.replace("new", "past")].narrow(axis, 0, here.start).copy_(
                new.narrow(axis, 0, here.start)
            )
        return self._stem_inputs(ids, here) | past

    def stem_outputs(self, ids: torch.Tensor, here: slice) -> Values:
        """What the stem puts out for some of the tokens."""
        hidden, context = self._network.stem(*self._stem_inputs(ids, here).values())
        return {"hidden": hidden, **context}

    def outputs(self, block: int, here: slice) -> Values:
        """Keys and values that a segment puts out for a block (1-based) and some of the tokens."""
        names = [f"new_{kind}_{block}" for kind in "kv"]
        return {
            name: self._cache[name].narrow(_axis(name), here.start, here.stop - here.start) for name in names
        }

    def fill(self, block: int, hidden: torch.Tensor, here: slice) -> Values:
        """Keys and values that a cache fill puts out for a block (1-based); hidden: of some of the tokens."""
        layer, network = _layer(self._network, block), self._network
        context = network.rotate_by(self._positions[:, here])
        keys, values = project_cache(network.family, network.attention(layer), layer, hidden, context)
        return {f"new_k_{block}": keys.transpose(2, 3), f"new_v_{block}": values}

    def _stem_inputs(self, ids: torch.Tensor, here: slice) -> Values:
        valid = torch.zeros(1, self._total + SPARE, dtype=torch.int64)
        valid[:, : here.start] = 1
        return {"input_ids": ids[:, here], "position_ids": self._positions[:, here], "past_valid": valid}


class _CacheInPlace:
    """Keys and values of a network whose segments extend the cache in place; see _AppendedCache."""

    def __init__(self, network: DecoderNetwork, split: SplitNetwork, read: Sequence[torch.Tensor]) -> None:
        self._network, self._total = network, read[0].shape[1]
        self._positions, self._rotations = torch.arange(self._total)[None], tuple(split.rotations)
        tables = rotation_tables(split.rotations, self._total + SPARE)
        self._tables = {name: torch.from_numpy(table) for name, table in tables.items()}
        everything = slice(0, self._total)
        self._cache: Values = {}  # of all tokens, by the names of a segment's outputs
        for number, hidden in enumerate(read, 1):
            self._cache |= self.fill(number, hidden, everything)

    def inputs(self, ids: torch.Tensor, here: slice) -> Values:
        """Inputs of stem, segments and cache fills that no graph puts out, for some of the tokens."""
        past = {name.replace("new", "past"): self._up_to(here.start, name) for name in self._cache}
        lengths = {
            LAST_POSITIONS.name: torch.tensor([here.stop - 1], dtype=torch.int32),
            TOTAL_LENGTH.name: torch.tensor(here.stop, dtype=torch.int32),
        }
        new = {"input_ids": ids[:, here], "position_ids": self._positions[:, here]}
        return new | lengths | self._tables | past

    def stem_outputs(self, ids: torch.Tensor, here: slice) -> Values:
        """What the stem puts out for some of the tokens."""
        network = self._network
        return {"hidden": network.family.embed(network.model, ids[:, here], self._positions[:, here])}

    def outputs(self, block: int, here: slice) -> Values:
        """Keys and values that a segment puts out for a block (1-based), with those of some of the tokens."""
        return {name: self._up_to(here.stop, name) for name in (f"new_k_{block}", f"new_v_{block}")}

    def fill(self, block: int, hidden: torch.Tensor, here: slice) -> Values:
        """Keys and values that a cache fill puts out for a block (1-based); hidden: of some of the tokens."""
        layer, family = _layer(self._network, block), self._network.family
        context = rotations_at(self._tables, self._rotations, self._positions[:, here])
        keys, values = project_cache(family, self._network.whole_attention(layer), layer, hidden, context)
        return {f"new_k_{block}": keys, f"new_v_{block}": values}

    def _up_to(self, end: int, name: str) -> torch.Tensor:
        """Keys or values of all places, of which those before `end` are filled."""
        rows, heads, _, size = self._cache[name].shape
        cache = torch.zeros(rows, heads, self._total + SPARE, size)
        cache[:, :, :end] = self._cache[name][:, :, :end]
        return cache


def _axis(name: str) -> int:
    return 3 if "_k_" in name else 2


def _expected(
    network: DecoderNetwork,
    split: SplitNetwork,
    stem_outputs: Values,
    states: Sequence[torch.Tensor],
    drafts: _Drafts,
    cache: _AppendedCache | _CacheInPlace,
    logits: torch.Tensor,
    here: slice,
) -> Iterator[Values]:
    """Outputs of every segment for some of the tokens, in walking order.

    states: hidden states [1, all tokens, hidden] by number of blocks that ran. logits [1, all tokens,
    vocabulary].
    """
    yield stem_outputs
    for segment in split.in_walking_order():
        if segment in split.heads:
            yield {"logits": logits[:, here, : int(segment.outputs[0].shape[-1])]}
        elif segment in split.cache_fills:
            hidden = states[segment.blocks[0] - 1][:, here]
            yield _of_blocks([cache.fill(block, hidden, here) for block in segment.blocks])
        elif segment is split.draft_block:
            yield {EXIT_HIDDEN: drafts.predicted[:, here]} | cache.outputs(segment.blocks[0], here)
        elif segment.blocks:
            yield _of_segment(network, segment, states[segment.blocks[-1]][:, here]) | _of_blocks(
                [cache.outputs(block, here) for block in segment.blocks]
            )


def _of_segment(network: DecoderNetwork, segment: Segment, hidden: torch.Tensor) -> Values:
    """What a segment puts out besides keys and values; hidden [1, tokens, hidden]: after its last block."""
    end, names = segment.blocks[-1], {tensor.name for tensor in segment.outputs}
    outputs: Values = {NEXT + "hidden": hidden}
    if EXIT_HIDDEN in names:
        outputs[EXIT_HIDDEN] = network.exit_hidden(end, hidden)
    if GATE in names:
        outputs[GATE] = network.gate_logit(end, hidden).sigmoid()
    if CONTROLLER in names:
        outputs[CONTROLLER] = run_probabilities(network, end, hidden)
    return outputs


def _of_blocks(values: Sequence[Values]) -> Values:
    return {name: value for block in values for name, value in block.items()}
