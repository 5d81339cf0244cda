"""Rule skip: which segments are skipped, evenly between the first and the last, or as a list says."""

from __future__ import annotations

import pytest
from tiny_bundles import GENERATOR

from offramp.runtime import load_generator
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.errors import BadSetting
from offramp.runtime.rules import RuleSpec, bind
from offramp.runtime.rules.resolve import resolve_rule
from offramp.runtime.rules.skip import read_list, skipped_segments, spec_of_list, thinned_plan


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


def test_a_list_names_segments_from_one() -> None:
    assert read_list("skip:-3-7-9") == RuleSpec("skip", {}, skipped=(3, 7, 9)) == spec_of_list({8, 2, 6})
    rule = bind(read_list("skip:-3-1"), 4)
    assert rule.first_plan(4, 1).tolist() == [[-1, 1, -1, 1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("skip:-", "expected the segments to skip, a minus sign before each"),
        ("skip:-3-", "expected the segments to skip"),
        ("skip:-3+7", "expected the segments to skip"),
        ("skip:-x", "expected the segments to skip"),
        ("skip:--3", "expected the segments to skip"),
        ("skip:-²", "expected the segments to skip"),
        ("gate:-3", "only rule skip has a list of segments"),
    ],
)
def test_bad_list_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        read_list(text)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (RuleSpec("skip", {}, skipped=(5,)), "segment 5 does not exist; there are segments 1 to 4"),
        (RuleSpec("skip", {}, skipped=(0,)), "segment 0 does not exist"),
        (RuleSpec("skip", {}, skipped=(2, 3, 2)), r"\[2, 3, 2\] names a segment twice"),
        (RuleSpec("skip", {}, skipped=(1, 2, 3, 4)), "all 4 segments are skipped; leave one at least"),
        (RuleSpec("skip", {"segments": 2}, skipped=(2,)), "not both"),
        (RuleSpec("gate", {"threshold": 0.5}, skipped=(2,)), "rule gate: it skips no list of segments"),
        (RuleSpec("route", {"price": 0.5}, skipped=(2,)), "rule route: it skips no list of segments"),
    ],
)
def test_list_that_does_not_fit_is_refused(spec: RuleSpec, message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        bind(spec, 4)


def test_a_list_comes_as_text_and_takes_no_threshold() -> None:
    manifest = open_bundle(GENERATOR).manifest
    spec, variant = resolve_rule(manifest, rule="skip:-2")
    assert (spec, variant) == (RuleSpec("skip", {}, skipped=(2,)), "fp32")
    for rule in ("skip:-2", spec):
        with pytest.raises(BadSetting, match="a list says which segments are skipped; leave the threshold"):
            resolve_rule(manifest, rule=rule, threshold=2)


@pytest.mark.parametrize("skipped", ["1", "2", "3", "1-3"])
def test_every_segment_can_be_skipped(skipped: str) -> None:
    with load_generator(GENERATOR, rule=f"skip:-{skipped}") as session:
        first, *later = session.tokens([5, 9, 30, 12], 12)
    blocks = 3 - len(skipped.split("-"))
    assert first.depth == 3 and {token.depth for token in later} == {blocks}
    assert {token.blocks_run for token in later} == {blocks}


def test_list_of_the_middle_segment_is_the_even_skip() -> None:
    answers = []
    for options in ({"rule": "skip:-2"}, {"rule": "skip", "threshold": 2}):
        with load_generator(GENERATOR, **options) as session:
            answers.append(list(session.tokens([5, 9, 30, 12], 12)))
    assert answers[0] == answers[1]
