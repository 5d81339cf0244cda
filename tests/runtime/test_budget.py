"""Budgets: the controller on simulated streams, and sessions that hold one."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_bundles import CLASSIFIER, GENERATOR, bundle_with_points, texts

from offramp.runtime import BadSetting, BudgetExceeded, load, load_classifier
from offramp.runtime.budget import Budget, BudgetOptions, BudgetPoint, budget_points, open_budget
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import Manifest, RuleSpec

BLOCKS = 12
DEPTHS = (0.2, 0.35, 0.6, 1.0)
POINTS = tuple(BudgetPoint(f"p{depth:g}", RuleSpec("gate", {"threshold": depth}), depth) for depth in DEPTHS)
Stream = Callable[[int, int], float]  # row, number of the point: the row's cost


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_with_points(tmp_path_factory.mktemp("points"))


@pytest.fixture(scope="module")
def guaranteed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_with_points(tmp_path_factory.mktemp("guaranteed"), guaranteed=True)


def walk_stream(budget: Budget, rows: int, cost: Stream, at_once: int = 1) -> np.ndarray:
    """Costs of the rows of a stream, in the unit of the budget [rows]."""
    costs, is_ms = [], budget.options.unit == "ms"
    for start in range(0, rows, at_once):
        drawn = budget.draw(at_once)
        for number, row in zip(drawn, range(start, start + at_once), strict=True):
            value = cost(row, number)
            costs.append(value)
            budget.observe(value / 1e3 if is_ms else 0.0, 6 if is_ms else round(BLOCKS * value))
    return np.array(costs)


def noisy(difficulty: Callable[[int], float], seed: int = 0) -> Stream:
    """Depths of rows that are spread around the point's own, times the difficulty, in whole blocks."""
    random = np.random.default_rng(seed)

    def cost(row: int, number: int) -> float:
        mean = difficulty(row) * DEPTHS[number]
        blocks = random.binomial(BLOCKS - 1, min((mean * BLOCKS - 1) / (BLOCKS - 1), 1.0)) + 1
        return float(blocks) / BLOCKS

    return cost


@pytest.mark.parametrize("at_once", [1, 8, 32])
def test_a_mean_is_held_while_the_difficulty_doubles(at_once: int) -> None:
    budget = Budget(BudgetOptions(depth=0.45), POINTS, BLOCKS)
    costs = walk_stream(budget, 8000, noisy(lambda row: 1 if row < 4000 else 2), at_once)
    windows = costs.reshape(-1, 1000).mean(1)
    assert np.abs(windows / 0.45 - 1).max() < 0.05
    assert budget.report().exceeded == 0 and budget.report().windows == 8


def test_decisions_for_many_rows_are_stable() -> None:
    budget = Budget(BudgetOptions(depth=0.45), POINTS, BLOCKS)
    with pytest.warns(BudgetExceeded):  # the first 250 rows after the change cost twice the budget
        costs = walk_stream(budget, 8000, noisy(lambda row: 1 if row < 4000 else 2), 250)
    windows = np.delete(costs.reshape(-1, 1000).mean(1), 4)
    assert np.abs(windows / 0.45 - 1).max() < 0.05


def test_inside_of_the_frontier_no_stream_breaks_the_bound() -> None:
    budget, random = Budget(BudgetOptions(depth=0.45), POINTS, BLOCKS), np.random.default_rng(1)
    levels = np.clip(np.exp(np.cumsum(random.normal(0, 0.02, 6000))), 0.6, 1.6)  # the difficulty wanders
    cost, costs, positions = noisy(lambda row: float(levels[row])), [], []
    for row in range(6000):
        (number,) = budget.draw()
        costs.append(cost(row, number))
        budget.observe(0.0, round(BLOCKS * costs[-1]))
        positions.append(budget._position)
    inside = 0
    for start in range(1, 5000, 50):
        if min(positions[start : start + 1001]) > 0 and max(positions[start : start + 1001]) < 1:
            inside += 1
            error = np.mean(costs[start : start + 1000]) - 0.45
            assert abs(error) <= (DEPTHS[-1] - DEPTHS[0]) / 40 + 1e-9
    assert inside > 20


