"""The resolver: from options and a manifest to a rule and a variant, for every kind of bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tiny_bundles import CLASSIFIER, EMBEDDING, GENERATOR, MULTI_LABEL, REGRESSION, TOKENS

from offramp.runtime.bundle.files import Bundle, open_bundle
from offramp.runtime.bundle.manifest import Manifest, OperatingPoint
from offramp.runtime.errors import BadSetting
from offramp.runtime.rules import RULES, RuleSpec, rules_for
from offramp.runtime.rules.resolve import bind_for_bundle, points_to_measure, resolve_rule
from offramp.runtime.rules.speculative import LOOKUP, SpeculativeRule, read_sources


def classifier() -> Manifest:
    return open_bundle(CLASSIFIER).manifest


def generator(**changes: Any) -> Manifest:
    return dataclasses.replace(open_bundle(GENERATOR).manifest, **changes)


def without_output(manifest: Manifest, name: str) -> Manifest:
    """The manifest, no segment of which computes this signal."""

    def without(segment):
        variants = {
            key: dataclasses.replace(variant, outputs=tuple(t for t in variant.outputs if t.name != name))
            for key, variant in segment.variants.items()
        }
        return dataclasses.replace(segment, variants=variants)

    return dataclasses.replace(manifest, segments=tuple(map(without, manifest.segments)))


POINTS = (
    OperatingPoint("default", RuleSpec("gate", {"threshold": 0.7}), "int8", "films", "dev", {}),
    OperatingPoint("full", RuleSpec("never", {}), "fp32", "films", "dev", {}),
)


@pytest.mark.parametrize("manifest", [classifier(), generator()], ids=["classifier", "generator"])
def test_without_options_the_manifest_decides(manifest: Manifest) -> None:
    assert resolve_rule(manifest) == (manifest.rule, manifest.variants[0])


@pytest.mark.parametrize("manifest", [classifier(), generator()], ids=["classifier", "generator"])
def test_rule_by_name_takes_the_threshold(manifest: Manifest) -> None:
    spec = RuleSpec("margin", {"threshold": 0.2})
    assert resolve_rule(manifest, rule="margin", threshold=0.2) == (spec, manifest.variants[0])


def test_threshold_sets_the_main_parameter() -> None:
    assert resolve_rule(classifier(), rule="fixed", threshold=2)[0] == RuleSpec("fixed", {"exit": 2.0})
    assert resolve_rule(generator(), rule="skip", threshold=2)[0] == RuleSpec("skip", {"segments": 2.0})
    assert resolve_rule(classifier(), threshold=0.9)[0] == RuleSpec("gate", {"threshold": 0.9})


def test_threshold_keeps_other_parameters() -> None:
    spec = RuleSpec("patience_confident", {"threshold": 0.1, "patience": 2.0})
    resolved, _ = resolve_rule(classifier(), rule=spec, threshold=0.3)
    assert resolved == RuleSpec("patience_confident", {"threshold": 0.3, "patience": 2.0})


def test_gate_by_name_has_threshold_one_half() -> None:
    manifest = dataclasses.replace(classifier(), rule=RuleSpec("never", {}))
    assert resolve_rule(manifest, rule="gate")[0] == RuleSpec("gate", {"threshold": 0.5})


def test_name_of_the_bundles_rule_keeps_its_parameters() -> None:
    manifest = dataclasses.replace(classifier(), rule=RuleSpec("gate", {"threshold": 0.8}))
    assert resolve_rule(manifest, rule="gate")[0] == manifest.rule


def test_spec_is_used_as_it_is() -> None:
    spec = RuleSpec("fixed", {"exit": 2.0})
    assert resolve_rule(classifier(), rule=spec, variant="int8") == (spec, "int8")


@pytest.mark.parametrize("manifest", [classifier(), generator()], ids=["classifier", "generator"])
def test_point_sets_rule_and_variant(manifest: Manifest) -> None:
    manifest = dataclasses.replace(manifest, points=POINTS)
    assert resolve_rule(manifest, point="default") == (POINTS[0].rule, "int8")
    assert resolve_rule(manifest, point="full") == (POINTS[1].rule, "fp32")
    assert resolve_rule(manifest, point="full", variant="fp32") == (POINTS[1].rule, "fp32")
    with pytest.raises(BadSetting, match="point 'default' was measured in variant int8, not fp32"):
        resolve_rule(manifest, point="default", variant="fp32")


def test_rule_of_the_default_point_starts_in_its_variant() -> None:
    manifest = dataclasses.replace(classifier(), points=POINTS)
    assert resolve_rule(manifest)[1] == resolve_rule(manifest, rule="gate", threshold=0.1)[1] == "int8"
    assert resolve_rule(manifest, rule="never")[1] == "fp32"
    assert resolve_rule(manifest, variant="fp32")[1] == "fp32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "int4"}, r"variant 'int4' .* it offers: fp32, int8"),
        ({"point": "fast", "rule": "never"}, r"point 'fast' sets the rule .*: give either, not both"),
        ({"point": "fast", "threshold": 0.1}, r"point 'fast' sets the rule .*: give either, not both"),
        ({"point": "slow"}, r"operating point 'slow' .* it has: default, fast"),
        ({"rule": "luck"}, r"rule 'luck' is not known; choose one of: gate, .*quee"),
        ({"rule": "never", "threshold": 0.5}, "rule never has no threshold"),
        ({"rule": "skip"}, r"rule skip: it is not for text-classification, .*; choose one of: gate, .*quee"),
        ({"rule": "speculative"}, "rule speculative: it is not for text-classification, the task of this"),
        ({"rule": RuleSpec("route", {"price": 0.1})}, "rule route: it is not for text-classification"),
        ({"rule": "quee", "threshold": 0.1}, r"rule quee: segment_00 has no error forecast .* choose one of"),
    ],
)
def test_bad_options_for_a_classifier(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        resolve_rule(classifier(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "quee"}, r"rule quee: it is not for text-generation, .*; choose one of: .*route"),
        ({"rule": "luck"}, r"rule 'luck' is not known; choose one of: gate, .*route"),
        ({"rule": "speculative", "threshold": 0.5}, "rule speculative has no threshold"),
        ({"point": "default"}, "it has: none at all"),
        ({"variant": "int4"}, "it offers: fp32, int8"),
    ],
)
def test_bad_options_for_a_generator(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        resolve_rule(generator(points=()), **options)


@pytest.mark.parametrize("manifest", [classifier(), generator()], ids=["classifier", "generator"])
def test_gate_without_policies_is_refused(manifest: Manifest) -> None:
    with pytest.raises(BadSetting, match=r"rule gate: \w+ has no policy in this bundle; choose one of: max_"):
        resolve_rule(without_output(manifest, "gate"), rule="gate")


def manifest_of(bundle: Path) -> Manifest:
    return open_bundle(bundle).manifest


@pytest.mark.parametrize(
    ("bundle", "rule", "message"),
    [
        (MULTI_LABEL, "patience", "rule patience: it is not for multi-label-classification, .*one of: gate,"),
        (MULTI_LABEL, "settled", "rule settled: it is not for multi-label-classification"),
        (TOKENS, "patience", "rule patience: it is not for token-classification, the task of this bundle"),
        (TOKENS, "quee", "rule quee: it is not for token-classification"),
        (REGRESSION, "entropy", "entropy: it is not for regression, .*: gate, settled, fixed, never$"),
        (EMBEDDING, "patience", "rule patience: it is not for sentence-embedding, the task of this bundle"),
        (EMBEDDING, "skip", "rule skip: it is not for sentence-embedding"),
        (EMBEDDING, "gate", "rule gate: segment_00 has no policy .*: settled, fixed, never$"),
    ],
)
def test_rule_that_a_task_lacks_is_refused(bundle: Path, rule: str, message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        resolve_rule(manifest_of(bundle), rule=rule, threshold=1.0)


@pytest.mark.parametrize("bundle", [MULTI_LABEL, TOKENS, REGRESSION, EMBEDDING], ids=lambda path: path.name)
def test_rules_that_a_task_has_are_bound(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert resolve_rule(opened.manifest) == (opened.manifest.rule, "fp32")
    for name in rules_for(opened.manifest.kind):
        if name == "gate" and bundle != REGRESSION:
            continue  # they have no policy
        spec = RuleSpec(name, {parameter: 1.0 for parameter in parameters_of(name)})
        assert bind_for_bundle(opened, resolve_rule(opened.manifest, rule=spec)[0]).spec == spec


def parameters_of(rule: str) -> list[str]:
    return [name for name in (RULES[rule].parameter, RULES[rule].count) if name is not None]


def test_settled_of_a_bundle_remembers_its_answers() -> None:
    spec = RuleSpec("settled", {"threshold": 0.1})
    assert bind_for_bundle(open_bundle(REGRESSION), spec).width == 1 + 1
    assert bind_for_bundle(open_bundle(EMBEDDING), spec).width == 1 + manifest_of(EMBEDDING).answer_size
    with pytest.raises(BadSetting, match=r"rule settled needs threshold: give a threshold"):
        bind_for_bundle(open_bundle(REGRESSION), RuleSpec("settled", {}))


def test_logits_are_needed_of_a_classifier_alone() -> None:
    with pytest.raises(BadSetting, match="rule entropy: segment_00 has no exit in this bundle"):
        resolve_rule(without_output(classifier(), "logits"), rule="entropy", threshold=0.5)
    assert resolve_rule(generator(), rule="entropy", threshold=0.5)[0].name == "entropy"


def test_generator_of_one_segment_has_nothing_to_choose() -> None:
    manifest = generator()
    manifest = dataclasses.replace(manifest, segments=manifest.segments[:1])
    assert resolve_rule(manifest, rule="never")[0].name == "never"
    for name in ("gate", "fixed"):
        with pytest.raises(BadSetting, match=f"rule {name}: the bundle has one segment"):
            resolve_rule(manifest, rule=name)


def test_lookups_draft_in_a_generator_of_one_segment() -> None:
    manifest = generator()
    manifest = dataclasses.replace(manifest, segments=manifest.segments[:1])
    bundle = Bundle(GENERATOR, manifest)
    rule = bind_for_bundle(bundle, resolve_rule(manifest, rule="speculative")[0])
    assert isinstance(rule, SpeculativeRule) and rule.sources == (LOOKUP,)
    for spec in (read_sources("speculative:exits"), RuleSpec("speculative", {"exit": 1, "drafts": 2})):
        with pytest.raises(BadSetting, match="the bundle has one segment, so"):
            bind_for_bundle(bundle, spec)


def test_sources_of_drafts_are_named_after_the_rule() -> None:
    for text, sources in (("speculative:lookup", (LOOKUP,)), ("speculative:exits", (1, 2))):
        rule = bind_for_bundle(open_bundle(GENERATOR), resolve_rule(generator(), rule=text)[0])
        assert isinstance(rule, SpeculativeRule) and rule.sources == sources
    with pytest.raises(BadSetting, match="source 'luck' is not known"):
        resolve_rule(generator(), rule="speculative:luck")


FIXED, NEVER = RuleSpec("fixed", {"exit": 1.0}), RuleSpec("never", {})


def test_bind_to_a_bundle() -> None:
    assert bind_for_bundle(open_bundle(CLASSIFIER), FIXED).spec == FIXED
    for exit_kv in ("deferred", "propagate"):
        assert bind_for_bundle(open_bundle(GENERATOR), FIXED, exit_kv).spec == FIXED
    with pytest.raises(BadSetting, match="rule fixed: exit 9 does not exist; there are exits 1 to 3"):
        bind_for_bundle(open_bundle(CLASSIFIER), RuleSpec("fixed", {"exit": 9.0}))
    with pytest.raises(BadSetting, match=r"has no router; fit one with: ee-calibrate"):
        bind_for_bundle(open_bundle(GENERATOR), RuleSpec("route", {"price": 0.1}))


@pytest.mark.parametrize(
    ("bundle", "spec", "exit_kv", "message"),
    [
        (CLASSIFIER, FIXED, "deep", "exit_kv 'deep': choose one of deferred, propagate"),
        (CLASSIFIER, FIXED, "propagate", "exit_kv propagate: a bundle of task text-classification has no"),
        (GENERATOR, FIXED, "deep", "exit_kv 'deep': choose one of deferred, propagate"),
        (GENERATOR, NEVER, "propagate", "with rule never no token exits early; leave it out"),
        (GENERATOR, RuleSpec("skip", {"segments": 2.0}), "propagate", "with rule skip no token exits early"),
        (GENERATOR, RuleSpec("speculative", {}), "propagate", "with rule speculative no token exits early"),
    ],
)
def test_exit_kv_that_contradicts_is_refused(bundle: Any, spec: RuleSpec, exit_kv: str, message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        bind_for_bundle(open_bundle(bundle), spec, exit_kv)


def test_exit_kv_without_cache_fills_is_refused() -> None:
    manifest = generator()
    assert manifest.decoder is not None
    decoder = dataclasses.replace(manifest.decoder, cache_fills=())
    bundle = Bundle(GENERATOR, dataclasses.replace(manifest, decoder=decoder))
    with pytest.raises(BadSetting, match=r"the bundle has no graphs for it; write it again with ee-split"):
        bind_for_bundle(bundle, FIXED, "propagate")


def test_points_to_measure() -> None:
    manifest = dataclasses.replace(classifier(), points=POINTS)
    assert points_to_measure(manifest, None) == ["default"]
    assert points_to_measure(dataclasses.replace(manifest, points=POINTS[1:]), None) == ["full"]
    assert points_to_measure(dataclasses.replace(manifest, points=()), None) == [None]
    assert points_to_measure(manifest, "full, default,default, other") == ["default", "other"]
    assert points_to_measure(dataclasses.replace(manifest, points=()), "full") == []
    with pytest.raises(BadSetting, match="name at least one of: default, full"):
        points_to_measure(manifest, " , ")
