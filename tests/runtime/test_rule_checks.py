"""Rules in a manifest: lists of skipped segments, and the controllers that rule select reads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_bundles import CLASSIFIER, GENERATOR

from offramp.runtime.bundle.checks import check_manifest, read_manifest
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import (
    CONTROLLER,
    FILE_NAME,
    Manifest,
    OperatingPoint,
    RuleSpec,
    Segment,
    Tensor,
)
from offramp.runtime.errors import BadManifest
from offramp.runtime.rules.resolve import resolve_rule


def generator(**changes: Any) -> Manifest:
    return dataclasses.replace(open_bundle(GENERATOR).manifest, **changes)


def with_controllers(sizes: dict[int, int]) -> Manifest:
    """The generator, whose segments (0-based) put out P(run) of so many segments."""
    manifest = generator()

    def changed(number: int, segment: Segment) -> Segment:
        added = Tensor(CONTROLLER, "float32", ("batch", "seq", sizes[number]))
        variants = {
            name: dataclasses.replace(variant, outputs=(*variant.outputs, added))
            for name, variant in segment.variants.items()
        }
        return dataclasses.replace(segment, variants=variants)

    segments = [changed(n, s) if n in sizes else s for n, s in enumerate(manifest.segments)]
    return dataclasses.replace(manifest, segments=tuple(segments))


def test_a_list_is_written_and_read() -> None:
    rule = RuleSpec("skip", {}, skipped=(1, 3))
    point = OperatingPoint("skip-33", rule, "fp32", "films", "dev", {"nats": 2.5})
    text = generator(rule=rule, points=(point,)).to_json()
    restored = read_manifest(text, source="written")
    assert restored.rule == rule == restored.points[0].rule
    assert json.loads(text)["rule"] == {"name": "skip", "parameters": {}, "skipped": [1, 3]}
    assert resolve_rule(restored, point="skip-33") == (rule, "fp32")
    assert resolve_rule(restored, threshold=2)[0] == RuleSpec("skip", {"segments": 2.0})


def test_without_a_list_the_file_is_as_before() -> None:
    assert "skipped" not in generator().to_json()


@pytest.mark.parametrize(
    ("skipped", "message"),
    [
        ([0], "rule.skipped: 0; expected 1 or more"),
        ([4], "rule.skipped: 4; expected at most 3"),
        ([2, 2], "rule.skipped: '2' is there twice"),
        ([1, 2, 3], "rule.skipped: all 3 segments; one at least must run"),
        ([1.5], "rule.skipped[0]: expected a whole number"),
        ("2", "rule.skipped: expected a list"),
    ],
)
def test_bad_list_is_refused(skipped: object, message: str) -> None:
    value = json.loads((GENERATOR / FILE_NAME).read_text(encoding="utf-8"))
    value["rule"] = {"name": "skip", "parameters": {}, "skipped": skipped}
    with pytest.raises(BadManifest) as caught:
        read_manifest(json.dumps(value), source="m")
    assert message in str(caught.value)


@pytest.mark.parametrize(("folder", "name"), [(CLASSIFIER, "skip"), (GENERATOR, "gate")])
def test_a_list_of_another_rule_or_task_is_refused(folder: Path, name: str) -> None:
    value = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    value["points"] = [
        {
            "name": "x",
            "rule": {"name": name, "parameters": {}, "skipped": [1]},
            "variant": "fp32",
            "data": "films",
            "split": "dev",
            "measured": {},
        }
    ]
    with pytest.raises(BadManifest, match=r"points\[0\]\.rule\.skipped: rule skip of text-generation has it"):
        read_manifest(json.dumps(value), source="m")


def test_controllers_decide_for_all_segments_between_the_first_and_the_last() -> None:
    manifest = with_controllers({0: 1})
    check_manifest(manifest)
    assert resolve_rule(manifest, rule="select")[0] == RuleSpec("select", {"threshold": 0.5})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({0: 2}, r"segments\[0\]: as controller it must put out \[batch, seq, 1\]"),
        ({0: 1, 1: 1}, r"segments\[1\]: as controller it must put out nothing"),
        ({1: 1}, r"segments\[0\]: as controller it must put out \[batch, seq, 1\]"),
    ],
)
def test_controllers_of_another_number_are_refused(sizes: dict[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_manifest(with_controllers(sizes))


def test_controllers_need_cache_fills() -> None:
    manifest = with_controllers({0: 1})
    assert manifest.decoder is not None
    decoder = dataclasses.replace(manifest.decoder, cache_fills=())
    with pytest.raises(ValueError, match=r"cache_fills: there are none, and segments put out controller"):
        check_manifest(dataclasses.replace(manifest, decoder=decoder))
