"""Rules: pure functions that read the signals of a segment and rewrite the rest of each row's plan."""

from __future__ import annotations

from offramp.runtime.bundle.manifest import RuleSpec, StepCosts
from offramp.runtime.rules.base import (
    Bools,
    Floats,
    Plan,
    RowSignals,
    Rule,
    Signals,
    normalised_entropy,
    softmax,
)
from offramp.runtime.rules.exits import ExitRule, simulate
from offramp.runtime.rules.registry import RULES, bind, main_parameter, rules_for

__all__ = [
    "RULES",
    "Bools",
    "ExitRule",
    "Floats",
    "Plan",
    "RowSignals",
    "Rule",
    "RuleSpec",
    "Signals",
    "StepCosts",
    "bind",
    "main_parameter",
    "normalised_entropy",
    "rules_for",
    "simulate",
    "softmax",
]
