"""Recipe attach: exits on a frozen classifier, from text without labels; full depth keeps its answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from offramp.models.own_head import classification_class
from offramp.training.checkpoint import load_checkpoint
from offramp.training.cli import train
from offramp.training.data import NO_LABEL, Dataset, Rows
from offramp.training.user_model import match_labels

SETTINGS = ("epochs=15", "batch_size=8", "lr=0.02")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("attach")
    tiny.classifier_folder(root / "model", labels=("bad", "good"), steps=30)
    tiny.data_folder(root / "data")
    texts = "".join(row["text"] + "\n" for row in tiny.rows(80, 5))
    (root / "traffic.txt").write_text(texts)
    return root


def run(root: Path, name: str, *words: str, data: str = "traffic.txt", **expected: Any) -> str:
    """Run ee-train on the model; gives what it printed on both streams."""
    command = ["--model", str(root / "model"), "--data", str(root / data), "--out", str(root / name)]
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    done = CliRunner().invoke(train, [*command, "--precision", "fp32", *settings, *words])
    assert done.exit_code == expected.get("exit_code", 0), done.output
    return done.output


def answers(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the user's model and of all exits of the checkpoint, on the tiny test rows."""
    checkpoint = load_checkpoint(folder)
    model = classification_class(checkpoint.network.config).from_pretrained(folder.parent / "model").eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch([row["text"] for row in tiny.rows(32, 2)])
    ids, mask = (torch.tensor([getattr(e, name) for e in encoded]) for name in ("ids", "attention_mask"))
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        return model(**inputs).logits, checkpoint.network(inputs).logits


@pytest.mark.slow
def test_full_depth_gives_the_models_own_logits_and_early_exits_agree(root: Path) -> None:
    output = run(root, "ckpt")
    assert "recipe attach adds exits and keeps its answers" in output
    own, exits = answers(root / "ckpt")
    torch.testing.assert_close(exits[:, -1], own, atol=1e-5, rtol=0)
    agrees = (exits.argmax(-1) == own.argmax(-1)[:, None]).float().mean(0)
    assert agrees[1] > 0.85
    training = json.loads((root / "ckpt" / "training.json").read_text())
    assert training["recipe"] == "attach"
    assert set(training["dev"]) == {"exit_agreement", "rows"}  # no labels, so no accuracy
    assert training["dev"]["exit_agreement"][-1] == 100
    assert {point["name"]: point for point in training["operating_points"]}["full"]["measured"][
        "agreement"
    ] == 100
    assert load_checkpoint(root / "ckpt").network.spec.labels == ("bad", "good")


@pytest.mark.slow
@pytest.mark.parametrize("pooling", tiny.with_slow(["mean", "cls"], "mean"))
def test_exits_that_pool_without_weights_learn_from_vectors_in_memory(root: Path, pooling: str) -> None:
    run(root, pooling, "--pooling", pooling)
    own, exits = answers(root / pooling)
    torch.testing.assert_close(exits[:, -1], own, atol=1e-5, rtol=0)
    assert (exits[:, 1].argmax(-1) == own.argmax(-1)).float().mean() > 0.75


@pytest.mark.slow
def test_labels_are_used_and_the_users_model_is_measured(root: Path) -> None:
    output = run(root, "labelled", data="data")
    assert "labels matched by number: 0 = bad, 1 = good" in output
    training = json.loads((root / "labelled" / "training.json").read_text())
    assert training["user_model"] == {"accuracy": training["dev"]["full_depth"], "rows": 32}
    assert training["dev"]["exit_accuracy"][-1] > 80


@pytest.mark.slow
def test_unfreeze_trains_everything_from_the_untouched_models_logits(root: Path) -> None:
    run(root, "unfrozen", "--unfreeze")
    training = json.loads((root / "unfrozen" / "training.json").read_text())
    assert training["settings"]["unfreeze"] == 2
    assert 80 < training["dev"]["same_as_given"] <= 100
    own, exits = answers(root / "unfrozen")
    assert not torch.equal(exits[:, -1], own)
    assert (exits[:, -1].argmax(-1) == own.argmax(-1)).float().mean() > 0.9


@pytest.mark.slow
def test_more_rows_than_fit_on_disk_are_sampled_and_reported(root: Path) -> None:
    output = run(root, "sampled", "--set", "disk_gb=0.00002")
    assert re.search(r"the exits learn from \d+ of 72 rows: hidden states of all would take", output)


def test_a_backbone_without_a_head_is_refused(root: Path, tmp_path: Path) -> None:
    tiny.model_folder(tmp_path / "model")
    command = ["--model", str(tmp_path / "model"), "--recipe", "attach", "--out", str(tmp_path / "ckpt")]
    done = CliRunner().invoke(train, [*command, "--data", str(root / "traffic.txt")])
    assert done.exit_code == 2
    assert "traffic.txt has no labels, and" in done.output and "has no trained head" in done.output
    done = CliRunner().invoke(train, [*command, "--precision", "fp32", "--data", str(root / "data")])
    assert done.exit_code == 2 and "recipe attach needs a model with a trained head" in done.output


def test_a_model_whose_answers_are_no_numbers_is_refused_until_it_is_mended(tmp_path: Path) -> None:
    folder = tiny.classifier_folder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    broken = weights | {"classifier.bias": torch.tensor([0.0, float("nan")])}
    save_file(broken, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "traffic.txt").write_text("a film\n" * 8)
    assert "answers 7 of 7 training rows with NaN or infinity" in run(tmp_path, "ckpt", exit_code=2)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    run(tmp_path, "ckpt")


