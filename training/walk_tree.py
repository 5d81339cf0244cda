"""All walks of rule quee through segments and variants, as a tree that is small enough to run completely.

A walk so far is a node. Walks that begin alike share their first nodes, so that a table with one column a
node contains every walk, however often it changes the variant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class WalkTree:
    """Walks through `segments` segments with at most `changes` changes of variant.

    increase: whether a change may go to an earlier variant, which is a more precise one. Nodes are numbered
    segment by segment, those of the first segment by their variants. Arrays over nodes: segment, variant, and
    so_far, the number of changes. child [nodes, variants]: the node of the next segment in each variant,
    -1 where no walk goes.
    """

    variants: int
    segments: int
    changes: int
    increase: bool
    segment: Numbers
    variant: Numbers
    so_far: Numbers
    child: Numbers

    def __len__(self) -> int:
        return len(self.segment)

    @property
    def straight(self) -> Numbers:
        """The nodes of walks without a change [variants, segments]."""
        nodes = [np.arange(self.variants)]
        for _ in range(self.segments - 1):
            nodes.append(self.child[nodes[-1], np.arange(self.variants)])
        return np.stack(nodes, axis=1)

    def paths_from(self, nodes: Numbers) -> Numbers:
        """The nodes of every path ahead [len(nodes), variants, exits ahead]; nodes of one segment.

        A path goes on in one variant; -1 for paths that no walk takes.
        """
        variants = np.arange(self.variants)
        following = self.child[nodes]  # [nodes, variants]
        steps = [following]
        for _ in range(self.segments - 2 - int(self.segment[nodes[0]])):
            # A walk that has gone on in a variant may always stay in it.
            following = np.where(following < 0, -1, self.child[following, variants])
            steps.append(following)
        return np.stack(steps, axis=-1)

    def end_nodes(self, plans: NDArray[np.int8]) -> Numbers:
        """The last node of each walk [rows]; plans [rows, segments], -1 for segments that are not run.

        Raises ValueError for a plan that is no walk of this tree.
        """
        nodes = plans[:, 0].astype(np.int64)
        for segment in range(1, self.segments):
            run = plans[:, segment] >= 0
            nodes[run] = self.child[nodes[run], plans[run, segment]]
            if (nodes < 0).any():
                raise ValueError(f"a plan changes its variant in a way that was not collected: {plans}")
        return nodes

    def select_variants(self, numbers: Sequence[int]) -> tuple[WalkTree, Numbers]:
        """The tree of walks through these variants alone, and the node of this tree for each of its nodes."""
        smaller = grow_tree(len(numbers), self.segments, self.changes, increase=self.increase)
        here = np.full(len(smaller), -1)
        here[: len(numbers)] = numbers
        for node in range(len(smaller)):
            for variant, child in enumerate(smaller.child[node]):
                if child >= 0:
                    here[child] = self.child[here[node], numbers[variant]]
        return smaller, here


def grow_tree(variants: int, segments: int, changes: int, *, increase: bool) -> WalkTree:
    """Grow the tree of all walks; see WalkTree for the arguments."""
    nodes = [(0, variant, 0) for variant in range(variants)]  # (segment, variant, changes so far)
    children: list[list[int]] = []
    for segment, variant, so_far in nodes:  # grows while it is read
        following = []
        for chosen in range(variants):
            total = so_far + (chosen != variant)
            allowed = total <= changes and (increase or chosen >= variant)
            if segment + 1 == segments or not allowed:
                following.append(-1)
                continue
            following.append(len(nodes))
            nodes.append((segment + 1, chosen, total))
        children.append(following)
    segment_of, variant_of, changes_of = (np.array(column, np.int64) for column in zip(*nodes, strict=True))
    child = np.array(children, np.int64)
    return WalkTree(variants, segments, changes, increase, segment_of, variant_of, changes_of, child)
