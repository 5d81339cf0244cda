"""Sweeping and choosing on a table small enough to check by hand."""

from __future__ import annotations

import numpy as np
import pytest

from offramp.runtime.rules import RuleSpec
from offramp.runtime.rules.quality import value_quality
from offramp.runtime.rules.sweep import (
    SWEPT,
    ExitMacs,
    ExitTable,
    accuracy_at,
    choose_points,
    fixed_settings,
    full_depth_point,
    most_accurate_point,
    setting_rule,
    settings_to_try,
    shallowest_point,
    sweep,
    swept_rules,
    undominated_points,
)


def table() -> ExitTable:
    """Four rows of label 1, three exits: the first exit is right and sure of two rows, wrong of two."""
    margins = np.array([[3, 3, 3], [2, 2, 2], [-0.5, 1, 1], [-1, -1, 1]], np.float32)
    logits = np.stack([np.zeros_like(margins), margins], -1)
    gates = np.array([[0.9, 0.9, 1], [0.8, 0.8, 1], [0.2, 0.7, 1], [0.3, 0.1, 1]], np.float32)
    return ExitTable(logits, gates, np.ones(4, np.int64), answers=margins[..., None])


def macs() -> ExitMacs:
    return ExitMacs(np.tile([10.0, 20.0, 30.0], (4, 1)), np.full(4, 30.0), np.array([2, 4, 6]))


def test_a_gate_at_one_half() -> None:
    point = sweep("gate", [0.5], table(), macs())[0]
    # rows leave at exits 1 1 2 3, blocks 2 2 4 6, all right
    assert point.accuracy == 100 and point.mean_exit == 3.5
    assert point.layers_saved == pytest.approx(100 * (1 - 3.5 / 6))
    assert point.macs_saved == pytest.approx(100 * (1 - 70 / 120))


@pytest.mark.parametrize("rule", sorted(SWEPT))
def test_every_rule_can_be_swept_from_shallow_to_deep(rule: str) -> None:
    points = sweep(rule, settings_to_try(rule, table()), table(), macs())
    assert [p.mean_exit for p in points] == sorted(p.mean_exit for p in points)
    assert len({p.mean_exit for p in points}) > 1 and all(p.rule.name == rule for p in points)


def test_two_parameters_are_swept_together_and_undominated_points_are_a_curve() -> None:
    points = sweep("patience_confident", settings_to_try("patience_confident", table()), table(), macs())
    assert {p.rule.parameters["patience"] for p in points} == {1, 2}
    assert len({p.rule.parameters["threshold"] for p in points}) > 2
    edge = undominated_points(points)
    assert [p.accuracy for p in edge] == sorted({p.accuracy for p in edge})
    assert all(any(e.mean_exit <= p.mean_exit and e.accuracy >= p.accuracy for e in edge) for p in points)


def test_points_are_chosen_by_the_quality_of_a_table() -> None:
    values = np.array([[[0.0], [3], [3.1]], [[1], [1], [1.1]], [[5], [2], [2.1]]], np.float32)
    quality = value_quality(values, values[:, -1, 0], name="agreement")
    nothing = np.zeros((3, 3, 0), np.float32)
    values_table = ExitTable(nothing, None, np.full(3, -1), values, quality)
    costs = ExitMacs(np.tile([10.0, 20.0, 30.0], (3, 1)), np.full(3, 30.0), np.array([2, 4, 6]))
    points = choose_points("settled", values_table, costs)
    assert values_table.measure.name == "agreement" and points["full"].accuracy == pytest.approx(100)
    # Row 1 does not change after the first exit; the others change by 3 and leave at the last.
    assert values_table.exits(RuleSpec("settled", {"threshold": 0.0})).tolist() == [2, 1, 2]
    assert points["default"].rule.name == "settled" and points["default"].accuracy == pytest.approx(100)
    assert points["default"].mean_exit == 4  # all rows leave at the second exit, ranked as at the last


def test_answers_without_a_second_early_exit_cannot_settle() -> None:
    short = ExitTable(np.zeros((2, 2, 0), np.float32), None, np.full(2, -1), np.zeros((2, 2, 1), np.float32))
    assert settings_to_try("settled", short) == [0.0]
    assert short.exits(RuleSpec("settled", {"threshold": 0.0})).tolist() == [1, 1]


def test_the_rules_that_are_swept_for_a_task() -> None:
    assert set(swept_rules("classification")) == {*SWEPT} - {"settled"}
    assert "patience" not in swept_rules("token-classification")
    assert swept_rules("regression") == ("gate", "settled")


def test_no_policies_no_gate() -> None:
    bare = ExitTable(table().logits, None, table().labels)
    with pytest.raises(ValueError, match="there are no policies"):
        settings_to_try("gate", bare)


def test_choices() -> None:
    points = sweep("gate", settings_to_try("gate", table()), table(), macs())
    best = shallowest_point(points, 100)
    assert best is not None and best.accuracy == 100
    assert all(p.accuracy < 100 for p in points if p.mean_exit < best.mean_exit)
    half = most_accurate_point(points, 60)
    assert half is not None and half.layers_saved >= 60
    assert half.accuracy == max(p.accuracy for p in points if p.layers_saved >= 60)
    assert shallowest_point(points, 101) is None and most_accurate_point(points, 101) is None


