"""The search of skip lists: which candidates there are, and how it ends."""

from __future__ import annotations

import pytest
from tiny_bundles import GENERATOR

from offramp.runtime import load_generator
from offramp.runtime.tuning.completions import score_plans
from offramp.runtime.tuning.search_skips import _candidates, _most_runs, search_skips

ROWS = [([5, 9, 30, 12], [8, 41, 3, 27]), ([7, 7, 2], [15, 8, 50]), ([40], [4, 5, 6, 7, 8])]


def test_candidates_have_one_segment_more_and_keep_both_ends() -> None:
    longer = list(_candidates([frozenset({2}), frozenset({3})], [1] * 6, 0.5))
    assert longer == [{1, 2}, {1, 3}, {2, 3}, {2, 4}, {3, 4}]


def test_candidates_leave_their_share_of_the_blocks() -> None:
    sizes = [2, 1, 4, 1, 2]
    assert list(_candidates([frozenset()], sizes, 0.7)) == [{1}, {3}]
    assert list(_candidates([frozenset()], sizes, 0.6)) == [{1}, {2}, {3}]
    assert list(_candidates([frozenset({1})], sizes, 0.9)) == []


@pytest.mark.parametrize(
    ("sizes", "beam", "share", "runs"),
    [
        ([1] * 30, 1, 0.6, sum(range(17, 29))),
        ([1] * 5, 2, 0.6, 3 + 2 * 2),
        ([1, 4, 1], 1, 0.6, 0),
        ([3], 1, 0.6, 0),
    ],
)
def test_number_of_candidates_is_known_before(sizes: list[int], beam: int, share: float, runs: int) -> None:
    assert _most_runs(sizes, beam, share) == runs


def test_a_list_has_the_mean_score_of_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    with load_generator(GENERATOR, rule="never") as session:
        (searched,) = search_skips(session, ROWS)
        scores = [score_plans(session, [frozenset({1})], *row)[1][0] for row in ROWS]
        assert search_skips(session, ROWS, least_share=0.7) == []
    assert (searched.skipped, searched.blocks) == ({1}, 2)
    assert searched.nats == pytest.approx(-sum(scores) / len(scores))
    assert "searching skipped segments: 3 runs" in capsys.readouterr().err
