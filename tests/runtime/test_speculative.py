"""Rule speculative: what it chooses from acceptance rates and times, and what trying may cost."""

from __future__ import annotations

import pytest

from offramp.runtime.errors import BadSetting
from offramp.runtime.rules import RuleSpec
from offramp.runtime.rules.draft_stats import MatchRates
from offramp.runtime.rules.speculative import (
    LOOKUP,
    LOOKUP_SIZES,
    NO_SOURCE,
    TIMED_EVERY,
    WITHOUT_DRAFTS,
    Draft,
    DraftChoice,
    SourceKey,
    SpeculativeRule,
    chosen_sources,
    read_sources,
    source_name,
)

SEGMENT, HEAD, DRAFT = 5.0, 2.0, 1.0  # seconds
ONE_TOKEN = 3 * SEGMENT + HEAD


def measured_rule(
    fixed: tuple[SourceKey, int] | None = None, sources: list[SourceKey] | None = None
) -> SpeculativeRule:
    """A rule for three equal segments, whose steps take as long for many tokens as for one."""
    rule = SpeculativeRule(RuleSpec("speculative", {}), 3, fixed, sources)
    for _ in range(2):
        for tokens in range(1, 17):
            for segment in range(3):
                rule.times.record("segment", segment, tokens, SEGMENT)
            rule.times.record("head", 0, tokens, HEAD)
        rule.times.record("draft", 0, 1, DRAFT)
    rule.record_round(WITHOUT_DRAFTS, [], [7], 0, ONE_TOKEN)
    return rule


def run_round(rule: SpeculativeRule, choice: DraftChoice | None, *, right: bool) -> tuple[float, int]:
    """Record a round in which all drafts are right, or all wrong; returns its seconds and tokens."""
    if choice is None:
        rule.record_plain()
        return ONE_TOKEN, 1
    drafts = [Draft(7, 0.6)] * choice.drafts
    tokens, seconds, verified = [7 if right else 8], ONE_TOKEN, 0
    if choice.probe:
        seconds += DRAFT
    elif choice.drafts:
        verified = choice.drafts
        tokens = [7] * choice.drafts + [9] if right else [8]
        if isinstance(choice.source, int):
            seconds += choice.drafts * (choice.source * SEGMENT + DRAFT)
    rule.record_round(choice, drafts, tokens, verified, seconds)
    return seconds, len(tokens)


def test_nothing_is_drafted_before_the_steps_of_one_token_were_measured() -> None:
    rule = SpeculativeRule(RuleSpec("speculative", {}), 3)
    for _ in range(3):
        assert rule.choose(8, 20, MatchRates()) == WITHOUT_DRAFTS
        rule.record_round(WITHOUT_DRAFTS, [], [7], 0, ONE_TOKEN)


def test_few_rounds_without_drafts_are_timed() -> None:
    rule, choices = measured_rule(sources=[LOOKUP]), list[DraftChoice | None]()
    for _ in range(10 * TIMED_EVERY):
        choices.append(rule.choose(8))
        run_round(rule, choices[-1], right=True)
    assert choices.count(WITHOUT_DRAFTS) == 10 and choices.count(None) == 10 * (TIMED_EVERY - 1)
    assert rule.rounds[NO_SOURCE] == 10 * TIMED_EVERY + 1


def test_an_exit_is_probed_before_it_drafts() -> None:
    rule = measured_rule()
    assert rule.choose(8) == DraftChoice(1, 1, probe=True)
    for _ in range(30):
        choice = rule.choose(8)
        run_round(rule, choice, right=True)
    assert choice is not None and choice.source == 1 and not choice.probe and choice.drafts > 2
    assert rule.probes[1] > 0 and rule.accepted == rule.offered and rule.offered[1] > 0
    assert rule.choose(1) == DraftChoice(1, 1)


