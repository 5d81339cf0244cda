"""The tree of walks against a list of all plans."""

from __future__ import annotations

import itertools
from itertools import pairwise

import numpy as np
import pytest

from offramp.training.walk_tree import grow_tree


def plans_by_hand(variants: int, segments: int, changes: int, increase: bool) -> set[tuple[int, ...]]:
    """Every plan that the limits allow, of every length."""
    return {
        plan
        for length in range(1, segments + 1)
        for plan in itertools.product(range(variants), repeat=length)
        if sum(a != b for a, b in pairwise(plan)) <= changes and (increase or list(plan) == sorted(plan))
    }


@pytest.mark.parametrize("increase", [True, False])
@pytest.mark.parametrize("changes", [1, 2])
def test_the_nodes_are_all_walks_within_the_limits(changes: int, increase: bool) -> None:
    tree = grow_tree(3, 4, changes, increase=increase)
    expected = plans_by_hand(3, 4, changes, increase)
    assert len(tree) == len(expected)
    padded = np.array([[*plan, *[-1] * (4 - len(plan))] for plan in sorted(expected)], np.int8)
    ends = tree.end_nodes(padded)
    assert sorted(ends.tolist()) == list(range(len(tree)))
    assert tree.segment[ends].tolist() == [len(plan) - 1 for plan in sorted(expected)]
    assert tree.variant[ends].tolist() == [plan[-1] for plan in sorted(expected)]
    assert tree.so_far[ends].tolist() == [sum(a != b for a, b in pairwise(p)) for p in sorted(expected)]


def test_twelve_exits_and_three_precisions_stay_small() -> None:
    assert len(grow_tree(3, 12, 2, increase=False)) == 36 + 3 * 66 + 220
    assert len(grow_tree(3, 12, 1, increase=True)) == 36 + 6 * 66


def test_paths_ahead_stay_in_one_variant() -> None:
    tree = grow_tree(2, 4, 1, increase=False)
    (after_one,) = tree.end_nodes(np.array([[0, 0, -1, -1]], np.int8))
    ahead = tree.paths_from(np.array([after_one]))[0]
    plans = np.array([[0, 0, 0, -1], [0, 0, 0, 0], [0, 0, 1, -1], [0, 0, 1, 1]], np.int8)
    assert ahead.tolist() == tree.end_nodes(plans).reshape(2, 2).tolist()
    (in_second,) = tree.end_nodes(np.array([[0, 1, -1, -1]], np.int8))
    assert tree.paths_from(np.array([in_second]))[0, 0].tolist() == [-1, -1]


def test_a_plan_outside_of_the_tree_is_refused() -> None:
    tree = grow_tree(2, 3, 1, increase=True)
    with pytest.raises(ValueError, match="not collected"):
        tree.end_nodes(np.array([[0, 1, 0]], np.int8))
