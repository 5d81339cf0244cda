"""Checks of manifests: of images, decoders and tasks beside labels here, of texts in test_manifest."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_bundles import CLASSIFIER, EMBEDDING, GENERATOR, MULTI_LABEL, REGRESSION, TOKENS

from offramp.runtime.bundle.checks import read_manifest
from offramp.runtime.bundle.manifest import (
    FILE_NAME,
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


def test_decoder_manifest_round_trip() -> None:
    text = (GENERATOR / FILE_NAME).read_text(encoding="utf-8")
    decoder = read_manifest(text, source="here").decoder
    assert decoder is not None and decoder.draft is not None and len(decoder.cache_fills) == 2


@pytest.mark.parametrize(
    ("graphs", "path", "new", "message"),
    [
        ("segments 0", "outputs -1 name", "gates", r"segments\[0\]: it puts out"),
        ("segments 0", "outputs -2 shape 2", 15, "all but the last put out exit_hidden"),
        ("segments 1", "outputs -1 shape 0", "seq", "all but the last put out gate"),
        ("segments 1", "inputs 0 name", "state", r"segments\[1\]: its input state .* is not an output"),
        ("segments 1", "outputs 1 name", "new_k_9", r"segments\[1\]: new_k_2 is missing"),
        ("stem", "outputs 0 name", "state", "stem: it has no output 'hidden'"),
        ("stem", "inputs 0 name", "ids", "stem: it reads"),
        ("decoder cache_fills 0", "outputs 0 name", "new_k_9", r"cache_fills\[0\]: it must put out"),
        ("decoder cache_fills 0", "inputs 0 name", "state", r"cache_fills\[0\]: its input state"),
        ("decoder head", "outputs 0 shape 2", 59, r"head: it must make logits \[batch, seq, 60\]"),
        ("decoder draft", "outputs 0 shape 2", 60, r"draft: it must make logits .* fewer than 60\]"),
    ],
)
def test_wrong_graph_of_a_decoder_is_named(graphs: str, path: str, new: Any, message: str) -> None:
    facts = json.loads((GENERATOR / FILE_NAME).read_text(encoding="utf-8"))
    segment: Any = facts
    for key in graphs.split():
        segment = segment[int(key) if key.isdigit() else key]
    *parents, last = [int(key) if key.lstrip("-").isdigit() else key for key in path.split()]
    for variant in segment["variants"].values():
        place = variant
        for key in parents:
            place = place[key]
        place[last] = new
    with pytest.raises(BadManifest, match=message):
        read_manifest(json.dumps(facts), source="here")


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        ("decoder stop", [60], "decoder.stop: 60 is not in a vocabulary of 60"),
        ("decoder", None, "decoder: missing for task text-generation"),
        ("task", "text-classification", "decoder: there is none for task text-classification"),
        ("labels", ["a", "b"], "labels: text-generation has none, found"),
        ("decoder cache_fills 1 blocks", [2], "cache_fills: their blocks must be those of the segments"),
    ],
)
def test_wrong_decoder_field_is_named(path: str, new: Any, message: str) -> None:
    facts = json.loads((GENERATOR / FILE_NAME).read_text(encoding="utf-8"))
    *parents, last = [int(key) if key.isdigit() else key for key in path.split()]
    place = facts
    for key in parents:
        place = place[key]
    if new is None:
        del place[last]
    else:
        place[last] = new
    with pytest.raises(BadManifest, match=message):
        read_manifest(json.dumps(facts), source="here")


FORECAST = {"name": "forecast", "dtype": "float32", "shape": ["batch", 3]}
STARTS = {"name": "word_starts", "dtype": "int64", "shape": ["batch", "seq"]}
CALIBRATION = {"coverage": 0.9, "temperatures": [1.0] * 3, "quantiles": [0.5] * 3, "quantile": 0.5}
FIRST, LAST, STEM = (f"{graph} variants fp32" for graph in ("segments 0", "segments 2", "stem"))


@pytest.mark.parametrize(
    ("bundle", "path", "new", "message"),
    [
        (MULTI_LABEL, "labels", [], "labels: multi-label-classification has 1 or more, found []"),
        (MULTI_LABEL, "thresholds", [0.5], "thresholds: multi-label-classification has 3, one a label"),
        (MULTI_LABEL, "thresholds", [0.5, 0.0, 0.5], "thresholds: they are probabilities above 0"),
        (MULTI_LABEL, "thresholds", [0.5, 1.0, 0.5], "thresholds: they are probabilities above 0"),
        (MULTI_LABEL, f"{FIRST} outputs 1 shape 1", 3, "logits must be [batch, 2], found ['batch', 3]"),
        (MULTI_LABEL, f"{FIRST} outputs 2 shape 1", 4, "answer must be [batch, 3], one a label, found"),
        (MULTI_LABEL, f"{FIRST} outputs 2 dtype", "float16", "answer must be float32, found float16"),
        (MULTI_LABEL, f"{LAST} outputs 1", None, "segments[2]: it has no output 'answer'"),
        (MULTI_LABEL, f"{LAST} outputs 0", None, "segments[2]: it has no output 'logits'"),
        (MULTI_LABEL, f"{FIRST} outputs 2", FORECAST, "'forecast'; expected logits, gate, answer or next_<"),
        (MULTI_LABEL, "points 0 calibration", CALIBRATION, "points[0].calibration: multi-label"),
        (MULTI_LABEL, f"{STEM} inputs 2", STARTS, "stem: its input word_starts is for token-class"),
        (TOKENS, "labels", ["O"], "labels: token-classification has 2 or more, found ['O']"),
        (TOKENS, "thresholds", [0.5] * 5, "thresholds: token-classification has none, found [0.5,"),
        (TOKENS, f"{STEM} inputs 3", None, "stem: for token-classification it reads word_starts, int64 ["),
        (TOKENS, f"{STEM} inputs 3 dtype", "int32", "stem: for token-classification it reads word_starts"),
        (TOKENS, f"{FIRST} outputs 1 shape 1", 5, "logits must be [batch, 2], found ['batch', 5]"),
        (TOKENS, f"{FIRST} outputs 2 shape", ["batch", 5], "answer must be [batch, seq, 5], one a label"),
        (REGRESSION, "labels", ["no", "yes"], "labels: regression has none, found ['no', 'yes']"),
        (REGRESSION, f"{FIRST} outputs 1 shape", [], "answer must be [batch, 1], found []"),
        (REGRESSION, f"{LAST} outputs 0 name", "logits", "output 'logits'; expected gate, answer or next_<"),
        (EMBEDDING, f"{FIRST} outputs 1 shape 1", 1, "answer must be [batch, 2] or longer, as in all"),
        (EMBEDDING, f"{LAST} outputs 0 shape 1", 9, "answer must be [batch, 8] or longer, as in all"),
        (EMBEDDING, f"{LAST} outputs 0 shape 1", "seq", "answer must be [batch, 8] or longer, as in all"),
        (CLASSIFIER, "thresholds", [0.5, 0.5], "thresholds: text-classification has none, found [0.5, 0.5]"),
        (
            CLASSIFIER,
            f"{LAST} outputs 0 name",
            "answer",
            "output 'answer'; expected logits, gate, forecast or",
        ),
    ],
)
def test_wrong_field_of_a_task_is_named(bundle: Path, path: str, new: Any, message: str) -> None:
    facts = json.loads((bundle / FILE_NAME).read_text(encoding="utf-8"))
    for segment in (facts["stem"], *facts["segments"]):
        segment["variants"].pop("int8", None)  # or it would not fit the changed graph
    *parents, last = [int(key) if key.isdigit() else key for key in path.split()]
    place = facts
    for key in parents:
        place = place[key]
    if new is None:
        del place[last]
    else:
        place[last] = new
    if bundle == CLASSIFIER:
        facts["points"] = []
    with pytest.raises(BadManifest) as problem:
        read_manifest(json.dumps(facts), source="here")
    assert message in str(problem.value)


def test_tasks_that_read_no_images_are_named() -> None:
    facts = json.loads(manifest().to_json())
    facts |= {"task": "token-classification", "labels": ["O", "B-X"]}
    read = {"name": "word_starts", "dtype": "int64", "shape": ["batch", "seq"]}
    facts["stem"]["variants"]["fp32"]["inputs"].append(read)
    outputs = facts["segments"][0]["variants"]["fp32"]["outputs"]
    outputs.append({"name": "answer", "dtype": "float32", "shape": ["batch", "seq", 2]})
    with pytest.raises(BadManifest, match=r"'token-classification'; expected .*'image-.*'regression'"):
        read_manifest(json.dumps(facts), source="here")


def test_regression_and_several_labels_read_images() -> None:
    facts = json.loads(manifest().to_json())
    outputs = facts["segments"][0]["variants"]["fp32"]["outputs"]
    outputs[0] |= {"name": "answer", "shape": ["batch", 1]}
    number = facts | {"task": "regression", "labels": []}
    assert read_manifest(json.dumps(number), source="here").kind == "regression"
    outputs[0] |= {"shape": ["batch", 2]}
    outputs.append({"name": "logits", "dtype": "float32", "shape": ["batch", 2]})
    several = facts | {"task": "multi-label-classification", "thresholds": [0.5, 0.5]}
    assert read_manifest(json.dumps(several), source="here").thresholds == (0.5, 0.5)


def shared_facts() -> dict[str, Any]:
    """The manifest of images with a block that runs before the segment's own graph."""
    facts: dict[str, Any] = json.loads(manifest().to_json())
    hidden = facts["segments"][0]["variants"]["fp32"]["inputs"][0]
    block = {"file": "block_01.onnx", "inputs": [hidden], "outputs": [hidden | {"name": "next_hidden"}]}
    facts["segments"][0]["variants"]["fp32"]["before"] = [block, block]
    facts["files"]["block_01.onnx"] = {"sha256": "b" * 64, "bytes": 20}
    return json.loads(json.dumps(facts))  # no object in two places


