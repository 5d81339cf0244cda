"""How ways of tokens are fitted on dev rows, for depth.py: which blocks to skip, and thresholds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from offramp.benchmarks.depth_rows import Judge, Rows, follow, judged, losses
from offramp.models.decoder import DecoderNetwork
from offramp.models.generation import Walk, Way, read_prompts


def skips(skipped: Sequence[int]) -> Way:
    """All tokens go past these blocks (0-based)."""
    past = frozenset(skipped)

    def way(number: int, hidden: Tensor, walk: Walk) -> Tensor | None:
        return torch.zeros_like(hidden[..., 0]) if number in past else None

    return way


class Dev:
    """Rows to fit on, their prompts read once. Where there are texts to hold answers against, depth is that
    of answers, which a way that says other things makes other than it is on the texts themselves.
    """

    def __init__(self, network: DecoderNetwork, rows: Rows, batch: int, judge: Judge = losses) -> None:
        self.network, self.rows, self.judge = network, rows, judge
        self.caches = [(i, read_prompts(network, [rows.prompts[n] for n in i])) for i in rows.batches(batch)]

    @torch.no_grad()
    def states(self, way: Way | None) -> list[list[Tensor]]:
        """Hidden behind every block, by batch."""
        found: list[list[Tensor]] = [[] for _ in self.caches]
        for (index, cache), states in zip(self.caches, found, strict=True):
            follow(self.network, self.rows, index, cache, way, states)
        return found

    @torch.no_grad()
    def loss(self, way: Way | None, block: int, before: list[list[Tensor]]) -> float:
        """Nats a token, every row alike, of a way that is another's up to this block (0-based, from 1 on);
        before: the states of that other.
        """
        scores = []
        for (index, cache), states in zip(self.caches, before, strict=True):
            start = block, states[block - 1]
            hidden, walk = follow(self.network, self.rows, index, cache, way, start=start)
            scores += [score["score"] for score in judged(self.network, self.rows, index, hidden, walk)]
        return -float(np.mean(scores))

    def depth(self, way: Way) -> float:
        """Blocks a token, every row alike."""
        means = []
        for index, cache in self.caches:
            if self.rows.references is not None:
                found = self.judge(self.network, self.rows, index, cache, way)
                means += [float(score["depth"]) for score in found]  # type: ignore[arg-type]
                continue
            depth = follow(self.network, self.rows, index, cache, way)[1].depth.float()
            means += [float(depth[row, : len(self.rows.after[i]) - 1].mean()) for row, i in enumerate(index)]
        return float(np.nanmean(means))


def search(dev: Dev, most: int, found: list[int], step: Callable[[list[int]], None]) -> list[int]:
    """Blocks (0-based) to go past, the one that dev's loss misses least first, given those before: greedy.

    found: where to go on; step is given the list whenever it has grown.
    """
    middle = range(1, dev.network.block_count - 1)
    while len(found) < most:
        free = [block for block in middle if block not in found]
        states = dev.states(skips(found))  # what comes before the block that is tried is known
        found = [*found, min(free, key=lambda block: dev.loss(skips([*found, block]), block, states))]
        step(found)
    return found


def dialled(dev: Dev, make: Callable[[float], Way], low: float, high: float, depth: float) -> float:
    """The setting of a way, whose depth grows with it, that comes nearest to a mean depth on dev."""
    tried: dict[float, float] = {}
    for _ in range(12):
        middle = (low + high) / 2
        tried[middle] = dev.depth(make(middle))
        if abs(tried[middle] - depth) < 0.05:
            break
        low, high = (middle, high) if tried[middle] < depth else (low, middle)
    return min(tried, key=lambda setting: abs(tried[setting] - depth))