def test_exits_that_are_wrong_are_probed_a_few_times_and_never_draft() -> None:
    rule = measured_rule()
    for _ in range(200):
        run_round(rule, rule.choose(8), right=False)
    assert 1 < sum(rule.probes.values()) < 15
    assert rule.offered == {1: 0, 2: 0, LOOKUP: 0} and rule.rounds[NO_SOURCE] == 201


def test_an_exit_is_probed_again_after_a_while() -> None:
    rule = measured_rule()
    for _ in range(200):
        run_round(rule, rule.choose(8), right=False)
    probes = sum(rule.probes.values())
    for _ in range(6000):
        run_round(rule, rule.choose(8), right=False)
    assert sum(rule.probes.values()) > probes


def test_an_exit_whose_drafts_become_wrong_is_given_up() -> None:
    rule = measured_rule()
    for _ in range(100):
        run_round(rule, rule.choose(8), right=True)
    for _ in range(300):
        run_round(rule, rule.choose(8), right=False)
    choice = rule.choose(8)
    assert choice is None or not choice.drafts or choice.probe


@pytest.mark.parametrize("right_at_first", [0, 300])
def test_tries_that_do_not_pay_cost_little(right_at_first: int) -> None:
    rule = measured_rule()
    for _ in range(right_at_first):
        run_round(rule, rule.choose(8), right=True)
    seconds, tokens = 0.0, 0
    while tokens < 5000:
        taken, count = run_round(rule, rule.choose(8), right=False)
        seconds, tokens = seconds + taken, tokens + count
    assert seconds / (tokens * ONE_TOKEN) < 1.012


def test_long_matches_that_were_right_draft_many_tokens() -> None:
    rule = measured_rule(sources=[LOOKUP])
    rates = MatchRates(rule.match_rates)
    for length in range(2, 60):
        rates.record(length, right=True)
    assert rule.choose(15, 20, rates) == DraftChoice(LOOKUP, LOOKUP_SIZES[-1])
    choice = rule.choose(5, 20, rates)
    assert choice == DraftChoice(LOOKUP, 4), "the largest of its numbers for which there is room"
    assert rule.choose(0, 20, rates) in (None, WITHOUT_DRAFTS)


def test_matches_that_were_wrong_draft_nothing() -> None:
    rule = measured_rule(sources=[LOOKUP])
    rates = MatchRates(rule.match_rates)
    for _ in range(2000):
        rates.record(2, right=False)
    assert rule.choose(15, 2, rates) in (None, WITHOUT_DRAFTS)
    assert rule.choose(15, 0, rates) in (None, WITHOUT_DRAFTS)


def test_further_tokens_that_cost_much_limit_the_drafts() -> None:
    rates = MatchRates()
    for _ in range(50):
        for length in range(2, 20):
            rates.record(length, right=length % 2 == 0)
    flat, steep = measured_rule(sources=[LOOKUP]), measured_rule(sources=[LOOKUP])
    for _ in range(200):
        for tokens in range(2, 17):
            for segment in range(3):
                steep.times.record("segment", segment, tokens, SEGMENT * (1 + 0.4 * (tokens - 1)))
    flat_choice, steep_choice = flat.choose(15, 4, rates), steep.choose(15, 4, rates)
    assert flat_choice is not None and flat_choice.drafts > 1
    assert steep_choice is None or steep_choice.drafts < flat_choice.drafts


def test_the_faster_source_drafts() -> None:
    rule = measured_rule()
    for _ in range(60):
        run_round(rule, rule.choose(8), right=True)
    rates = MatchRates(rule.match_rates)
    by_exit, by_lookup = rule.choose(8, 2, rates), rule.choose(8, 30, rates)
    assert by_exit is not None and by_exit.source == 1
    assert by_lookup is not None and by_lookup.source == LOOKUP


def test_tokens_that_are_run_again_count_as_time() -> None:
    rates = MatchRates()
    rule = measured_rule(sources=[LOOKUP])
    choice = rule.choose(15, 3, rates)
    assert choice is not None and choice.drafts
    for _ in range(200):
        rule.record_round(choice, [Draft(7, 0.6)], [7], 1, ONE_TOKEN, repeated=True)
        rule._lookup_budget.settle(10.0)
    assert rule.choose(15, 3, rates) in (None, WITHOUT_DRAFTS)


