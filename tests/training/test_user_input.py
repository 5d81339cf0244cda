"""What a tokenizer or a preprocessor does beyond its file is read as transformers does it, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_families
import torch
from chat_folders import edit_json
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from offramp.models import EarlyExitNetwork, NetworkSpec
from offramp.training import user_input
from offramp.training.batches import encode_texts
from offramp.training.classifier import text_input
from offramp.training.data import Rows
from offramp.training.options import BadModel
from offramp.training.user_model import UserModel, load_user_model

TYPED = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
PAIRS = [("the film was good", "a very bad plot"), ("bad", "the scene is quite bright and warm")]


def model_folder(
    folder: Path, family: str = "bert", tokenizer: dict[str, Any] | None = None, **more: Any
) -> str:
    """A classifier of transformers with random weights, none of them 0, and facts of its tokenizer."""
    tiny.model_folder(folder)
    edit_json(folder / "tokenizer_config.json", **tokenizer or {})
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_families.config(family, **more))
    tiny_families.lively(model).save_pretrained(folder)
    return str(folder)


def logits(user: UserModel) -> torch.Tensor:
    """The logits of the last exit for PAIRS, with the inputs of training and of the runtime."""
    tokenizer, text = text_input(user.tokenizer)
    rows = encode_texts(Rows(*map(list, zip(*PAIRS, strict=True)), torch.zeros(2).numpy()), tokenizer, text)
    spec = NetworkSpec(user.labels, (1, 2, 3), own_head=True)
    with torch.no_grad():
        return EarlyExitNetwork(user.backbone, spec, user.head).eval()(rows.batch([0, 1])[0]).logits[:, -1]


def expected(model: str) -> torch.Tensor:
    """The logits that transformers computes for PAIRS."""
    inputs = AutoTokenizer.from_pretrained(model)(PAIRS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return AutoModelForSequenceClassification.from_pretrained(model).eval()(**inputs).logits


@pytest.mark.parametrize(
    "family", tiny.with_slow(["bert", "electra", "albert", "rembert", "nomic_bert"], "bert")
)
@pytest.mark.parametrize("typed", [True, False])
def test_pairs_have_the_types_that_transformers_gives(family: str, typed: bool, tmp_path: Path) -> None:
    more = {"type_vocab_size": 2} if family == "nomic_bert" else {}
    model = model_folder(tmp_path / "model", family, TYPED if typed else None, **more)
    torch.testing.assert_close(logits(load_user_model(model, 0)), expected(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pairs", [True, False])
def test_types_that_are_not_given_are_reported_for_pairs(
    pairs: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_user_model(model_folder(tmp_path / "model"), 0, pairs=pairs)
    line = "(model_input_names): the second text of a pair is read as type 0"
    assert (line in capsys.readouterr().err) == pairs


@pytest.mark.slow
def test_a_type_beyond_those_of_the_model_is_the_last_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_folder(tmp_path / "model", "ernie", TYPED, type_vocab_size=1)
    user = load_user_model(model, 0)
    assert "config.json.type_vocab_size is 1, and its tokenizer gives type 1" in capsys.readouterr().err
    edit_json(Path(model) / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    torch.testing.assert_close(logits(user), expected(model), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_types_that_an_adapter_leaves_out_are_refused(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model", "deberta-v2, token types", TYPED)
    with pytest.raises(BadModel, match=r"type_vocab_size: 2: deberta-v2 with types of tokens"):
        load_user_model(model, 0)
    edit_json(Path(model) / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    torch.testing.assert_close(logits(load_user_model(model, 0)), expected(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_folder_without_a_tokenizer_is_refused(family: str, tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model", family)
    (tmp_path / "model" / "tokenizer.json").unlink()
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    with pytest.raises(
        BadModel, match=r"the folder has no tokenizer: transformers makes up one without words"
    ):
        load_user_model(model, 0)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"truncation_side": "left"}, r"cuts long texts at their beginning \(truncation_side: left\)"),
        ({"split_special_tokens": True}, r"split_special_tokens: texts that contain special tokens"),
    ],
)
def test_settings_with_other_tokens_are_refused(facts: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=message):
        load_user_model(model_folder(tmp_path / "model", tokenizer=facts), 0)


def test_the_side_of_truncation_in_the_file_of_the_tokenizer_counts_too(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    tokenizer = tiny.tokenizer()
    tokenizer.enable_truncation(8, direction="left")
    tokenizer.save(f"{model}/tokenizer.json")
    with pytest.raises(BadModel, match="truncation_side: left"):
        load_user_model(model, 0)


def test_a_file_of_sentencepiece_alone_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_folder(tmp_path / "model", "albert")
    (tmp_path / "model" / "tokenizer.json").rename(tmp_path / "model" / "spiece.model")
    monkeypatch.setattr(user_input, "find_spec", lambda name: None)
    with pytest.raises(BadModel, match=r"is spiece\.model alone, which only the package sentencepiece reads"):
        load_user_model(model, 0)


def image_classifier(folder: Path, family: str) -> PreTrainedModel:
    """A classifier of images of 24 x 24 in a folder whose preprocessor cuts out 16 x 16."""
    tiny.image_model_folder(folder)
    config = tiny_families.config(family, image_size=24)
    config.architectures = []
    torch.manual_seed(0)
    model = tiny_families.lively(AutoModelForImageClassification.from_config(config)).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", ["dinov2", "beit"])
def test_images_have_the_size_that_the_preprocessor_makes(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    model = image_classifier(folder, family)
    user = load_user_model(str(folder), 0)
    assert "makes images of 16 x 16, config.json.image_size is 24" in capsys.readouterr().err
    spec, pixels = NetworkSpec(user.labels, (1, 2, 3), own_head=True), tiny.pixel_values()
    with torch.no_grad():
        given = EarlyExitNetwork(user.backbone, spec, user.head).eval()(pixels).logits[:, -1]
        torch.testing.assert_close(given, model(**pixels).logits, atol=1e-5, rtol=0)


OTHER_SIZES: dict[str, tuple[dict[str, Any], str]] = {
    "not square": ({"crop_size": {"height": 12, "width": 16}}, "images of 12 x 16, and only square images"),
    "shortest edge": ({"do_center_crop": False}, "images keep their own sizes, and only square images"),
    "no resize": ({"do_center_crop": False, "do_resize": False}, "images keep their own sizes, and only"),
}


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_images_of_other_shapes_are_refused_without_an_option(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts, message = OTHER_SIZES[name]
    folder = tiny.image_model_folder(tmp_path / "model", "dinov2")
    edit_json(folder / "preprocessor_config.json", **facts)
    with pytest.raises(BadModel, match=rf"{message}.*; say --image-size 16, the size of config\.json"):
        load_user_model(str(folder), 0)
    load_user_model(str(folder), 0, image_size=32)
    load_user_model(str(folder), 0, no_crop=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("family", ["dinov2", "beit"])
def test_with_an_image_size_that_of_the_preprocessor_does_not_count(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image_classifier(tmp_path / "model", family)
    user = load_user_model(str(tmp_path / "model"), 0, image_size=32)
    assert user.backbone.config.image_size == 24  # new_network changes it to 32
    assert "interpolated" not in capsys.readouterr().err


PREPROCESSORS: dict[str, tuple[dict[str, Any], str]] = {
    "padding": ({"do_pad": True}, r"preprocessor_config\.json\.do_pad: ee-run does not do this step"),
    "offset": (
        {"image_processor_type": "EfficientNetImageProcessor", "rescale_offset": True},
        r"preprocessor_config\.json\.rescale_offset: ee-run does not do this step",
    ),
    "share of the image": (
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 16}, "crop_pct": 0.8},
        r"crop_pct: .* as BitImageProcessor: a size of 20 and a crop_size of 16",
    ),
    "share of an image of any size": (
        {"image_processor_type": "PoolFormerImageProcessor", "size": {"shortest_edge": 384}, "crop_pct": 0.8},
        r"crop_pct: .* as BitImageProcessor: a size of 480 and a crop_size of 16",
    ),
    "two edges": (
        {"size": {"shortest_edge": 18, "longest_edge": 20}},
        r"size: longest_edge, shortest_edge; supported are shortest_edge alone, or height and width",
    ),
    "two channels": ({"image_mean": [0.5, 0.4]}, r"image_mean: .*; expected 3 numbers, one for each channel"),
    "no spread": ({"image_std": [0.5, 0.0, 0.5]}, r"image_std: .*; expected 3 numbers above 0"),
}


@pytest.mark.parametrize("name", PREPROCESSORS)
def test_a_preprocessor_that_does_more_is_refused(name: str, tmp_path: Path) -> None:
    facts, message = PREPROCESSORS[name]
    folder = tiny.image_model_folder(tmp_path / "model")
    edit_json(folder / "preprocessor_config.json", **facts)
    with pytest.raises(BadModel, match=message):
        load_user_model(str(folder), 0)


def test_what_no_crop_leaves_out_is_not_checked(tmp_path: Path) -> None:
    folder = tiny.image_model_folder(tmp_path / "model")
    for name in ("share of the image", "share of an image of any size", "two edges"):
        edit_json(folder / "preprocessor_config.json", **PREPROCESSORS[name][0])
        load_user_model(str(folder), 0, no_crop=True)
    edit_json(folder / "preprocessor_config.json", do_pad=True)
    with pytest.raises(BadModel, match="do_pad"):
        load_user_model(str(folder), 0, no_crop=True)
