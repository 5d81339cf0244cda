"""Recipe consistentee_plus: qualities, prices and estimators by hand, and figures of earlier trainings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner

from offramp.training.cli import train
from offramp.training.recipes.consistentee import exit_distribution, reinforce_loss, sample_exits
from offramp.training.recipes.consistentee_plus import (
    ConsistentEEPlusSettings,
    draw_alpha,
    exit_qualities,
    policy_loss,
)

LOGITS = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [0.0, 4.0]]])
LABELS = torch.tensor([1])

# Losses that recipe consistentee logged at the first and last step of each phase when these were its methods.
DEFAULT = {"joint": (0.748276, 0.221342), "policy last": (-0.93778, -0.935469)}
ALTERNATED = {
    "joint": (0.6713, 0.398655),
    "policy 1": (0.619403, 0.709665),
    "both 1": (1.107224, 1.001467),
    "policy last": (0.494911, 0.596349),
}
ALTERNATION = ("rounds=1", "quality=ce", "hardness=true", "holdout=0.25")


def test_qualities() -> None:
    assert exit_qualities(LOGITS, LABELS, "correct").tolist() == [[0.0, 1.0, 1.0]]
    assert exit_qualities(LOGITS, torch.tensor([0]), "agree").tolist() == [[0.0, 1.0, 1.0]]
    losses = exit_qualities(LOGITS, LABELS, "ce")
    torch.testing.assert_close(losses[0], LOGITS[0].log_softmax(-1)[:, 1])


def test_prices_are_drawn_around_alpha_and_shift_the_gates() -> None:
    torch.manual_seed(0)
    settings = ConsistentEEPlusSettings(alpha=0.02, spread=4.0)
    alpha, shift = draw_alpha(4000, settings, torch.device("cpu"))
    assert 0.005 <= alpha.min() < 0.0055 and 0.075 < alpha.max() <= 0.08
    torch.testing.assert_close(shift, 3.0 * (alpha / 0.02).log(), atol=1e-4, rtol=0)
    same, no_shift = draw_alpha(3, ConsistentEEPlusSettings(alpha=0.02, spread=1.0), torch.device("cpu"))
    assert same.tolist() == pytest.approx([0.02] * 3) and no_shift.tolist() == [0.0] * 3


def test_the_estimators_are_the_expectation_and_reinforce() -> None:
    gate_logits, reward = torch.tensor([[0.3, -0.4]]), torch.tensor([[0.1, 0.9, 0.4]])
    expected = policy_loss(gate_logits, reward, ConsistentEEPlusSettings())
    torch.testing.assert_close(expected, -(exit_distribution(gate_logits) * reward).sum())
    losses = []
    for sampled_by_recipe in (True, False):
        torch.manual_seed(0)
        settings = ConsistentEEPlusSettings(estimator="sampled", trajectories=5)
        losses.append(
            policy_loss(gate_logits, reward, settings)
            if sampled_by_recipe
            else reinforce_loss(gate_logits, reward, sample_exits(gate_logits, 5))
        )
    assert losses[0].equal(losses[1]) and losses[0] != expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plus")
    tiny.model_folder(root / "model")
    tiny.data_folder(root / "data")
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("sets", "expected"), [((), DEFAULT), (ALTERNATION, ALTERNATED)])
def test_a_training_logs_what_it_logged_as_recipe_consistentee(
    folder: Path, tmp_path: Path, sets: tuple[str, ...], expected: dict[str, tuple[float, float]]
) -> None:
    fast = ["epochs=3", "batch_size=8", "lr=0.002", "heads_lr=0.01", "policy_epochs=4"]
    fast += ["both_lr=0.001", "both_heads_lr=0.001", *sets]
    words = ["--model", str(folder / "model"), "--data", str(folder / "data"), "--out", str(tmp_path / "c")]
    words += ["--recipe", "consistentee_plus", "--precision", "fp32"]
    done = CliRunner().invoke(train, [*words, *(word for name in fast for word in ("--set", name))])
    assert done.exit_code == 0, done.output
    losses: dict[str, list[float]] = {}
    for line in map(json.loads, (tmp_path / "c" / "log.jsonl").read_text().splitlines()):
        if "phase" in line and line["step"] in (1, line["of"]):
            losses.setdefault(line["phase"], []).append(line["loss"])
    assert list(losses) == list(expected)
    for phase, logged in losses.items():
        assert logged == pytest.approx(expected[phase], abs=2e-3), phase
    training = json.loads((tmp_path / "c" / "training.json").read_text())
    assert "published_points" not in training  # nothing here is the paper's
    network: dict[str, Any] = json.loads((tmp_path / "c" / "network.json").read_text())["network"]
    assert (network["pooling"], network["policy"]) == ("mean", "statistics")


@pytest.mark.parametrize(
    "wrong",
    [
        {"quality": "other"},
        {"estimator": "other"},
        {"policy": "other"},
        {"holdout": 1.0},
        {"alpha": 0.0},
        {"spread": 0.5},
        {"estimator": "sampled", "trajectories": 1},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="trajectories" if len(wrong) > 1 else next(iter(wrong))):
        ConsistentEEPlusSettings(**wrong)  # type: ignore[arg-type]