@pytest.mark.parametrize("target", [0.25, 0.5, 0.8])
def test_a_budget_between_two_points_is_hit(target: float) -> None:
    budget = Budget(BudgetOptions(depth=target), POINTS, BLOCKS)
    costs = walk_stream(budget, 4000, noisy(lambda row: 1))
    assert abs(costs.mean() - target) < 0.01 * target
    used = [name for name, share in budget.report().shares.items() if share > 0.02]
    assert 2 <= len(used) <= 3  # neighbours


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_the_position_settles_if_costs_are_not_as_estimated(factor: float) -> None:
    budget = Budget(BudgetOptions(ms=20.0), POINTS, BLOCKS)
    walk_stream(budget, 300, lambda row, number: factor * 30 * DEPTHS[number])
    positions = []
    for _ in range(200):
        walk_stream(budget, 1, lambda row, number: factor * 30 * DEPTHS[number])
        positions.append(budget._position)
    assert np.std(positions) < 0.1


def test_milliseconds_are_held_without_any_estimate_before() -> None:
    random = np.random.default_rng(0)
    budget = Budget(BudgetOptions(ms=8.0), POINTS, BLOCKS)

    def cost(row: int, number: int) -> float:
        slower = 1 if row < 3000 else 2
        return float(1 + slower * 12 * DEPTHS[number] * random.lognormal(0, 0.5))

    costs = walk_stream(budget, 6000, cost)
    assert np.abs(costs.reshape(-1, 1000).mean(1) / 8 - 1).max() < 0.05


def test_a_slow_first_row_is_paid_back_in_its_window() -> None:
    budget = Budget(BudgetOptions(ms=10.0), POINTS, BLOCKS)
    costs = walk_stream(budget, 2000, lambda row, number: 900.0 if row < 2 else 20 * DEPTHS[number])
    assert abs(costs[:1000].mean() / 10 - 1) < 0.05
    assert abs(costs[1000:].mean() / 10 - 1) < 0.05


def test_a_p95_is_held_while_the_difficulty_doubles() -> None:
    budget = Budget(BudgetOptions(depth=0.75, statistic="p95", window=2000), POINTS, BLOCKS)
    costs = walk_stream(budget, 12_000, noisy(lambda row: 0.8 if row < 6000 else 1.6))
    over = (costs > 0.75).reshape(-1, 2000).mean(1)
    assert np.abs(over[1:] - 0.05).max() < 0.015
    assert budget.report().exceeded == 0


def test_what_no_point_can_hold_is_reported_once_and_walked_at_the_cheapest() -> None:
    budget = Budget(BudgetOptions(depth=0.3, window=100), POINTS, BLOCKS)
    with pytest.warns(BudgetExceeded, match=r"mean of|mean depth of 0\.4.*p0\.2, the cheapest") as caught:
        walk_stream(budget, 500, noisy(lambda row: 2.3))
    assert len(caught) == 1
    report = budget.report()
    assert report.exceeded == 5 and report.shares["p0.2"] > 0.9 and report.worst > 0.4


def test_after_a_hard_part_the_budget_is_held_again() -> None:
    budget = Budget(BudgetOptions(depth=0.3, window=200), POINTS, BLOCKS)
    with pytest.warns(BudgetExceeded):
        costs = walk_stream(budget, 5000, noisy(lambda row: 3 if row < 1000 else 1))
    assert abs(costs[-1000:].mean() / 0.3 - 1) < 0.05


def test_easy_rows_run_at_full_depth_and_save_nothing_up() -> None:
    budget = Budget(BudgetOptions(depth=0.45), POINTS, BLOCKS)
    costs = walk_stream(budget, 6000, noisy(lambda row: 0.3 if row < 3000 else 1))
    assert costs[2000:3000].mean() < 0.35
    assert abs(costs[3000:4000].mean() / 0.45 - 1) < 0.05


