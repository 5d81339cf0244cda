"""Resolve the caller's options and the bundle's manifest to a rule and a variant, for every bundle."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import CONTROLLER, GENERATION, Manifest, RuleSpec, Segment
from offramp.runtime.errors import BadSetting
from offramp.runtime.rules.base import Rule
from offramp.runtime.rules.registry import RULES, bind, main_parameter, rules_for

# The part of the network that computes a signal which rules read.
_SOURCES = {
    "logits": "exit",
    "gate": "policy",
    "forecast": "error forecast",
    "answer": "answer",
    CONTROLLER: "controllers",
}
EXIT_KV = ("deferred", "propagate")  # what the cache holds of a token after its exit


def resolve_rule(
    manifest: Manifest,
    *,
    rule: str | RuleSpec | None = None,
    threshold: float | None = None,
    point: str | None = None,
    variant: str | None = None,
) -> tuple[RuleSpec, str]:
    """Find the rule and the starting variant that the options select.

    rule: a name, a name with a list ("skip:-3-7" of segments, "speculative:lookup" of sources), or a spec.
    Raises BadSetting for options that are unknown or contradict each other. Without rule, threshold and
    point, the bundle's own rule is used.
    """
    if variant is not None and variant not in manifest.variants:
        raise BadSetting(
            f"variant {variant!r} is not in this bundle; it offers: {', '.join(manifest.variants)}"
        )
    if point is not None:
        if rule is not None or threshold is not None:
            raise BadSetting(f"point {point!r} sets the rule and its threshold: give either, not both")
        points = {entry.name: entry for entry in manifest.points}
        if point not in points:
            names = ", ".join(points) or "none at all"
            raise BadSetting(f"operating point {point!r} is not in this bundle; it has: {names}")
        if variant not in (None, points[point].variant):
            raise BadSetting(
                f"point {point!r} was measured in variant {points[point].variant}, not {variant}: give either"
            )
        spec, variant = points[point].rule, points[point].variant
    elif isinstance(rule, RuleSpec):
        spec = rule
    elif rule is None or rule == manifest.rule.name:
        spec = manifest.rule
    else:
        spec = _named_rule(manifest, rule)
    _check_task(manifest, spec)
    if threshold is not None:
        parameter = main_parameter(spec.name)
        if parameter is None:
            raise BadSetting(f"rule {spec.name} has no threshold")
        if rule is not None and spec.skipped and rule != spec.name:
            raise BadSetting("rule skip: a list says which segments are skipped; leave the threshold out")
        # Of rule skip it is the number of segments to run, in place of a list.
        spec = replace(spec, parameters={**spec.parameters, parameter: float(threshold)}, skipped=())
    _check_signals(manifest, spec)
    return spec, variant or _usual_variant(manifest, spec)


def bind_for_bundle(bundle: Bundle, spec: RuleSpec, exit_kv: str = EXIT_KV[0]) -> Rule:
    """Make the rule of a spec for a bundle; raises BadSetting if the bundle lacks data that the rule needs.

    exit_kv: one of EXIT_KV; a value other than the default is allowed only for rules with early exits.
    """
    manifest = bundle.manifest
    _check_exit_kv(manifest, spec, exit_kv)
    routing = None
    if spec.name == "route":
        from offramp.runtime.rules.route import read_routing  # here: other rules do not need it

        routing = read_routing(bundle)
    size = manifest.answer_size
    has_head = manifest.decoder is not None and manifest.decoder.draft_block is not None
    segments = len(manifest.segments)
    return bind(spec, segments, manifest.costs, routing, answer_size=size, has_head=has_head)


def points_to_measure(manifest: Manifest, names: str | None) -> list[str | None]:
    """Parse names of operating points to measure, and leave out those of the full walk.

    names: comma-separated; None: "default" or else the first. A None in the result is the bundle's own rule.
    """
    known = {point.name: point for point in manifest.points}
    if names is None:
        return ["default" if "default" in known else next(iter(known), None)]
    chosen = [name for name in dict.fromkeys(part.strip() for part in names.split(",")) if name]
    if not chosen:
        raise BadSetting(f"points {names!r}: name at least one of: {', '.join(known) or 'full'}")
    full = ("never", manifest.variants[0])
    full_depth = {"full"} - set(known) | {p.name for p in manifest.points if (p.rule.name, p.variant) == full}
    return [name for name in chosen if name not in full_depth]


def _check_task(manifest: Manifest, spec: RuleSpec) -> None:
    """Check that the rule exists and is for bundles of this task."""
    known = rules_for(manifest.kind)
    if spec.name not in RULES:
        raise BadSetting(f"rule {spec.name!r} is not known; choose one of: {', '.join(known)}")
    if spec.name not in known:
        raise BadSetting(
            f"rule {spec.name}: it is not for {manifest.task}, the task of this bundle; choose one of: "
            f"{', '.join(known)}"
        )
    # A bundle of one segment has no exit and nothing to skip, but lookups can draft.
    needs_segments = manifest.kind == GENERATION and spec.name not in ("never", "speculative")
    if needs_segments and len(manifest.segments) == 1:
        raise BadSetting(f"rule {spec.name}: the bundle has one segment, so there is nothing to choose")


def _check_signals(manifest: Manifest, spec: RuleSpec) -> None:
    """Check that the bundle computes the signal that the rule reads."""
    lacking = _lacking_segment(manifest, spec.name)
    if lacking is not None:
        signal = RULES[spec.name].reads
        assert signal is not None  # or no segment would lack it
        others = [name for name in rules_for(manifest.kind) if _lacking_segment(manifest, name) is None]
        raise BadSetting(
            f"rule {spec.name}: {lacking.name} has no {_SOURCES[signal]} in this bundle; choose one of: "
            f"{', '.join(others)}"
        )


def _lacking_segment(manifest: Manifest, rule: str) -> Segment | None:
    """The first segment without the signal that a rule reads; None if all that need it have it."""
    signal = RULES[rule].reads
    if signal is None or (manifest.kind == GENERATION and signal == "logits"):
        return None  # a decoder's head computes logits after any segment
    # Nothing is ahead of the last segment, and ahead of the one before it is the last alone, which always
    # runs, so that it has no controllers.
    count = len(manifest.segments)
    deciding = max(1, count - 2) if signal == CONTROLLER else count - 1
    for segment in manifest.segments[:deciding]:
        if signal not in (tensor.name for tensor in segment.first_graph.outputs):
            return segment
    return None


def _check_exit_kv(manifest: Manifest, spec: RuleSpec, exit_kv: str) -> None:
    if exit_kv not in EXIT_KV:
        raise BadSetting(f"exit_kv {exit_kv!r}: choose one of {', '.join(EXIT_KV)}")
    if exit_kv == EXIT_KV[0]:
        return
    if manifest.decoder is None:
        raise BadSetting(f"exit_kv {exit_kv}: a bundle of task {manifest.task} has no cache")
    if spec.name != "select" and (RULES[spec.name].exits is None or spec.name == "never"):
        raise BadSetting(f"exit_kv {exit_kv}: with rule {spec.name} no token exits early; leave it out")
    if not manifest.decoder.cache_fills:
        raise BadSetting(f"exit_kv {exit_kv}: the bundle has no graphs for it; write it again with ee-split")


def _named_rule(manifest: Manifest, text: str) -> RuleSpec:
    """The spec of a rule given by its name, or with a list: "skip:-3-7-9", "speculative:lookup"."""
    if ":" in text:
        from offramp.runtime.rules.skip import LIST, read_list  # here: most rules have no list

        if LIST in text:
            return read_list(text)
        from offramp.runtime.rules.speculative import NAME, read_sources

        if text.startswith(f"{NAME}:"):
            return read_sources(text)
    return RuleSpec(text, _usual_parameters(manifest, text))


def _usual_parameters(manifest: Manifest, rule: str) -> dict[str, float]:
    """The parameters of a rule for which the caller gives a threshold at most."""
    if rule == "quee":
        from offramp.runtime.rules.quee import walk_limits  # here: other rules do not need it

        return walk_limits(manifest)
    # P(exit) and P(run) are probabilities, so one half is their natural threshold; no other rule has one.
    return {"threshold": 0.5} if rule in ("gate", "select") else {}


def _usual_variant(manifest: Manifest, spec: RuleSpec) -> str:
    """The variant in which rows start: that of the point "default" if it has the same rule."""
    variants = (p.variant for p in manifest.points if p.name == "default" and p.rule.name == spec.name)
    return next(variants, manifest.variants[0])


def segments_within(manifest: Manifest, rule: str, max_depth: int) -> int:
    """The number of segments whose blocks are at most max_depth, for rows of a rule.

    Raises BadSetting if the first segment has more blocks, or if the rule plans itself how deep a row goes.
    """
    if RULES[rule].exits is None:
        raise BadSetting(f"max_depth: rule {rule} plans how deep a row goes by itself; name another point")
    depths = list(accumulate(len(segment.blocks) for segment in manifest.segments))
    if max_depth < depths[0]:
        raise BadSetting(f"max_depth {max_depth}: the first exit of this bundle is after {depths[0]} blocks")
    return sum(depth <= max_depth for depth in depths)
