"""Rules that only exit: each predicate by hand, and simulation against a walk of one row after another."""

from typing import Any

import numpy as np
import pytest

from offramp.runtime.errors import BadSetting
from offramp.runtime.rules import RowSignals, RuleSpec, Signals, bind, simulate

SPECS = [
    RuleSpec("gate", {"threshold": 0.5}),
    RuleSpec("max_probability", {"threshold": 0.8}),
    RuleSpec("entropy", {"threshold": 0.5}),
    RuleSpec("margin", {"threshold": 0.4}),
    RuleSpec("patience", {"patience": 2}),
    RuleSpec("patience_confident", {"threshold": 0.6, "patience": 2}),
    RuleSpec("settled", {"threshold": 0.4}),
    RuleSpec("fixed", {"exit": 3}),
    RuleSpec("never", {}),
]


def logits_of(*probabilities: list[float]) -> np.ndarray:
    return np.log(np.array(probabilities, np.float32))


def exits(spec: RuleSpec, signals: Signals, segment: int = 0, segments: int = 4) -> list[bool]:
    """Which rows exit after a segment."""
    rule = bind(spec, segments)
    rows = len(signals.logits)
    memory = np.zeros((rows, rule.width), np.float32)
    plan, _ = rule(signals, memory, np.zeros((rows, segments), np.int8), segment)
    assert np.all(plan[:, : segment + 1] == 0)
    return [bool(row[segment + 1 :].max() < 0) for row in plan]


def test_gate_exits_above_its_threshold_not_at_it() -> None:
    signals = RowSignals(logits_of([0.5, 0.5]).repeat(3, 0), np.array([0.4, 0.5, 0.6], np.float32))
    assert exits(RuleSpec("gate", {"threshold": 0.5}), signals) == [False, False, True]


@pytest.mark.parametrize("threshold", [0.1, 0.7, 0.9])
def test_gate_at_its_threshold_is_the_same_for_one_row_and_for_many(threshold: float) -> None:
    spec, at = RuleSpec("gate", {"threshold": threshold}), np.full(3, threshold, np.float32)
    above, logits = np.nextafter(at, np.float32(2)), np.zeros((3, 2), np.float32)
    exit_test = bind(spec, 4).exit_test
    assert exit_test is not None
    for gates, expected in ((at, False), (above, True)):
        single = RowSignals(logits[:1], gates[:1])
        assert exits(spec, RowSignals(logits, gates)) == [expected] * 3
        assert exits(spec, single) == [expected] == [exit_test(single, 0)]


def test_gate_without_policy_is_refused() -> None:
    spec, signals = RuleSpec("gate", {"threshold": 0.5}), RowSignals(logits_of([0.5, 0.5]))
    exit_test = bind(spec, 4).exit_test
    assert exit_test is not None
    with pytest.raises(BadSetting, match="segment 1 has no policy; choose another rule"):
        exits(spec, signals)
    with pytest.raises(BadSetting, match="segment 2 has no policy; choose another rule"):
        exit_test(signals, 1)


def test_max_probability_exits_at_its_threshold() -> None:
    signals = RowSignals(logits_of([0.7, 0.3], [0.1, 0.9]))
    assert exits(RuleSpec("max_probability", {"threshold": 0.8}), signals) == [False, True]


def test_entropy_is_compared_as_a_share_of_its_maximum() -> None:
    signals = RowSignals(logits_of([1 / 3, 1 / 3, 1 / 3], [0.98, 0.01, 0.01]))
    assert exits(RuleSpec("entropy", {"threshold": 0.99}), signals) == [False, True]
    assert exits(RuleSpec("entropy", {"threshold": 1.0001}), signals) == [True, True]


def test_entropy_of_a_certain_exit_is_zero() -> None:
    signals = RowSignals(np.array([[1000.0, -1000.0]], np.float32))
    assert exits(RuleSpec("entropy", {"threshold": 0.0}), signals) == [True]