def test_points_by_name_and_the_reference_of_dev_x() -> None:
    points = choose_points("gate", table(), macs())
    assert next(iter(points)) == "default" and points["default"] == points["dev-0.5"]
    assert points["full"].rule == RuleSpec("never", {}) and points["full"].accuracy == 100
    assert points["trained"].rule == RuleSpec("gate", {"threshold": 0.5})
    lenient = choose_points("gate", table(), macs(), reference=75.5)
    assert lenient["default"].mean_exit < points["default"].mean_exit
    # No point reaches the reference: the default is full depth, and there is no point dev-X.
    hopeless = choose_points("max_probability", table(), macs(), reference=200)
    assert hopeless["default"] == full_depth_point(table(), macs())
    assert not any(name.startswith("dev") for name in hopeless) and "trained" not in hopeless


def test_accuracy_between_points() -> None:
    points = sweep("gate", settings_to_try("gate", table()), table(), macs())
    first, last = points[0], points[-1]
    assert accuracy_at(points, last.mean_exit + 1) is None
    at_first = accuracy_at(points, first.mean_exit)
    assert at_first == pytest.approx(np.mean([p.accuracy for p in points if p.mean_exit == first.mean_exit]))


@pytest.mark.parametrize("rule", sorted(SWEPT))
def test_fixed_settings_go_from_the_safest_to_the_cheapest(rule: str) -> None:
    sequences = fixed_settings(rule, 3)
    assert sequences == fixed_settings(rule, 3) and sum(map(len, sequences)) > 1
    for sequence in sequences:
        exits = np.array([table().exits(setting_rule(rule, setting)) for setting in sequence])
        assert np.all(np.diff(exits, axis=0) <= 0), "no row exits later at a cheaper setting"
    specs = [setting_rule(rule, setting) for sequence in sequences for setting in sequence]
    assert len({tuple(spec.parameters.items()) for spec in specs}) == len(specs)
    safest, cheapest = (
        table().exits(setting_rule(rule, setting)) for setting in (sequences[0][0], sequences[-1][-1])
    )
    # Answers of this table change by 0 or by more than 1, beyond all thresholds of settled.
    assert cheapest.sum() < safest.sum() or rule == "settled"


def test_points_state_an_interval_and_the_exits_of_their_rows() -> None:
    point = sweep("gate", [0.5], table(), macs())[0]
    assert point.exit_rows == (2, 1, 1)
    # Wilson's interval of 4 of 4: 4 / (4 + 1.96 squared) to 1
    assert point.stated_figures()["low"] == pytest.approx(100 * 4 / (4 + 1.959964**2), abs=1e-3)
    assert point.stated_figures()["high"] == 100 and "low" not in point.figures()


def test_a_table_at_temperatures() -> None:
    scaled = table().at_temperatures((1.0, 2.0, 4.0))
    assert scaled.logits[0, :, 1].tolist() == [3.0, 1.5, 0.75] and scaled.logits.dtype == np.float32
    assert table().at_temperatures(()).logits[0, 1, 1] == 3.0


@pytest.mark.parametrize(("rows", "right"), [(100, 7), (200, 117), (400, 61)])
def test_a_point_that_loses_just_what_it_may_is_taken(rows: int, right: int) -> None:
    # 100 * 0.07 is 7.000000000000001 in floats, and 1 less than it is more than 100 * 0.06.
    full = np.arange(rows) < right
    early = np.arange(rows) < right - rows // 100
    logits = np.zeros((rows, 2, 2), np.float32)
    logits[:, 0, 1], logits[:, 1, 1] = np.where(early, 2, -2), np.where(full, 2, -2)
    two_exits = ExitTable(logits, np.full((rows, 2), 0.9, np.float32), np.ones(rows, np.int64))
    to_exit = np.tile([10.0, 20.0], (rows, 1))
    chosen = choose_points("max_probability", two_exits, ExitMacs(to_exit, to_exit[:, -1], np.array([1, 2])))
    assert chosen["dev-1.0"].mean_exit == 1


def test_a_manifest_without_macs_saves_none() -> None:
    none = ExitMacs(np.zeros((4, 3)), np.zeros(4), np.array([2, 4, 6]))
    point = sweep("gate", [0.5], table(), none)[0]
    assert point.macs_saved == 0 and point.layers_saved > 0


@pytest.mark.parametrize("rule", sorted(SWEPT))
def test_a_network_of_one_exit_can_be_swept(rule: str) -> None:
    one = ExitTable(table().logits[:, -1:], None, np.ones(4, np.int64), table().answers[:, -1:])
    chosen = choose_points(rule, one, ExitMacs(np.full((4, 1), 30.0), np.full(4, 30.0), np.array([6])))
    assert {point.mean_exit for point in chosen.values()} == {6}
