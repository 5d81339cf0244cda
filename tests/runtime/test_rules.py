"""Rules: each predicate by hand, binding, and simulation against a slow row-by-row walk."""

import math

import numpy as np
import pytest

from offramp.runtime import rules
from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.errors import BadSetting
from offramp.runtime.rules import Signals, bind, simulate

SPECS = [
    RuleSpec("gate", {"threshold": 0.5}),
    RuleSpec("max_probability", {"threshold": 0.8}),
    RuleSpec("entropy", {"threshold": 0.5}),
    RuleSpec("margin", {"threshold": 0.4}),
    RuleSpec("patience", {"patience": 2}),
    RuleSpec("patience_confident", {"threshold": 0.6, "patience": 2}),
    RuleSpec("fixed", {"exit": 3}),
    RuleSpec("never", {}),
]


def logits_of(*probabilities: list[float]) -> np.ndarray:
    return np.log(np.array(probabilities, np.float32))


def leaves(spec: RuleSpec, signals: Signals, segment: int = 0, segments: int = 4) -> list[bool]:
    rule = bind(spec, segments)
    rows = len(signals.logits)
    memory = np.zeros((rows, rule.width), np.float32)
    plan, _ = rule(signals, memory, np.zeros((rows, segments), np.int8), segment)
    assert np.all(plan[:, : segment + 1] == 0)
    return [bool(row[segment + 1 :].max() < 0) for row in plan]


def test_gate_leaves_above_its_threshold_not_at_it() -> None:
    signals = Signals(logits_of([0.5, 0.5]).repeat(3, 0), np.array([0.4, 0.5, 0.6], np.float32))
    assert leaves(RuleSpec("gate", {"threshold": 0.5}), signals) == [False, False, True]


@pytest.mark.parametrize("threshold", [0.1, 0.7, 0.9])
def test_a_gate_at_its_threshold_is_the_same_alone_and_in_a_batch(threshold: float) -> None:
    spec, at = RuleSpec("gate", {"threshold": threshold}), np.full(3, threshold, np.float32)
    logits = np.zeros((3, 2), np.float32)
    assert leaves(spec, Signals(logits, at)) == [False] * 3
    assert leaves(spec, Signals(logits[:1], at[:1])) == [False]
    above = np.nextafter(at, np.float32(2))
    assert leaves(spec, Signals(logits[:1], above[:1])) == [True] == leaves(spec, Signals(logits, above))[:1]


def test_gate_without_a_policy_is_an_error() -> None:
    with pytest.raises(BadSetting, match="segment 1 has no policy"):
        leaves(RuleSpec("gate", {"threshold": 0.5}), Signals(logits_of([0.5, 0.5])))


def test_max_probability() -> None:
    signals = Signals(logits_of([0.7, 0.3], [0.1, 0.9]))
    assert leaves(RuleSpec("max_probability", {"threshold": 0.8}), signals) == [False, True]


def test_entropy_is_a_share_of_its_maximum() -> None:
    signals = Signals(logits_of([1 / 3, 1 / 3, 1 / 3], [0.98, 0.01, 0.01]))
    assert leaves(RuleSpec("entropy", {"threshold": 0.99}), signals) == [False, True]
    assert leaves(RuleSpec("entropy", {"threshold": 1.0001}), signals) == [True, True]


def test_entropy_of_certainty_is_zero_and_not_nan() -> None:
    signals = Signals(np.array([[1000.0, -1000.0]], np.float32))
    assert leaves(RuleSpec("entropy", {"threshold": 0.0}), signals) == [True]


def test_margin_is_top_minus_second() -> None:
    signals = Signals(logits_of([0.5, 0.45, 0.05], [0.6, 0.2, 0.2]))
    assert leaves(RuleSpec("margin", {"threshold": 0.3}), signals) == [False, True]


def test_fixed_leaves_at_its_exit() -> None:
    signals = Signals(logits_of([0.5, 0.5]))
    assert [leaves(RuleSpec("fixed", {"exit": 2}), signals, segment)[0] for segment in range(3)] == [
        False,
        True,
        True,
    ]


