"""The router of texts: it takes the way that its features tell, and the cheap one where they tell nothing."""

from __future__ import annotations

import numpy as np
import pytest

from offramp.runtime.rules.router import fit

COSTS = np.array([30.0, 10.0, 20.0])  # in no order


def rows(count: int, seed: int, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """The second way is as good as the first where feature 3 is below zero; texts differ by far more."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(count, 12))
    drop = np.where(features[:, 3] < 0, 0.0, 2.0)
    scores = np.stack([np.zeros(count), -drop, -drop / 4], 1)
    return features, scores + 10 * random.normal(size=(count, 1)) + noise * random.normal(size=(count, 3))


def test_it_goes_by_what_the_features_tell() -> None:
    router = fit(*rows(200, 0), COSTS)
    assert router.error < 0.5
    features, scores = rows(300, 1)
    price = router.price_for(features, 20)
    chosen = router.choose(features, price)
    assert COSTS[chosen].mean() <= 20
    reached = scores[np.arange(300), chosen].mean()
    drawn = [
        scores[np.arange(300), np.random.default_rng(seed).permutation(chosen)].mean() for seed in range(9)
    ]
    assert reached > max(drawn) + 0.2  # the same ways, for the wrong texts
    assert reached > scores[:, 2].mean()  # one way for all, as deep


def test_more_is_paid_at_a_lower_price() -> None:
    router = fit(*rows(200, 0), COSTS)
    features, _ = rows(100, 2)
    spent = [COSTS[router.choose(features, price)].mean() for price in (0.0, 0.05, 0.2, 100.0)]
    assert spent == sorted(spent, reverse=True)
    assert spent[0] > spent[-1] == 10
    assert router.price_for(features, 35) == 0
    assert COSTS[router.choose(features, router.price_for(features, 9))].mean() == 10


def test_features_that_tell_nothing_are_not_followed() -> None:
    features, _ = rows(60, 3)
    random = np.random.default_rng(5)
    router = fit(np.tile(features, (1, 10)), random.normal(size=(60, 3)) + np.array([1.0, 0, 0]), COSTS)
    assert router.error > 0.9
    assert (router.choose(np.tile(features, (1, 10)), 0.0) == 0).mean() > 0.9
    assert router.strength >= 100


def test_the_strength_is_that_of_rows_left_out() -> None:
    features, scores = rows(30, 4)
    router = fit(features, scores, COSTS)
    wanted = scores - scores.mean(1, keepdims=True)
    missed = []
    inputs = (features - router.shift) / router.scale
    for row in range(30):
        kept = np.arange(30) != row
        x, y = np.c_[inputs[kept], np.ones(29)], wanted[kept]
        ridge = router.strength * np.diag([*np.ones(12), 0.0])
        missed.append(wanted[row] - np.r_[inputs[row], 1] @ np.linalg.solve(x.T @ x + ridge, x.T @ y))
    alone = (wanted - wanted.mean(0)) * 30 / 29
    assert router.error == pytest.approx(np.square(missed).mean() / np.square(alone).mean(), rel=1e-6)
