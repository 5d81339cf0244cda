"""Outcomes of every path against walking them one by one; forecasters fitted on them; replayed walks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch

from offramp.models import EarlyExitNetwork
from offramp.models.forecasts import COMPACT, STATISTICS, softmax_statistics
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
from offramp.training.outcomes import (
    Outcomes,
    collect_outcomes,
    compression_layers,
    fit_compression,
    pack_outcomes,
    unpack_outcomes,
)
from offramp.training.replay import (
    WalkCosts,
    bit_costs,
    full_depth_point,
    price_frontier,
    replay_walks,
    static_points,
    upper_hull,
    walk_limits,
    walk_point,
)
from offramp.training.walk_tree import WalkTree, grow_tree

NAMES = ("fp32", "int6", "int8")


@pytest.fixture(scope="module")
def rows() -> EncodedText:
    random = np.random.default_rng(0)
    ids = [random.integers(5, 60, length).tolist() for length in (4, 9, 4, 6, 9, 4)]
    return EncodedText(ids, [[0] * len(row) for row in ids], random.integers(0, 2, 6), 0)


@pytest.fixture(scope="module")
def network() -> EarlyExitNetwork:
    return tiny.network("mpnet", policy=None)


def plans_of(tree: WalkTree) -> list[list[int]]:
    """The variants of each node's walk, in the order of nodes."""
    plans: list[list[int]] = [[]] * len(tree)
    for node in range(len(tree)):
        plans[node] = [*plans[node], int(tree.variant[node])]
        for child in tree.child[node][tree.child[node] >= 0]:
            plans[child] = plans[node]
    return plans


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "increase"), [(1, True), (2, False)])
def test_outcomes_equal_walks_of_every_path(
    network: EarlyExitNetwork, rows: EncodedText, changes: int, increase: bool
) -> None:
    tree = grow_tree(3, 3, changes, increase=increase)
    torch.manual_seed(0)
    compress = [torch.nn.Linear(32, COMPACT) for _ in range(2)]
    outcomes = collect_outcomes(network, rows, NAMES, tree, compress)
    blocks = [in_precision(network.blocks, name) for name in NAMES]
    for row in range(len(rows)):
        inputs, label = rows.batch([row])
        for node, plan in enumerate(plans_of(tree)):
            with torch.no_grad():
                hidden, context = network.stem(inputs)
                for block, variant in enumerate(plan):
                    hidden = network.family.run_block(blocks[variant][block], hidden, context)
                exit_index = len(plan) - 1
                pooled = network.pooled(exit_index, hidden, context)
                logits = network.classify(exit_index, pooled)
                features = compress[exit_index](pooled)[0] if exit_index < 2 else torch.zeros(COMPACT)
            collected = outcomes.inputs[row, node]
            np.testing.assert_allclose(collected[:STATISTICS], softmax_statistics(logits)[0], atol=2e-3)
            np.testing.assert_allclose(collected[STATISTICS:], features, atol=2e-3)
            assert outcomes.wrong[row, node] == bool(logits.argmax() != label[0])
    again = unpack_outcomes(pack_outcomes(outcomes), NAMES, tree, rows.lengths)
    assert (again.inputs == outcomes.inputs).all() and (again.wrong == outcomes.wrong).all()


def test_fewer_variants_and_inputs_are_parts_of_the_outcomes(
    network: EarlyExitNetwork, rows: EncodedText
) -> None:
    compress = [torch.nn.Linear(32, COMPACT) for _ in range(2)]
    tree = grow_tree(3, 3, 2, increase=True)
    outcomes = collect_outcomes(network, rows, NAMES, tree, compress)
    fewer = outcomes.select_variants(["fp32", "int8"])
    plans, numbers = plans_of(outcomes.tree), {0: 0, 1: 2}
    for node, plan in enumerate(plans_of(fewer.tree)):
        same = plans.index([numbers[variant] for variant in plan])
        assert (fewer.inputs[:, node] == outcomes.inputs[:, same]).all()
        assert (fewer.wrong[:, node] == outcomes.wrong[:, same]).all()
    sizes = [outcomes.select_inputs(kind).inputs.shape[2] for kind in ("statistics", "features", "both")]
    assert sizes == [STATISTICS, COMPACT, STATISTICS + COMPACT]
    assert (outcomes.select_inputs("features").inputs == outcomes.inputs[..., STATISTICS:]).all()


