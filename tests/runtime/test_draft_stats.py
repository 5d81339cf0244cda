"""What rule speculative learns: acceptance rates of exits and of lookups, times of steps, and budgets."""

from __future__ import annotations

import pytest

from offramp.runtime.rules.draft_stats import (
    CLASSES,
    LARGEST_BUDGET,
    LARGEST_LOSS,
    PRIOR_MATCH_RATES,
    PRIOR_RATE,
    TIME_SLOPE,
    AcceptanceRate,
    Budget,
    MatchRates,
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
    assert rate.at_probability(0.25) == pytest.approx(rate.overall()), "no such draft was compared"
    assert rate.at_probability(CLASSES[-1] + 0.2) == rate.at_probability(0.95), "one class has one rate"
    assert 0 < rate.optimistic() - rate.overall() < 0.02


def test_acceptance_rate_forgets() -> None:
    rate = AcceptanceRate()
    for _ in range(100):
        rate.record(0.5, right=False)
    low = rate.overall()
    for _ in range(100):
        rate.decay(0.9)
    assert low < 0.1 and rate.overall() == pytest.approx(PRIOR_RATE, abs=0.01)


def test_rates_of_matches_start_at_a_prior_that_grows_with_their_length() -> None:
    rates = [MatchRates().rate(length) for length in range(2, 40)]
    assert rates == sorted(rates) and rates[0] == pytest.approx(PRIOR_MATCH_RATES[0])
    assert rates[-1] == pytest.approx(PRIOR_MATCH_RATES[-1])


def test_a_text_learns_its_own_rates_and_those_of_the_session() -> None:
    session = MatchRates()
    bad, good = MatchRates(session), MatchRates(session)
    for _ in range(60):
        bad.record(3, right=False)
        good.record(3, right=True)
    assert bad.rate(3) < 0.1 < 0.9 < good.rate(3)
    assert session.rate(3) == pytest.approx(0.5, abs=0.05)
    assert MatchRates(session).rate(3) == pytest.approx(session.rate(3))
    assert session.rate(4) == MatchRates().rate(4), "lookups of other lengths tell nothing"


def test_rates_of_a_text_follow_a_change() -> None:
    rates = MatchRates(MatchRates())
    for _ in range(500):
        rates.record(2, right=False)
    for _ in range(40):
        rates.record(2, right=True)
    assert rates.rate(2) > 0.5


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
    assert times.expected_draft() == 2, "the full head, until the head that drafts was measured"


def test_times_to_and_from_an_exit() -> None:
    times = StepTimes()
    for segment, seconds in enumerate((1.0, 1.0, 10.0)):
        for _ in range(2):
            assert not times.knows_one_token(3)
            times.record("segment", segment, 1, seconds)
            times.record("head", 0, 1, 2.0)
    assert times.knows_one_token(3)
    assert (times.expected_to_exit(1), times.expected_to_exit(2)) == (1, 2)
    assert (times.expected_from_exit(0, 3, 1), times.expected_from_exit(2, 3, 1)) == (14, 12)


def test_budget_is_spent_by_losses_and_grows_with_tokens_and_gains() -> None:
    budget = Budget(0.01, 0.5)
    assert budget.is_left
    budget.settle(-0.5)
    assert not budget.is_left
    budget.add_tokens(10)
    assert budget.is_left, "a hundredth of the tokens"
    budget.settle(-1000.0)  # a round that was interrupted by other work
    budget.add_tokens(round(100 * LARGEST_LOSS))
    assert budget.is_left
    budget.settle(1000.0)
    for _ in range(int(LARGEST_BUDGET / LARGEST_LOSS) + 1):
        budget.settle(-LARGEST_LOSS)
    assert not budget.is_left, "gains of long ago pay for a few rounds only"
