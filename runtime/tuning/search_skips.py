"""Search which segments all tokens of answers skip: greedy, by the log-likelihood of completions (rule skip).

Beginning with no list, the segment is added whose removal costs least, given those removed before. A beam
keeps the best few lists of each length. The first and the last segment always run. Every candidate is one run
of the bundle over the completions, so that the time of a search grows with the square of the number of
segments. The finer the bundle is cut, the better the lists: segments of one or two blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from offramp.runtime.generator import TextGenerator
from offramp.runtime.progress import progress
from offramp.runtime.tuning.completions import score_plans

LEAST_SHARE = 0.6  # of the blocks that the shortest list leaves
WIDEST_BEAM = 3
Pair = tuple[list[int], list[int]]  # token ids of a prompt and of its completion


@dataclass(frozen=True)
class SkipList:
    """Segments (0-based) to skip, the blocks that are left, and nats a token on the rows of the search."""

    skipped: frozenset[int]
    blocks: int
    nats: float


def search_skips(
    session: TextGenerator, rows: Sequence[Pair], beam: int = 1, least_share: float = LEAST_SHARE
) -> list[SkipList]:
    """Find the best list of each length, from one skipped segment on, down to this share of the blocks.

    rows: prompts with completions of two tokens at least; each counts the same, whatever its length. Lists
    are in order of their length; none for a bundle in which nothing can be skipped. Progress is on stderr.
    """
    sizes = [len(segment.blocks) for segment in session.manifest.segments]
    lists = list[SkipList]()
    kept = [frozenset[int]()]
    runs = len(rows) * _most_runs(sizes, beam, least_share)
    with progress("searching skipped segments", runs, unit="run") as phase:
        while candidates := list(_candidates(kept, sizes, least_share)):
            nats = np.zeros(len(candidates))
            for prompt, completion in rows:
                nats -= score_plans(session, candidates, prompt, completion)[1]
                phase.advance(len(candidates))
            nats /= len(rows)
            order = np.argsort(nats, kind="stable")[:beam].tolist()
            kept = [candidates[number] for number in order]
            lists.append(SkipList(kept[0], _blocks_left(kept[0], sizes), float(nats[order[0]])))
            phase.note = f"{len(kept[0])} skipped, {lists[-1].nats:.3f} nats"
    return lists


def _candidates(
    kept: Sequence[frozenset[int]], sizes: Sequence[int], least_share: float
) -> Iterator[frozenset[int]]:
    """The lists that have one segment more than one of those kept, each once, in a fixed order."""
    longer = {
        skipped | {segment}
        for skipped in kept
        for segment in range(1, len(sizes) - 1)
        if segment not in skipped
    }
    for skipped in sorted(longer, key=sorted):
        if _blocks_left(skipped, sizes) >= least_share * sum(sizes) - 1e-9:
            yield skipped


def _blocks_left(skipped: frozenset[int], sizes: Sequence[int]) -> int:
    return sum(size for segment, size in enumerate(sizes) if segment not in skipped)


def _most_runs(sizes: Sequence[int], beam: int, least_share: float) -> int:
    """Most candidates that a search scores, if its lists hold the smallest segments."""
    middle, total, left, runs = sorted(sizes[1:-1]), sum(sizes), sum(sizes), 0
    for number, size in enumerate(middle):
        left -= size
        if left < least_share * total - 1e-9:
            break
        runs += (len(middle) - number) * (beam if number else 1)
    return runs
