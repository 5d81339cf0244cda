"""Wishes and the manifest brought together; test_session holds what load() refuses."""

import dataclasses
from pathlib import Path

import pytest

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.errors import BadSetting
from offramp.runtime.rules.resolve import choose

TINY = Path(__file__).parents[1] / "data" / "tiny_bundle"
NOTHING: dict = {"rule": None, "threshold": None, "point": None, "variant": None}


def test_without_wishes_the_manifest_decides() -> None:
    manifest = open_bundle(TINY).manifest
    assert choose(manifest, **NOTHING) == (manifest.rule, manifest.variants[0])


def test_a_rule_by_name_takes_its_threshold() -> None:
    manifest = open_bundle(TINY).manifest
    found = choose(manifest, **{**NOTHING, "rule": "margin", "threshold": 0.2})
    assert found == (RuleSpec("margin", {"threshold": 0.2}), manifest.variants[0])


def test_a_spec_is_taken_as_it_is() -> None:
    spec = RuleSpec("fixed", {"exit": 2.0})
    assert choose(open_bundle(TINY).manifest, **{**NOTHING, "rule": spec, "variant": "int8"}) == (
        spec,
        "int8",
    )


def test_a_gate_without_policies_is_refused() -> None:
    def without(stage):
        variants = {
            name: dataclasses.replace(variant, outputs=tuple(t for t in variant.outputs if t.name != "gate"))
            for name, variant in stage.variants.items()
        }
        return dataclasses.replace(stage, variants=variants)

    manifest = open_bundle(TINY).manifest
    bare = dataclasses.replace(manifest, segments=tuple(map(without, manifest.segments)))
    with pytest.raises(BadSetting, match="has no policy in this bundle"):
        choose(bare, rule=None, threshold=None, point=None, variant=None)
