"""Cut a decoder into stem, segments with a cache, and head: the graphs of a bundle for text generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from offramp.export.split import Segment
from offramp.models.decoder import DecoderNetwork, Pair, run_block
from offramp.models.families.family import Context
from offramp.models.macs import linear_weights
from offramp.models.network import parse_exits
from offramp.runtime.bundle.manifest import GATE, LEAVING, NEXT, Macs, Tensor

IDS, POSITIONS = (
    Tensor("input_ids", "int64", ("batch", "seq")),
    Tensor("position_ids", "int64", ("batch", "seq")),
)
# Ids of a vocabulary by pairs are by how early a pair was worth an id: the first are the frequent ones. A
# third of SmolLM2's is 92 % of the tokens of film reviews, and a third of the time.
DRAFT = 16384
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
    """Consecutive blocks: hidden, what the stem made, and keys and values of each block's past -> hidden,
    what each block adds to its past and, where a token may leave, `leaving` and `gate`.
    """

    def __init__(self, network: DecoderNetwork, blocks: range, reads: Sequence[str]) -> None:
        super().__init__()
        self.reads = tuple(reads)
        self.blocks = nn.ModuleList(CachedBlock(network, block) for block in blocks)
        self.norm = network.family.norm(network.model)
        name = str(blocks.stop)
        early = blocks.stop < network.block_count
        self.exit = network.exits[name] if early and name in network.exits else None
        self.policy = network.policies[name] if early and name in network.policies else None

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden, *others = tensors
        made, past = others[: len(self.reads)], others[len(self.reads) :]
        context, added = dict(zip(self.reads, made, strict=True)), list[torch.Tensor]()
        for number, block in enumerate(self.blocks):
            pair = past[2 * number], past[2 * number + 1]
            hidden, new = block(hidden, context, pair)
            added += new
        if self.exit is not None:
            added.append(hidden + self.exit(self.norm(hidden)))
        if self.policy is not None:
            added.append(self.policy(self.norm(hidden))[..., 0].sigmoid())  # P(exit), as in classifiers
        return hidden, *added


class FilledBlock(nn.Module):
    """What a token that goes past a block leaves in its cache."""

    def __init__(self, network: DecoderNetwork, block: int) -> None:
        super().__init__()
        self.family, self.block = network.family, network.blocks[block]

    def forward(self, hidden: torch.Tensor, context: Context) -> Pair:
        keys, values = self.family.keep(self.block, hidden, context)
        return keys.transpose(2, 3), values


class DecoderFill(nn.Module):
    """Hidden of tokens that go past consecutive blocks, and what turns keys -> what they leave in each."""

    def __init__(self, network: DecoderNetwork, blocks: range, reads: Sequence[str]) -> None:
        super().__init__()
        self.reads = tuple(reads)
        self.blocks = nn.ModuleList(FilledBlock(network, block) for block in blocks)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden, *others = tensors
        context = dict(zip(self.reads, others, strict=True))
        return tuple(new for block in self.blocks for new in block(hidden, context))


class DecoderHead(nn.Module):
    """Hidden behind any block, or `leaving` -> logits, of all ids or of the first so many."""

    def __init__(self, network: DecoderNetwork, ids: int | None = None) -> None:
        super().__init__()
        self.norm = network.family.norm(network.model)
        self.words: nn.Linear = network.model.lm_head
        if ids is not None:
            self.words = nn.Linear(network.hidden_size, ids, network.model.lm_head.bias is not None)
            with torch.no_grad():
                for mine, whole in zip(
                    self.words.parameters(), network.model.lm_head.parameters(), strict=True
                ):
                    mine.copy_(whole[:ids])

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.words(self.norm(tensors[0])),)


@dataclass(frozen=True)
class DecoderParts:
    """The graphs of a decoder; fills: for every segment but the first. draft: None for a small vocabulary."""

    stem: Segment
    segments: tuple[Segment, ...]
    fills: tuple[Segment, ...]
    head: Segment
    draft: Segment | None

    def __iter__(self) -> Iterator[Segment]:
        drafts = () if self.draft is None else (self.draft,)
        return iter((self.stem, *self.segments, *self.fills, self.head, *drafts))


def split_decoder(network: DecoderNetwork, cuts: str | Sequence[int], draft: int = DRAFT) -> DecoderParts:
    """Stem, segments that end behind these blocks (as in parse_exits), what fills their caches, and heads.

    draft: ids of the head that drafts; a vocabulary that is not twice as large has none. Raises ValueError
    for a cut that there cannot be, for exits elsewhere, and for weights that are not float32.
    """
    if (dtype := next(network.parameters()).dtype) != torch.float32:
        raise ValueError(
            f"the network's weights are {dtype}; segments are float32: call network.float() first"
        )
    network.eval()
    ends = parse_exits(cuts, network.block_count)
    if network.exits and (bare := [end for end in ends[:-1] if str(end) not in network.exits]):
        have = ", ".join(sorted(network.exits, key=int))
        raise ValueError(f"a segment may not end behind block {bare[0]}: there are exits behind {have}")
    made, cached = _probe(network)
    longest, size = network.longest, network.hidden_size
    stem = Segment("stem", DecoderStem(network).eval(), (IDS, POSITIONS, VALID), made, (), Macs(), longest)
    reads = [tensor.name for tensor in made[1:]]
    turns = tuple(tensor for tensor in made[1:] if not tensor.name.startswith("mask"))
    segments, fills = list[Segment](), list[Segment]()
    for number, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
        blocks, numbers = range(start, end), tuple(range(start + 1, end + 1))
        module = DecoderStretch(network, blocks, reads).eval()
        past, new = _cache(cached, numbers, "past", "past"), _cache(cached, numbers, "new", "seq")
        outputs = [Tensor(NEXT + "hidden", "float32", made[0].shape), *new]
        weights = sum(linear_weights(network.blocks[block]) for block in blocks)
        if module.exit is not None:
            outputs.append(Tensor(LEAVING, "float32", made[0].shape))
            weights += size * size
        if module.policy is not None:
            outputs.append(Tensor(GATE, "float32", made[0].shape[:2]))
        macs, name = Macs(token=weights, pair=2 * size * len(blocks)), f"segment_{number:02}"
        segments.append(Segment(name, module, (*made, *past), tuple(outputs), numbers, macs, longest))
        if number:
            filling = DecoderFill(network, blocks, [tensor.name for tensor in turns]).eval()
            macs, name = Macs(token=2 * size * cached[0] * cached[1] * len(blocks)), f"fill_{number:02}"
            fills.append(Segment(name, filling, (made[0], *turns), new, numbers, macs, longest))
    few = draft if 2 * draft <= network.vocab_size else None
    return DecoderParts(
        stem,
        tuple(segments),
        tuple(fills),
        _head("head", network, made[0], None),
        None if few is None else _head("draft", network, made[0], few),
    )


def _head(name: str, network: DecoderNetwork, hidden: Tensor, ids: int | None) -> Segment:
    count = network.vocab_size if ids is None else ids
    logits = Tensor("logits", "float32", ("batch", "seq", count))
    module, macs = DecoderHead(network, ids).eval(), Macs(token=network.hidden_size * count)
    return Segment(name, module, (hidden,), (logits,), (), macs, network.longest)


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