def test_margin_is_top_minus_second() -> None:
    signals = RowSignals(logits_of([0.5, 0.45, 0.05], [0.6, 0.2, 0.2]))
    assert exits(RuleSpec("margin", {"threshold": 0.3}), signals) == [False, True]


def test_fixed_exits_at_its_exit() -> None:
    spec, signals = RuleSpec("fixed", {"exit": 2}), RowSignals(logits_of([0.5, 0.5]))
    assert [exits(spec, signals, segment)[0] for segment in range(3)] == [False, True, True]


def test_patience_counts_agreements_in_a_row() -> None:
    labels = [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 0, 1]]  # one row each: the label at every exit
    logits = np.eye(2, dtype=np.float32)[labels]  # [rows, exits, classes]
    assert simulate(bind(RuleSpec("patience", {"patience": 2}), 4), logits, None).tolist() == [2, 3, 3]
    assert simulate(bind(RuleSpec("patience", {"patience": 1}), 4), logits, None).tolist() == [1, 2, 3]


def test_patience_confident_counts_confident_exits_of_any_label() -> None:
    sure, opposite, unsure = [0.97, 0.03], [0.03, 0.97], [0.6, 0.4]  # entropies 0.19, 0.19, 0.97
    rows = [[sure, opposite, sure, sure], [sure, unsure, sure, sure], [unsure, unsure, unsure, sure]]
    logits = np.log(np.array(rows, np.float32))  # [rows, exits, classes]

    def last_exits(**parameters: float) -> list[int]:
        rule = bind(RuleSpec("patience_confident", {"threshold": 0.5, **parameters}), 4)
        return [int(value) for value in simulate(rule, logits, None)]

    assert last_exits(patience=1) == [0, 0, 3]
    assert last_exits(patience=2) == [1, 3, 3]
    assert last_exits(patience=3) == [2, 3, 3]
    assert last_exits(patience=2, threshold=0.1) == [3, 3, 3]


def test_answers_settle_from_the_first_exit_that_counts_on() -> None:
    equal = np.zeros((1, 4, 1), np.float32)
    for first, exit in ((2, 1), (3, 2), (4, 3)):
        rule = bind(RuleSpec("settled", {"threshold": 0.0, "first": first}), 4, answer_size=1)
        assert simulate(rule, equal[..., :0], None, equal).tolist() == [exit]
    with pytest.raises(BadSetting, match=r"first 1\.5 must be a whole number"):
        bind(RuleSpec("settled", {"threshold": 0.0, "first": 1.5}), 4, answer_size=1)


def settled_exits(answers: list[Any], threshold: float) -> list[int]:
    """The exits (0-based) of rows with these answers [rows, exits, numbers], and no logits."""
    array = np.array(answers, np.float32)
    rule = bind(RuleSpec("settled", {"threshold": threshold}), array.shape[1], answer_size=array.shape[2])
    no_logits = np.zeros((*array.shape[:2], 0), np.float32)
    return [int(exit) for exit in simulate(rule, no_logits, None, array)]


def test_numbers_settle_by_their_difference() -> None:
    falling = [[3.0], [2.0], [1.75], [1.75]]
    assert settled_exits([falling], 0.25) == [2], "the threshold itself is near enough"
    assert settled_exits([falling], 0.2) == [3]
    assert settled_exits([falling], 1.0) == [1]
    assert settled_exits([[[-1.0], [1.0], [-1.0], [1.0]]], 1.5) == [3], "the sign counts"


def test_embeddings_settle_by_their_cosine() -> None:
    turning = [[1.0, 0.0], [0.6, 0.8], [0.0, 2.0], [0.0, 1.0]]  # cosines of neighbours: 0.6, 0.8, 1
    assert settled_exits([turning], 0.5) == [1]
    assert settled_exits([turning], 0.3) == [2]
    assert settled_exits([turning], 0.0) == [3]
    assert settled_exits([[[0.0, 0.0]] * 3], 0.9) == [2], "nothing is like an embedding of zeros"


