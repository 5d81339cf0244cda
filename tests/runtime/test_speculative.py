"""Rule speculative: how it estimates acceptance and times, and what it chooses by them."""

from __future__ import annotations

import pytest

from offramp.runtime.rules.base import RuleSpec
from offramp.runtime.rules.speculative import (
    CLASSES,
    PRIOR_RATE,
    TIME_SLOPE,
    AcceptanceRate,
    SpeculativeRule,
    StepTimes,
)


def test_acceptance_rate_starts_at_the_prior_and_follows_drafts() -> None:
    rate = AcceptanceRate()
    assert rate.overall() == pytest.approx(PRIOR_RATE) == rate.at_probability(0.5)
    assert rate.optimistic() > rate.overall()
    for _ in range(1000):
        rate.record(0.9, right=True)
        rate.record(0.01, right=False)
    assert rate.overall() == pytest.approx(0.5, abs=0.01)
    assert rate.at_probability(0.9) > 0.99 and rate.at_probability(0.01) < 0.01
    assert rate.at_probability(0.25) == pytest.approx(rate.overall()), "no such draft was verified"
    assert rate.at_probability(CLASSES[-1] + 0.2) == rate.at_probability(0.95), "one class has one rate"
    assert 0 < rate.optimistic() - rate.overall() < 0.01


def test_acceptance_rate_forgets() -> None:
    rate = AcceptanceRate()
    for _ in range(100):
        rate.record(0.5, right=False)
    low = rate.overall()
    for _ in range(100):
        rate.decay(0.9)
    assert low < 0.1 and rate.overall() == pytest.approx(PRIOR_RATE, abs=0.01)


def test_step_times_ignore_the_first_and_limit_outliers() -> None:
    times = StepTimes()
    times.record("segment", 0, 1, 50.0)  # binds memory
    assert times.expected("segment", 0, 1) == 0
    times.record("segment", 0, 1, 1.0)
    assert times.expected("segment", 0, 1) == 1
    times.record("segment", 0, 1, 1000.0)  # interrupted by other work
    assert times.expected("segment", 0, 1) == pytest.approx(1.2)


def test_step_times_of_more_tokens_are_estimated_until_measured() -> None:
    times = StepTimes()
    for seconds in (9.0, 2.0):
        times.record("head", 0, 1, seconds)
    assert times.expected("head", 0, 4) == pytest.approx(2 * (1 + 3 * TIME_SLOPE))
    for seconds in (9.0, 5.0):
        times.record("head", 0, 4, seconds)
    assert times.expected("head", 0, 4) == 5
    assert times.expected("draft", 0, 1) == 0


def measured_rule() -> SpeculativeRule:
    """A rule for three segments, the last of which takes ten times as long; all times are measured."""
    rule = SpeculativeRule(RuleSpec("speculative", {}), 3)
    for _ in range(2):
        for tokens in range(1, 10):
            for segment, seconds in enumerate((1.0, 1.0, 10.0)):
                rule.times.record("segment", segment, tokens, seconds)
            rule.times.record("head", 0, tokens, 2.0)
        rule.times.record("draft", 0, 1, 0.5)
    return rule


def test_times_to_and_from_an_exit() -> None:
    times = measured_rule().times
    assert (times.expected_to_exit(1), times.expected_to_exit(2)) == (1, 2)
    assert (times.expected_from_exit(0, 3, 1), times.expected_from_exit(2, 3, 4)) == (14, 12)


def test_choice_follows_what_pays() -> None:
    rule = measured_rule()
    assert rule.choose_drafts(8)[0] == 1, "nothing is known yet: the cheapest exit is tried"
    for _ in range(30):
        rule.record_round(1, [(7, 0.6)], [8], 1)
    assert rule.choose_drafts(8)[0] == 2, "drafts of exit 1 were wrong"
    for _ in range(30):
        rule.record_round(2, [(7, 0.6)], [7, 9], 1)
    exit, drafts = rule.choose_drafts(8)
    assert exit == 2 and drafts > 2 and rule.choose_drafts(1) == (2, 1)
    assert rule.accepted == {1: 0, 2: 30} and rule.offered == {1: 30, 2: 30}
    while (pair := rule.choose_drafts(8)) != (0, 0):  # all drafts are wrong from here on
        rule.record_round(pair[0], [(7, 0.6)], [8], 1)
        assert sum(rule.rounds.values()) < 300, "it should give up drafting"
    assert rule.rounds[0] == 0
    while rule.choose_drafts(8) == (0, 0):
        rule.record_round(0, [], [8], 0)
        assert rule.rounds[0] < 3000, "it should try again after a while"


def test_choice_without_measured_times_is_to_draft_or_not_but_never_fails() -> None:
    exit, drafts = SpeculativeRule(RuleSpec("speculative", {}), 3).choose_drafts(8)
    assert exit in (0, 1, 2) and 0 <= drafts <= 8


def test_unlikely_drafts_are_not_worth_verifying() -> None:
    rule = measured_rule()
    for _ in range(300):
        rule.record_round(2, [(7, 0.9)], [7, 9], 1)
        rule.record_round(2, [(7, 0.05)], [8], 1)
    assert rule.worth_verifying(2, [0.9]) and not rule.worth_verifying(2, [0.05])
    assert not rule.worth_verifying(2, [0.9, 0.05])


def test_fixed_pair_is_always_used() -> None:
    rule = SpeculativeRule(RuleSpec("speculative", {"exit": 2, "drafts": 5}), 3, (2, 5))
    assert (
        rule.choose_drafts(8) == (2, 5)
        and rule.choose_drafts(3) == (2, 3)
        and rule.choose_drafts(0) == (2, 0)
    )
    assert rule.worth_verifying(2, [0.0, 0.0])


def test_record_round_counts_unverified_drafts_as_long_as_all_before_were_right() -> None:
    rule = measured_rule()
    rule.record_round(1, [(7, 0.6), (8, 0.6), (9, 0.6)], [7, 8, 5], 2)
    assert (rule.offered[1], rule.accepted[1], rule.rounds) == (2, 2, {0: 0, 1: 1, 2: 0})
    only_right = measured_rule()
    only_right.record_round(1, [(7, 0.6), (8, 0.6)], [7, 8, 5], 2)
    assert rule._rates[1].overall() < only_right._rates[1].overall(), "the third draft was wrong"
