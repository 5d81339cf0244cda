"""Greedy answers of a decoder whose tokens each go their own way through the blocks, for measuring quality.

A token that goes past a block still leaves keys and values there, as in models.depth; prompts run every
block. What no token of a batch runs is not computed, the rest is computed and then chosen from: this counts
depth, it does not time it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from offramp.models.decoder import DecoderNetwork, Pair


@dataclass
class Walk:
    """What became of the tokens of one pass.

    rows: which text each row of the batch is, for ways that are chosen a text [batch].
    left: blocks behind which each token left for the head [batch, seq]; all of them where it did not.
    depth: blocks run [batch, seq]. extra: multiply-adds that deciding took, counted by who decides.
    """

    rows: Tensor
    left: Tensor
    depth: Tensor = field(init=False)
    extra: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.blocks = int(self.left.max())
        self.depth, self.extra = torch.zeros_like(self.left), torch.zeros_like(self.left, dtype=torch.float)

    @property
    def staying(self) -> Tensor:
        """Tokens that have not left [batch, seq]."""
        return self.left == self.blocks

    def leave(self, block: int, where: Tensor) -> None:
        """Tokens leave behind this many blocks, unless they left before; where [batch, seq]."""
        self.left = torch.where(where & self.staying, block, self.left)


# (block, 0-based, hidden [batch, seq, hidden] that enters it, walk) -> 1 for tokens that run it, 0 for those
# that go past it [batch, seq], or None where all run it. Tokens that it has leave must go past the rest.
Way = Callable[[int, Tensor, Walk], Tensor | None]


class Cache:
    """Keys and values of a batch of prompts, padded on the left, with room for what follows.

    counts: places where a token stands [batch, places]; length: places taken. states: hidden behind each
    block of every prompt's last token [blocks, batch, hidden].
    """

    def __init__(self, counts: Tensor, pairs: list[Pair]) -> None:
        self.counts, self.pairs, self.length = counts, pairs, 0
        self.states = torch.empty(0)

    def copy(self, room: int) -> Cache:
        """Another of the same prompts, with this many places more than are taken."""
        pairs = [
            (_grown(keys[:, :, : self.length], room), _grown(values[:, :, : self.length], room))
            for keys, values in self.pairs
        ]
        made = Cache(functional.pad(self.counts[:, : self.length], (0, room)), pairs)
        made.length, made.states = self.length, self.states
        return made


def _grown(one: Tensor, room: int) -> Tensor:
    return functional.pad(one, (0, 0, 0, room))


class Answers(NamedTuple):
    """By prompt and token: ids, the stop token too; blocks run; multiply-adds of deciding.

    The first token of each comes of the prompt's own pass: it took every block.
    """

    tokens: list[list[int]]
    depths: list[list[int]]
    extra: list[list[float]]


@torch.no_grad()
def read_prompts(network: DecoderNetwork, prompts: Sequence[Sequence[int]]) -> Cache:
    """Prompts through every block; each needs a token at least."""
    device = next(network.parameters()).device
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    counts = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], device=device)
    cache = Cache(torch.zeros_like(counts), [])
    states: list[Tensor] = []
    walk = Walk(torch.arange(len(prompts), device=device), torch.full_like(ids, network.block_count))
    advance(network, cache, ids, counts, walk, None, states)
    cache.states = torch.stack([state[:, -1] for state in states])
    return cache


@torch.no_grad()
def advance(
    network: DecoderNetwork,
    cache: Cache,
    ids: Tensor,
    counts: Tensor,
    walk: Walk,
    way: Way | None,
    states: list[Tensor] | None = None,
    start: tuple[int, Tensor] | None = None,
) -> Tensor:
    """Tokens [batch, seq] that follow what the cache holds, which grows by them: hidden as the head reads it.

    counts [batch, seq]: False for padding. states: where hidden behind every block is put. start: a block
    (0-based) and what enters it, where that is known; those before it then keep nothing of these tokens, nor
    do they count as depth.
    """
    begin, end = cache.length, cache.length + ids.shape[1]
    cache.counts[:, begin:end] = counts
    cache.length = end
    places = torch.arange(end, device=ids.device)
    own = places[begin:, None]
    # Padding reads itself: with nothing to read its softmax is NaN, and NaN times a share of zero still is.
    mask = (cache.counts[:, None, None, :end] & (places <= own)) | (places == own)
    positions = (cache.counts.cumsum(1)[:, begin:end] - 1).clamp(min=0)
    family, hidden = network.family, network.family.embed(network.model, ids, positions)
    context = family.context(network.model, hidden, positions)
    first, hidden = start or (0, hidden)
    for number, block in enumerate(network.blocks[first:], first):
        share = None if way is None else way(number, hidden, walk)
        walk.depth += 1 if share is None else share.long()
        queries, keys, values = family.project(block, hidden, context)
        if number == len(cache.pairs):
            cache.pairs.append((keys, values))
        else:
            for kept, new in zip(cache.pairs[number], (keys, values), strict=True):
                kept[:, :, begin:end] = new
        if share is None or bool(share.any()):
            keys, values = (kept[:, :, :end] for kept in cache.pairs[number])
            attended = functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=1.0, enable_gqa=True
            )
            behind = family.finish(block, hidden, attended.transpose(1, 2).flatten(2))
            hidden = behind if share is None else torch.lerp(hidden, behind, share[..., None].to(hidden))
        if states is not None:
            states.append(hidden)
    for name in network.exits:
        # A token that left has the hidden state of its exit still.
        at = walk.left == int(name)
        if bool(at.any()):
            hidden = torch.where(at[..., None], network.leaving(int(name), hidden), hidden)
    return hidden


@torch.no_grad()
def generate(
    network: DecoderNetwork,
    prompts: Sequence[Sequence[int]],
    most: int,
    stop: set[int],
    way: Way | None = None,
    rows: Sequence[int] | None = None,
    cache: Cache | None = None,
) -> Answers:
    """Likeliest tokens after each prompt, `most` of them or up to one of `stop`.

    rows: numbers of the prompts for `way`, from 0 where None. cache: what read_prompts gave of them.
    """
    cache = (read_prompts(network, prompts) if cache is None else cache).copy(most)
    device, blocks = cache.counts.device, network.block_count
    numbers = torch.tensor(range(len(prompts)) if rows is None else list(rows), device=device)
    answers = Answers(*([[] for _ in prompts] for _ in range(3)))  # type: ignore[arg-type]
    hidden = cache.states[-1][:, None]
    walk = Walk(numbers, torch.full((len(prompts), 1), blocks, device=device))
    walk.depth += blocks
    going = [True] * len(prompts)
    for step in range(most):
        said = network.head(hidden[:, -1]).argmax(-1)
        told = zip(said.tolist(), walk.depth[:, 0].tolist(), walk.extra[:, 0].tolist(), strict=True)
        for row, (token, depth, extra) in enumerate(told):
            if going[row]:
                answers.tokens[row].append(token)
                answers.depths[row].append(depth)
                answers.extra[row].append(extra)
                going[row] = token not in stop
        if not any(going) or step + 1 == most:
            break
        walk = Walk(numbers, torch.full((len(prompts), 1), blocks, device=device))
        counts = torch.ones(len(prompts), 1, dtype=torch.bool, device=device)
        hidden = advance(network, cache, said[:, None], counts, walk, way)
    return answers
