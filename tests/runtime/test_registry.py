"""The register of rules, and what bind() refuses; every message names the cure."""

import math

import pytest

from offramp.runtime.errors import BadSetting
from offramp.runtime.rules import RULES, RuleSpec, bind, main_parameter, rules_for


def test_rules_of_labels_and_of_text() -> None:
    classifying, generating = set(rules_for("classification")), set(rules_for("text-generation"))
    assert classifying | generating == set(RULES) - {"settled"}
    assert classifying - generating == {"quee"}
    assert generating - classifying == {"speculative", "skip", "route", "select"}


def test_rules_of_tasks_without_one_label_a_row() -> None:
    certain = {"gate", "max_probability", "entropy", "margin", "patience_confident", "fixed", "never"}
    for task in ("multi-label-classification", "token-classification"):
        assert set(rules_for(task)) == certain
    for task in ("regression", "sentence-embedding"):
        assert set(rules_for(task)) == {"settled", "gate", "fixed", "never"}


def test_settled_remembers_an_answer_and_whether_there_was_one() -> None:
    spec = RuleSpec("settled", {"threshold": 0.1})
    assert [bind(spec, 4, answer_size=size).width for size in (1, 384)] == [2, 385]
    with pytest.raises(BadSetting, match=r"rule settled: there are no answers .* choose another rule"):
        bind(spec, 4)


def test_main_parameter_of_each_rule() -> None:
    assert main_parameter("gate") == main_parameter("patience_confident") == "threshold"
    assert (main_parameter("never"), main_parameter("fixed")) == (None, "exit")
    assert (main_parameter("skip"), main_parameter("route")) == ("segments", "price")
    assert main_parameter("select") == "threshold"


def test_unknown_rule_lists_the_known() -> None:
    message = r"'gates' is not known; choose one of: gate, max_probability, .*never"
    with pytest.raises(BadSetting, match=message):
        bind(RuleSpec("gates", {}), 4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (RuleSpec("gate", {"temperature": 1.0}), "'temperature' is not known; its parameter is threshold"),
        (RuleSpec("never", {"threshold": 1.0}), "it has none"),
        (RuleSpec("margin", {}), r"needs threshold: give a threshold \(--threshold NUMBER\)"),
        (RuleSpec("gate", {"threshold": math.nan}), "finite"),
        (RuleSpec("patience", {"patience": 1.5}), "whole number"),
        (RuleSpec("patience", {"patience": 0}), "whole number"),
        (RuleSpec("fixed", {"exit": 5}), "exits 1 to 4"),
        (RuleSpec("patience_confident", {"threshold": 0.2}), "needs patience: choose an operating point"),
        (RuleSpec("patience_confident", {"patience": 2}), "--threshold"),
        (RuleSpec("patience_confident", {"threshold": 0.2, "patience": 1.5}), "whole number"),
        (RuleSpec("patience_confident", {"tau": 0.2}), "its parameters are threshold and patience"),
        (RuleSpec("skip", {}), r"rule skip needs segments: give a threshold \(--threshold NUMBER\)"),
        (RuleSpec("skip", {"segments": 1}), "segments 1 is not a whole number from 2 to 4"),
        (RuleSpec("skip", {"segments": math.nan}), "segments nan is not a whole number from 2 to 4"),
        (RuleSpec("skip", {"segments": math.inf}), "segments inf is not a whole number from 2 to 4"),
        (RuleSpec("skip", {"segments": 2.5}), "segments 2.5 is not a whole number from 2 to 4"),
        (RuleSpec("route", {}), "needs a price from 0: choose a point that ee-calibrate measured"),
        (RuleSpec("route", {"price": -1.0}), "needs a price from 0"),
        (RuleSpec("route", {"price": 0.1}), "has no router; fit one with: ee-calibrate pairs.jsonl"),
        (RuleSpec("speculative", {"exit": 1}), "'exit' does not go with the others; give exits and lookup"),
        (RuleSpec("speculative", {"exit": 4, "drafts": 2}), "exit 4 is not a whole number from 1 to 3"),
        (RuleSpec("speculative", {"exit": 1, "drafts": 16}), "drafts 16 is not a whole number from 1 to 15"),
    ],
    ids=lambda value: value.name if isinstance(value, RuleSpec) else "",
)
def test_bad_spec_is_refused(spec: RuleSpec, message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        bind(spec, 4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (RuleSpec("margin", {"threshold": 0.5}, (1.0,)), "1 temperatures for 4 segments"),
        (RuleSpec("margin", {"threshold": 0.5}, (1.0, 0.0, 1.0, 1.0)), "must be above 0"),
        (RuleSpec("margin", {"threshold": 0.5}, (1.0, math.nan, 1.0, 1.0)), "must be above 0"),
        (RuleSpec("speculative", {}, (1.0,) * 4), "it has no temperatures"),
    ],
)
def test_temperatures_that_do_not_fit_are_refused(spec: RuleSpec, message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        bind(spec, 4)
