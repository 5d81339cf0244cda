"""Step costs and points of rule quee, on an engine with scripted outputs that reads images."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from offramp.runtime import BadSetting
from offramp.runtime.bundle.files import Bundle, open_bundle
from offramp.runtime.bundle.manifest import ImageInput, OperatingPoint, RuleSpec, Tensor
from offramp.runtime.classifier import Classifier
from offramp.runtime.rules import RowSignals, bind
from offramp.runtime.tuning.labelled import LabelledRows
from offramp.runtime.tuning.step_costs import (
    has_forecast,
    measure_step_costs,
    measure_walk_points,
    require_forecast,
)

TINY = Path(__file__).parents[1] / "data" / "tiny_bundle"
PATCHES = 5  # tokens of every image
SECONDS = ((0.001, 0.003, 0.001), (0.0005, 0.001, 0.0005))  # of each step [variants, segments]


@dataclass
class ImageState:
    """Pixels of one image."""

    pixels: NDArray[Any]
    rows: int = 1
    length: int = PATCHES


class ScriptedEngine:
    """Takes a fixed time for a step; predicts label 1 for bright images, the first exit label 0 for all.

    Forecasts: leaving is wrong after the first exit, and every path ahead is right.
    """

    name, device, max_rows = "scripted", "cpu", 1
    facts: Mapping[str, str] = {}

    def prepare(self, variant: int, segments: Sequence[int]) -> None: ...

    def begin(self, inputs: Mapping[str, NDArray[Any]]) -> ImageState:
        return ImageState(inputs["pixel_values"])

    def step(self, segment: int, variant: int, state: ImageState) -> RowSignals:
        time.sleep(SECONDS[variant][segment])
        label = float(state.pixels.mean() > 0) if segment else 0.0
        logits = np.array([[1 - label, label]], np.float32)
        ahead = 2 - segment
        forecast = np.zeros((1, 2, 1 + 2 * ahead), np.float32)  # [row, variant now, paths]
        forecast[..., 0] = segment == 0
        return RowSignals(logits, None, forecast.reshape(1, -1) if ahead else None)

    def skip(self, segment: int, state: ImageState) -> None: ...

    def take(self, state: ImageState, rows: NDArray[np.int64]) -> ImageState:
        raise NotImplementedError

    def join(self, states: Sequence[ImageState]) -> ImageState:
        raise NotImplementedError

    def drop(self, state: ImageState) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class PixelRow:
    """One image; see AnyRow."""

    pixels: NDArray[np.float32]
    length: int = PATCHES
    truncated: bool = False


class PixelReader:
    """Items are the names of images: "bright" or "dark"."""

    def read(self, items: Sequence[object]) -> list[PixelRow]:
        return [PixelRow(np.full((3, 2, 2), 1 if item == "bright" else -1, np.float32)) for item in items]

    def arrays(self, rows: Sequence[PixelRow], pad_alone: bool = False) -> dict[str, NDArray[Any]]:
        return {"pixel_values": np.stack([row.pixels for row in rows])}

    def blank(self, rows: int, length: int) -> dict[str, NDArray[Any]]:
        return {"pixel_values": np.zeros((rows, 3, 2, 2), np.float32)}


@pytest.fixture
def session() -> Classifier:
    """The tiny bundle's segments with error forecasts, for images."""
    manifest = open_bundle(TINY).manifest
    forecast = Tensor("forecast", "float32", ("batch", 10))
    segments = tuple(
        dataclasses.replace(
            segment,
            variants={
                name: dataclasses.replace(variant, outputs=(*variant.outputs, forecast))
                for name, variant in segment.variants.items()
            },
        )
        for segment in manifest.segments
    )
    images = ImageInput(2, 2, (), "bilinear", "RGB", 1.0, (0.0,) * 3, (1.0,) * 3)
    manifest = dataclasses.replace(manifest, segments=segments, input=images, task="image-classification")
    rule = bind(RuleSpec("never", {}), len(segments))
    return Classifier(Bundle(TINY, manifest), ScriptedEngine(), PixelReader(), rule, "fp32", 1)


ROWS = LabelledRows("dev", ("bright", "dark", "bright", "bright"), np.array([1, 0, 1, 1]))


def test_steps_of_images_are_timed_in_every_variant(session: Classifier) -> None:
    _, tokens = session.at_full_depth(ROWS.items)
    costs = measure_step_costs(session, ROWS.items, tokens)
    assert costs.tokens == PATCHES
    assert set(costs.steps) == {"fp32", "int8"}
    for variant, seconds in zip(("fp32", "int8"), SECONDS, strict=True):
        assert (np.array(costs.steps[variant]) >= 1e3 * np.array(seconds)).all()
    assert sum(costs.steps["int8"]) < sum(costs.steps["fp32"])


@pytest.mark.slow
def test_points_of_images_are_measured_by_walks(session: Classifier) -> None:
    _, tokens = session.at_full_depth(ROWS.items)
    costs = measure_step_costs(session, ROWS.items, tokens)
    points = {point.name: point for point in measure_walk_points(session, ROWS, tokens, costs)}
    assert points["full"].rule == RuleSpec("never", {}) and points["full"].measured["accuracy"] == 100
    default = points["default"]
    assert default.rule.name == "quee" and default.measured["accuracy"] == 100
    # After the second exit every path is right, so the third segment is saved: 1 block of 4.
    assert default.measured["mean_exit"] == 3 and default.measured["layers_saved"] == 25
    assert default.measured["ms"] > 0 and default.measured["macs_saved"] > 0
    assert (default.data, default.split) == ("dev", "dev")


@pytest.mark.slow
def test_points_keep_to_the_walks_for_which_forecasts_were_fitted(session: Classifier) -> None:
    limits = {"changes": 2.0, "increase": 0.0}
    own = OperatingPoint("saves-90", RuleSpec("quee", {"price": 0.1, **limits}), "fp32", "", "dev", {})
    session.manifest = dataclasses.replace(session.manifest, points=(own,))
    _, tokens = session.at_full_depth(ROWS.items)
    costs = measure_step_costs(session, ROWS.items, tokens)
    points = {point.name: point for point in measure_walk_points(session, ROWS, tokens, costs)}
    parameters = points["default"].rule.parameters
    assert parameters == {"price": parameters["price"], "measured": 1.0, **limits}


def test_a_bundle_without_forecasts_is_refused(session: Classifier) -> None:
    assert has_forecast(session.manifest)
    require_forecast(session.manifest)
    plain = open_bundle(TINY).manifest
    assert not has_forecast(plain)
    with pytest.raises(BadSetting, match="no error forecasts; train it with ee-train --recipe quee"):
        require_forecast(plain)