def test_the_same_seed_draws_the_same_points() -> None:
    def drawn(seed: int) -> list[int]:
        return Budget(BudgetOptions(depth=0.45, seed=seed), POINTS, BLOCKS).draw(50)

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ms": 5.0, "depth": 0.4}, "give one of them"),
        ({"statistic": "p95"}, "give budget_ms or budget_depth"),
        ({"ms": 0.0}, "budget_ms 0"),
        ({"ms": float("nan")}, "budget_ms nan"),
        ({"depth": 1.5}, "budget_depth 1.5"),
        ({"depth": 0.4, "statistic": "median"}, "budget_of 'median'"),
        ({"depth": 0.4, "window": 3}, "budget_window 3"),
        ({"depth": 0.4, "max_risk": 1.0}, "max_risk 1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(options: dict[str, float], text: str) -> None:
    with pytest.raises(BadSetting, match=text):
        BudgetOptions(**options)  # type: ignore[arg-type]


def manifest_of(path: Path, **changes: object) -> Manifest:
    return replace(open_bundle(path).manifest, **changes)  # type: ignore[arg-type]


def test_points_are_those_of_one_rule_and_variant_and_full_depth(bundle: Path) -> None:
    points = budget_points(manifest_of(bundle), "gate", "fp32")
    assert [point.name for point in points] == ["gate-1", "gate-2", "gate-3", "full depth"]
    assert sorted(point.depth for point in points) == [point.depth for point in points]
    assert [point.name for point in budget_points(manifest_of(bundle), "gate", "int8")] == ["full depth"]


def test_with_max_risk_only_points_that_guarantee_it_count(bundle: Path, guaranteed: Path) -> None:
    manifest = manifest_of(guaranteed)
    limits = [point.guarantee.limit for point in manifest.points if point.guarantee is not None]
    assert limits == sorted(limits, reverse=True)  # deeper points disagree less
    points = budget_points(manifest, "gate", "fp32", limits[2])
    assert [point.name for point in points] == ["gate-3", "full depth"]
    with pytest.raises(BadSetting, match=r"ee-calibrate --risk 0\.01"):
        open_budget(manifest, manifest.rule, "fp32", BudgetOptions(depth=0.9, max_risk=0.01))
    with pytest.raises(BadSetting, match="there is full depth"):
        open_budget(manifest_of(bundle), manifest.rule, "fp32", BudgetOptions(depth=0.9, max_risk=0.5))


def test_full_depth_of_another_variant_guarantees_nothing(guaranteed: Path) -> None:
    manifest = manifest_of(guaranteed)
    points = tuple(replace(point, variant="int8") for point in manifest.points)
    allowed = budget_points(replace(manifest, points=points), "gate", "int8", 0.99)
    assert "full depth" not in [point.name for point in allowed] and len(allowed) == 2


def test_a_budget_below_the_cheapest_point_is_refused(guaranteed: Path) -> None:
    manifest = manifest_of(guaranteed)
    limit = manifest.points[2].guarantee
    assert limit is not None
    with pytest.raises(BadSetting, match=r"gate-3, the cheapest .* at a mean of 0\.7"):
        open_budget(manifest, manifest.rule, "fp32", BudgetOptions(depth=0.5, max_risk=limit.limit))
    with pytest.raises(BadSetting, match=r"gate-3, .* at a p95 of 1\.000"):
        options = BudgetOptions(depth=0.9, statistic="p95", max_risk=limit.limit)
        open_budget(manifest, manifest.rule, "fp32", options)


def test_a_bundle_at_full_depth_uses_the_points_of_its_only_rule(bundle: Path) -> None:
    manifest = manifest_of(bundle)
    budget = open_budget(manifest, RuleSpec("never", {}), "fp32", BudgetOptions(depth=0.9))
    assert budget.points[0].name == "gate-1"
    other = replace(manifest.points[0], rule=RuleSpec("entropy", {"threshold": 0.1}))
    with pytest.raises(BadSetting, match="one of: entropy, gate"):
        several = replace(manifest, points=(other, *manifest.points))
        open_budget(several, RuleSpec("never", {}), "fp32", BudgetOptions(depth=0.9))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 8])
