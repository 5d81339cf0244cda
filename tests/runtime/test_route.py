"""Rule route: routes of a bundle, the router that chooses among them, and its file."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
from tiny_bundles import GENERATOR

from offramp.runtime.bundle.files import Bundle, open_bundle
from offramp.runtime.bundle.manifest import FileFact
from offramp.runtime.errors import BadBundle, BadSetting
from offramp.runtime.rules import RuleSpec, bind
from offramp.runtime.rules.route import (
    ROUTER_FILE,
    Router,
    Routing,
    fit_router,
    list_routes,
    read_router,
    read_routing,
)

COSTS = np.array([30.0, 10.0, 20.0])  # in no order


def scored_texts(count: int, seed: int, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Features and scores of texts; route 1 is as good as route 0 where feature 3 is below zero.

    Scores differ far more between texts than between routes.
    """
    random = np.random.default_rng(seed)
    features = random.normal(size=(count, 12))
    loss = np.where(features[:, 3] < 0, 0.0, 2.0)
    scores = np.stack([np.zeros(count), -loss, -loss / 4], 1)
    return features, scores + 10 * random.normal(size=(count, 1)) + noise * random.normal(size=(count, 3))


def test_router_uses_informative_features() -> None:
    router = fit_router(*scored_texts(200, 0), COSTS)
    assert router.error < 0.5
    features, scores = scored_texts(300, 1)
    routes, rows = router.choose_routes(features, router.price_for_cost(features, 20)), np.arange(300)
    assert COSTS[routes].mean() <= 20
    mean_score = scores[rows, routes].mean()
    shuffled = [scores[rows, np.random.default_rng(seed).permutation(routes)].mean() for seed in range(9)]
    assert mean_score > max(shuffled) + 0.2, "the same routes for other texts should be worse"
    assert mean_score > scores[:, 2].mean(), "one route of this cost for all texts should be worse"


def test_lower_price_buys_more() -> None:
    router = fit_router(*scored_texts(200, 0), COSTS)
    features, _ = scored_texts(100, 2)
    mean_costs = [COSTS[router.choose_routes(features, price)].mean() for price in (0.0, 0.05, 0.2, 100.0)]
    assert mean_costs == sorted(mean_costs, reverse=True)
    assert mean_costs[0] > mean_costs[-1] == 10
    assert router.price_for_cost(features, 35) == 0
    assert COSTS[router.choose_routes(features, router.price_for_cost(features, 9))].mean() == 10


def test_router_ignores_random_features() -> None:
    features, _ = scored_texts(60, 3)
    random, features = np.random.default_rng(5), np.tile(features, (1, 10))
    router = fit_router(features, random.normal(size=(60, 3)) + np.array([1.0, 0, 0]), COSTS)
    assert router.error > 0.9
    assert (router.choose_routes(features, 0.0) == 0).mean() > 0.9
    assert router.strength >= 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "width", "repeated"), [(30, 12, 1), (20, 12, 2), (12, 12, 1), (48, 576, 1)], ids=str
)
def test_error_of_router_is_that_of_rows_left_out(rows: int, width: int, repeated: int) -> None:
    random = np.random.default_rng(4)
    features, scores = (
        np.tile(random.normal(size=(rows, width)), (1, repeated)),
        random.normal(size=(rows, 3)),
    )
    features[:, 3] += scores[:, 1]
    router = fit_router(features, scores, COSTS)
    relative = scores - scores.mean(1, keepdims=True)
    residuals = []
    inputs = (features - router.shift) / router.scale
    for row in range(rows):
        kept = np.arange(rows) != row
        x, y = np.c_[inputs[kept], np.ones(rows - 1)], relative[kept]
        ridge = router.strength * np.diag([*np.ones(width * repeated), 0.0])
        forecast = np.r_[inputs[row], 1] @ np.linalg.solve(x.T @ x + ridge, x.T @ y)
        residuals.append(relative[row] - forecast)
    residuals_of_means = (relative - relative.mean(0)) * rows / (rows - 1)
    expected = np.square(residuals).mean() / np.square(residuals_of_means).mean()
    assert router.error == pytest.approx(expected, rel=1e-6)


def test_error_of_router_on_noise_with_more_features_than_rows_is_not_small() -> None:
    random = np.random.default_rng(0)
    router = fit_router(random.normal(size=(48, 576)), random.normal(size=(48, 3)), COSTS)
    assert router.error > 0.9


def test_cheaper_route_wins_a_tie() -> None:
    router = Router(np.zeros(2), np.ones(2), np.zeros((2, 3)), np.zeros(3), COSTS, 1.0, 1.0)
    assert router.choose_routes(np.zeros((4, 2)), 0.0).tolist() == [1] * 4


def test_router_file_round_trip() -> None:
    router = fit_router(*scored_texts(50, 6), COSTS)
    restored = read_router(router.to_bytes(), 12, 3)
    for name, value in dataclasses.asdict(router).items():
        np.testing.assert_array_equal(getattr(restored, name), value)
    with pytest.raises(ValueError, match=r"a router of \(12, 3\), this bundle's has \(12, 4\)"):
        read_router(router.to_bytes(), 12, 4)
    with pytest.raises(ValueError, match="not a router"):
        read_router(b"no file of numpy", 12, 3)


def test_routes_of_a_bundle() -> None:
    routes = list_routes(open_bundle(GENERATOR).manifest)
    assert [(route.name, sorted(route.skipped), route.blocks) for route in routes] == [
        ("full", [], 3),
        ("skip to 2", [1], 2),
        ("exit at 2", [2], 2),
    ]


def bundle_with_router(folder: Path, data: bytes) -> Bundle:
    """The tiny generator's manifest in a folder that holds no file but a router."""
    manifest = open_bundle(GENERATOR).manifest
    (folder / ROUTER_FILE).write_bytes(data)
    fact = FileFact(hashlib.sha256(data).hexdigest(), len(data))
    return Bundle(folder, dataclasses.replace(manifest, files={**manifest.files, ROUTER_FILE: fact}))


def routing_of(forecasts: list[float], folder: Path) -> Routing:
    """Routing of the tiny generator whose forecasts are the same for every prompt."""
    hidden = open_bundle(GENERATOR).manifest.hidden_size
    costs = np.array([3.0, 2.0, 2.0])
    router = Router(
        np.zeros(hidden), np.ones(hidden), np.zeros((hidden, 3)), np.array(forecasts), costs, 1.0, 1.0
    )
    return read_routing(bundle_with_router(folder, router.to_bytes()))


def test_plan_follows_the_chosen_route(tmp_path: Path) -> None:
    routing = routing_of([1.0, 0.5, 0.0], tmp_path)
    hidden = np.zeros(open_bundle(GENERATOR).manifest.hidden_size, np.float32)
    cheap, dear = (bind(RuleSpec("route", {"price": price}), 3, None, routing) for price in (0.1, 2.0))
    assert cheap.first_plan(3, 1, hidden).tolist() == [[1, 1, 1]]
    assert dear.first_plan(3, 1, hidden).tolist() == [[1, -1, 1]]
    assert dear.first_plan(3, 0).tolist() == [[0, 0, 0]], "without a prompt there is no route to choose"


def test_bundle_without_or_with_a_damaged_router_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match=r"has no router; fit one with: ee-calibrate pairs\.jsonl"):
        read_routing(open_bundle(GENERATOR))
    with pytest.raises(BadBundle, match=r"router\.npz: not a router: .*; calibrate the bundle again"):
        read_routing(bundle_with_router(tmp_path, b"no file of numpy"))
