"""The modules from which a decoder's graphs are exported: stem, segments with a cache, cache fills and heads.

Each takes and returns plain tensors in the order of the inputs and outputs of its segment.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from offramp.export.cached_attention import cached_attention, rotations_at
from offramp.models.controllers import controllers_after
from offramp.models.decoder import DecoderNetwork, KeyValue, cap, project_cache, run_block
from offramp.models.draft_head import draft_head_of
from offramp.models.families.family import Context
from offramp.runtime.bundle.manifest import Tensor

IDS, POSITIONS = (Tensor(name, "int64", ("batch", "seq")) for name in ("input_ids", "position_ids"))
STEM_INPUTS = (IDS, POSITIONS, Tensor("past_valid", "int64", ("batch", "past")))


class DecoderStem(nn.Module):
    """The graph before the first segment: from token ids and positions to the hidden state.

    Inputs: STEM_INPUTS; past_valid marks the places of the cache that hold a token. Outputs: hidden [batch,
    seq, hidden size] and the tensors that every block reads.
    """

    def __init__(self, network: DecoderNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the stem; tensors: in the order of STEM_INPUTS."""
        hidden, context = self.network.stem(*tensors)
        return hidden, *context.values()


class EmbeddingStem(nn.Module):
    """The stem of a decoder whose cache grows in place: from token ids to hidden [batch, seq, hidden size].

    Inputs: input_ids, and position_ids if the family embeds positions.
    """

    def __init__(self, network: DecoderNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the stem; a family that does not embed positions gets the ids in their place."""
        ids, positions = tensors[0], tensors[-1]
        return (self.network.family.embed(self.network.model, ids, positions),)


class CachedBlock(nn.Module):
    """A block with its attention to the cache, as one module, since the exporter names nodes by modules."""

    def __init__(self, network: DecoderNetwork, block: nn.Module, in_place: bool) -> None:
        super().__init__()
        self.family, self.block, self.in_place = network.family, block, in_place
        self.form = (network.whole_attention if in_place else network.attention)(self.block)

    def forward(
        self, hidden: torch.Tensor, context: Context, past: KeyValue
    ) -> tuple[torch.Tensor, KeyValue]:
        """Run the block on new tokens; returns hidden, and the new keys and values, or the longer cache."""
        if not self.in_place:
            return run_block(self.family, self.form, self.block, hidden, context, past)
        heads = self.family.project(self.block, hidden, "qkv")
        attended, cache = cached_attention(self.form, heads, past, context)
        return self.family.finish_block(self.block, hidden, attended), cache


class DecoderSegment(nn.Module):
    """Consecutive blocks of a decoder, which read a cache of keys and values, and the exit after them.

    Inputs: hidden, the tensors that all blocks read, and keys and values of each block's past. Outputs:
    hidden, keys and values of each block (of the new tokens, or of all places for a cache that grows in
    place) and, where the network has them, exit_hidden and gate of the exit and P(run) of the blocks ahead by
    its controllers.
    """

    def __init__(self, network: DecoderNetwork, blocks: range, reads: Sequence[str], in_place: bool) -> None:
        super().__init__()
        self.reads = tuple(reads)
        layers = [network.blocks[block] for block in blocks]
        self.blocks = nn.ModuleList(CachedBlock(network, layer, in_place) for layer in layers)
        self.norm = network.family.norm(network.model)
        name = str(blocks.stop)
        early = blocks.stop < network.block_count
        self.exit = network.exits[name] if early and name in network.exits else None
        self.policy = network.policies[name] if early and name in network.policies else None
        self.controllers = controllers_after(network, blocks.stop)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the segment; tensors: hidden, those named in `reads`, keys and values by block."""
        hidden, *others = tensors
        context = dict(zip(self.reads, others, strict=False))
        past, outputs = others[len(self.reads) :], list[torch.Tensor]()
        for number, block in enumerate(self.blocks):
            pair = past[2 * number], past[2 * number + 1]
            hidden, new = block(hidden, context, pair)
            outputs += new
        if self.exit is not None:
            outputs.append(hidden + self.exit(self.norm(hidden)))
        if self.policy is not None:
            outputs.append(self.policy(self.norm(hidden))[..., 0].sigmoid())  # [batch, seq]
        if self.controllers is not None:
            outputs.append(self.controllers(hidden))  # [batch, seq, blocks ahead but the last]
        return hidden, *outputs


class DraftBlock(nn.Module):
    """The block of a draft head, which predicts hidden states after the last block, to draft tokens.

    Inputs: hidden, as the stem puts it out; the hidden states of the tokens before, after the last block; the
    tensors named in `reads`; keys and values of the block's past. Outputs: the predictions, and keys and
    values.
    """

    def __init__(self, network: DecoderNetwork, reads: Sequence[str], in_place: bool) -> None:
        """network: one with a draft head."""
        super().__init__()
        draft_head = draft_head_of(network)
        assert draft_head is not None
        self.reads, self.draft_head = tuple(reads), draft_head
        self.norm = network.family.norm(network.model)
        self.blocks = nn.ModuleList([CachedBlock(network, draft_head.block, in_place)])

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the block; tensors: in the order of its inputs."""
        embedded, previous, *others = tensors
        context = dict(zip(self.reads, others, strict=False))
        keys, values = others[len(self.reads) :]
        joined = self.draft_head(embedded, self.norm(previous))
        hidden, new = self.blocks[0](joined, context, (keys, values))
        return hidden, *new


class BlockCacheFill(nn.Module):
    """Computes the keys and values that tokens leave in the cache of a block that they skip."""

    def __init__(self, network: DecoderNetwork, block: int, in_place: bool) -> None:
        super().__init__()
        self.family, self.block, self.in_place = network.family, network.blocks[block], in_place
        self.form = (network.whole_attention if in_place else network.attention)(self.block)

    def forward(self, hidden: torch.Tensor, context: Context) -> KeyValue:
        """Compute keys and values of the tokens in the layout of the cache.

        Values are [batch, kv heads, tokens, size], and so are keys of a cache that grows in place; others are
        [batch, kv heads, size, tokens].
        """
        keys, values = project_cache(self.family, self.form, self.block, hidden, context)
        return (keys if self.in_place else keys.transpose(2, 3)), values


class CacheFill(nn.Module):
    """Computes keys and values for the caches of consecutive blocks that tokens skip.

    Inputs: hidden of these tokens, and the tensors that rotate keys: for a cache that grows in place,
    position_ids and tables. Outputs: keys and values of each block.
    """

    def __init__(
        self, network: DecoderNetwork, blocks: range, reads: Sequence[str], rotations: Sequence[str] | None
    ) -> None:
        """rotations: names of those whose tables are read, for a cache that grows in place; else None."""
        super().__init__()
        self.reads, self.rotations = tuple(reads), rotations
        in_place = rotations is not None
        self.blocks = nn.ModuleList(BlockCacheFill(network, block, in_place) for block in blocks)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute keys and values by block; tensors: hidden, then those named in `reads`."""
        hidden, *others = tensors
        context = dict(zip(self.reads, others, strict=True))
        if self.rotations:
            context = rotations_at(context, self.rotations, context[POSITIONS.name])
        return tuple(new for block in self.blocks for new in block(hidden, context))


class DecoderHead(nn.Module):
    """Final norm and vocabulary projection: from hidden after the last block, or exit_hidden, to logits.

    ids: the logits cover this many first ids of the vocabulary (None: all).
    """

    def __init__(self, network: DecoderNetwork, ids: int | None = None) -> None:
        super().__init__()
        self.norm, self.softcap = network.family.norm(network.model), network.softcap
        self.words: nn.Linear = network.model.lm_head
        if ids is not None:
            self.words = nn.Linear(network.hidden_size, ids, network.model.lm_head.bias is not None)
            with torch.no_grad():
                whole = network.model.lm_head.parameters()
                for first, all_ids in zip(self.words.parameters(), whole, strict=True):
                    first.copy_(all_ids[:ids])

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute logits [batch, seq, ids]; tensors: hidden [batch, seq, hidden size] alone."""
        return (cap(self.words(self.norm(tensors[0])), self.softcap),)
