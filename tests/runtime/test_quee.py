"""Rule quee against a plain reference on random forecasts; test_walker has walks with it."""

from __future__ import annotations

import dataclasses
import itertools
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tiny_bundles

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import StepCosts
from offramp.runtime.errors import BadSetting
from offramp.runtime.rules import RowSignals, RuleSpec, bind
from offramp.runtime.rules.quee import walk_limits

SEGMENTS, VARIANTS = 5, 3
RANDOM = np.random.default_rng(7)
STEPS = RANDOM.random((VARIANTS, SEGMENTS))
COSTS = {
    "bops": StepCosts(9, {f"v{v}": tuple(STEPS[v].tolist()) for v in range(VARIANTS)}),
    "ms": StepCosts(9, {f"v{v}": tuple(STEPS[::-1][v].tolist()) for v in range(VARIANTS)}),
}


def reference(
    forecast: np.ndarray, plan: list[int], segment: int, price: float, steps: Any, limits: tuple[int, bool]
) -> list[int]:
    """The rest of one row's plan, by trying every path; forecast [variants * (1 + variants * ahead)]."""
    current, ahead = plan[segment], SEGMENTS - 1 - segment
    width = 1 + VARIANTS * ahead
    own_forecast = forecast[current * width : (current + 1) * width]
    lowest, rest = own_forecast[0], [-1] * ahead
    full_walk = sum(steps[0])
    for variant, exits in itertools.product(range(VARIANTS), range(1, ahead + 1)):
        changes = sum(before != after for before, after in pairwise([*plan[: segment + 1], variant]))
        if changes > limits[0] or (variant < current and not limits[1]):
            continue
        cost = sum(steps[variant][segment + 1 : segment + 1 + exits]) / full_walk
        total = own_forecast[1 + variant * ahead + exits - 1] + price * cost
        if total < lowest:
            lowest, rest = total, [variant] * exits + [-1] * (ahead - exits)
    return rest


@pytest.mark.parametrize("price", [0.0, 0.05, 0.3, 2.0])
@pytest.mark.parametrize(
    ("measured", "changes", "increase"), [(0.0, 1, True), (1.0, 1, True), (0.0, 2, True), (0.0, 2, False)]
)
def test_quee_takes_the_best_of_all_paths(
    price: float, measured: float, changes: int, increase: bool
) -> None:
    limits = {"changes": float(changes), "increase": float(increase)}
    rule = bind(RuleSpec("quee", {"price": price, "measured": measured, **limits}), SEGMENTS, COSTS)
    steps = STEPS[::-1] if measured else STEPS
    random = np.random.default_rng(3)
    next_steps = set()
    for segment in range(SEGMENTS - 1):
        paths = 1 + VARIANTS * (SEGMENTS - 1 - segment)
        forecast = random.random((64, VARIANTS * paths)).astype("f4")
        plan = np.full((64, SEGMENTS), -1, np.int8)
        # Walks within the limits: the first variant, then perhaps others.
        places = np.sort(random.integers(0, segment + 1, (64, changes)), axis=1)
        variants = random.integers(0, VARIANTS, (64, changes + 1))
        if not increase:
            variants.sort(axis=1)
        for row in range(64):
            plan[row, : segment + 1] = variants[row, 0]
            for place, variant in zip(places[row], variants[row, 1:], strict=True):
                plan[row, place + 1 : segment + 1] = variant
        before = plan.copy()
        signals = RowSignals(np.zeros((64, 3), np.float32), None, forecast)
        new_plan, _ = rule(signals, np.zeros((64, 0), np.float32), plan, segment)
        assert (plan == before).all(), "the argument was written to"
        for row in range(64):
            expected = reference(
                forecast[row], before[row].tolist(), segment, price, steps, (changes, increase)
            )
            assert new_plan[row].tolist() == [*before[row, : segment + 1].tolist(), *expected]
            row_signals = RowSignals(signals.logits[:1], None, forecast[row : row + 1])
            row_plan, _ = rule(row_signals, np.zeros((1, 0), np.float32), plan[row : row + 1], segment)
            assert row_plan[0].tolist() == new_plan[row].tolist()
            next_steps.add(expected[0])
    assert next_steps >= {0, 1, 2} if price == 0 else -1 in next_steps


def test_quee_exits_on_a_tie() -> None:
    rule = bind(RuleSpec("quee", {"price": 0.0}), SEGMENTS, COSTS)
    signals = RowSignals(np.zeros((2, 3), np.float32), None, np.full((2, VARIANTS * 13), 0.5, np.float32))
    plan, _ = rule(signals, np.zeros((2, 0), np.float32), np.zeros((2, SEGMENTS), np.int8), 0)
    assert plan.tolist() == [[0, -1, -1, -1, -1]] * 2


@pytest.mark.parametrize(
    ("parameters", "costs", "message"),
    [
        ({}, COSTS, r"needs price: give the errors that a full walk may cost \(--threshold NUMBER\)"),
        ({"price": -1.0}, COSTS, "price -1.0"),
        ({"price": float("nan")}, COSTS, "finite"),
        ({"price": 1.0, "measured": 0.5}, COSTS, "measured 0.5"),
        ({"price": 1.0, "threshold": 0.5}, COSTS, "threshold"),
        ({"price": 1.0, "changes": 3.0}, COSTS, "changes 3"),
        ({"price": 1.0, "increase": 2.0}, COSTS, "increase 2"),
        ({"price": 1.0, "measured": 1.0}, {"bops": COSTS["bops"]}, "ee-calibrate"),
        ({"price": 1.0}, None, "bops; split it again from a checkpoint of recipe quee"),
    ],
)
def test_bad_parameters_or_costs_are_refused(parameters: dict[str, float], costs: Any, message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        bind(RuleSpec("quee", parameters), SEGMENTS, costs)


def test_signals_without_forecast_are_refused() -> None:
    rule = bind(RuleSpec("quee", {"price": 1.0}), SEGMENTS, COSTS)
    with pytest.raises(BadSetting, match="segment 1 has no error forecast"):
        rule(
            RowSignals(np.zeros((1, 3), np.float32)),
            np.zeros((1, 0), np.float32),
            np.zeros((1, 5), np.int8),
            0,
        )


@pytest.mark.parametrize("odd", [{}, {"walk_limits": 3}, {"walk_limits": {"changes": "2"}}, "text"])
def test_limits_of_walks_stay_after_another_rule(odd: object) -> None:
    manifest = open_bundle(tiny_bundles.CLASSIFIER).manifest
    limits = {"changes": 2.0, "increase": 0.0}
    other = dataclasses.replace(manifest, provenance={"odd": 1, "calibrated": {"walk_limits": limits}})
    assert walk_limits(other) == limits and walk_limits(manifest) == {}
    assert walk_limits(dataclasses.replace(manifest, provenance={"calibrated": odd})) == {}