def test_a_session_holds_its_budget(bundle: Path, size: int) -> None:
    with load_classifier(bundle, budget_depth=0.8, budget_window=200, batch_size=size) as session:
        answers = list(session.map(texts(1000, seed=2)))
        report = session.budget_report()
        shares = [answer.depth / session.manifest.blocks for answer in answers]
    assert report.rows == 1000 and report.mean == pytest.approx(np.mean(shares))
    assert abs(report.mean / 0.8 - 1) < 0.03 and report.windows == 5


def test_answers_of_calls_and_of_map_keep_their_order_under_a_budget(bundle: Path) -> None:
    items = texts(60, seed=4)
    with load_classifier(bundle, rule="never") as session:
        full = {item: session(item) for item in items}
    with load_classifier(bundle, budget_depth=1.0, batch_size=8) as session:
        answers = list(session.answers([*items[:30], 7, *items[30:]]))
    assert len(answers) == 61 and not hasattr(answers[30], "label")
    for item, answer in zip([*items[:30], None, *items[30:]], answers, strict=True):
        if item is not None and getattr(answer, "depth", 0) == 4:
            assert answer.label == full[item].label  # type: ignore[union-attr]


@pytest.mark.slow
def test_scores_are_those_of_the_point_that_walked_the_row(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(bundle, path)
    manifest, temperatures = open_bundle(path).manifest, (0.5, 2.0, 4.0)
    points = [
        replace(point, rule=replace(point.rule, score_temperatures=(value,) * 3))
        for point, value in zip(manifest.points, temperatures, strict=True)
    ]
    changed = replace(manifest, points=tuple(points), rule=points[0].rule)
    (path / "manifest.json").write_text(changed.to_json(), encoding="utf-8")
    items, expected = texts(60, seed=5), list[list[tuple[str, float]]]()
    for point in points:
        with load_classifier(path, point=point.name) as session:
            expected.append([(answer.label, answer.score) for answer in session.map(items, 1)])
    with load_classifier(path, budget_depth=0.5, seed=3) as session:
        answers = [session(item) for item in items]
    early = [number for number, answer in enumerate(answers) if answer.exit == 1]
    used = set()
    for number in early:
        given = (answers[number].label, answers[number].score)
        used.add(next(point for point, each in enumerate(expected) if each[number] == given))
    assert len(used) > 1


def test_a_session_without_a_budget_has_no_report(bundle: Path) -> None:
    with load_classifier(bundle) as session, pytest.raises(BadSetting, match="there is no budget"):
        session.budget_report()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"budget_depth": 0.8, "point": "gate-1"}, "point: a budget moves among points"),
        ({"budget_depth": 0.8, "threshold": 0.1}, "threshold: a budget moves among points"),
        ({"budget_window": 100}, "give budget_ms or budget_depth"),
        ({"budget_depth": 0.8, "rule": "entropy"}, "two points of rule entropy in fp32"),
        ({"budget_depth": 0.01}, "gate-1, the cheapest point allowed"),
    ],
)
def test_options_that_contradict_a_budget_are_refused(
    bundle: Path, options: dict[str, object], text: str
) -> None:
    with pytest.raises(BadSetting, match=text):
        load_classifier(bundle, **options)


def test_a_generator_refuses_a_budget_by_name() -> None:
    with pytest.raises(BadSetting, match="generates text: a budget is for bundles that give one answer"):
        load(GENERATOR, budget_ms=5.0)


def test_a_bundle_without_points_is_refused() -> None:
    with pytest.raises(BadSetting, match="write points with ee-calibrate"):
        load(CLASSIFIER, budget_depth=0.5)


def test_without_budgets_nothing_warns(bundle: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with load_classifier(bundle) as session:
            assert session("good film").exit >= 1
