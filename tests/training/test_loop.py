"""Learning rates over a phase, and the optimizers of phases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from offramp.training.loop import MOMENTUM, Phase, Run


def no_loss(model: nn.Module, index: np.ndarray) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of a network of one weight: half its square."""
    return model.weight.square().sum() / 2, {"rate": 0.0}  # type: ignore[operator,union-attr]


PHASE = Phase("try", ("weight",), np.zeros(4, np.int64), no_loss, epochs=2, batch_size=1, lr=0.1)
PLAIN = replace(PHASE, optimizer="sgd", warmup=0.0, weight_decay=0.0, clip=1e9)


def weights_after(folder: Path, phase: Phase) -> list[float]:
    """The weight before training and after every step of the phase, from 1."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.ones_(network.weight)
    values = []

    def loss(model: nn.Module, index: np.ndarray) -> tuple[torch.Tensor, dict[str, float]]:
        values.append(float(network.weight.detach()))
        return no_loss(model, index)

    Run(network, folder, seed=0).fit(replace(phase, loss=loss))
    return [*values, float(network.weight.detach())]


def test_sgd_has_momentum_and_a_constant_rate_where_asked(tmp_path: Path) -> None:
    weight, speed, expected = 1.0, 0.0, [1.0]
    for _ in range(8):
        speed = MOMENTUM * speed + weight
        weight -= 0.1 * speed
        expected.append(weight)
    constant = replace(PLAIN, decay="cosine", last_share=1.0)
    assert weights_after(tmp_path, constant) == pytest.approx(expected, abs=1e-5)


def test_a_cosine_ends_near_its_last_share(tmp_path: Path) -> None:
    steps = 8
    weight, speed, expected = 1.0, 0.0, [1.0]
    for step in range(steps):
        fallen = max(step - 1, 0) / (steps - 1)  # the first step is the warm-up
        rate = 0.02 + (1 - 0.02) * (1 + np.cos(np.pi * fallen)) / 2
        speed = MOMENTUM * speed + weight
        weight -= 0.1 * rate * speed
        expected.append(weight)
    cosine = replace(PLAIN, decay="cosine", last_share=0.02)
    assert weights_after(tmp_path, cosine) == pytest.approx(expected, abs=1e-5)


def test_unknown_optimizers_and_decays_are_refused() -> None:
    for wrong in ({"optimizer": "adam"}, {"decay": "steps"}):
        with pytest.raises(ValueError, match="choose one of"):
            replace(PHASE, **wrong)  # type: ignore[arg-type]
