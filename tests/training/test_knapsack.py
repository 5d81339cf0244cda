"""The exact choice of ways, held to all choices there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from offramp.training.knapsack import best, choose, held_out, shuffled, smallest_depth


def brute(scores: np.ndarray, layers: list[int], budget: int) -> float:
    ways = itertools.product(range(len(layers)), repeat=len(scores))
    return max(
        sum(scores[text, way] for text, way in enumerate(chosen))
        for chosen in ways
        if sum(layers[way] for way in chosen) <= budget
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    random = np.random.default_rng(seed)
    scores, layers = random.normal(size=(5, 4)), [7, 2, 4, 3]  # in no order
    totals = best(scores, layers)
    assert len(totals) == 36
    assert np.isneginf(totals[:10]).all()
    for budget in range(10, 36, 3):
        chosen = choose(scores, layers, budget)
        assert sum(layers[way] for way in chosen) <= budget
        found = scores[np.arange(5), chosen].sum()
        assert found == pytest.approx(brute(scores, layers, budget))
        assert totals[budget] == pytest.approx(found / 5)
    with pytest.raises(ValueError, match="10 layers at least, not 9"):
        choose(scores, layers, 9)


def test_the_smallest_depth_as_good_as_full() -> None:
    # Two texts are as good at 2 layers, one needs all 6.
    scores = np.array([[1.0, 1.0], [0.5, 0.5], [0.0, 1.0]])
    assert smallest_depth(scores, [2, 6]) == pytest.approx(10 / 3)
    assert smallest_depth(scores[:, ::-1], [6, 2]) == pytest.approx(10 / 3)
    assert smallest_depth(-scores, [2, 6]) == 2


def test_shuffling_keeps_ways_and_forgets_texts() -> None:
    random = np.random.default_rng(0)
    scores = random.normal(size=(40, 1)) * 3 + random.normal(size=(40, 3)) * [0.1, 0.2, 0.4] + [0, 1, 2]
    drawn = shuffled(scores, 1)
    assert (np.sort(drawn, 0) == np.sort(scores, 0)).all()
    assert (drawn != scores).mean() > 0.8
    assert not (drawn == shuffled(scores, 2)).all()
    centred = shuffled(scores, 1, centred=True)
    assert centred.mean(0) == pytest.approx(scores.mean(0))
    assert np.corrcoef(centred.mean(1), scores.mean(1))[0, 1] > 0.9
    assert abs(np.corrcoef(drawn.mean(1), scores.mean(1))[0, 1]) < 0.5


def test_noise_gains_where_it_is_chosen_by_and_nothing_where_it_is_not() -> None:
    random = np.random.default_rng(0)
    noise = [random.normal(size=(400, 4)) for _ in range(2)]
    layers, budget = [1, 2, 3, 4], 400 * 4
    lucky = noise[0][np.arange(400), choose(noise[0], layers, budget)].mean()
    assert lucky > 0.9
    assert abs(held_out(noise[0], noise[1], layers, budget)) < 0.15
    assert held_out(noise[0], noise[0], layers, budget) == pytest.approx(lucky)
