"""The oracle of layer selection: one configuration for each sequence, best total score within a budget.

Choosing one configuration a sequence, with a bound on their total cost, is a multiple-choice knapsack. The
dynamic program over whole costs is exact (Glavas et al., arXiv 2410.20022, solve it in shards of the data).

An oracle chooses by the scores that it is judged by. It gains even if all configurations are equally good,
because it takes the best of several noisy scores. Two controls measure this: `shuffled` removes what scores
have to do with their sequence, `held_out` judges the choice by scores that it did not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

INFEASIBLE = -np.inf
TIE_BREAK = 1e-6  # weight of a configuration's mean score where a sequence's own scores are equal


@dataclass(frozen=True)
class Allocation:
    """The best choice of configurations for every budget.

    costs [configurations]: whole numbers. totals [budget + 1]: the greatest total score at no more than each
    total cost, -inf if no choice is that cheap. last_choices [sequences, budget + 1]: the configuration of
    sequence i where the first i + 1 sequences share each budget.
    """

    costs: tuple[int, ...]
    totals: np.ndarray
    last_choices: np.ndarray

    @property
    def mean_scores(self) -> np.ndarray:
        """The greatest mean score within each total cost [budget + 1]."""
        means: np.ndarray = self.totals / len(self.last_choices)
        return means

    def choose(self, budget: int) -> np.ndarray:
        """The configuration of each sequence [sequences] for this total cost.

        Raises ValueError if no choice is that cheap.
        """
        budget = min(budget, len(self.totals) - 1)
        count = len(self.last_choices)
        if budget < count * min(self.costs):
            raise ValueError(f"{count} sequences cost at least {count * min(self.costs)}, more than {budget}")
        choice = np.zeros(count, np.int64)
        for sequence in range(count - 1, -1, -1):
            choice[sequence] = self.last_choices[sequence, budget]
            budget -= self.costs[choice[sequence]]
        return choice


def allocate(scores: np.ndarray, costs: Sequence[int]) -> Allocation:
    """Solve for all budgets up to that of the dearest configuration for every sequence.

    scores [sequences, configurations], higher is better; costs [configurations], positive whole numbers in
    any order. Every sequence is treated alike: the first one, too, takes no configuration beyond the budget.
    """
    budget = len(scores) * max(costs)
    totals = np.zeros(budget + 1)
    last_choices = np.zeros((len(scores), budget + 1), np.int16)
    for sequence, row in enumerate(scores):
        extended = np.full(budget + 1, INFEASIBLE)
        for number, (score, cost) in enumerate(zip(row, costs, strict=True)):
            candidates = totals[: budget + 1 - cost] + score
            better = candidates > extended[cost:]
            extended[cost:][better] = candidates[better]
            last_choices[sequence, cost:][better] = number
        totals = extended
    return Allocation(tuple(int(cost) for cost in costs), totals, last_choices)


def smallest_mean_cost(allocation: Allocation, goal: float) -> float:
    """The least mean cost at which the mean score is at least `goal`; the dearest if none reaches it."""
    reached = allocation.mean_scores >= goal - 1e-9  # sums in another order
    if not reached.any():
        return float(max(allocation.costs))
    return float(np.argmax(reached)) / len(allocation.last_choices)


def without_knowledge(scores: np.ndarray) -> np.ndarray:
    """Scores [sequences, configurations] in which each sequence has the mean of its configuration.

    Their allocation is the best mixture of configurations that knows nothing about a sequence.
    """
    means: np.ndarray = np.broadcast_to(scores.mean(0), scores.shape)
    return means


def shuffled(scores: np.ndarray, seed: int, *, centred: bool = False) -> np.ndarray:
    """Permute the scores of each configuration over the sequences: the control for the winner's curse.

    Means and spreads of configurations are kept, the relation of scores to their sequence is lost. centred:
    only the deviation from the sequence's own mean is permuted, so that easy sequences stay easy. Otherwise
    the oracle also gains because some sequences are easier than others under every configuration.
    """
    random = np.random.default_rng(seed)
    means = scores.mean(1, keepdims=True) if centred else np.zeros((len(scores), 1))
    permuted: np.ndarray = random.permuted(scores - means, axis=0) + means
    return permuted


def held_out(seen: np.ndarray, costs: Sequence[int]) -> Allocation:
    """The allocation by `seen`, for judging on scores of the same sequences that it did not see.

    Where the seen scores of a sequence are equal, the configuration with the better mean is taken: among
    equal scores of right and wrong that is the safest choice within the budget.
    """
    return allocate(seen + TIE_BREAK * seen.mean(0), costs)


def judge(allocation: Allocation, scores: np.ndarray, budget: int) -> float:
    """The mean of `scores` [sequences, configurations] under the choice for a total cost."""
    return float(scores[np.arange(len(scores)), allocation.choose(budget)].mean())


def smallest_judged_cost(
    allocations: Sequence[Allocation], scores: Sequence[np.ndarray], goal: float
) -> float | None:
    """The least whole mean cost at which choices judged on other scores reach `goal`, or None.

    allocations and the scores that judge each; their judgements are averaged.
    """
    costs, count = allocations[0].costs, len(scores[0])
    for cost in range(min(costs), max(costs) + 1):
        judged = [judge(a, s, cost * count) for a, s in zip(allocations, scores, strict=True)]
        if float(np.mean(judged)) >= goal - 1e-9:
            return float(cost)
    return None
