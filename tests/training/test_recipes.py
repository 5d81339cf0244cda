"""The register of recipes, and the published baselines: losses, trained parts, rules."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from offramp.models.policies import KINDS
from offramp.runtime.rules.sweep import SWEPT
from offramp.training.cli import train
from offramp.training.options import parse_settings
from offramp.training.recipes import RECIPES, load_recipe
from offramp.training.recipes.base import ClassifierRecipe, DecoderRecipe
from offramp.training.recipes.berxit import policy_loss, task_loss
from offramp.training.recipes.branchynet import mean_loss
from offramp.training.recipes.deebert import last_exit_only
from offramp.training.recipes.fastbert import distillation_loss

RULES = {
    "branchynet": "entropy",
    "deebert": "entropy",
    "fastbert": "entropy",
    "berxit": "gate",
    "pabee": "patience",
    "pcee_bert": "patience_confident",
}


def test_losses_by_hand() -> None:
    losses = torch.tensor([[1.0, 2.0, 6.0], [3.0, 4.0, 8.0]])
    assert mean_loss(losses) == 4.0 and last_exit_only(losses) == 7.0
    assert task_loss(losses, 0) == task_loss(losses, 4) == 7.0 and task_loss(losses, 3) == 12.0


def test_the_distillation_loss_is_a_kl_divergence() -> None:
    teacher = torch.log(torch.tensor([[0.5, 0.5]]))
    student = torch.log(torch.tensor([[[0.5, 0.5], [0.8, 0.2]]]))
    expected = 0.5 * torch.log(torch.tensor(0.5 / 0.8)) + 0.5 * torch.log(torch.tensor(0.5 / 0.2))
    torch.testing.assert_close(distillation_loss(student, teacher), expected)
    assert distillation_loss(student[:, :1] + 3.0, teacher).item() == pytest.approx(0, abs=1e-6)


def test_learning_to_exit_is_trained_to_predict_errors() -> None:
    logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [0.0, 9.0]]])  # predicts 0, 1, 1
    gate_logits = torch.logit(torch.tensor([[0.3, 0.9]]))  # P(right)
    loss = policy_loss(gate_logits, logits, torch.tensor([1]))
    assert loss.item() == pytest.approx((0.7 - 1) ** 2 + (0.1 - 0) ** 2)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_implements_its_protocol(name: str) -> None:
    recipe = load_recipe(name)
    settings = parse_settings(recipe.SETTINGS, ())
    assert recipe.__doc__.startswith(f"{name}: ") and f"--recipe {name}" in recipe.__doc__
    assert recipe.STARTS_FROM is None or recipe.STARTS_FROM in RECIPES
    protocol = ClassifierRecipe if recipe.KIND == "classifier" else DecoderRecipe
    assert recipe.KIND in ("classifier", "decoder")
    for method in ("parts_of", "prepare", "train"):
        declared = getattr(protocol, method, None)
        assert (declared is None) == (getattr(recipe, method, None) is None)
        if declared is not None:
            parameters = list(inspect.signature(declared).parameters.values())[1:]  # without self
            implemented = inspect.signature(getattr(recipe, method)).parameters.values()
            assert [(p.name, p.kind) for p in implemented] == [(p.name, p.kind) for p in parameters]
    if recipe.KIND == "classifier":
        assert recipe.parts_of(settings).policy in (None, *KINDS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every baseline, from the checkpoint that it starts from where it can start from one."""
    root = tmp_path_factory.mktemp("recipes")
    tiny.model_folder(root / "model")
    tiny.data_folder(root / "data")
    fast = ["epochs=6", "batch_size=8", "lr=0.002", "heads_lr=0.01"]
    for name in ("joint", *RULES):
        recipe = load_recipe(name)
        begin = recipe.STARTS_FROM
        start = ["--model", str(root / "model")] if begin is None else ["--init", str(root / begin)]
        words = [*start, "--data", str(root / "data"), "--recipe", name, "--out", str(root / name)]
        sets = [*fast, "exit_epochs=30", "exit_lr=0.01"] if name in ("deebert", "fastbert") else fast
        flags = [word for setting in sets for word in ("--set", setting)]
        done = CliRunner().invoke(train, [*words, "--precision", "fp32", *flags])
        assert done.exit_code == 0, done.output
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RULES))
def test_points_have_the_recipes_rule(trained: Path, name: str) -> None:
    training = json.loads((trained / name / "training.json").read_text())
    assert training["rule"] == RULES[name] and RULES[name] in SWEPT
    rules = {point["rule"]["name"] for point in training["operating_points"]}
    assert rules - {"never"} == {RULES[name]}
    default = training["operating_points"][0]
    assert default["name"] == "default" and default["measured"]["accuracy"] > 80
    assert (trained / name / "log.jsonl").is_file()


@pytest.mark.slow
def test_the_second_phase_changes_neither_backbone_nor_last_exit(trained: Path) -> None:
    teacher, student = (load_file(trained / name / "weights.safetensors") for name in ("deebert", "fastbert"))
    moved = {".".join(n.split(".")[:2]) for n, value in teacher.items() if not value.equal(student[n])}
    assert moved == {"exits.0", "exits.1"}


@pytest.mark.slow
def test_recipes_that_only_choose_points_change_no_weight(trained: Path) -> None:
    joint = load_file(trained / "joint" / "weights.safetensors")
    for name in ("pabee", "pcee_bert"):
        same = load_file(trained / name / "weights.safetensors")
        assert joint.keys() == same.keys() and all(joint[n].equal(same[n]) for n in joint)


@pytest.mark.slow
def test_the_learning_to_exit_layer_is_shared(trained: Path) -> None:
    weights = load_file(trained / "berxit" / "weights.safetensors")
    assert weights["policies.0.wrong.weight"].equal(weights["policies.1.wrong.weight"])


@pytest.mark.slow
def test_samples_of_rows_are_kept_by_a_training_on_further_rows(trained: Path, tmp_path: Path) -> None:
    before, same = (json.loads((trained / n / "training.json").read_text()) for n in ("joint", "pabee"))
    assert same["rows_sample"] == before["rows_sample"], "the same rows once"
    tiny.data_folder(tmp_path / "more", train=40)
    words = ["--init", str(trained / "joint"), "--data", str(tmp_path / "more"), "--recipe", "pabee"]
    done = CliRunner().invoke(train, [*words, "--out", str(tmp_path / "ckpt"), "--precision", "fp32"])
    assert done.exit_code == 0, done.output
    after = json.loads((tmp_path / "ckpt" / "training.json").read_text())["rows_sample"]
    assert after[:2] == before["rows_sample"]
    assert [(sample["data"], sample["rows"]) for sample in after[2:]] == [("more", 40), ("more", 32)]
