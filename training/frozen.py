"""Exits on a frozen backbone: what it says is computed once, and the exits learn on that in seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.models.network import EarlyExitNetwork
from offramp.training.collect import Collected
from offramp.training.loop import Run, Stage

# (logits of the exits but the last [batch, exits - 1, classes], row numbers [batch]) -> scalar
Loss = Callable[[Tensor, Tensor], Tensor]


def early_logits(network: EarlyExitNetwork, pooled: Tensor) -> Tensor:
    """What the exits but the last say today [batch, exits - 1, classes]; pooled [batch, exits, hidden]."""
    exits = range(pooled.shape[1] - 1)
    return torch.stack([network.classify(index, pooled[:, index]) for index in exits], dim=1)


def fit_exits(
    run: Run, seen: Collected, loss: Loss, *, name: str, epochs: int, batch_size: int, lr: float
) -> None:
    """One stage in which the exits but the last learn from `seen`; the last, never called, stays as it is."""
    device = run.accelerator.device

    def step(model: Any, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        rows = torch.from_numpy(index)
        with torch.autocast(device.type, enabled=False):  # one linear layer: bf16 would only blur it
            return loss(early_logits(run.network, seen.pooled[rows].to(device)), rows), {}

    lengths = np.zeros(len(seen.labels), np.int64)  # features have no length
    run.fit(Stage(name, ("exits",), lengths, step, epochs, batch_size, lr, shared=False))
