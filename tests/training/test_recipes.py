"""The register and the baselines: what each trains, leaves alone and leaves by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from offramp.runtime.rules.sweep import SWEPT
from offramp.training.cli import train
from offramp.training.recipes import RECIPES, load_recipe
from offramp.training.recipes.berxit import task_loss, telling_loss
from offramp.training.recipes.branchynet import uniform
from offramp.training.recipes.deebert import last_alone
from offramp.training.recipes.fastbert import distance
from offramp.training.settings import settings_from

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
    assert uniform(losses) == 4.0 and last_alone(losses) == 7.0
    assert task_loss(losses, 0) == task_loss(losses, 4) == 7.0 and task_loss(losses, 3) == 12.0


def test_students_are_held_against_the_teacher() -> None:
    teacher = torch.log(torch.tensor([[0.5, 0.5]]))
    student = torch.log(torch.tensor([[[0.5, 0.5], [0.8, 0.2]]]))
    expected = 0.5 * torch.log(torch.tensor(0.5 / 0.8)) + 0.5 * torch.log(torch.tensor(0.5 / 0.2))
    torch.testing.assert_close(distance(student, teacher), expected)
    assert distance(student[:, :1] + 3.0, teacher).item() == pytest.approx(0, abs=1e-6)


def test_learning_to_exit_is_taught_whether_exits_are_wrong() -> None:
    logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [0.0, 9.0]]])  # says 0, 1, 1
    gates = torch.logit(torch.tensor([[0.3, 0.9]]))  # P(right)
    found = telling_loss(gates, logits, torch.tensor([1]))
    assert found.item() == pytest.approx((0.7 - 1) ** 2 + (0.1 - 0) ** 2)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_keeps_the_contract(name: str) -> None:
    recipe = load_recipe(name)
    settings = settings_from(recipe.SETTINGS, ())
    assert recipe.__doc__.startswith(f"{name}: ") and f"--recipe {name}" in recipe.__doc__
    assert recipe.STARTS_FROM is None or recipe.STARTS_FROM in RECIPES
    if getattr(recipe, "GENERATES", False):
        assert not hasattr(recipe, "policy_of")
    else:
        recipe.policy_of(settings)


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
        flags = [word for wish in sets for word in ("--set", wish)]
        done = CliRunner().invoke(train, [*words, "--precision", "fp32", *flags])
        assert done.exit_code == 0, done.output
    return root


@pytest.mark.parametrize("name", sorted(RULES))
def test_points_are_of_the_recipes_own_rule(trained: Path, name: str) -> None:
    training = json.loads((trained / name / "training.json").read_text())
    assert training["rule"] == RULES[name] and RULES[name] in SWEPT
    rules = {point["rule"]["name"] for point in training["operating_points"]}
    assert rules - {"never"} == {RULES[name]}
    default = training["operating_points"][0]
    assert default["name"] == "default" and default["measured"]["accuracy"] > 80
    assert (trained / name / "log.jsonl").is_file()


def test_two_stage_recipes_leave_backbone_and_last_exit_as_they_were(trained: Path) -> None:
    teacher, student = (load_file(trained / name / "weights.safetensors") for name in ("deebert", "fastbert"))
    moved = {".".join(n.split(".")[:2]) for n, value in teacher.items() if not value.equal(student[n])}
    assert moved == {"exits.0", "exits.1"}


def test_recipes_that_only_choose_points_change_no_weight(trained: Path) -> None:
    joint = load_file(trained / "joint" / "weights.safetensors")
    for name in ("pabee", "pcee_bert"):
        same = load_file(trained / name / "weights.safetensors")
        assert joint.keys() == same.keys() and all(joint[n].equal(same[n]) for n in joint)


def test_berxit_learns_when_it_is_right(trained: Path) -> None:
    weights = load_file(trained / "berxit" / "weights.safetensors")
    assert weights["policies.0.wrong.weight"].equal(weights["policies.1.wrong.weight"])
