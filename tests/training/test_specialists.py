"""Recipes cosee and l2w_den: weights and quotas by hand, the meta gradient, training, and resuming."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from offramp.models import EarlyExitNetwork
from offramp.training.batches import EncodedText
from offramp.training.loop import Run
from offramp.training.losses import exit_losses, losses_of
from offramp.training.recipes import cosee, joint, l2w_den
from offramp.training.recipes.cosee import (
    CoseeSettings,
    calibration_loss,
    distance_weights,
    exit_signals,
    row_weights,
    simulated_exits,
)
from offramp.training.recipes.joint import JointSettings
from offramp.training.recipes.l2w_den import (
    L2wDenSettings,
    WeightNetwork,
    exit_quotas,
    exits_by_quota,
    meta_loss,
    walk_loss,
)

FAST: dict[str, Any] = {"epochs": 4, "batch_size": 8, "lr": 0.002, "heads_lr": 0.01}
SIGNALS = torch.tensor([[0.9, 0.6, 0.1], [0.3, 0.7, 0.9], [0.2, 0.4, 0.9]])  # 3 rows, 3 exits


def encoded(count: int, seed: int = 0) -> EncodedText:
    """Rows of tiny.rows as token ids."""
    rows = tiny.rows(count, seed)
    ids = [tiny.tokenizer().encode(str(row["text"])).ids for row in rows]
    return EncodedText(ids, [[0] * len(row) for row in ids], np.array([row["label"] for row in rows]), 0)


def train(recipe: ModuleType, folder: Path, settings: JointSettings) -> tuple[EarlyExitNetwork, Any]:
    """A tiny network that the recipe trained, and what the recipe returned."""
    network = tiny.network(policy=None)
    run = Run(network, folder, seed=0)
    return network, recipe.train(run, encoded(64), encoded(32, 1), settings, skip_warm_start=False)


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# Recipe cosee


def test_signals_by_hand() -> None:
    logits = torch.tensor([[[0.9, 0.1], [0.5, 0.5]]]).log()
    torch.testing.assert_close(exit_signals(logits, "max_probability"), torch.tensor([[0.9, 0.5]]))
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(2)
    torch.testing.assert_close(exit_signals(logits, "entropy"), torch.tensor([[entropy, 1.0]]))


def test_a_row_leaves_at_the_first_exit_whose_signal_reaches_the_threshold() -> None:
    exits = simulated_exits(SIGNALS, torch.tensor([0.65, 0.35, 0.95]), "max_probability")
    assert exits.tolist() == [[0, 1, 2], [0, 1, 1], [2, 2, 2]]
    assert simulated_exits(SIGNALS, torch.tensor([0.35, 0.65]), "entropy").tolist() == [[2, 0, 0], [1, 0, 0]]


def test_weights_fall_with_the_distance_from_the_exit() -> None:
    e1, e2 = math.exp(-1), math.exp(-2)
    first, middle = 1 + e1 + e2, 1 + 2 * e1
    expected = [[1 / first, e1 / first, e2 / first], [e1 / middle, 1 / middle, e1 / middle]]
    torch.testing.assert_close(distance_weights(3, 1.0)[:2], torch.tensor(expected))
    torch.testing.assert_close(distance_weights(3, 0.0), torch.full((3, 3), 1 / 3))


def test_row_weights_are_the_mean_over_thresholds() -> None:
    weights = row_weights(SIGNALS, torch.tensor([0.65, 0.35]), "max_probability", 100.0)  # one-hot, nearly
    expected = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.5]]
    torch.testing.assert_close(weights, torch.tensor(expected), atol=1e-6, rtol=0)


def test_the_weights_of_every_row_sum_to_one() -> None:
    weights = row_weights(torch.rand(20, 12), torch.rand(5), "entropy", 3.0)
    torch.testing.assert_close(weights.sum(1), torch.ones(20))


@pytest.mark.parametrize("signal", cosee.SIGNALS)
def test_calibration_asks_for_a_gap_between_right_and_wrong_rows(signal: str) -> None:
    right = torch.tensor([[True, True, False], [False, True, False], [True, True, True]])
    # Exit 1: right rows 0.9 and 0.2, a wrong one 0.3. At exit 2 all are right. The last exit is not read.
    gap = 0.25 if signal == "max_probability" else -0.25
    loss = calibration_loss(SIGNALS, right, 0.3, signal)
    assert loss.item() == pytest.approx(0.3 - gap)
    assert calibration_loss(SIGNALS, torch.ones_like(right), 0.3, signal).item() == 0.0


@pytest.mark.slow
def test_weights_are_equal_at_first_and_follow_the_exits_at_last(tmp_path: Path) -> None:
    train(cosee, tmp_path, CoseeSettings(**FAST))
    steps = [line for line in logged(tmp_path) if line.get("phase") == "cosee"]
    assert steps[0]["first_weight"] == pytest.approx(1 / 3) == steps[0]["last_weight"]
    assert abs(steps[-1]["first_weight"] - 1 / 3) > 0.1


# Recipe l2w_den


@pytest.mark.parametrize(("centre", "dimension"), [("row", 1), ("exit", 0), ("batch", (0, 1))])
def test_weights_are_one_on_average(centre: str, dimension: Any) -> None:
    weights = WeightNetwork(3, 8, 0.8, centre)(torch.rand(4, 3) * 5)
    torch.testing.assert_close(weights.mean(dimension), torch.ones_like(weights.mean(dimension)))
    assert weights.std() > 0.01 and (weights - 1).abs().max() < 1.6


def test_the_weights_of_every_row_sum_to_the_number_of_exits() -> None:
    weights = WeightNetwork(3, 8, L2wDenSettings().epsilon, L2wDenSettings().centre)(torch.rand(4, 3))
    torch.testing.assert_close(weights.sum(1), torch.full((4,), 3.0))


def test_quotas_are_geometric() -> None:
    torch.testing.assert_close(exit_quotas(3, 0.5).float(), torch.tensor([4.0, 2.0, 1.0]) / 7)


def test_at_each_exit_the_surest_of_the_remaining_rows_leave() -> None:
    confidence = torch.tensor([[0.6, 0.9, 0.0], [0.9, 0.1, 0.0], [0.7, 0.8, 0.0], [0.8, 0.2, 0.0]])
    quotas = torch.tensor([0.5, 0.25, 0.25])
    assert exits_by_quota(confidence, quotas, 0.0).tolist() == [1, 0, 2, 0]
    assert exits_by_quota(confidence, torch.tensor([0.1, 0.8, 0.1]), 0.0).tolist() == [1, 2, 1, 1]


def test_offsets_give_every_exit_its_exact_quota_on_average() -> None:
    quotas, rows = exit_quotas(12, 0.75), 16
    counts = torch.stack(
        [
            torch.bincount(exits_by_quota(torch.rand(rows, 12), quotas, float(offset)), minlength=12)
            for offset in np.arange(0.005, 1, 0.01)
        ]
    )
    torch.testing.assert_close(counts.double().mean(0), rows * quotas, atol=0.011, rtol=0)


def test_the_meta_loss_is_summed_over_exits() -> None:
    losses = torch.tensor([[1.0, 5.0, 9.0], [3.0, 5.0, 9.0], [1.0, 5.0, 7.0]])
    assert walk_loss(losses, torch.tensor([0, 0, 2])) == (1 + 3) / 2 + 7


def meta_case(pseudo_lr: float = 2.0) -> tuple[WeightNetwork, Any]:
    """A weight network, and its meta loss as a function, on random exits and rows."""
    torch.manual_seed(3)
    network = tiny.network(policy=None, head="mlp")
    halves = [(torch.randn(6, 3, 32), torch.randint(2, (6,))) for _ in range(2)]
    exits, quotas = list(network.exits), exit_quotas(3, 0.75)
    weight_network = WeightNetwork(3, 5, 0.8, "row")
    return weight_network, lambda: meta_loss(weight_network, exits, halves, quotas, pseudo_lr)


def test_the_meta_gradient_agrees_with_finite_differences() -> None:
    weight_network, loss = meta_case()
    parameters = list(weight_network.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    size = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    assert size > 1e-3
    values, step = [], 0.05
    for sign in (1, -1):
        with torch.no_grad():
            before = copy.deepcopy(weight_network.state_dict())
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter += sign * step * gradient / size
        values.append(float(loss().detach()))
        weight_network.load_state_dict(before)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(size, rel=0.02)


def test_without_a_pseudo_step_there_is_no_meta_gradient() -> None:
    weight_network, loss = meta_case(pseudo_lr=0.0)
    gradients = torch.autograd.grad(loss(), list(weight_network.parameters()))
    assert all(gradient.abs().max() == 0 for gradient in gradients)


def test_a_meta_step_leaves_the_network_as_it_is() -> None:
    network = tiny.network(policy=None).train()
    before = copy.deepcopy(network.state_dict())
    halves = [(torch.randn(4, 3, 32), torch.tensor([0, 1, 0, 1]))] * 2
    network.exits.eval()
    meta_loss(
        WeightNetwork(3, 5, 0.8, "row"), list(network.exits), halves, exit_quotas(3, 0.75), 0.1
    ).backward()
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.slow
def test_the_weight_network_learns(tmp_path: Path) -> None:
    deviations = []
    for meta_lr in (1e-9, 0.01):
        folder = tmp_path / str(meta_lr)
        train(l2w_den, folder, L2wDenSettings(**FAST, meta_lr=meta_lr))
        deviations.append(logged(folder)[-1]["weight_deviation"])
    assert deviations[1] > deviations[0] + 0.05


# Both


OTHER_COSEE = CoseeSettings(**FAST, signal="entropy", thresholds="quantile", gradient="equilibrium")
OTHER_L2W = L2wDenSettings(**FAST, centre="batch", meta_interval=3, weights="linear", plain_epochs=1)
RECIPES = [
    (cosee, CoseeSettings(**FAST)),
    pytest.param(cosee, OTHER_COSEE, marks=pytest.mark.slow),
    (l2w_den, L2wDenSettings(**FAST, meta_lr=0.001)),
    pytest.param(l2w_den, OTHER_L2W, marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "settings"), RECIPES)
def test_a_recipe_trains_and_its_exits_are_not_those_of_joint(
    recipe: ModuleType, settings: JointSettings, tmp_path: Path
) -> None:
    network, results = train(recipe, tmp_path / "specialists", settings)
    assert results["rule"] == getattr(settings, "signal", "max_probability")
    assert max(results["dev"]["exit_accuracy"]) > 80  # the last exit of cosee knows hard rows alone
    plain = JointSettings(**FAST, weights=settings.weights, gradient=settings.gradient)
    other, _ = train(joint, tmp_path / "joint", plain)
    for exit, other_exit in zip(network.exits, other.exits, strict=True):
        assert (exit.classify.weight - other_exit.classify.weight).abs().max() > 1e-3  # type: ignore[union-attr, operator]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "settings"), RECIPES)
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(
    recipe: ModuleType, settings: JointSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, dev, losses = encoded(40), encoded(16, 1), exit_losses
    settings = replace(settings, epochs=3)
    final_weights = []
    for kills in ((), (2, 6, 4)):  # calls of exit_losses
        for kill in (*kills, 0):
            network = tiny.network(policy=None)
            run = Run(network, tmp_path / str(len(kills)), seed=0, save_every=-1.0)
            calls_left = [kill]

            def interrupted(*arguments: Any, calls_left: list[int] = calls_left) -> Any:
                calls_left[0] -= 1
                if calls_left[0] == 0:
                    raise KeyboardInterrupt
                return losses(*arguments)

            monkeypatch.setattr(recipe, "exit_losses", interrupted)
            in_warm_start = replace(losses_of(network), by_label=interrupted)
            monkeypatch.setattr(joint, "losses_of", lambda network, losses=in_warm_start: losses)
            if kill:
                with pytest.raises(KeyboardInterrupt):
                    recipe.train(run, rows, dev, settings, skip_warm_start=False)
            else:
                recipe.train(run, rows, dev, settings, skip_warm_start=False)
        final_weights.append({name: value.clone() for name, value in network.state_dict().items()})
    for name, value in final_weights[0].items():
        assert value.equal(final_weights[1][name]), name


@pytest.mark.parametrize(
    "wrong",
    [
        {"signal": "energy"},
        {"thresholds": "other"},
        {"draws": 0},
        {"decay": -1.0},
        {"weights": "linear"},
        {"distill": 0.5},
    ],
)
def test_settings_of_cosee_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CoseeSettings(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"centre": "column"}, {"hidden": 0}, {"epsilon": -0.1}, {"quota": 0.0}, {"distill": 0.5}],
)
def test_settings_of_l2w_den_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        L2wDenSettings(**wrong)
