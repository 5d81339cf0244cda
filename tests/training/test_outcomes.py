"""Outcomes of every path against walking them one by one; forecasters fitted on them; replayed walks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch

from offramp.models import EarlyExitNetwork
from offramp.models.forecasts import softmax_statistics
from offramp.models.macs import bit_operations, segment_macs
from offramp.models.precision import in_precision
from offramp.runtime.rules import RuleSpec, StepCosts, bind
from offramp.training.batches import EncodedText
from offramp.training.forecasters import (
    Forecaster,
    ForecastFit,
    WalkState,
    fit_networks,
    fit_tables,
    k_means,
    mean_forecaster,
    network_forecaster,
    oracle_forecaster,
    table_forecaster,
)
from offramp.training.outcomes import Outcomes, collect_outcomes, pack_outcomes, unpack_outcomes
from offramp.training.replay import (
    WalkCosts,
    bit_costs,
    full_depth_point,
    price_frontier,
    replay_walks,
    static_points,
    upper_hull,
    walk_point,
)

NAMES = ("fp32", "int6", "int8")


@pytest.fixture(scope="module")
def rows() -> EncodedText:
    random = np.random.default_rng(0)
    ids = [random.integers(5, 60, length).tolist() for length in (4, 9, 4, 6, 9, 4)]
    return EncodedText(ids, [[0] * len(row) for row in ids], random.integers(0, 2, 6), 0)


@pytest.fixture(scope="module")
def network() -> EarlyExitNetwork:
    return tiny.network("mpnet", policy=None)


def test_outcomes_equal_walks_of_every_path(network: EarlyExitNetwork, rows: EncodedText) -> None:
    outcomes = collect_outcomes(network, rows, NAMES)
    blocks = [in_precision(network.blocks, name) for name in NAMES]
    for row in range(len(rows)):
        inputs, label = rows.batch([row])
        for before in range(3):
            for after in range(3):
                for change in range(3):
                    for exit_index in range(change + (before != after), 3):
                        with torch.no_grad():
                            hidden, context = network.stem(inputs)
                            for block in range(exit_index + 1):
                                chosen = blocks[before if block <= change else after][block]
                                hidden = network.family.run_block(chosen, hidden, context)
                            logits = network.classify(exit_index, network.pooled(exit_index, hidden, context))
                        place = (row, before, after, change, exit_index)
                        np.testing.assert_allclose(
                            outcomes.statistics[place], softmax_statistics(logits)[0], atol=2e-3
                        )
                        assert outcomes.wrong[place] == bool(logits.argmax() != label[0])
    again = unpack_outcomes(pack_outcomes(outcomes), NAMES, rows.lengths)
    assert (again.statistics == outcomes.statistics).all() and (again.wrong == outcomes.wrong).all()
    fewer = outcomes.select_variants(["fp32", "int8"])
    assert (fewer.wrong[:, 1, 0] == outcomes.wrong[:, 2, 0]).all() and fewer.variants == ("fp32", "int8")


def synthetic(count: int = 400, exits: int = 4, seed: int = 0) -> Outcomes:
    """Rows, some of them easy; deeper exits and the first variant are more often right and more certain."""
    random = np.random.default_rng(seed)
    hard = random.random(count)
    shape = (count, 2, 2, exits, exits)
    skill = np.linspace(0.3, 1.0, exits) - np.array([0.0, 0.1])[:, None, None]  # [after, 1, exits]
    straight = hard[:, None, None] > skill[:, 0] + random.normal(0, 0.05, (count, 2, exits))
    wrong = np.zeros(shape, bool)
    for before in range(2):
        for after in range(2):
            wrong[:, before, after] = straight[:, after][:, None]
    certain = (skill[None, None] - hard[:, None, None, None, None]) + random.normal(0, 0.1, shape)
    statistics = np.stack([certain, -certain, random.random(shape)], axis=-1).astype(np.float32)
    same = np.arange(2)
    # Without a change: the same wherever the change would be.
    statistics[:, same, same] = statistics[:, same, same][:, :, :1]
    return Outcomes(("fp32", "int8"), statistics, wrong, np.full(count, 9))


def costs_of_walks(outcomes: Outcomes) -> WalkCosts:
    steps = np.stack([np.full(outcomes.exits, 1.0), np.full(outcomes.exits, 0.3)])
    stated = StepCosts(
        9, {name: tuple(row) for name, row in zip(outcomes.variants, steps.tolist(), strict=True)}
    )
    count = len(outcomes)
    whole = np.full(count, float(outcomes.exits))
    ones = np.ones(outcomes.exits, np.int64)
    return WalkCosts(
        "bops", np.broadcast_to(steps, (count, *steps.shape)), np.zeros(count), whole, ones, stated
    )


def test_k_means_recovers_clusters() -> None:
    random = np.random.default_rng(0)
    middle = np.array([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    points = np.concatenate([at + random.normal(0, 0.1, (30, 2)) for at in middle])
    centres = k_means(points, 3, seed=1)
    assert sorted(np.round(centres, 0).tolist()) == sorted(middle.tolist())
    assert len(k_means(np.ones((10, 2)), 4, seed=0)) == 1


def test_targets_are_error_rates_of_clusters() -> None:
    outcomes = synthetic()
    table = fit_tables(outcomes, ForecastFit(clusters=8, prior=0.0))[1]
    statistics, _ = outcomes.without_change()
    rates = table.look_up(statistics[:, 1, 1], 1)
    truth = outcomes.path_errors(1)[:, 1]
    np.testing.assert_allclose(rates.mean(0), truth.mean(0), atol=1e-5)
    assert len(np.unique(rates[:, 0])) > 2 and ((rates >= 0) & (rates <= 1)).all()


def test_better_forecasts_give_better_walks_and_the_oracle_is_the_bound() -> None:
    fit_rows, walk_rows = synthetic(seed=0), synthetic(seed=1)
    tables = fit_tables(fit_rows, ForecastFit(clusters=12))
    networks = fit_networks(fit_rows, tables, ForecastFit(clusters=12, steps=200))
    costs = costs_of_walks(walk_rows)

    def gain(forecaster: Forecaster) -> float:
        """The greatest accuracy minus a price times the cost."""
        return max(
            p.accuracy - 0.4 * p.cost for p in price_frontier(walk_rows, forecaster, costs, [0.2, 0.4, 0.8])
        )

    oracle, network = gain(oracle_forecaster), gain(network_forecaster(networks))
    table, mean = gain(table_forecaster(tables)), gain(mean_forecaster(fit_rows))
    assert oracle > network + 1 and network > mean + 1
    assert abs(network - table) < 4


def test_a_forecast_is_close_to_its_target() -> None:
    outcomes = synthetic()
    tables = fit_tables(outcomes, ForecastFit(clusters=12))
    networks = fit_networks(outcomes, tables, ForecastFit(clusters=12))
    rows = np.arange(len(outcomes))
    zeros = np.zeros(len(rows), np.int64)
    state = WalkState(rows, 1, zeros, zeros, zeros)
    difference = np.abs(
        network_forecaster(networks)(outcomes, state) - table_forecaster(tables)(outcomes, state)
    )
    width = 1 + 2 * (outcomes.exits - 2)  # the slice of the variant in which the rows are
    assert difference[:, :width].mean() < 0.06


def test_replayed_walks_and_their_figures() -> None:
    outcomes = synthetic(40)
    costs = costs_of_walks(outcomes)
    rule = bind(RuleSpec("quee", {"price": 0.3}), outcomes.exits, {"bops": costs.stated})
    for start in range(2):
        plans = replay_walks(rule, outcomes, oracle_forecaster, start)
        assert {len({*row.tolist()} - {-1}) for row in plans} == {1, 2}
        point = walk_point(rule.spec, start, plans, outcomes, costs)
        right = cost = changed = 0.0
        for row, plan in enumerate(plans):
            variants = [int(variant) for variant in plan if variant >= 0]
            switch = next((at - 1 for at in range(1, len(variants)) if variants[at] != variants[at - 1]), 0)
            right += not outcomes.wrong[row, start, variants[-1], switch, len(variants) - 1]
            cost += sum(0.3 if variant else 1.0 for variant in variants) / outcomes.exits
            changed += variants[-1] != start
        assert point.accuracy == pytest.approx(100 * right / 40)
        assert point.cost == pytest.approx(100 * cost / 40)
        assert point.changed == pytest.approx(100 * changed / 40)


def test_static_points_full_depth_and_hull() -> None:
    outcomes = synthetic()
    costs = costs_of_walks(outcomes)
    points = static_points(outcomes, costs)
    _, wrong = outcomes.without_change()
    assert [p.accuracy for p in points] == pytest.approx((100 * (1 - wrong.mean(0))).ravel().tolist())
    full = full_depth_point(outcomes, costs)
    assert full.cost == pytest.approx(100) and full.accuracy == pytest.approx(points[3].accuracy)
    edge = upper_hull(points)
    slopes = [(b.accuracy - a.accuracy) / (b.cost - a.cost) for a, b in pairwise(edge)]
    assert slopes == sorted(slopes, reverse=True) and edge[0].cost == min(p.cost for p in points)


def test_bits_are_counted_for_every_row(network: EarlyExitNetwork) -> None:
    lengths = np.array([4, 9, 4])
    costs = bit_costs(network, lengths, ("fp32", "int8"))
    segments = segment_macs(network)
    assert costs.steps.shape == (3, 2, 3)
    assert costs.steps[1, 1, 2] == bit_operations(segments[2], "int8", 9)
    plans = np.array([[0, 1, -1]] * 3, np.int8)
    expected = costs.stem + costs.steps[:, 0, 0] + costs.steps[:, 1, 1]
    np.testing.assert_allclose(costs.walk_costs(plans), expected)
    assert (costs.full < costs.stem + costs.steps[:, 0].sum(1)).all()  # without the earlier exits