def test_manifest_with_graphs_before_a_segments_own_round_trip() -> None:
    text = json.dumps(shared_facts(), indent=1, ensure_ascii=False) + "\n"
    variant = (again := read_manifest(text, source="here")).segments[0].first_graph
    assert [graph.file for graph in variant.graphs] == ["block_01.onnx", "block_01.onnx", "segment_00.onnx"]
    assert variant.graphs[-1].before == () and variant.updates == ("hidden", "hidden")
    assert json.loads(again.to_json()) == shared_facts()
    assert '"before"' not in manifest().to_json()


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        ("before 1 file", "other.onnx", "variants['fp32'].before[1].file: 'other.onnx' is not listed"),
        ("before 0 file", "../x", "before[0].file: '../x' is not a plain file name"),
        ("before 1 inputs 0 name", "state", "segments[0].before[1]: its input state"),
        ("before 0 outputs 0 name", "gates", "segments[0].before[0]: output 'gates'; expected next_<a"),
        ("before 0 outputs 0 dtype", "float16", "before[0]: output next_hidden differs from hidden in dtype"),
        ("before 0 outputs 0 shape 2", 0, "before[0].outputs[0].shape: 0"),
        ("before 0 before", [{"file": "x", "inputs": [], "outputs": []}], "before[0].before: it runs before"),
        ("before 0 after", [], "before[0].after: unknown key"),
        ("before", "block_01.onnx", "before: expected a list"),
    ],
)
def test_wrong_graph_before_a_segments_own_is_named(path: str, new: Any, message: str) -> None:
    facts = shared_facts()
    *parents, last = [int(key) if key.isdigit() else key for key in path.split()]
    place = facts["segments"][0]["variants"]["fp32"]
    for key in parents:
        place = place[key]
    place[last] = new
    with pytest.raises(BadManifest) as problem:
        read_manifest(json.dumps(facts), source="here")
    assert message in str(problem.value)


