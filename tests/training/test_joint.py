"""The settings of joint training that every recipe can take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from offramp.runtime.errors import BadSetting
from offramp.training.cli import train
from offramp.training.options import parse_settings
from offramp.training.recipes.joint import JointSettings, distillation_losses, joint_loss, loss_weights

FAST = ("epochs=4", "batch_size=8", "lr=0.002", "heads_lr=0.01")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("joint")
    tiny.model_folder(root / "model")
    tiny.data_folder(root / "data")
    return root


def run(
    root: Path,
    name: str,
    *settings: str,
    recipe: str = "joint",
    options: tuple[str, ...] = (),
    fast: tuple[str, ...] = FAST,
) -> Path:
    words = ["--model", str(root / "model"), "--data", str(root / "data"), "--out", str(root / name)]
    flags = [word for setting in (*fast, *settings) for word in ("--set", setting)]
    done = CliRunner().invoke(train, [*words, "--recipe", recipe, "--precision", "fp32", *flags, *options])
    assert done.exit_code == 0, done.output
    return root / name


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [1 / 6, 2 / 6, 3 / 6]),
        ("uniform", [1 / 3, 1 / 3, 1 / 3]),
        ("descending", [3 / 6, 2 / 6, 1 / 6]),
        ("learned", [1 / 7, 2 / 7, 4 / 7]),  # 1 / loss
    ],
)
def test_loss_weights(kind: str, expected: list[float]) -> None:
    torch.testing.assert_close(loss_weights(torch.tensor([1.0, 0.5, 0.25]), kind), torch.tensor(expected))


def test_learned_weights_get_no_gradient_of_their_own() -> None:
    losses = torch.tensor([[1.0, 0.5]], requires_grad=True)
    joint_loss(losses, "learned").backward()
    torch.testing.assert_close(losses.grad, torch.tensor([[1 / 3, 2 / 3]]))


def test_distillation_compares_with_the_last_exit_and_sends_it_no_gradient() -> None:
    logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]]], requires_grad=True)
    losses = distillation_losses(logits, 1.0)
    p, q = torch.tensor([2.0, 0.0]).softmax(0), torch.tensor([0.0, 2.0]).softmax(0)
    torch.testing.assert_close(losses.detach(), torch.tensor([[0.0, float((p * (p / q).log()).sum()), 0.0]]))
    losses.sum().backward()
    assert logits.grad[0, 1].abs().max() > 0.1 and logits.grad[0, 2].abs().max() < 1e-6


@pytest.mark.slow
def test_epochs_of_ordinary_fine_tuning_come_first(root: Path) -> None:
    folder = run(root, "mixed", "plain_epochs=2")
    phases = [json.loads(line).get("phase") for line in (folder / "log.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(phases)) == ["plain", "joint", None]


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["weights=uniform", "gradient=equilibrium", "distill=0.5"])
def test_a_setting_changes_what_is_learned(root: Path, setting: str) -> None:
    fast = ("epochs=1", *FAST[1:])
    plain = root / "plain" if (root / "plain").is_dir() else run(root, "plain", fast=fast)
    changed = run(root, setting, setting, fast=fast)
    before, after = (load_file(folder / "weights.safetensors") for folder in (plain, changed))
    assert not before["exits.0.classify.weight"].equal(after["exits.0.classify.weight"])


@pytest.mark.parametrize("word", ["weights=steep", "gradient=none", "distill=2", "temperature=0"])
def test_a_setting_that_does_not_exist_is_refused(word: str) -> None:
    with pytest.raises(BadSetting, match=word.partition("=")[0]):
        parse_settings(JointSettings, (word,))


@pytest.mark.slow
def test_options_replace_the_parts_of_a_recipe(root: Path) -> None:
    options = ("--pooling", "mean", "--head", "linear")
    folder = run(root, "replaced", recipe="offramp", options=options)
    spec = json.loads((folder / "network.json").read_text())["network"]
    assert (spec["pooling"], spec["head"]) == ("mean", "linear")


def test_parts_of_a_checkpoint_cannot_be_replaced(root: Path) -> None:
    words = ["--init", str(root), "--data", str(root / "data"), "--head", "mlp", "--recipe", "joint"]
    done = CliRunner().invoke(train, [*words, "--out", str(root / "refused")])
    assert done.exit_code == 2 and "--pooling, --head and --ensemble go with --model" in done.output
