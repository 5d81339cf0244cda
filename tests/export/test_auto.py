"""Which exits to keep: the choice against trying every subset, and its two ends."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from offramp.export.auto import Choice, _expected, keep_exits


@pytest.mark.parametrize("seed", range(6))
def test_no_subset_is_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    leaves = rng.dirichlet(np.full(6, 0.5))
    block_ms, exit_ms = rng.uniform(0.2, 2.0, 6), float(rng.uniform(0.0, 1.0))
    kept = keep_exits(leaves, block_ms, exit_ms)
    assert kept[-1] == 5
    least = min(
        _expected(leaves, block_ms, exit_ms, (*subset, 5))
        for size in range(6)
        for subset in combinations(range(5), size)
    )
    assert _expected(leaves, block_ms, exit_ms, kept) == pytest.approx(least)


def test_exits_that_nobody_takes_go_and_free_ones_that_somebody_takes_stay() -> None:
    nobody = np.array([0.0, 0.0, 0.0, 1.0])
    assert keep_exits(nobody, np.ones(4), 0.1) == (3,)
    assert keep_exits(np.full(4, 0.25), np.ones(4), 0.0) == (0, 1, 2, 3)


def test_the_table_says_what_each_exit_is_worth() -> None:
    leaves, block_ms = np.array([0.5, 0.0, 0.5]), np.array([1.0, 1.0, 1.0])
    kept = keep_exits(leaves, block_ms, 0.2)
    choice = Choice((1, 2, 3), leaves, block_ms, 0.2, 0.1, kept)
    assert kept == (0, 2)
    # stem 0.1; all pass block 1 and its exit; half of them the other two blocks and one exit
    assert choice.expected_ms(kept) == pytest.approx(0.1 + 1.2 + 0.5 * 2.2)
    lines = choice.table().splitlines()
    assert [line.split()[-1] for line in lines[1:4]] == ["yes", "no", "yes"]
    assert lines[-1].endswith("with 2 of 3")