@pytest.mark.parametrize("bundle", [CLASSIFIER, GENERATOR])
def test_only_segments_of_classifiers_have_graphs_before_their_own(bundle: Path) -> None:
    facts = json.loads((bundle / FILE_NAME).read_text(encoding="utf-8"))
    segment = facts["stem"] if bundle == CLASSIFIER else facts["segments"][0]
    for variant in segment["variants"].values():
        variant["before"] = [copy.deepcopy(variant)]
    with pytest.raises(BadManifest, match=r"variants\['fp32'\]\.before: graphs run before those of a class"):
        read_manifest(json.dumps(facts), source="here")


def pointed(**fields: object) -> dict[str, Any]:
    """The manifest with one operating point, whose fields are these."""
    value: dict[str, Any] = json.loads(manifest().to_json())
    rule = {"name": "never", "parameters": {}}
    point = {"name": "p", "rule": rule, "variant": "fp32", "data": "d", "split": "dev", "measured": {}}
    value["points"] = [point | fields]
    return value


GUARANTEE = {
    "risk": "disagreement",
    "limit": 0.01,
    "confidence": 0.95,
    "rows": 500,
    "observed": 0.002,
    "bound": 0.009,
    "bound_name": "clopper-pearson",
    "groups": "all",
}


def test_a_point_with_a_guarantee_round_trips_and_others_stay_as_they_were() -> None:
    plain = json.dumps(pointed())
    text = read_manifest(plain, source="here").to_json()
    assert json.loads(text) == json.loads(plain), "nothing is added to a point of an older bundle"
    warm = {"name": "never", "parameters": {}, "temperatures": [1.5], "score_temperatures": [2.5]}
    full = pointed(rule=warm, guarantee=GUARANTEE, exit_rows=[500])
    again = read_manifest(json.dumps(full), source="here")
    assert again.points[0].guarantee is not None and again.points[0].guarantee.rows == 500
    rule = again.points[0].rule
    assert (rule.temperatures, rule.score_temperatures) == ((1.5,), (2.5,))
    assert again.points[0].exit_rows == (500,)
    assert json.loads(again.to_json()) == full


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"guarantee": GUARANTEE | {"limit": 1.0}}, "guarantee.limit"),
        ({"guarantee": GUARANTEE | {"confidence": 0}}, "guarantee.confidence"),
        ({"guarantee": GUARANTEE | {"rows": 0}}, "guarantee.rows"),
        ({"guarantee": GUARANTEE | {"bound": 1.5}}, "guarantee.bound"),
        ({"guarantee": GUARANTEE | {"observed": -2}}, "guarantee.observed"),
        ({"guarantee": GUARANTEE | {"groups": "label"}}, "guarantee.groups"),
        ({"exit_rows": [1, 2]}, "exit_rows"),
        ({"exit_rows": [-1]}, "exit_rows"),
        ({"rule": {"name": "never", "parameters": {}, "temperatures": [1.0, 1.0]}}, "rule.temperatures"),
        ({"rule": {"name": "never", "parameters": {}, "temperatures": [0.0]}}, "rule.temperatures"),
        ({"rule": {"name": "never", "parameters": {}, "score_temperatures": [-1]}}, "score_temperatures"),
    ],
)
def test_what_a_point_states_must_be_possible(fields: dict[str, object], named: str) -> None:
    with pytest.raises(BadManifest, match=re.escape(named)):
        read_manifest(json.dumps(pointed(**fields)), source="here")