def test_unlikely_drafts_are_not_worth_verifying() -> None:
    rule = measured_rule()
    for _ in range(300):
        rule.record_round(DraftChoice(2, 1), [Draft(7, 0.9)], [7, 9], 1, ONE_TOKEN)
        rule.record_round(DraftChoice(2, 1), [Draft(7, 0.05)], [8], 1, ONE_TOKEN)
    assert rule.worth_verifying(2, [0.9]) and not rule.worth_verifying(2, [0.05])
    assert not rule.worth_verifying(2, [0.9, 0.05])


def test_fixed_pair_is_always_used() -> None:
    rule = measured_rule(fixed=(2, 5))
    assert rule.choose(8) == DraftChoice(2, 5) and rule.choose(3) == DraftChoice(2, 3)
    assert rule.choose(0) is None and rule.worth_verifying(2, [0.0, 0.0])


def test_fixed_lookups_need_a_match() -> None:
    rule = measured_rule(fixed=(LOOKUP, 5))
    assert rule.choose(8, 2) == DraftChoice(LOOKUP, 5) and rule.choose(8, 0) is None


def test_record_round_counts_unverified_drafts_as_long_as_all_before_were_right() -> None:
    drafts = [Draft(7, 0.6), Draft(8, 0.6), Draft(9, 0.6)]
    rule, only_right = measured_rule(), measured_rule()
    rule.record_round(DraftChoice(1, 3), drafts, [7, 8, 5], 2, ONE_TOKEN)
    only_right.record_round(DraftChoice(1, 3), drafts[:2], [7, 8, 5], 2, ONE_TOKEN)
    assert (rule.offered[1], rule.accepted[1], rule.rounds[1]) == (2, 2, 1)
    assert rule._rates[1].overall() < only_right._rates[1].overall(), "the third draft was wrong"


def test_probes_are_no_drafts_in_the_counts() -> None:
    rule = measured_rule()
    run_round(rule, DraftChoice(2, 1, probe=True), right=True)
    assert rule.probes == {1: 0, 2: 1} and rule.offered[2] == rule.rounds[2] == 0
    assert rule.rounds[NO_SOURCE] == 2


def test_names_of_sources_in_reports() -> None:
    assert [source_name(key) for key in (2, "2", LOOKUP)] == ["exit 2", "exit 2", "lookup"]


def test_sources_by_text_and_by_parameters() -> None:
    assert chosen_sources(read_sources("speculative:lookup"), 3) == [LOOKUP]
    assert chosen_sources(read_sources("speculative:exits"), 3) == [1, 2]
    assert chosen_sources(read_sources("speculative:exits+lookup"), 3) == [1, 2, LOOKUP]
    assert chosen_sources(RuleSpec("speculative", {}), 3) == [1, 2, LOOKUP]
    assert chosen_sources(RuleSpec("speculative", {"exits": 0.0}), 3) == [LOOKUP]
    assert chosen_sources(RuleSpec("speculative", {}), 1) == [LOOKUP]
    with pytest.raises(BadSetting, match=r"source 'look' is not known; join with \+: exits and lookup"):
        read_sources("speculative:look+exits")


@pytest.mark.parametrize(
    ("parameters", "segments", "message"),
    [
        ({"exits": 0.0, "lookup": 0.0}, 3, "no source of drafts is left; allow lookup, or take rule never"),
        ({"lookup": 0.0}, 1, "the bundle has one segment, so no exits: no source of drafts is left"),
        ({"lookup": 0.5}, 3, "lookup 0.5 is neither 0 nor 1"),
        ({"lookup": 1.0, "drafts": 2.0}, 3, "parameter 'drafts' does not go with the others; give exits and"),
    ],
)
def test_wrong_parameters_name_the_cure(parameters: dict[str, float], segments: int, message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        chosen_sources(RuleSpec("speculative", parameters), segments)
