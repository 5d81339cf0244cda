"""How the tokens of a decoder's bundle come about: from a rule's name and what the bundle has, to a way.

Rules that leave are those of classifiers, asked of every token: gate, max_probability, entropy, margin,
patience, patience_confident, fixed, never. Three are of decoders alone: speculative, which drafts by early
exits and says what the full depth says, skip, whose parameter `segments` is how many of them a token of the
answer runs, evenly chosen, and route, which chooses such a way for each text by its prompt (`price`).
"""

from __future__ import annotations

from collections.abc import Mapping

from offramp.runtime import rules
from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import GATE, Manifest, RuleSpec, Stage
from offramp.runtime.errors import BadSetting
from offramp.runtime.generate import SILENT, Chooser, Exiting, Skipping, Way, full
from offramp.runtime.rules.route import open_routing, skipped
from offramp.runtime.rules.speculative import Drafting

CACHES = ("deferred", "propagate")  # what becomes of a token's cache behind the exit where it left
LEAVING_RULES = tuple(name for name in rules.KNOWN if name != "quee")
OWN: Mapping[str, str | None] = {"speculative": None, "skip": "segments", "route": "price"}  # by parameter
KNOWN = (*LEAVING_RULES, *OWN)


def choose_rule(
    manifest: Manifest, rule: str | RuleSpec | None, threshold: float | None, point: str | None = None
) -> RuleSpec:
    """The rule that the wishes and the manifest come to; BadSetting where there is no such rule or point."""
    if point is not None:
        if rule is not None or threshold is not None:
            raise BadSetting(f"point {point!r} sets the rule and its threshold: wish for either, not both")
        known = {one.name: one for one in manifest.points}
        if point not in known:
            names = ", ".join(known) or "none at all"
            raise BadSetting(f"operating point {point!r} is not in this bundle; it has: {names}")
        spec = known[point].rule
    elif isinstance(rule, RuleSpec):
        spec = rule
    elif rule is None or rule == manifest.rule.name:
        spec = manifest.rule
    else:
        # A gate is a probability, so one half is its natural threshold; of the others, none is.
        spec = RuleSpec(rule, {"threshold": 0.5} if rule == "gate" else {})
    if spec.name not in KNOWN:
        raise BadSetting(
            f"rule {spec.name!r} is not for bundles that generate text; choose one of: {', '.join(KNOWN)}"
        )
    if threshold is None:
        return spec
    parameter = OWN[spec.name] if spec.name in OWN else rules.main_parameter(spec.name)
    if parameter is None:
        raise BadSetting(f"rule {spec.name} has no threshold")
    return RuleSpec(spec.name, {**spec.parameters, parameter: float(threshold)})


def way_of(bundle: Bundle, spec: RuleSpec, cache: str = CACHES[0]) -> Way | Chooser:
    """The way that a rule describes; BadSetting names what the bundle lacks or what cannot be.

    cache: "deferred" or "propagate", for rules that leave.
    """
    manifest, count = bundle.manifest, len(bundle.manifest.segments)
    if cache not in CACHES:
        raise BadSetting(f"cache {cache!r}: choose one of {', '.join(CACHES)}")
    if cache != CACHES[0] and spec.name in (*OWN, "never"):
        raise BadSetting(f"cache {cache}: with rule {spec.name} no token leaves early; leave it out")
    if spec.name == "never":
        return full
    if count == 1:
        raise BadSetting(f"rule {spec.name}: the bundle has one segment, there is nothing to choose")
    if spec.name == "skip":
        return Skipping(skipped(count, _whole(spec, "segments", 2, count)))
    if spec.name == "route":
        price = spec.parameters.get("price")
        if price is None or not 0 <= price < float("inf"):
            raise BadSetting("rule route needs a price from 0: take a point that ee-calibrate measured")
        return open_routing(bundle, price)
    if spec.name == "speculative":
        return _speculative(spec, count)
    assert manifest.decoder is not None
    if spec.name == "gate" and not all(_puts_out(segment, GATE) for segment in manifest.segments[:-1]):
        raise BadSetting(f"rule gate: the bundle has no policies; choose one of: {', '.join(KNOWN)}")
    if cache == "propagate" and not manifest.decoder.cache_fills:
        raise BadSetting("cache propagate: the bundle has no graphs for it; write it again with ee-split")
    return Exiting(rules.bind(spec, count), spec.name not in SILENT, cache == "propagate", count)


def _speculative(spec: RuleSpec, count: int) -> Way:
    exits = range(1, count)
    if not spec.parameters:
        return Drafting(exits)
    if set(spec.parameters) != {"exit", "drafts"}:
        raise BadSetting("rule speculative: no parameters, or exit and drafts, both")
    return Drafting(exits, (_whole(spec, "exit", 1, count - 1), _whole(spec, "drafts", 1, 15)))


def _whole(spec: RuleSpec, name: str, least: int, most: int) -> int:
    value = spec.parameters.get(name)
    if value is None:
        raise BadSetting(f"rule {spec.name} needs {name}: give a threshold (--threshold NUMBER)")
    if value != int(value) or not least <= value <= most:
        raise BadSetting(f"rule {spec.name}: {name} {value:g} is not a whole number from {least} to {most}")
    return int(value)


def _puts_out(stage: Stage, name: str) -> bool:
    return any(tensor.name == name for tensor in next(iter(stage.variants.values())).outputs)