def test_a_point_with_a_name_of_earlier_versions_loads() -> None:
    value = pointed(name="within-0.5")
    assert read_manifest(json.dumps(value), source="here").points[0].name == "within-0.5"


def test_a_decoder_without_variants_is_refused() -> None:
    facts = json.loads((GENERATOR / FILE_NAME).read_text(encoding="utf-8"))
    facts["segments"][0]["variants"] = {}
    with pytest.raises(BadManifest, match=r"segments\[0\]\.variants: there is none"):
        read_manifest(json.dumps(facts), source="here")


@pytest.mark.parametrize("bundle", [CLASSIFIER, TOKENS, GENERATOR], ids=lambda bundle: bundle.name)
@pytest.mark.parametrize("shape", [["batch", 1], [1, "seq"], ["batch"]])
def test_a_stem_reads_tensors_of_any_number_of_rows_and_tokens(bundle: Path, shape: list[object]) -> None:
    facts = json.loads((bundle / FILE_NAME).read_text(encoding="utf-8"))
    for variant in facts["stem"]["variants"].values():
        variant["inputs"][1]["shape"] = shape
    with pytest.raises(BadManifest, match="stem: it"):
        read_manifest(json.dumps(facts), source="here")


@pytest.mark.parametrize("place", ["rule name", "points 0 name", "segments 1 name", "stem inputs"])
def test_a_name_that_no_message_can_hold_is_refused(place: str) -> None:
    facts = json.loads((CLASSIFIER / FILE_NAME).read_text(encoding="utf-8"))
    *parents, last = [int(key) if key.isdigit() else key for key in place.split()]
    if last == "inputs":
        value: Any = facts["stem"]["variants"]["fp32"]["inputs"][1]
        last = "name"
    else:
        value = facts
        for key in parents:
            value = value[key]
    value[last] = "x" * 201
    with pytest.raises(BadManifest, match="a name of 201 characters; at most 200 are read"):
        read_manifest(json.dumps(facts), source="here")
