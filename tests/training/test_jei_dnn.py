"""JEI-DNN's surrogates by hand, the gradients of its two weightings, early stopping, and resuming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from offramp.models import EarlyExitNetwork
from offramp.training.batches import encode_texts
from offramp.training.checkpoint import TextFacts
from offramp.training.cli import train
from offramp.training.collect import collect
from offramp.training.data import load_data
from offramp.training.frozen import EarlyStopping, reset_early_exits
from offramp.training.loop import Run
from offramp.training.recipes.jei_dnn import (
    JeiDnnSettings,
    Rates,
    cost_shares,
    exit_turn_loss,
    gate_targets,
    positive_weights,
    turn_number,
)
from offramp.training.recipes.jei_dnn import train as recipe

EXIT_AT = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5], [0.1, 0.0, 0.2]])


def gradient(weighting: str, probabilities: torch.Tensor) -> torch.Tensor:
    """Of the exits' loss with respect to what produced the exits' cross-entropies [3, 3]."""
    torch.manual_seed(0)
    source = torch.randn(3, 3, requires_grad=True)
    (gradients,) = torch.autograd.grad(exit_turn_loss(source.exp(), probabilities, weighting), source)
    return gradients


def plain() -> torch.Tensor:
    torch.manual_seed(0)
    source = torch.randn(3, 3, requires_grad=True)
    (gradients,) = torch.autograd.grad(source.exp().sum() / 9, source)
    return gradients


def test_as_run_has_the_gradient_of_the_plain_sum() -> None:
    torch.testing.assert_close(gradient("as_run", EXIT_AT), plain())
    torch.testing.assert_close(gradient("as_run", EXIT_AT.flip(1)), plain())


def test_as_intended_trains_the_exits_that_rows_take() -> None:
    gradients = gradient("as_intended", EXIT_AT)
    assert not torch.allclose(gradients, plain(), rtol=0.2)
    assert gradients[1, 0] == 0 and gradients[2, 1] == 0  # P(exit) is 0 there
    weighted = (plain() * EXIT_AT)[0]
    torch.testing.assert_close(gradients[0] / gradients[0].sum(), weighted / weighted.sum())


def test_both_weightings_have_the_same_value_and_accept_rows_without_exit() -> None:
    losses = torch.tensor([[1.0, 2.0, 3.0]] * 3)
    assert exit_turn_loss(losses, EXIT_AT, "as_run") == pytest.approx(2.0)
    assert exit_turn_loss(losses, EXIT_AT, "as_intended") == pytest.approx(2.0)
    no_exit = torch.zeros(3, 3)
    torch.testing.assert_close(gradient("as_run", no_exit), plain())
    assert gradient("as_intended", no_exit).abs().max() == 0


def test_targets_are_one_from_the_optimal_exit_on() -> None:
    losses = torch.tensor([[0.9, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1], [2.0, 2.0, 2.0, 0.1]])
    costs = torch.tensor([[0.25, 0.5, 0.75, 1.0]]).expand(3, 4)
    assert gate_targets(losses, costs, 1.0).tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert (
        gate_targets(losses, costs, 10.0).tolist() == [[1, 1, 1]] * 3
    )  # a high price: all rows take the first exit
    assert gate_targets(losses, costs, 0.0).tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 0]]


def test_rare_positives_weigh_more_up_to_a_limit() -> None:
    targets = torch.tensor([[0, 0, 1], [0, 1, 1], [0, 1, 1], [0, 1, 1]])
    # no positive: 4 / 0.1 is limited to 5; 1 / 3; no negative: 0.1 / 4
    assert positive_weights(targets.float()).tolist() == pytest.approx([5.0, 1 / 3, 0.025])


def test_turns_begin_and_end_with_the_gates() -> None:
    for steps, switch in ((1150, 200), (3000, 200), (15, 200), (400, 200), (800, 200)):
        turn_numbers = [turn_number(step, steps, switch) for step in range(steps)]
        assert turn_numbers[0] == 0 and turn_numbers[-1] % 2 == 0 and turn_numbers[-1] >= 2
        assert turn_numbers == sorted(turn_numbers) and set(turn_numbers) == set(range(turn_numbers[-1] + 1))
    assert turn_number(2999, 3000, 200) == 14  # 15 turns of 200


def test_costs_are_shares_of_the_whole_walk_and_grow() -> None:
    shares = cost_shares(tiny.network(policy="jei"), torch.tensor([4, 9]).numpy())
    assert (shares.diff(dim=1) > 0).all() and shares[:, -1].tolist() == [1.0, 1.0]
    assert 0.2 < shares[0, 0] < 0.4


@pytest.mark.parametrize(
    "wrong",
    [
        {"backbone": "other"},
        {"weighting": "other"},
        {"optimizer": "other"},
        {"backbone": "tuned", "optimizer": "sgd"},
        {"price": -1.0},
        {"switch": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        JeiDnnSettings(**wrong)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("jei")
    tiny.model_folder(root / "model")
    tiny.data_folder(root / "data")
    return root


def test_each_exit_stops_by_itself_and_gets_its_best_weights(folder: Path, tmp_path: Path) -> None:
    network = tiny.network(policy="jei")
    rows = load_data(str(folder / "data")).split("dev")
    dev = collect(network, encode_texts(rows, tiny.tokenizer(), TextFacts("", 0, 64)))
    run = Run(network, tmp_path, seed=0)
    stopping = EarlyStopping(run, dev, patience=2, name="try")
    initial = [exit_head.classify.weight.clone() for exit_head in network.exits]
    right = dev.labels.float() * 2 - 1  # +1 for label 1

    def set_weights(index: int, sign: float) -> None:
        """Weights that answer by least squares on dev, or their opposite."""
        exit_head = network.exits[index]
        features = exit_head.standardize(dev.pooled[:, index])
        answer = torch.linalg.lstsq(features, right[:, None]).solution[:, 0] * sign
        with torch.no_grad():
            exit_head.classify.weight.copy_(torch.stack([-answer, answer]))
            exit_head.classify.bias.zero_()

    stopping.evaluate(0)
    set_weights(0, 1.0)
    set_weights(1, -1.0)
    stopping.evaluate(1)
    good = network.exits[0].classify.weight.clone()
    assert stopping.active.tolist() == [True, True]
    set_weights(0, -1.0)
    stopping.evaluate(2)
    assert stopping.best_epoch.tolist() == [1, 0] and stopping.active.tolist() == [True, False]
    stopping.restore_best()
    torch.testing.assert_close(network.exits[0].classify.weight, good)
    torch.testing.assert_close(network.exits[1].classify.weight, initial[1])
    again = EarlyStopping(run, dev, patience=2, name="try")
    again.evaluate(2)  # as a resumed run: from stored values
    assert again.best_epoch.tolist() == [1, 0]


def test_rates_are_those_of_the_optimizer_unless_they_are_set() -> None:
    assert JeiDnnSettings(gates_lr=0.5).rates == Rates(0.01, 0.01, 0.5)
    assert JeiDnnSettings(optimizer="adamw", warm_lr=0.2).rates == Rates(0.2, 3e-4, 3e-2)


def test_small_data_takes_more_epochs_for_the_same_number_of_steps() -> None:
    settings = JeiDnnSettings(turn_epochs=10, turn_steps=7000)
    assert [settings.epochs_of_turns(steps) for steps in (1000, 700, 80)] == [10, 10, 88]
    tuned = JeiDnnSettings(backbone="tuned", optimizer="adamw", turn_epochs=10)
    assert tuned.epochs_of_turns(80) == 10


def test_the_early_exits_start_anew_by_the_seed() -> None:
    networks = [tiny.network(policy="jei", seed=number) for number in (0, 1)]
    before = networks[0].exits[2].classify.weight.clone()
    for network in networks:
        reset_early_exits(network, seed=4)
    first, second = (network.exits for network in networks)
    for index in (0, 1):
        assert first[index].classify.weight.equal(second[index].classify.weight)
    assert first[2].classify.weight.equal(before) and not first[0].classify.weight.equal(before)


# Settings of phase 1, which a tiny network learns in seconds.
FAST = ("epochs=3", "batch_size=8", "lr=0.002", "heads_lr=0.01")
TURNS = ("turn_epochs=6", "turn_steps=0", "warm_epochs=4")


def train_command(folder: Path, out: Path, recipe_name: str, begin: Path | None, *settings: str) -> None:
    words = ["--data", str(folder / "data"), "--precision", "fp32", "--recipe", recipe_name]
    words += ["--model", str(folder / "model")] if begin is None else ["--init", str(begin)]
    flags = [word for setting in settings for word in ("--set", setting)]
    done = CliRunner().invoke(train, [*words, "--out", str(out), *flags])
    assert done.exit_code == 0, done.output


@pytest.mark.slow
@pytest.mark.parametrize("backbone", tiny.with_slow(["frozen", "tuned"], "frozen"))
def test_trained_and_frozen_parts(folder: Path, tmp_path: Path, backbone: str) -> None:
    optimizer = "sgd" if backbone == "frozen" else "adamw"
    train_command(folder, tmp_path / "deebert", "deebert", None, *FAST, "exit_epochs=2")
    settings = (f"backbone={backbone}", f"optimizer={optimizer}", "tuned_lr=0.001", *TURNS)
    train_command(folder, tmp_path / "jei", "jei_dnn", tmp_path / "deebert", *settings)
    before, after = (load_file(tmp_path / name / "weights.safetensors") for name in ("deebert", "jei"))
    moved = {
        name.split(".")[0] + "." + name.split(".")[1]
        for name in before
        if not before[name].equal(after[name])
    }
    last = {"exits.2"}
    assert {"exits.0", "exits.1"} <= moved
    assert (moved & ({"backbone.encoder"} | last) == set()) == (backbone == "frozen")
    training = json.loads((tmp_path / "jei" / "training.json").read_text())
    assert training["rule"] == "gate" and training["operating_points"][-1]["name"] == "trained"
    assert training["published_points"] == ["trained"]


@pytest.mark.slow
def test_a_training_from_the_start_fine_tunes_the_last_exit_alone(folder: Path, tmp_path: Path) -> None:
    """Its backbone is that of recipe deebert with the same seed, and the published optimizer learns."""
    train_command(folder, tmp_path / "deebert", "deebert", None, *FAST, "exit_epochs=1")
    train_command(folder, tmp_path / "jei", "jei_dnn", None, *FAST, "turn_steps=160", "warm_epochs=10")
    teacher, jei = (load_file(tmp_path / name / "weights.safetensors") for name in ("deebert", "jei"))
    same = [name for name in teacher if name.startswith(("backbone.", "exits.2."))]
    assert same and all(teacher[name].equal(jei[name]) for name in same)
    points = json.loads((tmp_path / "jei" / "training.json").read_text())["operating_points"]
    trained = next(point for point in points if point["name"] == "trained")
    assert trained["measured"]["accuracy"] > 80 and trained["measured"]["mean_exit"] < 3


class Interrupted(Exception):
    """Simulates a kill: nothing is written after it."""


class InterruptedRun(Run[EarlyExitNetwork]):
    """A run that is interrupted at a step of a phase."""

    at: tuple[str, int] | None = None

    def log(self, **figures: object) -> None:
        super().log(**figures)
        if self.at is not None and (figures.get("phase"), figures.get("step")) == self.at:
            raise Interrupted


@pytest.mark.slow
@pytest.mark.parametrize(
    "at",
    [
        ("warm-up", 21),
        ("turns", 21),
        ("turns", 41),
    ],
)
def test_an_interrupted_run_ends_with_the_weights_of_the_uninterrupted_one(
    folder: Path, tmp_path: Path, at: tuple[str, int]
) -> None:
    """Best weights and counts are read from stored values, not computed again."""
    rows = load_data(str(folder / "data"))
    encoded = [
        encode_texts(rows.split(name), tiny.tokenizer(), TextFacts("", 0, 64)) for name in ("train", "dev")
    ]
    settings = JeiDnnSettings(warm_epochs=4, turn_epochs=6, turn_steps=0, turn_batch=8, switch=10)

    def run_recipe(place: Path, stop: tuple[str, int] | None) -> dict[str, torch.Tensor]:
        run = InterruptedRun(tiny.network(policy="jei"), place, seed=3, save_every=0)
        run.at = stop
        recipe(run, *encoded, settings, skip_warm_start=True)
        return run.network.state_dict()

    whole = run_recipe(tmp_path / "whole", None)
    with pytest.raises(Interrupted):
        run_recipe(tmp_path / "torn", at)
    resumed = run_recipe(tmp_path / "torn", None)
    assert all(whole[name].equal(resumed[name]) for name in whole)
