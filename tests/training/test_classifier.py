"""A model's preprocessing at the size that the network reads, and options and data that do not fit."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from chat_folders import edit_json
from click.testing import CliRunner
from transformers import AutoImageProcessor

from offramp.models import EarlyExitNetwork
from offramp.models.network import ExitParts
from offramp.runtime.errors import BadSetting
from offramp.runtime.inputs.images import ImageInput, normalize_pixels, picture_pixels
from offramp.training.batches import encode_rows
from offramp.training.checkpoint import Checkpoint, TextFacts
from offramp.training.classifier import IMAGENET_MEAN, IMAGENET_STD, image_input, new_network
from offramp.training.cli import train
from offramp.training.data import BadData, load_data
from offramp.training.options import BadModel
from offramp.training.user_model import load_user_model

LABELS = ("red", "blue")


def network(model: Path, size: int | None = None, *, no_crop: bool = False) -> EarlyExitNetwork:
    options: dict[str, Any] = {"exits": "each", "parts": ExitParts(pooling="cls"), "seed": 0}
    user = load_user_model(str(model), 0, image_size=size, no_crop=no_crop)
    return new_network(user, LABELS, image_size=size, **options)


def assert_pixels_are_those_of_transformers(model: Path, facts: ImageInput) -> None:
    image = tiny.image(1, 5, (20, 30))
    processor: Any = AutoImageProcessor.from_pretrained(model)
    expected = np.stack(processor(image)["pixel_values"])
    np.testing.assert_allclose(
        normalize_pixels(picture_pixels(image, facts)[None], facts), expected, atol=1e-5
    )


def test_at_the_models_own_size_pixels_are_its_processors(tmp_path: Path) -> None:
    model = tiny.image_model_folder(tmp_path)
    facts = image_input(str(model), network(model), no_crop=False)
    assert_pixels_are_those_of_transformers(model, facts)


@pytest.mark.parametrize(("family", "size"), [("vit", 384), ("dinov2", None)])
@pytest.mark.parametrize("crop", [None, 384])
def test_convnext_resizes_large_images_to_a_square(
    crop: int | None, family: str, size: int | None, tmp_path: Path
) -> None:
    model = tiny.image_model_folder(tmp_path, family)
    more = {} if crop is None else {"do_center_crop": True, "crop_size": {"height": crop, "width": crop}}
    facts = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, **more}
    (model / "preprocessor_config.json").write_text(json.dumps(facts | {"crop_pct": 0.875}))
    image = image_input(str(model), network(model, size), no_crop=False)
    assert (image.height, image.width, image.resize) == (384, 384, (384, 384))
    assert_pixels_are_those_of_transformers(model, image)


@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_without_a_crop_the_whole_image_is_read_at_the_size_of_the_network(
    family: str, tmp_path: Path
) -> None:
    model = tiny.image_model_folder(tmp_path, family)
    edit_json(model / "preprocessor_config.json", do_center_crop=False)
    for size in (None, 32):
        image = image_input(str(model), network(model, size, no_crop=True), no_crop=True)
        assert (image.height, image.resize) == (size or 16, (size or 16, size or 16))


def test_at_another_size_the_crop_contains_as_much_of_the_image(tmp_path: Path) -> None:
    model = tiny.image_model_folder(tmp_path)
    net = network(model, 32)
    facts = image_input(str(model), net, no_crop=False)
    assert (facts.height, facts.resize) == (32, (36,))  # 18 for 16
    assert image_input(str(model), net, no_crop=True).resize == (32, 32)
    assert net.longest == 65


def test_without_a_preprocessor_the_defaults_are_reported(tmp_path: Path) -> None:
    model = tiny.image_model_folder(tmp_path)
    (model / "preprocessor_config.json").unlink()
    messages = io.StringIO()
    facts = image_input(str(model), network(model), no_crop=False, messages=messages)
    assert (facts.resize, facts.mean, facts.std) == ((16, 16), IMAGENET_MEAN, IMAGENET_STD)
    assert "no preprocessor" in messages.getvalue() and "bicubic" in messages.getvalue()


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    images = tiny.image_model_folder(tmp_path / "images")
    with pytest.raises(BadSetting, match="patches are 4 pixels, say a multiple such as 16"):
        network(images, 18)
    with pytest.raises(BadSetting, match="reads text"):
        network(tiny.model_folder(tmp_path / "text"), 16)
    grey = tmp_path / "grey"
    tiny.image_model_folder(grey)
    facts = json.loads((grey / "config.json").read_text()) | {"num_channels": 1}
    (grey / "config.json").write_text(json.dumps(facts))
    (grey / "model.safetensors").unlink()
    tiny.AutoModel.from_config(tiny.VISION["vit"](num_channels=1, num_hidden_layers=2)).save_pretrained(grey)
    with pytest.raises(BadModel, match="1 channels"):
        image_input(str(grey), network(grey), no_crop=False)


def test_data_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    images = load_data(str(tiny.image_folder(tmp_path / "images", 4, 2, 2)))
    texts = load_data(str(tiny.data_folder(tmp_path / "texts", 4, 2, 2)))
    image_network = network(tiny.image_model_folder(tmp_path / "model"))
    facts = image_input(str(tmp_path / "model"), image_network, no_crop=False)
    with pytest.raises(BadData, match="holds text, the network reads images"):
        encode_rows(Checkpoint(image_network, facts, None), texts.split("train"))
    tiny.tokenizer().save(str(tmp_path / "tokenizer.json"))
    text_checkpoint = Checkpoint(tiny.network(), TextFacts("", 0, 64), tmp_path / "tokenizer.json")
    with pytest.raises(BadData, match="holds images, the network reads text"):
        encode_rows(text_checkpoint, images.split("train"))


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "model")
    larger = tiny.tokenizer()
    larger.add_tokens([f"word{number}" for number in range(60)])
    larger.save(str(folder / "tokenizer.json"))
    words = ["--model", str(folder), "--data", str(tiny.data_folder(tmp_path / "data")), "--out", "x"]
    done = CliRunner().invoke(train, [*words, "--precision", "fp32"])
    assert done.exit_code == 2
    assert "its tokenizer has 87 ids, its embeddings 60" in done.output


def test_options_of_sizes_of_images_reach_the_checks_of_the_preprocessor(tmp_path: Path) -> None:
    model = tiny.image_model_folder(tmp_path / "model", "dinov2")
    edit_json(model / "preprocessor_config.json", do_center_crop=False)
    data = tiny.image_folder(tmp_path / "data", 4, 2, 2)
    words = ["--model", str(model), "--data", str(data), "--recipe", "joint", "--set", "epochs=1"]
    for number, options in enumerate(([], ["--image-size", "8"], ["--no-crop"])):
        out = tmp_path / str(number)
        done = CliRunner().invoke(train, [*words, *options, "--precision", "fp32", "--out", str(out)])
        assert (done.exit_code, out.exists()) == ((0, True) if options else (2, False)), done.output
        assert ("keep their own sizes" in done.output) == (not options)