def test_a_network_without_early_exits_is_refused(root: Path) -> None:
    output = run(root, "single", "--exits", "3", exit_code=2)
    assert "name earlier blocks in --exits" in output


@pytest.mark.slow
def test_other_recipes_keep_the_head_as_the_last_exits_start(root: Path) -> None:
    words = ["--recipe", "joint", "--set", "epochs=1", "--set", "heads_lr=0.01"]
    command = ["--model", str(root / "model"), "--data", str(root / "data"), "--out", str(root / "joint")]
    done = CliRunner().invoke(train, [*command, "--precision", "fp32", *words, "--set", "lr=0.00001"])
    assert done.exit_code == 0, done.output
    training = json.loads((root / "joint" / "training.json").read_text())
    assert training["user_model"]["accuracy"] > 80
    own, exits = answers(root / "joint")
    torch.testing.assert_close(exits[:, -1], own, atol=0.1, rtol=0.1)


def test_other_recipes_drop_a_head_with_other_labels_and_say_so(root: Path, tmp_path: Path) -> None:
    rows = [dict(row, label=("cold", "warm", "hot")[n % 3]) for n, row in enumerate(tiny.rows(30))]
    data = tiny.write_rows(tmp_path / "data", *rows)
    words = ["--recipe", "joint", "--set", "epochs=1", "--model", str(root / "model"), "--data", data]
    done = CliRunner().invoke(train, [*words, "--precision", "fp32", "--out", str(tmp_path / "ckpt")])
    assert done.exit_code == 0, done.output
    message = (
        "its own head is dropped, a new one is trained: its labels are ['bad', 'good'], those of the data"
    )
    assert message in done.output
    assert not load_checkpoint(tmp_path / "ckpt").network.spec.own_head


@pytest.mark.parametrize(
    ("data", "own", "expected"),
    [
        (("bad", "good"), ("good", "bad"), [1, 0, NO_LABEL]),  # by name
        (("Bad", "Good"), ("good", "bad"), [1, 0, NO_LABEL]),  # without regard to case
        (("Us", "us"), ("us", "Us"), [1, 0, NO_LABEL]),  # names that differ only by case
        (("0", "1"), ("good", "bad"), [0, 1, NO_LABEL]),  # by number
        (("bad", "good"), ("LABEL_0", "LABEL_1"), [0, 1, NO_LABEL]),
        (("bad",), ("good", "bad"), [1, None, NO_LABEL]),  # fewer labels than the model has
    ],
)
def test_labels_are_matched(data: tuple[str, ...], own: tuple[str, ...], expected: list[int | None]) -> None:
    rows = Rows(["a", "b", "c"], None, np.array([0, 1 if len(data) > 1 else 0, NO_LABEL]))
    matched, _ = match_labels(Dataset("data", data, {"train": rows}), own)
    assert matched is not None and matched.labels == own
    assert [
        label for label, e in zip(matched.splits["train"].label, expected, strict=True) if e is not None
    ] == [e for e in expected if e is not None]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_an_image_classifier_learns_from_images_without_labels(tmp_path: Path, family: str) -> None:
    folder = tiny.image_model_folder(tmp_path / "model", family)
    torch.manual_seed(0)
    config = tiny.VISION[family](num_hidden_layers=2)
    config.id2label = {0: "red", 1: "blue"}
    config.architectures = [
        {"vit": "ViTForImageClassification", "dinov2": "Dinov2ForImageClassification"}[family]
    ]
    model = classification_class(config).from_config(config).eval()
    model.save_pretrained(folder)
    images = tmp_path / "images"
    images.mkdir()
    for number in range(20):
        (images / f"{number}.png").write_bytes(tiny.png(number % 2, number))
    command = ["--model", str(folder), "--data", str(images), "--out", str(tmp_path / "ckpt")]
    done = CliRunner().invoke(train, [*command, "--precision", "fp32", "--set", "epochs=1"])
    assert done.exit_code == 0, done.output
    network = load_checkpoint(tmp_path / "ckpt").network
    pixels = tiny.pixel_values(3)
    with torch.no_grad():
        expected = model(**pixels).logits
        torch.testing.assert_close(network(pixels).logits[:, -1], expected, atol=1e-5, rtol=0)


def test_rows_of_rarer_labels_are_repeated(root: Path, tmp_path: Path) -> None:
    rows = [row for number, row in enumerate(tiny.rows(64)) if row["label"] or number % 8 == 0]
    data = tiny.write_rows(tmp_path / "data", *rows)
    words = ["--recipe", "joint", "--set", "epochs=1", "--model", str(root / "model"), "--data", data]
    done = CliRunner().invoke(
        train, [*words, "--precision", "fp32", "--balance", "--out", str(tmp_path / "ckpt")]
    )
    assert done.exit_code == 0, done.output
    assert "training rows become" in done.output


def test_data_of_another_task_than_the_head_is_refused(tmp_path: Path) -> None:
    folder = tiny.classifier_folder(tmp_path / "model")
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"problem_type": "multi_label_classification"}))
    done = CliRunner().invoke(
        train, ["--model", str(folder), "--data", str(tiny.data_folder(tmp_path / "data")), "--out", "x"]
    )
    assert done.exit_code == 2 and "multi-label-classification" in done.output
