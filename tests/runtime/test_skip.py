"""Rule skip: which segments are skipped, evenly between the first and the last."""

import pytest

from offramp.runtime.rules import RuleSpec, bind
from offramp.runtime.rules.skip import skipped_segments, thinned_plan


@pytest.mark.parametrize("segments", [2, 3, 10, 24])
def test_skipped_segments_leave_as_many_as_are_to_run(segments: int) -> None:
    for run in range(2, segments + 1):
        skipped = skipped_segments(segments, run)
        assert len(skipped) == segments - run
        assert skipped <= set(range(1, segments - 1)), "the first and the last segment are run"


def test_skipped_segments_are_spread_evenly() -> None:
    assert skipped_segments(10, 10) == frozenset()
    assert skipped_segments(10, 2) == frozenset(range(1, 9))
    assert skipped_segments(3, 2) == {1}
    assert skipped_segments(10, 7) == {2, 5, 7}


def test_thinned_plan() -> None:
    assert thinned_plan(4, 1, frozenset({2})).tolist() == [[1, 1, -1, 1]]
    assert thinned_plan(2, 0, frozenset()).tolist() == [[0, 0]]


def test_plan_of_skip_is_the_same_for_every_prompt() -> None:
    rule = bind(RuleSpec("skip", {"segments": 2}), 3)
    assert rule.first_plan(3, 0).tolist() == [[0, -1, 0]] == rule.first_plan(3, 0, None).tolist()
