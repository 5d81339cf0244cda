"""The manifest: its bytes, and which contradictions are refused."""

import copy
import json
from pathlib import Path

import pytest
from tiny_bundles import CLASSIFIER, EMBEDDING, GENERATOR, MULTI_LABEL, REGRESSION, TOKENS

from offramp.runtime.bundle.checks import read_manifest
from offramp.runtime.bundle.manifest import (
    FILE_NAME,
    FileFact,
    Macs,
    Manifest,
    OperatingPoint,
    RuleSpec,
    Segment,
    Tensor,
    TextInput,
    Variant,
)
from offramp.runtime.errors import BadManifest

TINY = CLASSIFIER / FILE_NAME

GOLDEN = """{
 "format": 1,
 "task": "text-classification",
 "labels": [
  "no",
  "straße"
 ],
 "input": {
  "tokenizer": "tokenizer.json",
  "prefix": "query: ",
  "pad_id": 0,
  "longest": 512
 },
 "hidden_size": 8,
 "vocab_size": 30,
 "blocks": 2,
 "stem": {
  "name": "stem",
  "blocks": [],
  "macs": {
   "token": 0,
   "pair": 0,
   "row": 0
  },
  "variants": {
   "fp32": {
    "file": "stem.onnx",
    "inputs": [
     {
      "name": "input_ids",
      "dtype": "int64",
      "shape": [
       "batch",
       "seq"
      ]
     }
    ],
    "outputs": [
     {
      "name": "hidden",
      "dtype": "float32",
      "shape": [
       "batch",
       "seq",
       8
      ]
     }
    ]
   }
  }
 },
 "segments": [
  {
   "name": "segment_00",
   "blocks": [
    1,
    2
   ],
   "macs": {
    "token": 5,
    "pair": 3,
    "row": 7
   },
   "variants": {
    "fp32": {
     "file": "segment_00.onnx",
     "inputs": [
      {
       "name": "hidden",
       "dtype": "float32",
       "shape": [
        "batch",
        "seq",
        8
       ]
      }
     ],
     "outputs": [
      {
       "name": "logits",
       "dtype": "float32",
       "shape": [
        "batch",
        2
       ]
      }
     ]
    }
   }
  }
 ],
 "rule": {
  "name": "never",
  "parameters": {}
 },
 "points": [
  {
   "name": "default",
   "rule": {
    "name": "max_probability",
    "parameters": {
     "threshold": 0.9
    }
   },
   "variant": "fp32",
   "data": "sst2",
   "split": "dev",
   "measured": {
    "accuracy": 0.5
   }
  }
 ],
 "files": {
  "tokenizer.json": {
   "sha256": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
   "bytes": 3
  },
  "stem.onnx": {
   "sha256": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
   "bytes": 3
  },
  "segment_00.onnx": {
   "sha256": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
   "bytes": 3
  }
 },
 "provenance": {
  "seeds": [
   1,
   null
  ]
 }
}
"""


def small() -> Manifest:
    hidden = Tensor("hidden", "float32", ("batch", "seq", 8))
    ids, logits = Tensor("input_ids", "int64", ("batch", "seq")), Tensor("logits", "float32", ("batch", 2))
    stem = Segment("stem", (), Macs(), {"fp32": Variant("stem.onnx", (ids,), (hidden,))})
    segment = Variant("segment_00.onnx", (hidden,), (logits,))
    fact = FileFact("a" * 64, 3)
    return Manifest(
        format=1,
        task="text-classification",
        labels=("no", "straße"),
        input=TextInput("tokenizer.json", "query: ", 0, 512),
        hidden_size=8,
        vocab_size=30,
        blocks=2,
        stem=stem,
        segments=(Segment("segment_00", (1, 2), Macs(5, 3, 7), {"fp32": segment}),),
        rule=RuleSpec("never", {}),
        points=(
            OperatingPoint(
                "default",
                RuleSpec("max_probability", {"threshold": 0.9}),
                "fp32",
                "sst2",
                "dev",
                {"accuracy": 0.5},
            ),
        ),
        files=dict.fromkeys(("tokenizer.json", "stem.onnx", "segment_00.onnx"), fact),
        provenance={"seeds": [1, None]},
    )


