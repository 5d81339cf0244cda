"""The register of recipes, and the published baselines: losses, trained parts, rules."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from offramp.models.policies import KINDS
from offramp.runtime.errors import BadSetting
from offramp.runtime.rules.sweep import SWEPT
from offramp.training.batches import EncodedText
from offramp.training.cli import train
from offramp.training.loop import Phase, Run
from offramp.training.options import parse_settings
from offramp.training.recipes import RECIPES, load_recipe
from offramp.training.recipes.base import ClassifierRecipe, DecoderRecipe
from offramp.training.recipes.berxit import BerxitSettings, policy_loss, task_loss
from offramp.training.recipes.branchynet import mean_loss
from offramp.training.recipes.deebert import DeeBertSettings, fine_tune, last_exit_only
from offramp.training.recipes.fastbert import distillation_loss
from offramp.training.recipes.joint import JointSettings

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


class FirstPhaseError(Exception):
    """Raised instead of the first phase."""

    def __init__(self, phase: Phase) -> None:
        super().__init__(phase.name)
        self.phase = phase


class FirstPhaseRun(Run[Any]):
    """A run that tells its first phase and ends there."""

    def fit(self, phase: Phase) -> None:
        raise FirstPhaseError(phase)


def few_rows(count: int) -> EncodedText:
    ids = [tiny.tokenizer().encode(row["text"]).ids for row in tiny.rows(count)]
    return EncodedText(ids, [[0] * len(row) for row in ids], np.arange(count) % 2, 0)


@pytest.mark.parametrize(
    "name", ["joint", "consistentee", "consistentee_plus", "cosee", "deebert", "l2w_den", *sorted(RULES)]
)
def test_shared_settings_reach_the_first_phase(name: str, tmp_path: Path) -> None:
    """ee-compare gives them to every recipe, so that methods are trained alike."""
    recipe = load_recipe(name)
    assert issubclass(recipe.SETTINGS, JointSettings)
    given = {"epochs": 5, "batch_size": 2, "lr": 0.25, "heads_lr": 0.5, "warmup": 0.375, "weight_decay": 0.75}
    settings = parse_settings(recipe.SETTINGS, tuple(f"{key}={value}" for key, value in given.items()))
    network = tiny.network(policy=recipe.parts_of(settings).policy)
    run = FirstPhaseRun(network, tmp_path, seed=0)
    with pytest.raises(FirstPhaseError) as first:
        recipe.train(run, few_rows(4), few_rows(4), settings, skip_warm_start=False)
    assert {key: getattr(first.value.phase, key) for key in given} == given


@pytest.mark.parametrize("gradient", ["equilibrium", "next_exit"])
def test_fine_tuning_gives_every_block_the_whole_gradient(gradient: str, tmp_path: Path) -> None:
    """With next_exit the blocks before the last would learn nothing from the last exit."""
    weights = []
    for kind in ("full", gradient):
        network = tiny.network(policy=None)
        run = Run(network, tmp_path / kind, seed=0)
        fine_tune(run, few_rows(4), DeeBertSettings(epochs=1, batch_size=4, gradient=kind))
        weights.append(network.state_dict())
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(("step", "reached"), [(0, True), (1, False)])
def test_gradient_belongs_to_the_odd_steps_of_berxit(step: int, reached: bool, tmp_path: Path) -> None:
    """With next_exit the last exit reaches the first block on even steps alone: no other exit trains then."""
    network = tiny.network(policy="lte")
    run = FirstPhaseRun(network, tmp_path, seed=0)
    with pytest.raises(FirstPhaseError) as first:
        settings = BerxitSettings(gradient="next_exit")
        load_recipe("berxit").train(run, few_rows(4), few_rows(4), settings, skip_warm_start=False)
    for parameter in (*network.policies.parameters(), *network.exits[0].parameters()):
        parameter.data.zero_()  # the first exit and the policies give the first block no gradient
    run.position["step"] = step
    first.value.phase.loss(network, np.arange(4))[0].backward()
    assert any(p.grad is not None and p.grad.any() for p in network.blocks[0].parameters()) == reached


@pytest.mark.parametrize("wrong", ["weights=uniform", "distill=0.5", "plain_epochs=1"])
def test_berxit_refuses_settings_of_losses_that_it_does_not_have(wrong: str) -> None:
    with pytest.raises(BadSetting, match=wrong.partition("=")[0]):
        parse_settings(BerxitSettings, (wrong,))


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