def test_no_row_settles_at_its_first_exit() -> None:
    assert settled_exits([[[0.0], [0.0], [0.0]], [[0.0], [5.0], [5.0]]], 100.0) == [1, 1]


def test_settled_without_answer_is_refused() -> None:
    rule = bind(RuleSpec("settled", {"threshold": 0.1}), 4, answer_size=1)
    with pytest.raises(BadSetting, match="segment 2 has no answer to compare; choose another rule"):
        rule(RowSignals(logits_of([0.5, 0.5])), np.zeros((1, 2), "f4"), np.zeros((1, 4), "i1"), 1)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_simulation_of_many_rows_equals_that_of_each_row(spec: RuleSpec) -> None:
    random = np.random.default_rng(1)
    logits = random.normal(0, 2, (60, 6, 3)).astype(np.float32)
    gates = random.random((60, 6)).astype(np.float32)
    answers = random.normal(0, 2, (60, 6, 4)).astype(np.float32)
    rule = bind(spec, 6, answer_size=4)
    rows = [slice(i, i + 1) for i in range(60)]
    single = [int(simulate(rule, logits[row], gates[row], answers[row])[0]) for row in rows]
    assert simulate(rule, logits, gates, answers).tolist() == single
    assert simulate(rule, logits, gates[:, :-1], answers).tolist() == single


def test_simulation_of_no_rows_and_of_one_segment() -> None:
    rule = bind(RuleSpec("never", {}), 3)
    assert simulate(rule, np.zeros((0, 3, 2), np.float32), None).shape == (0,)
    assert simulate(rule, np.zeros((2, 1, 2), np.float32), None).tolist() == [0, 0]


@pytest.mark.parametrize(
    "spec",
    [
        RuleSpec("max_probability", {"threshold": 0.8}, (2.0, 0.5, 1.5, 1.0)),
        RuleSpec("entropy", {"threshold": 0.6}, (2.0, 0.5, 1.5, 1.0)),
        RuleSpec("margin", {"threshold": 0.5}, (2.0, 0.5, 1.5, 1.0)),
        RuleSpec("patience_confident", {"threshold": 0.6, "patience": 2}, (2.0, 0.5, 1.5, 1.0)),
    ],
    ids=lambda spec: spec.name,
)
def test_a_rule_reads_probabilities_at_its_temperatures(spec: RuleSpec) -> None:
    logits = np.random.default_rng(0).normal(0, 2, (200, 4, 3)).astype(np.float32)
    scaled = logits / np.array(spec.temperatures, np.float32)[:, None]
    plain = simulate(bind(RuleSpec(spec.name, spec.parameters), 4), scaled, None)
    expected = plain.tolist()
    assert simulate(bind(spec, 4), logits, None).tolist() == expected
    raw = simulate(bind(RuleSpec(spec.name, spec.parameters), 4), logits, None)
    assert raw.tolist() != expected, "or the temperatures of this test change nothing"
    exit_test = bind(spec, 4).exit_test
    if exit_test is not None:  # one row decides as many do
        for row, exit in zip(logits, expected, strict=True):
            tests = (exit_test(RowSignals(row[None, segment]), segment) for segment in range(3))
            assert next((segment for segment, is_exit in enumerate(tests) if is_exit), 3) == exit


@pytest.mark.parametrize(
    "spec", [RuleSpec("gate", {"threshold": 0.5}), RuleSpec("patience", {"patience": 1})]
)
def test_rules_that_read_no_certainty_decide_the_same_at_every_temperature(spec: RuleSpec) -> None:
    random = np.random.default_rng(0)
    logits, gates = random.normal(0, 2, (50, 4, 3)).astype(np.float32), random.random((50, 4), np.float32)
    warm = bind(RuleSpec(spec.name, spec.parameters, (3.0,) * 4), 4)
    assert simulate(warm, logits, gates).tolist() == simulate(bind(spec, 4), logits, gates).tolist()
