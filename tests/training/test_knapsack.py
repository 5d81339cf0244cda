"""The exact allocation against all choices that exist, and its controls against known expectations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from offramp.training.knapsack import (
    allocate,
    held_out,
    judge,
    shuffled,
    smallest_judged_cost,
    smallest_mean_cost,
    without_knowledge,
)


def brute_force(scores: np.ndarray, costs: list[int], budget: int) -> float:
    choices = itertools.product(range(len(costs)), repeat=len(scores))
    return max(
        sum(scores[sequence, number] for sequence, number in enumerate(choice))
        for choice in choices
        if sum(costs[number] for number in choice) <= budget
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_allocation_is_the_best_of_all_choices(seed: int) -> None:
    random = np.random.default_rng(seed)
    scores, costs = random.normal(size=(5, 4)), [7, 2, 4, 3]  # in no order
    allocation = allocate(scores, costs)
    assert len(allocation.totals) == 36 and np.isneginf(allocation.totals[:10]).all()
    for budget in range(10, 36):
        choice = allocation.choose(budget)
        assert sum(costs[number] for number in choice) <= budget
        total = scores[np.arange(5), choice].sum()
        assert total == pytest.approx(brute_force(scores, costs, budget))
        assert allocation.mean_scores[budget] == pytest.approx(total / 5)
    with pytest.raises(ValueError, match="5 sequences cost at least 10, more than 9"):
        allocation.choose(9)


def test_the_first_sequence_keeps_to_the_budget() -> None:
    # The dear configuration is listed first and has the better score.
    allocation = allocate(np.array([[1.0, 0.0]]), [5, 1])
    assert [int(allocation.choose(budget)[0]) for budget in (1, 4, 5)] == [1, 1, 0]
    assert allocation.totals.tolist() == [-np.inf, 0, 0, 0, 0, 1]


def test_the_smallest_cost_as_good_as_full() -> None:
    # Two sequences are as good at cost 2, one needs all 6.
    scores = np.array([[1.0, 1.0], [0.5, 0.5], [0.0, 1.0]])
    for table, costs, full in ((scores, [2, 6], 1), (scores[:, ::-1], [6, 2], 0)):
        cost = smallest_mean_cost(allocate(table, costs), float(table[:, full].mean()))
        assert cost == pytest.approx(10 / 3)
    assert smallest_mean_cost(allocate(scores, [2, 6]), 2.0) == 6


def test_a_mixture_without_knowledge_is_the_line_between_two_configurations() -> None:
    scores = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])  # means 1/4 and 3/4
    means = allocate(without_knowledge(scores), [1, 3]).mean_scores
    assert means[[4, 6, 8, 12]] == pytest.approx([0.25, 0.375, 0.5, 0.75])


@pytest.mark.slow
def test_the_shuffled_oracle_has_the_expectation_of_independent_draws() -> None:
    # Right or wrong, 30 % and 50 % right, never both wrong: with knowledge the oracle is right in 80 %.
    scores = np.zeros((200, 2))
    scores[:60, 0], scores[60:160, 1] = 1, 1
    assert allocate(scores, [1, 1]).mean_scores[200] == pytest.approx(0.8)
    draws = [allocate(shuffled(scores, seed), [1, 1]).mean_scores[200] for seed in range(100)]
    expected = 1 - (1 - 0.3) * (1 - 0.5)  # without knowledge a sequence is wrong twice by chance
    assert np.mean(draws) == pytest.approx(expected, abs=4 * np.std(draws) / 10)
    assert np.std(draws) > 0


def test_shuffling_keeps_configurations_and_forgets_sequences() -> None:
    random = np.random.default_rng(0)
    scores = random.normal(size=(40, 1)) * 3 + random.normal(size=(40, 3)) * [0.1, 0.2, 0.4] + [0, 1, 2]
    permuted = shuffled(scores, 1)
    assert (np.sort(permuted, 0) == np.sort(scores, 0)).all()
    assert not (permuted == shuffled(scores, 2)).all()
    centred = shuffled(scores, 1, centred=True)
    assert centred.mean(0) == pytest.approx(scores.mean(0))
    assert np.corrcoef(centred.mean(1), scores.mean(1))[0, 1] > 0.9
    assert abs(np.corrcoef(permuted.mean(1), scores.mean(1))[0, 1]) < 0.5


def test_noise_gains_for_the_oracle_and_not_for_the_held_out_choice() -> None:
    random = np.random.default_rng(0)
    seen, unseen = (random.normal(size=(400, 4)) for _ in range(2))
    allocation = held_out(seen, [1, 2, 3, 4])
    assert judge(allocation, seen, 1600) > 0.9  # the greatest of four standard normals: 1.03
    assert abs(judge(allocation, unseen, 1600)) < 0.15


def test_a_held_out_choice_takes_the_better_configuration_among_equals() -> None:
    seen = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    assert held_out(seen, [1, 2]).choose(6).tolist() == [1, 1, 1]
    assert held_out(seen, [1, 2]).choose(4).tolist() == [0, 1, 0]


def test_the_smallest_cost_of_judged_choices() -> None:
    seen = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    allocation, costs = held_out(seen, [1, 2, 4]), [1, 2, 4]
    assert smallest_judged_cost([allocation], [seen], 1.0) == 3
    assert smallest_judged_cost([allocation], [seen - 1], 0.5) is None
    assert allocation.costs == tuple(costs)
