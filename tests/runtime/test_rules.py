"""What all rules share: softmax, entropy and plans; and the protocol, which every known rule keeps."""

import math

import numpy as np
import pytest

from offramp.runtime.bundle.manifest import StepCosts
from offramp.runtime.rules import RowSignals, RuleSpec, bind, normalised_entropy, softmax
from offramp.runtime.rules.base import full_plan, never_exits
from offramp.runtime.rules.route import Route, Router, Routing

SEGMENTS, VARIANTS, ANSWER = 4, 2, 3
COSTS = {"bops": StepCosts(8, {f"v{variant}": (1.0,) * SEGMENTS for variant in range(VARIANTS)})}
ROUTER = Router(np.zeros(3), np.ones(3), np.zeros((3, 2)), np.zeros(2), np.array([4.0, 3.0]), 1.0, 1.0)
ROUTING = Routing(ROUTER, (Route("full", frozenset(), 4), Route("skip to 3", frozenset({2}), 3)))
SPECS = [
    RuleSpec("gate", {"threshold": 0.5}),
    RuleSpec("max_probability", {"threshold": 0.8}),
    RuleSpec("entropy", {"threshold": 0.5}),
    RuleSpec("margin", {"threshold": 0.4}),
    RuleSpec("patience", {"patience": 2}),
    RuleSpec("patience_confident", {"threshold": 0.6, "patience": 2}),
    RuleSpec("settled", {"threshold": 0.5}),
    RuleSpec("fixed", {"exit": 3}),
    RuleSpec("never", {}),
    RuleSpec("quee", {"price": 0.1}),
    RuleSpec("speculative", {}),
    RuleSpec("skip", {"segments": 3}),
    RuleSpec("route", {"price": 0.1}),
    RuleSpec("select", {"threshold": 0.5}),
]


def signals_of(rows: int, segment: int, seed: int = 0) -> RowSignals:
    """Random signals of every kind after a segment."""
    random = np.random.default_rng(seed)
    paths = VARIANTS * (1 + VARIANTS * (SEGMENTS - 1 - segment))
    return RowSignals(
        random.normal(0, 3, (rows, 2)).astype(np.float32),
        random.random(rows).astype(np.float32),
        random.random((rows, paths)).astype(np.float32),
        answer=random.normal(0, 1, (rows, ANSWER)).astype(np.float32),
        controller=random.random((rows, max(0, SEGMENTS - 2 - segment))).astype(np.float32),
    )


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_rule_changes_no_argument_and_nothing_that_was_run(spec: RuleSpec) -> None:
    rule = bind(spec, SEGMENTS, COSTS, ROUTING, ANSWER)
    assert rule.spec == spec
    for segment in range(SEGMENTS - 1):
        memory, plan = np.zeros((5, rule.width), np.float32), np.zeros((5, SEGMENTS), np.int8)
        new_plan, new_memory = rule(signals_of(5, segment), memory, plan, segment)
        assert not memory.any() and not plan.any()
        assert new_plan.dtype == np.int8 and new_plan.shape == plan.shape and new_memory.shape == memory.shape
        assert not new_plan[:, : segment + 1].any()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_exit_test_agrees_with_the_rule(spec: RuleSpec) -> None:
    rule = bind(spec, SEGMENTS, COSTS, ROUTING, ANSWER)
    if rule.exit_test is None:
        assert rule.width or spec.name in ("quee", "select")
        return
    for seed in range(20):
        for segment in range(SEGMENTS - 1):
            signals = signals_of(1, segment, seed)
            plan, _ = rule(signals, np.zeros((1, 0), np.float32), full_plan(SEGMENTS, 0), segment)
            assert rule.exit_test(signals, segment) == bool(plan[0, segment + 1] < 0)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_first_plan_runs_all_segments_in_the_variant_unless_the_rule_skips(spec: RuleSpec) -> None:
    plan = bind(spec, SEGMENTS, COSTS, ROUTING, ANSWER).first_plan(SEGMENTS, 1, np.zeros(3, np.float32))
    assert plan.shape == (1, SEGMENTS) and plan.dtype == np.int8
    skipped = [2] if spec.name in ("skip", "route") else []
    assert [int(value) for value in plan[0]] == [-1 if number in skipped else 1 for number in range(SEGMENTS)]


def test_never_exits_is_false() -> None:
    assert not never_exits(signals_of(1, 0), 0)


def test_softmax_of_large_logits() -> None:
    logits = np.array([[1e4, 1e4 - math.log(3)]], np.float32)
    assert np.allclose(softmax(logits), [[0.75, 0.25]], atol=1e-3)


def test_normalised_entropy_is_between_zero_and_one() -> None:
    certain, even = np.array([1000.0, -1000.0, -1000.0]), np.zeros(3)
    entropies = normalised_entropy(np.stack([certain, even]).astype(np.float32))
    assert entropies.tolist() == pytest.approx([0, 1], abs=1e-6)
