"""Checks of the rules in a manifest, of the segments that they name, and of controllers, which rules read."""

from __future__ import annotations

from offramp.runtime.bundle import fields
from offramp.runtime.bundle.manifest import CONTROLLER, GENERATION, TASKS, Manifest, RuleSpec, Tensor


def check_rule(where: str, rule: RuleSpec, manifest: Manifest) -> None:
    """Raise ValueError, which names the field, if a rule of a manifest does not fit its segments and task.

    where: the path of the rule. Names of rules and parameters are not checked here, but by
    offramp.runtime.rules.bind for the rule that is used.
    """
    fields.short(f"{where}.name", [rule.name])
    fields.short(f"{where}.parameters", rule.parameters)
    _check_temperatures(where, rule, manifest)
    for name, value in rule.parameters.items():
        fields.within(f"{where}.parameters[{name!r:.80}]", abs(value), 0, fields.LARGEST_PARAMETER)
    _check_skipped(f"{where}.skipped", rule, manifest)


def check_controllers(manifest: Manifest) -> None:
    """Raise ValueError unless controllers decide for all segments of a decoder but the first and the last.

    A decoder without controllers passes.
    """
    assert manifest.decoder is not None
    outputs = [[t for t in s.first_graph.outputs if t.name == CONTROLLER] for s in manifest.segments]
    if not any(outputs):
        return
    for number, present in enumerate(outputs):
        ahead = len(outputs) - 2 - number  # segments after this one, without the last, which always runs
        if present != ([Tensor(CONTROLLER, "float32", ("batch", "seq", ahead))] if ahead > 0 else []):
            shape = f"[batch, seq, {ahead}]" if ahead > 0 else "nothing"
            raise ValueError(f"segments[{number}]: as {CONTROLLER} it must put out {shape}")
    if not manifest.decoder.cache_fills:  # tokens leave keys and values in the segments that they skip
        raise ValueError(f"decoder.cache_fills: there are none, and segments put out {CONTROLLER}")


def _check_temperatures(where: str, rule: RuleSpec, manifest: Manifest) -> None:
    task = TASKS[manifest.task]
    for field in ("temperatures", "score_temperatures"):
        values = getattr(rule, field)
        if values and not task.one_label:
            raise ValueError(f"{where}.{field}: {manifest.task} has none; they are for one label a row")
        if values and (len(values) != len(manifest.segments) or min(values) <= 0):
            raise ValueError(f"{where}.{field}: expected {len(manifest.segments)} above 0, one a segment")


def _check_skipped(where: str, rule: RuleSpec, manifest: Manifest) -> None:
    """Check that skipped segments exist, are named once each, and are not all."""
    if not rule.skipped:
        return
    if rule.name != "skip" or manifest.kind != GENERATION:
        raise ValueError(f"{where}: rule skip of {GENERATION} has it, rule {rule.name!r:.80} has none")
    segments = len(manifest.segments)
    for number in rule.skipped:
        fields.within(where, number, 1, segments)
    fields.unique(where, [str(number) for number in rule.skipped])
    if len(rule.skipped) == segments:
        raise ValueError(f"{where}: all {segments} segments; one at least must run")
