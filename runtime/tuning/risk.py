"""Risk control: settings of a rule whose risk is below a limit with a stated confidence, in finite samples.

A loss is a number that a row has at a setting; the risk of the setting is its expectation. The statements
hold for every distribution of rows, if the rows are drawn independently from the one that the setting will
meet, and if neither the settings nor their order were chosen on them. Settings are tested as in
Learn-then-Test (arXiv 2110.01052).

Losses of dtype bool are 0 or 1, and their bounds are exact (Clopper-Pearson). Other losses lie in `low`..1:
low = 0 for shares, low = -1 for accuracy against full depth (+1 lost, -1 gained). They are rescaled to 0..1
and tested by betting (arXiv 2010.09686).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.errors import BadInput, BadSetting

Losses = NDArray[np.bool_] | NDArray[np.floating] | NDArray[np.signedinteger]
Ids = NDArray[np.int64]
Floats = NDArray[np.float64]

EXACT, BETTING = "clopper-pearson", "betting"
LEAST_SHARE = 0.1  # a group with a smaller share of the rows is bounded as if it had this share
_MOST_ROWS = 1_000_000  # more are not counted by rows_needed: each takes memory
_HALVINGS = 60  # of an interval in 0..1: beyond what float64 resolves
# A bet is at most this part of the one that a loss of 1 turns into ruin. Of 0.5, 0.75 and 0.9 the bounds at
# 0.75 were the lowest or near it on simulated losses: docs/log.md, 2026-11-29.
_BOLDEST = 0.75


@dataclass(frozen=True)
class Bound:
    """An upper confidence bound of a risk, and the name of the method by which it was computed."""

    value: float
    name: str


@dataclass(frozen=True)
class GroupRisk:
    """The losses of one group of rows: its number, its rows, their mean loss and its upper bound."""

    group: int
    rows: int
    observed: float
    bound: float


def upper_bound(losses: Losses, confidence: float, *, low: float = 0.0) -> Bound:
    """The number that the risk does not exceed with probability `confidence` over the draw of the rows.

    losses [rows] of one setting, see the module. It is the least risk that the test of control_risk rejects;
    1 if there are no rows. Raises BadSetting for a confidence or losses out of range.
    """
    _check(losses, confidence, low)
    tail = 1 - confidence
    if losses.dtype == np.bool_:
        count, rows = int(losses.sum()), len(losses)
        return Bound(_least(lambda share: binomial_tail(count, rows, share) <= tail), EXACT)
    if not len(losses):
        return Bound(1.0, BETTING)
    scaled, bets = _bets(losses, tail, low)
    bound = _least(lambda mean: _betting_p(scaled, bets, mean) <= tail)
    return Bound(low + (1 - low) * bound, BETTING)


def p_value(losses: Losses, limit: float, confidence: float, *, low: float = 0.0) -> float:
    """The p-value of the hypothesis that the risk is above `limit`, valid for any number of rows.

    losses [rows] of one setting. confidence: the one at which the result will be used; bets are sized for it,
    but the p-value is valid at every other. 1 if there are no rows.
    """
    _check(losses, confidence, low, limit)
    if not len(losses):
        return 1.0
    if losses.dtype == np.bool_:
        return binomial_tail(int(losses.sum()), len(losses), limit)
    scaled, bets = _bets(losses, 1 - confidence, low)
    return _betting_p(scaled, bets, (limit - low) / (1 - low))


def control_risk(
    losses: Losses,
    order: Sequence[Sequence[int]],
    limit: float,
    confidence: float,
    *,
    low: float = 0.0,
    groups: Ids | None = None,
    group_count: int = 0,
    least_share: float = LEAST_SHARE,
) -> Ids:
    """The settings whose risk is at most `limit`: all of them at once with probability `confidence`.

    losses [settings, rows]. order: sequences of settings, each tested from its first until one fails. Give
    one sequence, from the safest setting to the cheapest, where there is a natural order; a sequence for each
    setting where there is none; and one for each value of a second parameter. The sequences share the error
    1 - confidence, and those that passed to their end leave their part to the others. One sequence is
    fixed-sequence testing, sequences of one setting are Bonferroni-Holm (Bretz et al. 2009 have both as
    graphs).

    groups [settings, rows] or [rows]: for each row the group, 0 to group_count - 1, in which its loss counts;
    negative for none. A setting is valid if the risk within every group is at most the limit, where a group
    with a smaller share of all rows than `least_share` counts as if it had this share: its losses are at most
    limit * least_share of all rows. There is no correction for the number of groups, since every one of them
    must pass. With least_share = 0 the risk within every group is bounded, however small.

    Returns the indices of valid settings in the order in which they passed; the cheapest of them may be
    chosen freely. Empty if the rows carry nothing: see rows_needed. Raises BadSetting for numbers out of
    range.
    """
    _check(losses, confidence, low, limit)
    if losses.ndim != 2:
        raise BadInput(f"losses have {losses.ndim} axes; give them as [settings, rows]")
    indices = [index for sequence in order for index in sequence]
    if len(set(indices)) < len(indices) or not all(0 <= index < len(losses) for index in indices):
        raise BadSetting(f"order: give each of the {len(losses)} settings at most once, by its index from 0")
    if groups is not None and not groups.max(initial=0) < group_count:
        raise BadSetting(f"groups: their numbers are below group_count, which is {group_count}")
    every = None if groups is None else np.broadcast_to(groups, losses.shape)

    def p(index: int) -> float:
        test = partial(p_value, confidence=confidence, low=low)
        if every is None:
            return test(losses[index], limit)
        return _groups_p_value(losses[index], every[index], group_count, limit, least_share, test)

    # Each sequence as a stack, and the p-value of its next setting.
    waiting = [list(reversed(sequence)) for sequence in order if len(sequence)]
    following = [p(sequence[-1]) for sequence in waiting]
    valid: list[int] = []
    while waiting and min(following) <= (1 - confidence) / len(waiting):
        place = int(np.argmin(following))
        valid.append(waiting[place].pop())
        if waiting[place]:
            following[place] = p(waiting[place][-1])
        else:
            del waiting[place], following[place]
    return np.array(valid, np.int64)


def group_risks(losses: Losses, groups: Ids, confidence: float, *, low: float = 0.0) -> list[GroupRisk]:
    """The mean loss of each group that has rows, and its bound at `confidence` for this group alone.

    losses, groups [rows]; rows with a negative group are left out.
    """
    risks = []
    for group in np.unique(groups[groups >= 0]):
        inside = losses[groups == group]
        bound = upper_bound(inside, confidence, low=low).value
        risks.append(GroupRisk(int(group), len(inside), float(inside.mean()), bound))
    return risks


def rows_needed(
    limit: float,
    confidence: float,
    *,
    low: float = 0.0,
    binary: bool = True,
    grouped: bool = False,
    least_share: float = LEAST_SHARE,
) -> int:
    """The fewest rows with which a limit can be shown, which is so if none of them has any loss.

    A limit that needs more than a million rows gives a million. binary: losses are of dtype bool. grouped:
    for control_risk with groups, all of them at least_share or smaller; with least_share = 0 it is the rows
    of each group.
    """
    shared = grouped and least_share > 0
    limit = limit * least_share if shared else limit
    tail = (1 - confidence) / 2 if shared else 1 - confidence

    def enough(rows: int) -> bool:
        losses: Losses = np.zeros(rows, np.bool_) if binary else np.zeros(rows)
        return p_value(losses, limit, confidence, low=low) <= tail

    if not enough(_MOST_ROWS):
        return _MOST_ROWS
    high = 1
    while not enough(high):
        high *= 2
    fewer = high // 2  # not enough
    while high - fewer > 1:
        middle = (fewer + high) // 2
        fewer, high = (fewer, middle) if enough(middle) else (middle, high)
    return high


def binomial_tail(count: int, rows: int, share: float) -> float:
    """P(X <= count) for X, the number of successes in `rows` draws that succeed with probability `share`."""
    if count >= rows or share <= 0:
        return 1.0
    if share >= 1:
        return 0.0
    numbers = np.arange(1, count + 1)
    # The logarithm of each term from the one before it: the terms themselves underflow for many rows.
    steps = np.log((rows - numbers + 1) / numbers) + (np.log(share) - np.log1p(-share))
    terms = rows * np.log1p(-share) + np.concatenate([[0.0], np.cumsum(steps)])
    return min(1.0, float(np.exp(terms).sum()))


def _groups_p_value(
    losses: Losses, groups: Ids, count: int, limit: float, least_share: float, test: Callable[..., float]
) -> float:
    """The p-value of the hypothesis that one of the groups has too much risk: the greatest of the groups'.

    If a group has too much, both its risk within and its part of all losses are too great. So either test may
    reject, at half of the error each.
    """
    pairs: set[tuple[float, float]] = set()  # p-values within a group, and of its part of all losses
    if losses.dtype == np.bool_:
        inside = groups >= 0
        rows = np.bincount(groups[inside], minlength=count)
        lost = np.bincount(groups[inside], weights=losses[inside], minlength=count).astype(np.int64)
        # Groups with the same numbers are computed once: there may be hundreds, most of them small.
        for lost_rows, group_rows in set(zip(lost.tolist(), rows.tolist(), strict=True)):
            part = binomial_tail(lost_rows, len(losses), limit * least_share)
            pairs.add((binomial_tail(lost_rows, group_rows, limit), part))
    else:
        for inside in (groups == group for group in range(count)):
            part = test(np.where(inside, losses, 0), limit * least_share) if least_share > 0 else 1.0
            pairs.add((test(losses[inside], limit), part))
    return max(within if least_share == 0 else min(1.0, 2 * min(within, part)) for within, part in pairs)


def _bets(losses: Losses, tail: float, low: float) -> tuple[Floats, Floats]:
    """Losses rescaled to 0..1 in a random but fixed order, and the bet before each of them [rows].

    Files are often sorted, by label for example; each bet relies on the rows before it, which in such an
    order are unlike those to come. Bets are those of arXiv 2010.09686, from the variance so far.
    """
    rows = len(losses)
    scaled = (losses[np.random.default_rng(0).permutation(rows)].astype(np.float64) - low) / (1 - low)
    seen = np.arange(2, rows + 2)  # with one imagined row of mean 1/2 and variance 1/4
    means = (0.5 + scaled.cumsum()) / seen
    variances = (0.25 + ((scaled - means) ** 2).cumsum()) / seen
    before = np.concatenate([[0.25], variances[:-1]])
    return scaled, np.sqrt(2 * np.log(1 / tail) / (rows * before))


def _betting_p(scaled: Floats, bets: Floats, mean: float) -> float:
    """The p-value of "the mean is `mean` or more": one by the greatest wealth of a bettor against it.

    The wealth of a fair or losing game is multiplied by x at any time with probability 1 / x at most (Ville).
    It does not fall if `mean` rises, so that bounds can be found by bisection.
    """
    if mean >= 1:
        return 0.0
    stakes = np.minimum(bets, _BOLDEST / (1 - mean))
    wealth = np.log1p(stakes * (mean - scaled)).cumsum().max(initial=0.0)
    return float(np.exp(-wealth))


def _least(rejects: Callable[[float], bool]) -> float:
    """The least number in 0..1 from which on `rejects` is true, rounded up; 1 if there is none."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if rejects(middle) else (middle, high)
    return high


def _check(losses: Losses, confidence: float, low: float, limit: float | None = None) -> None:
    if not 0 < confidence < 1:
        raise BadSetting(f"confidence {confidence:g}: give a probability between 0 and 1, such as 0.9")
    if limit is not None and not 0 < limit < 1:
        raise BadSetting(f"risk {limit:g}: give a share between 0 and 1, such as 0.01")
    if losses.size and losses.dtype != np.bool_:
        least, greatest = float(losses.min()), float(losses.max())
        if not (low <= least and greatest <= 1):  # NaN too
            raise BadInput(f"losses are {least:g} to {greatest:g}; they must lie in {low:g} to 1")
