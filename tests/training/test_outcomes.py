"""Outcomes of every path against walking them one by one, and forecasters that are fitted on them."""

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
    Fit,
    Forecaster,
    Place,
    by_mean,
    by_network,
    by_table,
    by_truth,
    fit_networks,
    k_means,
    make_tables,
)
from offramp.training.outcomes import Outcomes, collect_outcomes, pack, unpack
from offramp.training.replanning import (
    Ledger,
    bit_ledger,
    frontier,
    full_depth,
    hull,
    measured,
    replay,
    static_points,
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


def test_outcomes_are_those_of_walking_every_path(network: EarlyExitNetwork, rows: EncodedText) -> None:
    outcomes = collect_outcomes(network, rows, NAMES)
    blocks = [in_precision(network.blocks, name) for name in NAMES]
    for row in range(len(rows)):
        inputs, label = rows.batch([row])
        for before in range(3):
            for after in range(3):
                for change in range(3):
                    for exit_at in range(change + (before != after), 3):
                        with torch.no_grad():
                            hidden, context = network.stem(inputs)
                            for block in range(exit_at + 1):
                                chosen = blocks[before if block <= change else after][block]
                                hidden = network.family.run_block(chosen, hidden, context)
                            logits = network.classify(exit_at, network.pooled(hidden, context))
                        place = (row, before, after, change, exit_at)
                        np.testing.assert_allclose(
                            outcomes.seen[place], softmax_statistics(logits)[0], atol=2e-3
                        )
                        assert outcomes.wrong[place] == bool(logits.argmax() != label[0])
    again = unpack(pack(outcomes), NAMES, rows.lengths)
    assert (again.seen == outcomes.seen).all() and (again.wrong == outcomes.wrong).all()
    fewer = outcomes.only(["fp32", "int8"])
    assert (fewer.wrong[:, 1, 0] == outcomes.wrong[:, 2, 0]).all() and fewer.variants == ("fp32", "int8")


def made_up(count: int = 400, exits: int = 4, seed: int = 0) -> Outcomes:
    """Rows of which some are easy; deeper exits and the first variant are right more often, and surer."""
    random = np.random.default_rng(seed)
    hard = random.random(count)
    shape = (count, 2, 2, exits, exits)
    skill = np.linspace(0.3, 1.0, exits) - np.array([0.0, 0.1])[:, None, None]  # [after, 1, exits]
    straight = hard[:, None, None] > skill[:, 0] + random.normal(0, 0.05, (count, 2, exits))
    wrong = np.zeros(shape, bool)
    for before in range(2):
        for after in range(2):
            wrong[:, before, after] = straight[:, after][:, None]
    sure = (skill[None, None] - hard[:, None, None, None, None]) + random.normal(0, 0.1, shape)
    seen = np.stack([sure, -sure, random.random(shape)], axis=-1).astype(np.float32)
    same = np.arange(2)
    seen[:, same, same] = seen[:, same, same][:, :, :1]  # without a change, the same wherever it would be
    return Outcomes(("fp32", "int8"), seen, wrong, np.full(count, 9))


def ledger_of(outcomes: Outcomes) -> Ledger:
    steps = np.stack([np.full(outcomes.exits, 1.0), np.full(outcomes.exits, 0.3)])
    stated = StepCosts(
        9, {name: tuple(row) for name, row in zip(outcomes.variants, steps.tolist(), strict=True)}
    )
    count = len(outcomes)
    whole = np.full(count, float(outcomes.exits))
    ones = np.ones(outcomes.exits, np.int64)
    return Ledger("bops", np.broadcast_to(steps, (count, *steps.shape)), np.zeros(count), whole, ones, stated)


def test_clusters_are_found() -> None:
    random = np.random.default_rng(0)
    middle = np.array([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    points = np.concatenate([at + random.normal(0, 0.1, (30, 2)) for at in middle])
    centres = k_means(points, 3, seed=1)
    assert sorted(np.round(centres, 0).tolist()) == sorted(middle.tolist())
    assert len(k_means(np.ones((10, 2)), 4, seed=0)) == 1


def test_targets_are_error_rates_of_clusters() -> None:
    outcomes = made_up()
    table = make_tables(outcomes, Fit(clusters=8, prior=0.0))[1]
    seen, _ = outcomes.straight()
    found = table.look_up(seen[:, 1, 1], 1)
    truth = outcomes.paths(1)[:, 1]
    np.testing.assert_allclose(found.mean(0), truth.mean(0), atol=1e-5)
    assert len(np.unique(found[:, 0])) > 2 and ((found >= 0) & (found <= 1)).all()


def test_better_forecasts_walk_better_and_the_truth_is_the_bound() -> None:
    fitted_on, walked = made_up(seed=0), made_up(seed=1)
    tables = make_tables(fitted_on, Fit(clusters=12))
    networks = fit_networks(fitted_on, tables, Fit(clusters=12, steps=200))
    ledger = ledger_of(walked)

    def gain(forecaster: Forecaster) -> float:
        """The most that accuracy minus a price of cost comes to."""
        return max(p.accuracy - 0.4 * p.cost for p in frontier(walked, forecaster, ledger, [0.2, 0.4, 0.8]))

    truth, network = gain(by_truth), gain(by_network(networks))
    table, mean = gain(by_table(tables)), gain(by_mean(fitted_on))
    assert truth > network + 1 and network > mean + 1
    assert abs(network - table) < 4


def test_a_forecast_is_close_to_its_target() -> None:
    outcomes = made_up()
    tables = make_tables(outcomes, Fit(clusters=12))
    networks = fit_networks(outcomes, tables, Fit(clusters=12))
    rows = np.arange(len(outcomes))
    zeros = np.zeros(len(rows), np.int64)
    place = Place(rows, 1, zeros, zeros, zeros)
    far = np.abs(by_network(networks)(outcomes, place) - by_table(tables)(outcomes, place))
    own = 1 + 2 * (outcomes.exits - 2)  # the slice of the variant in which the rows are
    assert far[:, :own].mean() < 0.06


def test_replayed_walks_and_their_figures() -> None:
    outcomes = made_up(40)
    ledger = ledger_of(outcomes)
    rule = bind(RuleSpec("quee", {"price": 0.3}), outcomes.exits, {"bops": ledger.stated})
    for start in range(2):
        plans = replay(rule, outcomes, by_truth, start)
        assert {len({*row.tolist()} - {-1}) for row in plans} == {1, 2}
        point = measured(rule.spec, start, plans, outcomes, ledger)
        right = cost = changed = 0.0
        for row, plan in enumerate(plans):
            ran = [int(variant) for variant in plan if variant >= 0]
            switch = next((at - 1 for at in range(1, len(ran)) if ran[at] != ran[at - 1]), 0)
            right += not outcomes.wrong[row, start, ran[-1], switch, len(ran) - 1]
            cost += sum(0.3 if variant else 1.0 for variant in ran) / outcomes.exits
            changed += ran[-1] != start
        assert point.accuracy == pytest.approx(100 * right / 40)
        assert point.cost == pytest.approx(100 * cost / 40)
        assert point.changed == pytest.approx(100 * changed / 40)


def test_static_points_full_depth_and_hull() -> None:
    outcomes = made_up()
    ledger = ledger_of(outcomes)
    points = static_points(outcomes, ledger)
    _, wrong = outcomes.straight()
    assert [p.accuracy for p in points] == pytest.approx((100 * (1 - wrong.mean(0))).ravel().tolist())
    full = full_depth(outcomes, ledger)
    assert full.cost == pytest.approx(100) and full.accuracy == pytest.approx(points[3].accuracy)
    line = hull(points)
    slopes = [(b.accuracy - a.accuracy) / (b.cost - a.cost) for a, b in pairwise(line)]
    assert slopes == sorted(slopes, reverse=True) and line[0].cost == min(p.cost for p in points)


def test_bits_are_counted_for_every_row(network: EarlyExitNetwork) -> None:
    lengths = np.array([4, 9, 4])
    ledger = bit_ledger(network, lengths, ("fp32", "int8"))
    segments = segment_macs(network)
    assert ledger.steps.shape == (3, 2, 3)
    assert ledger.steps[1, 1, 2] == bit_operations(segments[2], "int8", 9)
    plans = np.array([[0, 1, -1]] * 3, np.int8)
    expected = ledger.stem + ledger.steps[:, 0, 0] + ledger.steps[:, 1, 1]
    np.testing.assert_allclose(ledger.of(plans), expected)
    assert (ledger.full < ledger.stem + ledger.steps[:, 0].sum(1)).all()  # exits on the way are not in it
