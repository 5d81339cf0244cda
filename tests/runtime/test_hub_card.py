"""The model card: from the manifest alone, with every point, and safe against what a manifest may hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_bundles import CLASSIFIER, EMBEDDING, GENERATOR, MULTI_LABEL, REGRESSION, TOKENS

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import Guarantee, ImageInput, Manifest, OperatingPoint, RuleSpec
from offramp.runtime.hub.card import model_card

FULL = OperatingPoint(
    "full", RuleSpec("never", {}), "fp32", "sst2", "dev", {"accuracy": 90.138, "mean_exit": 4.0}
)
EARLY = OperatingPoint(
    "dev-0.5",
    RuleSpec("gate", {"threshold": 0.75}),
    "int8",
    "sst2",
    "dev",
    {
        "accuracy": 89.794,
        "low": 87.61,
        "high": 91.63,
        "mean_exit": 1.804,
        "layers_saved": 54.9,
        "macs_saved": 52.3,
    },
)
SAFE = OperatingPoint(
    "risk-0.01",
    RuleSpec("gate", {"threshold": 0.9}),
    "fp32",
    "traffic",
    "calibration",
    {"agreement": 99.5, "mean_exit": 3.0},
    guarantee=Guarantee("disagreement", 0.01, 0.95, 2000, 0.005, 0.0087, "clopper-pearson"),
)
IMAGE = ImageInput(16, 16, (16,), "bilinear", "RGB", 1 / 255, (0.5,) * 3, (0.5,) * 3)


def manifest(**changes: object) -> Manifest:
    """The tiny classifier's manifest with other points or provenance."""
    return replace(open_bundle(CLASSIFIER).manifest, **changes)  # type: ignore[arg-type]


def head(card: str) -> list[str]:
    """The lines of a card's YAML."""
    lines = card.splitlines()
    return lines[1 : lines.index("---", 1)]


def row(card: str, name: str) -> list[str]:
    """The cells of an operating point."""
    (line,) = (line for line in card.splitlines() if line.startswith(f"| `{name}` |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_the_same_manifest_gives_the_same_card() -> None:
    assert model_card(manifest(), "user/name") == model_card(manifest(), "user/name")


def test_the_head_names_library_task_and_origin() -> None:
    provenance = {"backbone": "bert", "recipe": "offramp", "base_model": "org/base", "license": "mit"}
    assert head(model_card(manifest(provenance=provenance), "user/name")) == [
        "library_name: offramp",
        "pipeline_tag: text-classification",
        "tags:",
        '- "offramp"',
        '- "early-exit"',
        '- "onnx"',
        '- "text-classification"',
        '- "bert"',
        'base_model: "org/base"',
        'license: "mit"',
    ]


@pytest.mark.parametrize("base", ["models/e5/small", "./minilm", "a b", 3, None])
def test_a_base_model_that_is_no_name_of_a_hub_is_left_out(base: object) -> None:
    assert "base_model" not in model_card(manifest(provenance={"base_model": base}), "user/name")


def test_an_unknown_licence_is_left_out() -> None:
    assert "license" not in model_card(manifest(), "user/name")


def test_a_guaranteed_point_states_its_promise() -> None:
    states = row(model_card(manifest(points=(SAFE,)), "user/name"), "risk-0.01")[2]
    assert states == "guaranteed: disagreement at most 1 %, confidence 95 %, by 2000 rows"


def test_a_measured_point_states_where_it_was_measured() -> None:
    cells = row(model_card(manifest(points=(EARLY,)), "user/name"), "dev-0.5")
    rule, quality = "gate threshold=0.75", "accuracy 89.79 (87.6 to 91.6)"
    assert cells == [rule, "int8", "measured on sst2 dev", quality, "1.80 of 4", "54.9 %"]


def test_points_are_a_curve_from_deep_to_early() -> None:
    card = model_card(manifest(points=(EARLY, SAFE, FULL)), "user/name")
    places = [card.index(f"| `{name}` |") for name in ("full", "risk-0.01", "dev-0.5")]
    assert places == sorted(places)


def test_the_commands_name_the_revision() -> None:
    assert "ee-run --bundle hub:user/name input.txt" in model_card(manifest(), "user/name")
    assert "ee-run --bundle hub:user/name@v2 input.txt" in model_card(manifest(), "user/name", "v2")


@pytest.mark.parametrize("bundle", [CLASSIFIER, EMBEDDING, GENERATOR, MULTI_LABEL, REGRESSION, TOKENS])
def test_the_python_of_the_card_runs(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = model_card(open_bundle(bundle).manifest, "user/name")
    code = card.partition("```python\n")[2].partition("```")[0]
    exec(code.replace('load("hub:user/name")', f"load({str(bundle)!r})"), {})
    assert capsys.readouterr().out


def test_images_are_listed_as_images() -> None:
    card = model_card(manifest(task="image-classification", input=IMAGE), "user/name")
    assert "pipeline_tag: image-classification" in card
    assert (
        "pip install 'offramp[cpu,hub,vision]'" in card and "ee-run --bundle hub:user/name image.jpg" in card
    )


def test_text_of_the_manifest_is_no_markup() -> None:
    label = "a | b\n# <script>`[x](y)"
    provenance = {"recipe": "x\n---\nlicense: evil", "data": {"name": "| a |"}}
    card = model_card(manifest(labels=(label, "good"), provenance=provenance), "user/name")
    assert "<script>" not in card.replace(r"\<script", "") and "\n# <" not in card
    assert [line for line in head(card) if line.startswith("license")] == []
    assert r"a \| b \# \<script\>\`\[x\](y), good" in card


def test_a_point_with_an_odd_name_is_one_argument() -> None:
    card = model_card(manifest(points=(replace(EARLY, name="it's $(x)\n"),)), "user/name")
    assert r"--point 'it'\''s $(x)?' input.txt" in card
