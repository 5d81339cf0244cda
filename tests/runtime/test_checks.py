"""Checks of manifests: of bundles for images here, of text classifiers in test_manifest."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from offramp.runtime.bundle.checks import read_manifest
from offramp.runtime.bundle.manifest import (
    FileFact,
    ImageInput,
    Macs,
    Manifest,
    RuleSpec,
    Segment,
    Tensor,
    Variant,
)
from offramp.runtime.errors import BadManifest

HIDDEN = Tensor("hidden", "float32", ("batch", 17, 8))
LOGITS = Tensor("logits", "float32", ("batch", 2))


def manifest() -> Manifest:
    pixels = Tensor("pixel_values", "float32", ("batch", 3, 16, 16))
    stem = Segment("stem", (), Macs(row=100), {"fp32": Variant("stem.onnx", (pixels,), (HIDDEN,))})
    segment = Segment(
        "segment_00", (1,), Macs(1, 1), {"fp32": Variant("segment_00.onnx", (HIDDEN,), (LOGITS,))}
    )
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    return Manifest(
        format=1,
        task="image-classification",
        labels=("cat", "dog"),
        input=ImageInput(16, 16, (18,), "bicubic", "RGB", 1 / 255, mean, std),
        hidden_size=8,
        vocab_size=0,
        blocks=1,
        stem=stem,
        segments=(segment,),
        rule=RuleSpec("never", {}),
        points=(),
        files={name: FileFact("a" * 64, 10) for name in ("stem.onnx", "segment_00.onnx")},
        provenance={},
    )


def test_image_manifest_round_trip() -> None:
    text = manifest().to_json()
    again = read_manifest(text, source="here")
    assert again == manifest() and isinstance(again.input, ImageInput)
    assert again.to_json() == text
    assert '"input": {\n  "height": 16,\n  "width": 16,\n  "resize": [\n   18\n  ],' in text


@pytest.mark.parametrize(
    ("path", "new", "named"),
    [
        ("input.resample", "cubic", "input.resample: 'cubic'"),
        ("input.channels", "RBG", "input.channels: 'RBG'"),
        ("input.height", 0, "input.height: 0"),
        ("input.height", 32, "stem: it reads"),
        ("input.resize", [1, 2, 3], "input.resize: expected at most two"),
        ("input.resize", [0], "input.resize: 0"),
        ("input.mean", [0.5], "input.mean: expected one number a channel"),
        ("input.std", [0.5, 0.0, 0.5], "must be above 0"),
        ("input.scale", 0.0, "must be above 0"),
        ("input.scale", "1", "manifest.input.scale: expected a number"),
        ("input.crop", 1, "manifest.input.crop: unknown key"),
        ("input.std", None, "manifest.input.std: missing"),
        ("input", [], "manifest.input: expected an object"),
        ("task", "text-classification", "task: 'text-classification'"),
        ("vocab_size", 30, "vocab_size: 30"),
    ],
)
def test_wrong_image_field_is_named(path: str, new: Any, named: str) -> None:
    facts = json.loads(manifest().to_json())
    wrong = copy.deepcopy(facts)
    *parents, last = path.split(".")
    place = wrong
    for key in parents:
        place = place[key]
    if new is None:
        del place[last]
    else:
        place[last] = new
    with pytest.raises(BadManifest) as problem:
        read_manifest(json.dumps(wrong), source="here")
    assert named in str(problem.value)


def test_image_tokens_must_be_a_fixed_number() -> None:
    facts = json.loads(manifest().to_json())
    for variant in (
        facts["stem"]["variants"]["fp32"]["outputs"],
        facts["segments"][0]["variants"]["fp32"]["inputs"],
    ):
        variant[0]["shape"][1] = "seq"
    with pytest.raises(BadManifest, match="a fixed number of tokens"):
        read_manifest(json.dumps(facts), source="here")