def test_patience_counts_agreements_in_a_row() -> None:
    labels = [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 0, 1]]  # one row each: the label at every exit
    logits = np.eye(2, dtype=np.float32)[labels]  # [rows, exits, classes]
    exits = simulate(bind(RuleSpec("patience", {"patience": 2}), 4), logits, None)
    assert exits.tolist() == [2, 3, 3]
    assert simulate(bind(RuleSpec("patience", {"patience": 1}), 4), logits, None).tolist() == [1, 2, 3]


def test_patience_confident_counts_confident_exits_in_a_row_whatever_they_say() -> None:
    sure, other, unsure = [0.97, 0.03], [0.03, 0.97], [0.6, 0.4]  # entropies 0.19, 0.19, 0.97
    said = [[sure, other, sure, sure], [sure, unsure, sure, sure], [unsure, unsure, unsure, sure]]
    logits = np.log(np.array(said, np.float32))  # [rows, exits, classes]

    def exits(**parameters: float) -> list[int]:
        rule = bind(RuleSpec("patience_confident", {"threshold": 0.5, **parameters}), 4)
        return [int(value) for value in simulate(rule, logits, None)]

    assert exits(patience=1) == [0, 0, 3]
    assert exits(patience=2) == [1, 3, 3]
    assert exits(patience=3) == [2, 3, 3]
    assert exits(patience=2, threshold=0.1) == [3, 3, 3]


def test_a_rule_leaves_its_arguments_alone() -> None:
    random = np.random.default_rng(0)
    for spec in SPECS:
        rule = bind(spec, 4)
        signals = Signals(random.normal(0, 3, (5, 2)).astype("f4"), random.random(5).astype("f4"))
        memory, plan = np.zeros((5, rule.width), np.float32), np.zeros((5, 4), np.int8)
        rule(signals, memory, plan, 2)
        assert not memory.any() and not plan.any()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_simulation_gives_each_row_what_it_would_get_alone(spec: RuleSpec) -> None:
    random = np.random.default_rng(1)
    logits = random.normal(0, 2, (60, 6, 3)).astype(np.float32)
    gates = random.random((60, 6)).astype(np.float32)
    rule = bind(spec, 6)
    together = simulate(rule, logits, gates)
    alone = [int(simulate(rule, logits[i : i + 1], gates[i : i + 1])[0]) for i in range(60)]
    assert together.tolist() == alone
    assert simulate(rule, logits, gates[:, :-1]).tolist() == alone


def test_simulation_of_no_rows_and_of_one_segment() -> None:
    rule = bind(RuleSpec("never", {}), 3)
    assert simulate(rule, np.zeros((0, 3, 2), np.float32), None).shape == (0,)
    assert simulate(rule, np.zeros((2, 1, 2), np.float32), None).tolist() == [0, 0]


def test_softmax_of_large_logits() -> None:
    assert np.allclose(
        rules.softmax(np.array([[1e4, 1e4 - math.log(3)]], np.float32)), [[0.75, 0.25]], atol=1e-3
    )


def test_an_unknown_rule_lists_the_known() -> None:
    with pytest.raises(
        BadSetting, match=r"'gates' is not known; choose one of: gate, max_probability, .*never"
    ):
        bind(RuleSpec("gates", {}), 4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (RuleSpec("gate", {"temperature": 1.0}), "'temperature' is not known; its parameter is threshold"),
        (RuleSpec("never", {"threshold": 1.0}), "it has none"),
        (RuleSpec("margin", {}), "needs threshold"),
        (RuleSpec("gate", {"threshold": math.nan}), "finite"),
        (RuleSpec("patience", {"patience": 1.5}), "whole number"),
        (RuleSpec("patience", {"patience": 0}), "whole number"),
        (RuleSpec("fixed", {"exit": 5}), "exits 1 to 4"),
        (RuleSpec("patience_confident", {"threshold": 0.2}), "needs patience: choose an operating point"),
        (RuleSpec("patience_confident", {"patience": 2}), "--threshold"),
        (RuleSpec("patience_confident", {"threshold": 0.2, "patience": 1.5}), "whole number"),
        (RuleSpec("patience_confident", {"tau": 0.2}), "its parameters are threshold and patience"),
    ],
)
def test_what_cannot_be_bound(spec: RuleSpec, message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        bind(spec, 4)
