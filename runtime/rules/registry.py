"""The register of rules, and bind(), which makes a rule from its name and parameters.

Modules of rules that most walks do not use are imported when such a rule is made, so that `ee-run` starts
sooner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from offramp.runtime.bundle.manifest import (
    CLASSIFICATION,
    EMBEDDING,
    GENERATION,
    MULTI_LABEL,
    REGRESSION,
    TOKENS,
    RuleSpec,
    StepCosts,
)
from offramp.runtime.errors import BadSetting
from offramp.runtime.rules import exits
from offramp.runtime.rules.base import Bools, Floats, Rule
from offramp.runtime.rules.exits import ExitRule

if TYPE_CHECKING:
    from offramp.runtime.rules.route import Routing

# Kinds of task by what their exits give: labels of which one is right, decisions of some certainty, numbers.
_LABELS, _DECISIONS = (CLASSIFICATION, GENERATION), (CLASSIFICATION, GENERATION, MULTI_LABEL, TOKENS)
_NUMBERS = (REGRESSION, EMBEDDING)
_ALL = (*_DECISIONS, *_NUMBERS)


@dataclass(frozen=True)
class BundleFacts:
    """Facts of a bundle that rules need: number of segments, costs of steps by unit, routing or None.

    has_head: whether a decoder has a draft head with a block of its own.
    """

    segments: int
    costs: Mapping[str, StepCosts]
    routing: Routing | None
    has_head: bool = False


@dataclass(frozen=True)
class RuleKind:
    """The description of one rule in the register: its parameters, how it is made, and for which bundles.

    parameter: the parameter that --threshold sets, None if there is none. exits: the predicate of a rule that
    only exits; for other rules None, and `make` makes the rule. tasks: the kinds of task that the rule is for
    (Manifest.kind). reads: the signal that it reads, None if it reads none. whole: the parameter is a whole
    number from 1. width: how many numbers the rule remembers for each row. remembers_answer: it remembers the
    answer of the last exit beside them. count: a second parameter, a whole number from 1; count_needed:
    whether it has no default. certainty: it reads how probable the labels are, and so at the
    temperatures of its spec.
    """

    parameter: str | None
    exits: Callable[..., tuple[Bools | bool, Floats]] | None = None
    tasks: tuple[str, ...] = _ALL
    reads: str | None = "logits"
    whole: bool = False
    width: int = 0
    remembers_answer: bool = False
    count: str | None = None
    count_needed: bool = True
    certainty: bool = False
    make: Callable[[RuleSpec, BundleFacts], Rule] | None = None


def _quee(spec: RuleSpec, bundle: BundleFacts) -> Rule:
    from offramp.runtime.rules.quee import make_quee

    return make_quee(spec, bundle.segments, bundle.costs)


def _skip(spec: RuleSpec, bundle: BundleFacts) -> Rule:
    from offramp.runtime.rules.skip import SkipRule, listed_segments, skipped_segments

    if not spec.skipped:
        run = _whole_number(spec, "segments", 2, bundle.segments)
        return SkipRule(spec, skipped_segments(bundle.segments, run))
    if spec.parameters:
        raise BadSetting("rule skip: give how many segments are run, or which are skipped, not both")
    return SkipRule(spec, listed_segments(spec, bundle.segments))


def _select(spec: RuleSpec, bundle: BundleFacts) -> Rule:
    from offramp.runtime.rules.select import SelectRule

    return SelectRule(spec, _value(spec, "threshold", whole=False))


def _route(spec: RuleSpec, bundle: BundleFacts) -> Rule:
    from offramp.runtime.rules.route import RouteRule

    price = spec.parameters.get("price")
    if price is None or not 0 <= price < math.inf:
        raise BadSetting("rule route needs a price from 0: choose a point that ee-calibrate measured")
    if bundle.routing is None:
        raise BadSetting("rule route: the bundle has no router; fit one with: ee-calibrate pairs.jsonl")
    return RouteRule(spec, bundle.routing, price)


def _speculative(spec: RuleSpec, bundle: BundleFacts) -> Rule:
    from offramp.runtime.rules.speculative import HEAD, LOOKUP, SpeculativeRule, chosen_sources

    names = set(spec.parameters)
    if "exit" in names and bundle.segments == 1:
        raise BadSetting("rule speculative: the bundle has one segment, so it has no exit that could draft")
    if names == {"exit", "drafts"}:
        exit = _whole_number(spec, "exit", 1, bundle.segments - 1)
        return SpeculativeRule(spec, bundle.segments, (exit, _whole_number(spec, "drafts", 1, 15)))
    if names == {"drafts"}:
        return SpeculativeRule(spec, bundle.segments, (LOOKUP, _whole_number(spec, "drafts", 1, 15)))
    if names == {HEAD, "drafts"} and bundle.has_head:
        fixed = (HEAD, _whole_number(spec, "drafts", 1, 15))
        return SpeculativeRule(spec, bundle.segments, fixed, [HEAD])
    sources = chosen_sources(spec, bundle.segments, has_head=bundle.has_head)
    return SpeculativeRule(spec, bundle.segments, sources=sources)


RULES: Mapping[str, RuleKind] = {
    "gate": RuleKind("threshold", exits.gate, reads="gate"),
    "max_probability": RuleKind("threshold", exits.max_probability, _DECISIONS, certainty=True),
    "entropy": RuleKind("threshold", exits.entropy, _DECISIONS, certainty=True),
    "margin": RuleKind("threshold", exits.margin, _DECISIONS, certainty=True),
    "patience": RuleKind("patience", exits.patience, _LABELS, whole=True, width=2),
    "patience_confident": RuleKind(
        *("threshold", exits.patience_confident, _DECISIONS), width=1, count="patience", certainty=True
    ),
    "settled": RuleKind(
        *("threshold", exits.settled, _NUMBERS),
        reads="answer",
        width=1,
        remembers_answer=True,
        count="first",
        count_needed=False,
    ),
    "fixed": RuleKind("exit", exits.fixed, reads=None, whole=True),
    "never": RuleKind(None, exits.never, reads=None),
    "quee": RuleKind("price", tasks=(CLASSIFICATION,), reads="forecast", make=_quee),
    "speculative": RuleKind(None, tasks=(GENERATION,), make=_speculative),
    "skip": RuleKind("segments", tasks=(GENERATION,), reads=None, make=_skip),
    "route": RuleKind("price", tasks=(GENERATION,), reads=None, make=_route),
    "select": RuleKind("threshold", tasks=(GENERATION,), reads="controller", make=_select),
}


def rules_for(kind: str) -> tuple[str, ...]:
    """Names of the rules for bundles of a kind of task (Manifest.kind), such as "classification"."""
    return tuple(name for name, rule in RULES.items() if kind in rule.tasks)


def main_parameter(name: str) -> str | None:
    """Name of the parameter that --threshold sets for a rule; raises BadSetting for an unknown rule."""
    if name not in RULES:
        raise BadSetting(f"rule {name!r} is not known; choose one of: {', '.join(RULES)}")
    return RULES[name].parameter


def bind(
    spec: RuleSpec,
    segments: int,
    costs: Mapping[str, StepCosts] | None = None,
    routing: Routing | None = None,
    answer_size: int = 0,
    has_head: bool = False,
) -> Rule:
    """Make the rule that a spec describes, for a walk of this many segments.

    Raises BadSetting for a spec with unknown, missing or invalid parameters. costs: those of the manifest,
    for rules that choose between variants. routing: that of the bundle, for rule route. answer_size: numbers
    of an answer (Manifest.answer_size), for rule settled. has_head: see BundleFacts, for rule speculative.
    """
    parameter, kind = main_parameter(spec.name), RULES[spec.name]
    if spec.skipped and spec.name != "skip":
        raise BadSetting(f"rule {spec.name}: it skips no list of segments; rule skip does")
    if kind.exits is None:
        assert kind.make is not None
        if spec.temperatures:
            raise BadSetting(f"rule {spec.name}: it has no temperatures; they are for rules that only exit")
        return kind.make(spec, BundleFacts(segments, costs or {}, routing, has_head))
    names = [name for name in (parameter, kind.count) if name is not None]
    unknown = sorted(set(spec.parameters) - set(names))
    if unknown:
        takes = ("it has none", f"its parameter is {parameter}", f"its parameters are {' and '.join(names)}")
        raise BadSetting(f"rule {spec.name}: parameter {unknown[0]!r} is not known; {takes[len(names)]}")
    if kind.count is not None and not kind.count_needed and kind.count not in spec.parameters:
        names.remove(kind.count)
    parameters = {name: _value(spec, name, whole=kind.whole or name == kind.count) for name in names}
    if spec.name == "fixed" and parameters["exit"] > segments:
        raise BadSetting(
            f"rule fixed: exit {parameters['exit']:g} does not exist; there are exits 1 to {segments}"
        )
    if kind.remembers_answer and not answer_size:
        raise BadSetting(f"rule {spec.name}: there are no answers that it can compare; choose another rule")
    width = kind.width + (answer_size if kind.remembers_answer else 0)
    return ExitRule(spec, kind.exits, width, parameters, _temperatures(spec, segments))


def _temperatures(spec: RuleSpec, segments: int) -> tuple[Floats, ...]:
    """Check the temperatures of the spec, and return those by which the rule divides logits, if it reads any.

    The predicates of patience and of rules that read no logits decide the same at every temperature.
    """
    if not spec.temperatures:
        return ()
    if len(spec.temperatures) != segments:
        count = len(spec.temperatures)
        raise BadSetting(f"rule {spec.name}: {count} temperatures for {segments} segments; give one for each")
    if not all(0 < temperature < math.inf for temperature in spec.temperatures):
        raise BadSetting(f"rule {spec.name}: temperatures must be above 0: {list(spec.temperatures)}")
    if not RULES[spec.name].certainty:
        return ()
    return tuple(np.array([temperature], np.float32) for temperature in spec.temperatures)


def _value(spec: RuleSpec, name: str, *, whole: bool) -> float:
    """Check a parameter of the spec and return it."""
    if name not in spec.parameters:
        cure = "give a threshold (--threshold NUMBER)"
        if name != main_parameter(spec.name):
            cure = "choose an operating point that sets it, or use RuleSpec(name, parameters) in Python"
        raise BadSetting(f"rule {spec.name} needs {name}: {cure}")
    value = spec.parameters[name]
    if not math.isfinite(value):
        raise BadSetting(f"rule {spec.name}: {name} {value} is not a finite number")
    if whole and (value != int(value) or value < 1):
        raise BadSetting(f"rule {spec.name}: {name} {value:g} must be a whole number from 1")
    # In float32 like the signals, so that comparisons are the same for one row and for many in every numpy.
    return float(np.float32(value))


def _whole_number(spec: RuleSpec, name: str, least: int, largest: int) -> int:
    """Check a parameter that counts segments, exits or drafts, and return it."""
    value = spec.parameters.get(name)
    if value is None:
        raise BadSetting(f"rule {spec.name} needs {name}: give a threshold (--threshold NUMBER)")
    if not least <= value <= largest or value != int(value):  # in this order: NaN and infinity have no int
        raise BadSetting(
            f"rule {spec.name}: {name} {value:g} is not a whole number from {least} to {largest}"
        )
    return int(value)