def refused(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    with pytest.raises(BadManifest) as caught:
        read_manifest(text, source="b/manifest.json")
    assert str(caught.value).startswith("b/manifest.json: ")
    return str(caught.value)


def changed(path: str, new: object) -> dict:
    """The golden manifest with one value replaced; path: keys and numbers, by dots."""
    value = json.loads(GOLDEN)
    *parents, last = path.split(".")
    place = value
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[int(last) if isinstance(place, list) else last] = new
    return value


def test_to_json_golden_bytes() -> None:
    assert small().to_json() == GOLDEN


def test_read_golden_bytes() -> None:
    assert read_manifest(GOLDEN, source="golden") == small()


@pytest.mark.parametrize("tiny", [CLASSIFIER, GENERATOR, MULTI_LABEL, TOKENS, REGRESSION, EMBEDDING])
def test_tiny_manifests_round_trip(tiny: Path) -> None:
    text = (tiny / FILE_NAME).read_text(encoding="utf-8")
    assert read_manifest(text, source="tiny").to_json() == text


def test_thresholds_are_in_the_file_of_several_labels_alone() -> None:
    several = json.loads((MULTI_LABEL / FILE_NAME).read_text(encoding="utf-8"))
    assert len(several["thresholds"]) == len(several["labels"])
    for other in (TOKENS, REGRESSION, EMBEDDING, CLASSIFIER):
        assert "thresholds" not in json.loads((other / FILE_NAME).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("tiny", "kind", "classes", "answer_size"),
    [
        (CLASSIFIER, "classification", 2, 0),
        (GENERATOR, "text-generation", 0, 0),
        (MULTI_LABEL, "multi-label-classification", 2, 3),
        (TOKENS, "token-classification", 2, 5),
        (REGRESSION, "regression", 0, 1),
        (EMBEDDING, "sentence-embedding", 0, 8),
    ],
)
def test_kind_and_sizes_of_signals(tiny: Path, kind: str, classes: int, answer_size: int) -> None:
    manifest = read_manifest((tiny / FILE_NAME).read_text(encoding="utf-8"), source="tiny")
    assert (manifest.kind, manifest.classes, manifest.answer_size) == (kind, classes, answer_size)


def test_macs_of_row() -> None:
    assert Macs(5, 3, 7).of(10) == 5 * 10 + 3 * 100 + 7


def test_first_variant_is_default() -> None:
    assert small().variants == ("fp32",)


def test_unknown_key_is_named() -> None:
    value = json.loads(GOLDEN)
    value["segments"][0]["macs"]["tokens"] = 1
    assert "segments[0].macs.tokens: unknown key" in refused(value)


@pytest.mark.parametrize(
    "path", ["labels", "input.prefix", "segments.0.variants.fp32.file", "files.stem.onnx"]
)
def test_missing_key_is_named(path: str) -> None:
    value = json.loads(GOLDEN)
    if path == "files.stem.onnx":
        del value["files"]["stem.onnx"]["bytes"]
        assert "files['stem.onnx'].bytes: missing" in refused(value)
        return
    *parents, last = path.split(".")
    place = value
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    del place[last]
    assert f"{last}: missing" in refused(value)


def test_duplicate_key_is_refused() -> None:
    assert "labels: the key is there twice" in refused(
        GOLDEN.replace(' "labels"', ' "labels": [], "labels"', 1)
    )


def test_unknown_format_is_reported_first() -> None:
    message = refused({"format": 2, "new": 1})
    assert "format: 2 is not known" in message and "reads format 1" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '"x"'])
def test_other_json_is_refused(text: str) -> None:
    refused(text)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_non_finite_number_is_refused(number: str) -> None:
    refused(GOLDEN.replace("0.9", number))


@pytest.mark.parametrize(
    ("path", "new", "named"),
    [
        ("labels", "ab", "labels"),
        ("labels", ["one"], "labels"),
        ("labels", ["one", "one"], "labels"),
        ("labels.0", 3, "labels[0]"),
        ("hidden_size", True, "hidden_size"),
        ("hidden_size", "8", "hidden_size"),
        ("hidden_size", 8.0, "hidden_size"),
        ("hidden_size", 0, "hidden_size"),
        ("task", "chess", "task"),
        ("blocks", 3, "segments"),
        ("blocks", 10**12, "blocks"),
        ("blocks", 3000, "segments"),
        ("input.pad_id", -1, "input.pad_id"),
        ("input.tokenizer", "other.json", "input.tokenizer"),
        ("segments", [], "segments"),
        ("segments.0.blocks", [1], "segments"),
        ("segments.0.variants", {}, "segments[0].variants"),
        ("segments.0.name", "stem", "segments"),
        ("segments.0.macs.pair", -1, "segments[0].macs.pair"),
        ("segments.0.variants.fp32.outputs.0.shape", ["batch", 3], "logits"),
        ("segments.0.variants.fp32.outputs.0.dtype", "float", "dtype"),
        ("segments.0.variants.fp32.outputs.0.name", "out", "'out'"),
        ("segments.0.variants.fp32.inputs.0.name", "other", "other"),
        ("segments.0.variants.fp32.inputs.0.shape", ["batch", "time", 8], "shape"),
        ("segments.0.variants.fp32.inputs.0.shape", ["batch", "seq", 9], "hidden"),
        ("stem.blocks", [1], "stem.blocks"),
        ("rule.parameters", {"threshold": "0.5"}, "rule.parameters['threshold']"),
        ("points.0.variant", "int4", "points[0].variant"),
        ("files", {"../stem.onnx": {"sha256": "a" * 64, "bytes": 1}}, "file"),
    ],
)
def test_wrong_value_is_named(path: str, new: object, named: str) -> None:
    assert named in refused(changed(path, new))


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/passwd", "..", "", "a\\b", "c:x", "a\0b", "a\nb"])
def test_file_name_with_path_is_refused(name: str) -> None:
    value = json.loads(GOLDEN)
    value["files"][name] = value["files"]["stem.onnx"]
    assert "not a plain file name" in refused(value)


@pytest.mark.parametrize("digest", ["A" * 64, "a" * 63, "g" * 64])
def test_digest_not_lower_hex_is_refused(digest: str) -> None:
    value = json.loads(GOLDEN)
    value["files"]["stem.onnx"]["sha256"] = digest
    assert "sha256" in refused(value)


def test_manifest_listing_itself_is_refused() -> None:
    value = json.loads(GOLDEN)
    value["files"]["manifest.json"] = value["files"]["stem.onnx"]
    assert "cannot list itself" in refused(value)


def test_segments_with_different_variants_are_refused() -> None:
    value = json.loads(TINY.read_text(encoding="utf-8"))
    del value["segments"][1]["variants"]["int8"]
    assert "segments[1].variants" in refused(value)


def test_middle_segment_without_next_hidden_is_refused() -> None:
    value = json.loads(TINY.read_text(encoding="utf-8"))
    for variant in value["segments"][0]["variants"].values():
        variant["outputs"] = [tensor for tensor in variant["outputs"] if tensor["name"] != "next_hidden"]
    assert "next_hidden" in refused(value)


def test_to_json_changes_nothing() -> None:
    manifest = read_manifest(GOLDEN, source="golden")
    before = copy.deepcopy(manifest)
    manifest.to_json()
    assert manifest == before
