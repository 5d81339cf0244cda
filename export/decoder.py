"""Cut a decoder into stem, segments with a cache, and head: the graphs of a bundle for text generation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from offramp.export.split import Segment
from offramp.models.decoder import DecoderNetwork, Pair, run_block
from offramp.models.families.family import Context
from offramp.models.macs import linear_weights
from offramp.models.network import parse_exits
from offramp.runtime.manifest import NEXT, Macs, Tensor

IDS, POSITIONS = (
    Tensor("input_ids", "int64", ("batch", "seq")),
    Tensor("position_ids", "int64", ("batch", "seq")),
)
VALID = Tensor("past_valid", "int64", ("batch", "past"))


class DecoderStem(nn.Module):
    """Ids, their positions and which places of the past count -> hidden and what every block reads."""

    def __init__(self, network: DecoderNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden, context = self.network.stem(*tensors)
        return hidden, *context.values()


class CachedBlock(nn.Module):
    """A block with its attention to the cache, as one module: an exporter names nodes by theirs."""

    def __init__(self, network: DecoderNetwork, block: int) -> None:
        super().__init__()
        self.family, self.block = network.family, network.blocks[block]

    def forward(self, hidden: torch.Tensor, context: Context, past: Pair) -> tuple[torch.Tensor, Pair]:
        return run_block(self.family, self.block, hidden, context, past)


class DecoderStretch(nn.Module):
    """Consecutive blocks: hidden, what the stem made, and keys and values of each block's past -> hidden and
    what each block adds to its past.
    """

    def __init__(self, network: DecoderNetwork, blocks: range, reads: Sequence[str]) -> None:
        super().__init__()
        self.reads = tuple(reads)
        self.blocks = nn.ModuleList(CachedBlock(network, block) for block in blocks)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden, *others = tensors
        made, past = others[: len(self.reads)], others[len(self.reads) :]
        context, added = dict(zip(self.reads, made, strict=True)), list[torch.Tensor]()
        for number, block in enumerate(self.blocks):
            pair = past[2 * number], past[2 * number + 1]
            hidden, new = block(hidden, context, pair)
            added += new
        return hidden, *added


class DecoderHead(nn.Module):
    """Hidden behind any block -> logits."""

    def __init__(self, network: DecoderNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.network.head(tensors[0]),)


def split_decoder(network: DecoderNetwork, cuts: str | Sequence[int]) -> list[Segment]:
    """Stem, segments that end behind these blocks (as in parse_exits), and the head.

    Raises ValueError for a cut that there cannot be, and for weights that are not float32.
    """
    if (dtype := next(network.parameters()).dtype) != torch.float32:
        raise ValueError(
            f"the network's weights are {dtype}; segments are float32: call network.float() first"
        )
    network.eval()
    ends = parse_exits(cuts, network.block_count)
    stem = DecoderStem(network).eval()
    made, cached = _probe(network)
    longest = network.longest
    parts = [Segment("stem", stem, (IDS, POSITIONS, VALID), made, (), Macs(), longest)]
    for number, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
        blocks = range(start, end)
        module = DecoderStretch(network, blocks, [tensor.name for tensor in made[1:]]).eval()
        numbers = tuple(block + 1 for block in blocks)
        past, new = _cache(cached, numbers, "past", "past"), _cache(cached, numbers, "new", "seq")
        hidden = Tensor(NEXT + "hidden", "float32", made[0].shape)
        weights = sum(linear_weights(network.blocks[block]) for block in blocks)
        macs = Macs(token=weights, pair=2 * network.hidden_size * len(blocks))
        name = f"segment_{number:02}"
        parts.append(Segment(name, module, (*made, *past), (hidden, *new), numbers, macs, longest))
    logits = Tensor("logits", "float32", ("batch", "seq", network.vocab_size))
    macs = Macs(token=network.hidden_size * network.vocab_size)
    parts.append(Segment("head", DecoderHead(network).eval(), (made[0],), (logits,), (), macs, longest))
    return parts


def _cache(sizes: tuple[int, int], blocks: Sequence[int], word: str, axis: str) -> tuple[Tensor, ...]:
    """Keys [batch, kv heads, size, tokens] and values [batch, kv heads, tokens, size] of these blocks."""
    heads, size = sizes
    shapes: dict[str, tuple[int | str, ...]] = {
        "k": ("batch", heads, size, axis),
        "v": ("batch", heads, axis, size),
    }
    return tuple(
        Tensor(f"{word}_{kind}_{block}", "float32", shape)
        for block in blocks
        for kind, shape in shapes.items()
    )


@torch.no_grad()
def _probe(network: DecoderNetwork) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """What the stem puts out, run at sizes that tell the axes apart; heads and size of keys and values."""
    rows, tokens, places = 2, 5, 11
    axes = {rows: "batch", tokens: "seq", places: "past"}
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    positions = torch.arange(tokens).expand(rows, -1)
    hidden, context = network.stem(ids, positions, torch.ones(rows, places, dtype=torch.int64))
    _, keys, _ = network.family.project(network.blocks[0], hidden, context)
    made = [Tensor("hidden", "float32", ("batch", "seq", network.hidden_size))]
    for name, value in context.items():
        last = {"mask_past": "past", "mask_new": "seq"}.get(name, value.shape[-1])
        lead = tuple(axes.get(size, size) for size in value.shape[:-1])
        made.append(Tensor(name, "float32", (*lead, last)))
    return tuple(made), (keys.shape[1], keys.shape[3])
