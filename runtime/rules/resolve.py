"""What the caller wishes for and what the bundle says, brought together: a rule and a variant to walk in."""

from __future__ import annotations

from offramp.runtime import rules
from offramp.runtime.bundle.manifest import Manifest, RuleSpec
from offramp.runtime.errors import BadSetting

# What a rule reads beside logits, and what makes it.
READS = {"gate": ("gate", "policy"), "quee": ("forecast", "error forecast")}


def choose(
    manifest: Manifest,
    *,
    rule: str | RuleSpec | None,
    threshold: float | None,
    point: str | None,
    variant: str | None,
) -> tuple[RuleSpec, str]:
    """The rule and variant that wishes and manifest come to; BadSetting names a contradiction."""
    if variant is not None and variant not in manifest.variants:
        raise BadSetting(
            f"variant {variant!r} is not in this bundle; it offers: {', '.join(manifest.variants)}"
        )
    if point is not None:
        if rule is not None or threshold is not None:
            raise BadSetting(f"point {point!r} sets the rule and its threshold: wish for either, not both")
        found = next((known for known in manifest.points if known.name == point), None)
        if found is None:
            known = ", ".join(p.name for p in manifest.points) or "none at all"
            raise BadSetting(f"operating point {point!r} is not in this bundle; it has: {known}")
        if variant not in (None, found.variant):
            raise BadSetting(
                f"point {point!r} was measured in variant {found.variant}, not {variant}: wish for either"
            )
        return _readable(manifest, found.rule), found.variant
    if isinstance(rule, RuleSpec):
        spec = rule
    elif rule is None or rule == manifest.rule.name:
        spec = manifest.rule
    else:
        # A gate is a probability, so one half is its natural threshold; of the others, none is.
        spec = RuleSpec(rule, {"threshold": 0.5} if rule == "gate" else {})
    if threshold is not None:
        parameter = rules.main_parameter(spec.name)
        if parameter is None:
            raise BadSetting(f"rule {spec.name} has no threshold")
        spec = RuleSpec(spec.name, {**spec.parameters, parameter: float(threshold)})
    return _readable(manifest, spec), variant or _usual(manifest, spec)


def _usual(manifest: Manifest, spec: RuleSpec) -> str:
    """The variant in which rows start: that of the point "default" where the rule is its own."""
    found = (p.variant for p in manifest.points if p.name == "default" and p.rule.name == spec.name)
    return next(found, manifest.variants[0])


def _readable(manifest: Manifest, spec: RuleSpec) -> RuleSpec:
    """The spec, unless it asks for a signal that the bundle does not give."""
    signal, maker = READS.get(spec.name, ("logits", "exit"))
    for segment in manifest.segments[:-1]:
        outputs = [tensor.name for tensor in next(iter(segment.variants.values())).outputs]
        if signal not in outputs:
            others = ", ".join(name for name in rules.KNOWN if name not in READS)
            raise BadSetting(
                f"rule {spec.name}: {segment.name} has no {maker} in this bundle; choose one of: {others}"
            )
    return spec


def chosen_points(manifest: Manifest, wish: str | None) -> list[str | None]:
    """Names of operating points (None: the bundle's own rule) but those that only name the full walk."""
    known = {point.name: point for point in manifest.points}
    if wish is None:
        return ["default" if "default" in known else next(iter(known), None)]
    names = [name for name in dict.fromkeys(part.strip() for part in wish.split(",")) if name]
    if not names:
        raise BadSetting(f"points {wish!r}: name at least one of: {', '.join(known) or 'full'}")
    plain = ("never", manifest.variants[0])
    whole = {"full"} - set(known) | {p.name for p in manifest.points if (p.rule.name, p.variant) == plain}
    return [name for name in names if name not in whole]
