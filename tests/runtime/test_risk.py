"""Bounds and tests of risk.py against exact values, and their promise on simulated rows."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from offramp.runtime.errors import BadInput, BadSetting
from offramp.runtime.tuning.risk import (
    BETTING,
    EXACT,
    binomial_tail,
    control_risk,
    group_risks,
    p_value,
    rows_needed,
    upper_bound,
)

TRIALS = 300
# 300 trials at 10 % have more errors than this with probability 0.001.
TOO_MANY = 48


def exact_tail(count: int, rows: int, share: Fraction) -> Fraction:
    """P(X <= count) in rational numbers."""
    return sum(
        (comb(rows, k) * share**k * (1 - share) ** (rows - k) for k in range(count + 1)), start=Fraction(0)
    )


def first(rows: int, count: int) -> np.ndarray:
    """Losses of 0 or 1 of which the first `count` are 1."""
    return np.arange(rows) < count


@pytest.mark.parametrize(
    ("count", "rows", "share"), [(0, 10, 0.3), (3, 17, 0.25), (40, 100, 0.5), (9, 10, 0.9)]
)
def test_binomial_tail_is_the_exact_one(count: int, rows: int, share: float) -> None:
    assert binomial_tail(count, rows, share) == pytest.approx(float(exact_tail(count, rows, Fraction(share))))


def test_binomial_tail_of_many_rows_does_not_underflow() -> None:
    # Half of the mass is at or below the mean; each term is below 1e-300 far from it.
    assert binomial_tail(50_000, 1_000_000, 0.05) == pytest.approx(0.5, abs=0.002)


def test_clopper_pearson_bound_solves_its_equation() -> None:
    bound = upper_bound(first(40, 3), 0.9)
    assert bound.name == EXACT
    assert float(exact_tail(3, 40, Fraction(bound.value))) == pytest.approx(0.1)


def test_clopper_pearson_bound_without_losses_has_a_closed_form() -> None:
    assert upper_bound(first(230, 0), 0.9).value == pytest.approx(1 - 0.1 ** (1 / 230))


def test_bound_is_one_if_every_row_is_lost_or_there_is_none() -> None:
    assert upper_bound(first(7, 7), 0.9).value == 1
    assert upper_bound(first(0, 0), 0.9).value == 1
    assert upper_bound(np.zeros(0), 0.9).value == 1


def test_bound_rises_with_confidence() -> None:
    losses = first(200, 4)
    assert upper_bound(losses, 0.99).value > upper_bound(losses, 0.9).value > 0.02


def test_other_losses_are_bounded_by_betting_close_to_the_exact_bound() -> None:
    losses = np.random.default_rng(1).random(2000) < 0.02
    exact, betting = upper_bound(losses, 0.9), upper_bound(losses.astype(float), 0.9)
    assert betting.name == BETTING
    assert exact.value < betting.value < 1.2 * exact.value


def test_bound_of_steady_losses_is_far_below_that_of_their_range() -> None:
    # Losses of 0.1 for sure: the variance is zero, and betting learns so.
    assert upper_bound(np.full(500, 0.1), 0.9).value < 0.11


def test_bound_and_test_agree() -> None:
    losses = np.random.default_rng(2).beta(0.5, 20, 600)
    bound = upper_bound(losses, 0.9).value
    assert p_value(losses, bound + 1e-6, 0.9) <= 0.1 < p_value(losses, bound - 1e-6, 0.9)


def test_signed_losses_are_rescaled() -> None:
    signed = np.random.default_rng(3).choice([-1, 0, 1], 800, p=[0.02, 0.96, 0.02])
    bound = upper_bound(signed, 0.9, low=-1)
    assert bound.value == pytest.approx(2 * upper_bound((signed + 1) / 2, 0.9).value - 1)
    assert signed.mean() < bound.value < 0.03


def test_gained_rows_make_up_for_lost_ones() -> None:
    lost, gained = np.zeros(800), np.zeros(800)
    lost[:8] = gained[:8] = 1
    gained[8:16] = -1
    assert upper_bound(gained, 0.9, low=-1).value < upper_bound(lost, 0.9, low=-1).value


def test_bound_does_not_depend_on_how_a_file_is_sorted_much() -> None:
    losses = np.zeros(1000)
    losses[:20] = 1
    assert upper_bound(losses, 0.9).value == pytest.approx(upper_bound(losses[::-1], 0.9).value, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["binary", "share", "signed"])
def test_bound_holds_in_nine_of_ten_samples(kind: str) -> None:
    generator = np.random.default_rng(4)
    draws = {
        "binary": lambda: (generator.random(150) < 0.04, 0.04),
        "share": lambda: (generator.beta(0.3, 5.7, 150), 0.05),
        "signed": lambda: (generator.choice([-1, 0, 1], 150, p=[0.02, 0.92, 0.06]), 0.04),
    }
    low = -1 if kind == "signed" else 0
    samples = [draws[kind]() for _ in range(TRIALS)]
    broken = sum(upper_bound(losses, 0.9, low=low).value < risk for losses, risk in samples)
    assert broken < TOO_MANY
    assert broken or kind != "binary"  # the exact bound is not lower than it must be either


def test_one_sequence_is_tested_until_a_setting_fails() -> None:
    losses = np.array([first(500, count) for count in (0, 1, 30, 0)])
    # The last setting alone would pass: it stands behind one that failed.
    assert control_risk(losses, [range(4)], 0.02, 0.9).tolist() == [0, 1]


def test_sequences_of_one_setting_are_holms() -> None:
    rows, limit = 100, 0.05
    p = [binomial_tail(count, rows, limit) for count in (0, 1)]
    assert p[0] < p[1] / 2
    losses = np.array([first(rows, count) for count in (1, 0)])
    tight = 1 - (p[1] + 1e-9)  # half of the error is too little for one loss, all of it is enough
    assert control_risk(losses, [[0], [1]], limit, tight).tolist() == [1, 0]
    assert control_risk(losses[:1].repeat(2, 0), [[0], [1]], limit, tight).tolist() == []


def test_sequences_share_the_error() -> None:
    rows = rows_needed(0.05, 0.9)
    losses = np.zeros((2, rows), bool)
    losses[1, :20] = True
    assert control_risk(losses, [[0, 1]], 0.05, 0.9).tolist() == [0]
    assert control_risk(losses, [[0], [1]], 0.05, 0.9).tolist() == []
    assert control_risk(losses[:, :1].repeat(2 * rows, 1), [[0], [1]], 0.05, 0.9).tolist() == [0]


def test_no_setting_is_valid_with_too_few_rows() -> None:
    rows = rows_needed(0.01, 0.9)
    assert control_risk(np.zeros((1, rows), bool), [[0]], 0.01, 0.9).tolist() == [0]
    assert control_risk(np.zeros((1, rows - 1), bool), [[0]], 0.01, 0.9).tolist() == []


def test_cheapest_valid_setting_keeps_its_word_in_nine_of_ten_samples() -> None:
    generator = np.random.default_rng(5)
    risks = np.linspace(0, 0.1, 21)  # of settings from the safest to the cheapest
    broken = 0
    for _ in range(TRIALS):
        losses = generator.random(400) < risks[:, None]
        valid = control_risk(losses, [range(len(risks))], 0.04, 0.9)
        broken += bool(len(valid)) and risks[valid].max() > 0.04
    assert 0 < broken < TOO_MANY


def test_naive_tuning_breaks_the_word_that_control_keeps() -> None:
    generator = np.random.default_rng(6)
    risks = np.linspace(0, 0.1, 101)
    broken = 0
    for _ in range(TRIALS):
        observed = (generator.random(400) < risks[:, None]).mean(1)
        broken += risks[observed <= 0.04].max() > 0.04
    assert broken > TRIALS / 2


def test_bad_group_does_not_hide_behind_the_mean() -> None:
    losses, groups = np.zeros((1, 1000), bool), np.repeat([0, 1], [800, 200])
    losses[0, 800:830] = True  # 15 % of group 1, 3 % of all rows
    assert control_risk(losses, [[0]], 0.05, 0.9).tolist() == [0]
    assert control_risk(losses, [[0]], 0.05, 0.9, groups=groups, group_count=2).tolist() == []
    assert control_risk(losses, [[0]], 0.25, 0.9, groups=groups, group_count=2).tolist() == [0]


def test_bad_group_of_other_losses_does_not_hide_either() -> None:
    losses, groups = np.zeros((1, 1000)), np.repeat([0, 1], [800, 200])
    losses[0, 800:860] = 0.5  # the same 15 % of group 1, in halves
    assert control_risk(losses, [[0]], 0.05, 0.9).tolist() == [0]
    assert control_risk(losses, [[0]], 0.05, 0.9, groups=groups, group_count=2).tolist() == []
    assert control_risk(losses, [[0]], 0.25, 0.9, groups=groups, group_count=2).tolist() == [0]


def test_small_group_counts_as_if_it_had_the_least_share() -> None:
    losses, groups = np.zeros((1, 2000), bool), np.repeat([0, 1], [1995, 5])
    losses[0, -2:] = True  # of five rows: 0.1 % of all, less than 5 % of a tenth
    given = {"groups": groups, "group_count": 2}
    assert control_risk(losses, [[0]], 0.05, 0.9, **given).tolist() == [0]
    assert control_risk(losses, [[0]], 0.05, 0.9, least_share=0, **given).tolist() == []


def test_group_without_rows_needs_the_rows_that_are_named() -> None:
    rows = rows_needed(0.05, 0.9, grouped=True)
    for count, valid in ((rows, [0]), (rows - 1, [])):
        losses, groups = np.zeros((1, count), bool), np.zeros(count, int)
        assert control_risk(losses, [[0]], 0.05, 0.9, groups=groups, group_count=2).tolist() == valid


def test_rows_of_no_group_do_not_count() -> None:
    losses, groups = np.zeros((1, 1000), bool), np.repeat([0, -1], [900, 100])
    losses[0, 900:] = True
    assert control_risk(losses, [[0]], 0.05, 0.9, groups=groups, group_count=1).tolist() == [0]


def test_groups_keep_their_word_in_nine_of_ten_samples() -> None:
    generator = np.random.default_rng(7)
    limit, shares = 0.1, np.array([0.8, 0.15, 0.05])
    steps = np.linspace(0, 1, 9)
    # Within the first two groups, and the last as if it were 0.1: its own risk is 0.2 where that is reached.
    risks = steps[:, None] * np.array([0.05, 0.15, 0.3])
    too_much = (risks * shares / np.maximum(shares, 0.1) > limit).any(1)
    assert 3 < too_much.argmax() < 8
    broken = 0
    for _ in range(TRIALS):
        groups = generator.choice(3, 600, p=shares)
        losses = generator.random(600) < risks[:, groups]
        valid = control_risk(losses, [range(9)], limit, 0.9, groups=groups, group_count=3)
        broken += bool(too_much[valid].any())
    assert broken < TOO_MANY


def test_group_risks_are_those_of_each_group() -> None:
    losses, groups = first(100, 5), np.repeat([2, 0, -1], [40, 50, 10])
    zero, two = group_risks(losses, groups, 0.9)
    assert (zero.group, zero.rows, zero.observed) == (0, 50, 0.0)
    assert (two.group, two.rows, two.observed) == (2, 40, 0.125)
    assert two.bound == upper_bound(first(40, 5), 0.9).value


@pytest.mark.parametrize(
    ("limit", "confidence", "rows"), [(0.01, 0.9, 230), (0.02, 0.9, 114), (0.05, 0.95, 59), (0.5, 0.5, 1)]
)
def test_rows_needed_without_any_loss(limit: float, confidence: float, rows: int) -> None:
    assert rows_needed(limit, confidence) == rows


def test_rows_needed_by_betting_are_more() -> None:
    rows = rows_needed(0.02, 0.9, low=-1, binary=False)
    assert rows > rows_needed(0.02, 0.9)
    for count, valid in ((rows, [0]), (rows - 1, [])):
        assert control_risk(np.zeros((1, count)), [[0]], 0.02, 0.9, low=-1).tolist() == valid


@pytest.mark.parametrize("losses", [np.array([0.2, 1.2]), np.array([-0.1, 0.0]), np.array([0.0, np.nan])])
def test_losses_out_of_range_are_refused(losses: np.ndarray) -> None:
    with pytest.raises(BadInput, match=r"must lie in 0 to 1"):
        upper_bound(losses, 0.9)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, float("nan")])
def test_confidence_out_of_range_is_refused(confidence: float) -> None:
    with pytest.raises(BadSetting, match="confidence"):
        upper_bound(first(10, 0), confidence)


@pytest.mark.parametrize("limit", [0.0, 1.0, float("nan")])
def test_risk_out_of_range_is_refused(limit: float) -> None:
    with pytest.raises(BadSetting, match="risk"):
        control_risk(np.zeros((1, 10), bool), [[0]], limit, 0.9)
    with pytest.raises(BadSetting, match="risk"):
        rows_needed(limit, 0.9)


@pytest.mark.parametrize("group_count", [0, 1])
def test_groups_beyond_their_count_are_refused(group_count: int) -> None:
    groups = np.array([0, 1])
    with pytest.raises(BadSetting, match="group_count"):
        control_risk(np.zeros((1, 2), bool), [[0]], 0.5, 0.9, groups=groups, group_count=group_count)


@pytest.mark.parametrize("order", [[[0, 0]], [[2]], [[-1]]])
def test_order_that_does_not_fit_is_refused(order: list[list[int]]) -> None:
    with pytest.raises(BadSetting, match="order"):
        control_risk(np.zeros((2, 10), bool), order, 0.05, 0.9)


@pytest.mark.parametrize("limit", [1e-9, 5e-324])
@pytest.mark.parametrize("binary", [True, False])
def test_rows_beyond_a_million_are_not_counted(limit: float, binary: bool) -> None:
    assert rows_needed(limit, 0.95, low=0.0 if binary else -1.0, binary=binary) == 1_000_000