def test_paths_that_no_walk_takes_count_as_wrong(network: EarlyExitNetwork, rows: EncodedText) -> None:
    outcomes = collect_outcomes(network, rows, ("fp32", "int8"), grow_tree(2, 3, 2, increase=False), ())
    errors = outcomes.path_errors(0)  # exiting, fp32 and int8 to exits 2 and 3
    _, wrong = outcomes.without_change()
    assert (errors[:, 1, 1:3] == 1).all(), "from int8 no walk goes back to fp32"
    assert (errors[:, 1, 3:] == wrong[:, 1, 1:]).all() and (errors[:, 0, 1:3] == wrong[:, 0, 1:]).all()


def test_the_compact_features_are_standardized_components() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(200, 3) @ torch.randn(3, 12) * torch.linspace(0.1, 30, 12) + 5
    (layer,) = compression_layers(fit_compression(hidden)[None])
    features = layer(hidden)
    assert features[:, 3:].abs().max() < 1e-3  # there are three
    torch.testing.assert_close(features[:, :3].mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    covariance = features[:, :3].T @ features[:, :3] / 200
    torch.testing.assert_close(covariance, torch.eye(3), atol=1e-3, rtol=0)


def synthetic(
    count: int = 400,
    exits: int = 4,
    seed: int = 0,
    changes: int = 1,
    increase: bool = True,
    variants: int = 2,
) -> Outcomes:
    """Rows, some of them easy; deeper exits and earlier variants are more often right and more certain."""
    random = np.random.default_rng(seed)
    hard = random.random(count)[:, None]
    tree = grow_tree(variants, exits, changes, increase=increase)
    skill = np.linspace(0.3, 1.0, exits)[tree.segment] - 0.1 * tree.variant  # [nodes]
    # The outcome of an exit depends on the variant there, and not on those before.
    noise = random.normal(0, 0.05, (count, variants, exits))[:, tree.variant, tree.segment]
    wrong = hard > skill + noise
    certain = skill - hard + random.normal(0, 0.1, (count, len(tree)))
    inputs = np.stack([certain, -certain, random.random((count, len(tree)))], axis=-1).astype(np.float32)
    names = ("fp32", "int8", "int4")[:variants]
    return Outcomes(names, tree, inputs, wrong, np.full(count, 9))


def costs_of_walks(outcomes: Outcomes) -> WalkCosts:
    prices = (1.0, 0.3, 0.1)[: len(outcomes.variants)]
    steps = np.stack([np.full(outcomes.exits, price) for price in prices])
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
    inputs, _ = outcomes.without_change()
    rates = table.look_up(inputs[:, 1, 1], 1)
    truth = outcomes.path_errors(1)[:, 1]
    np.testing.assert_allclose(rates.mean(0), truth.mean(0), atol=1e-5)
    assert len(np.unique(rates[:, 0])) > 2 and ((rates >= 0) & (rates <= 1)).all()


@pytest.mark.slow
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


@pytest.mark.slow
def test_features_that_show_errors_make_better_walks_than_statistics_that_do_not() -> None:
    fit_rows, walk_rows = synthetic(seed=0), synthetic(seed=1)
    costs, gains = costs_of_walks(walk_rows), {}
    random = np.random.default_rng(0)
    for kind in ("statistics", "features"):
        fitted, walked = (
            replace(
                rows,
                inputs=np.concatenate(
                    # The informative statistics become features, and statistics are noise.
                    [random.random(rows.inputs.shape), rows.inputs, np.zeros((*rows.wrong.shape, 5))],
                    axis=-1,
                    dtype=np.float32,
                ),
            ).select_inputs(kind)
            for rows in (fit_rows, walk_rows)
        )
        fit = ForecastFit(clusters=12, steps=200)
        forecaster = network_forecaster(fit_networks(fitted, fit_tables(fitted, fit), fit))
        points = price_frontier(walked, forecaster, costs, [0.2, 0.4, 0.8])
        gains[kind] = max(point.accuracy - 0.4 * point.cost for point in points)
    assert gains["features"] > gains["statistics"] + 1


@pytest.mark.slow
def test_a_forecast_is_close_to_its_target() -> None:
    outcomes = synthetic()
    tables = fit_tables(outcomes, ForecastFit(clusters=12))
    networks = fit_networks(outcomes, tables, ForecastFit(clusters=12))
    rows = np.arange(len(outcomes))
    state = WalkState(rows, 1, np.full(len(rows), outcomes.tree.straight[0, 1]))
    difference = np.abs(
        network_forecaster(networks)(outcomes, state) - table_forecaster(tables)(outcomes, state)
    )
    width = 1 + 2 * (outcomes.exits - 2)  # the slice of the variant in which the rows are
    assert difference[:, :width].mean() < 0.06


@pytest.mark.parametrize(("changes", "increase"), [(1, True), (2, True), (2, False)])
def test_replayed_walks_and_their_figures(changes: int, increase: bool) -> None:
    outcomes = synthetic(60, changes=changes, increase=increase, variants=3)
    costs = costs_of_walks(outcomes)
    spec = RuleSpec("quee", {"price": 0.3, **walk_limits(outcomes.tree)})
    rule = bind(spec, outcomes.exits, {"bops": costs.stated})
    nodes = {tuple(plan): node for node, plan in enumerate(plans_of(outcomes.tree))}
    random = np.random.default_rng(5)

    def forecaster(outcomes: Outcomes, state: WalkState) -> np.ndarray:
        """Random, so that rows take every kind of walk."""
        paths = 1 + 3 * (outcomes.exits - 1 - state.segment)
        return random.random((len(state.rows), 3 * paths)).astype(np.float32)

    largest = 0
    for start in range(3):
        plans = replay_walks(rule, outcomes, forecaster, start)
        point = walk_point(spec, start, plans, outcomes, costs)
        right = cost = changed = 0.0
        for row, plan in enumerate(plans):
            variants = [int(variant) for variant in plan if variant >= 0]
            count = sum(before != after for before, after in pairwise(variants))
            largest = max(largest, count)
            assert increase or variants == sorted(variants)
            right += not outcomes.wrong[row, nodes[tuple(variants)]]
            cost += sum((1.0, 0.3, 0.1)[variant] for variant in variants) / outcomes.exits
            changed += count > 0
        assert point.accuracy == pytest.approx(100 * right / 60)
        assert point.cost == pytest.approx(100 * cost / 60)
        assert point.changed == pytest.approx(100 * changed / 60)
    assert largest == changes


def test_a_rule_that_leaves_the_collected_walks_is_refused() -> None:
    outcomes = synthetic(60, increase=False)
    rule = bind(RuleSpec("quee", {"price": 0.0}), outcomes.exits, {"bops": costs_of_walks(outcomes).stated})

    def forecaster(outcomes: Outcomes, state: WalkState) -> np.ndarray:
        ahead = outcomes.exits - 1 - state.segment
        one = np.ones((len(state.rows), 2, 1 + 2 * ahead), np.float32)
        one[:, 1, 1] = 0.0  # from int8 to fp32
        return one.reshape(len(one), -1)

    with pytest.raises(ValueError, match="was not collected"):
        replay_walks(rule, outcomes, forecaster, 1)


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
