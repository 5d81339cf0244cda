"""joint: all exits train at once, deeper ones weigh more (PABEE's training; ConsistentEE's warm start).

Loss: sum over exits l of l * CE_l / sum of l (PABEE, arXiv 2006.04152; also ConsistentEE's first stage).

We differ in the defaults (3 epochs, lr 5e-5 and 1e-3 for the exits, warm-up and decay, weight decay 0.01),
and an exit is one linear layer on the standardized mean of the tokens, unless --pooling cls asks for the
published shared pooler on the first token.

Expect: e5-small on sst2, 3 epochs, about 6 minutes on 2 cores with AMX; 90.2 % on test at the last exit.

    ee-train --model MODEL --data DATA --recipe joint --out ckpt/
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.models.network import EarlyExitNetwork
from offramp.training.batches import Encoded
from offramp.training.collect import operating_points
from offramp.training.loop import Phase, Run

EVERYTHING = ("backbone", "exits", "pooler")


@dataclass(frozen=True)
class JointSettings:
    """Settings of recipe joint; heads_lr: learning rate of the exits, which have no pretrained weights."""

    epochs: int = 3
    batch_size: int = 32
    lr: float = 5e-5
    heads_lr: float = 1e-3

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1 or self.lr <= 0:
            raise ValueError(f"epochs, batch_size and lr must be positive: {self}")


KIND: Literal["classifier"] = "classifier"
SETTINGS = JointSettings
STARTS_FROM: str | None = None


def policy_of(settings: JointSettings) -> str | None:
    """The kind of policies: None, since this recipe trains no policy."""
    return None


def exit_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of every exit [batch, exits]; logits [batch, exits, classes], labels [batch]."""
    rows, exits, _ = logits.shape
    repeated = labels[:, None].expand(rows, exits)
    return functional.cross_entropy(logits.float().flatten(0, 1), repeated.flatten(), reduction="none").view(
        rows, exits
    )


def joint_loss(losses: Tensor) -> Tensor:
    """The mean loss over exits, weighted by their number (1-based), a scalar; losses [batch, exits]."""
    weights = torch.arange(1, losses.shape[1] + 1, device=losses.device, dtype=losses.dtype)
    return (losses * weights).sum(1).mean() / weights.sum()


def warm_start(
    run: Run[EarlyExitNetwork],
    train: Encoded,
    settings: JointSettings,
    combine: Callable[[Tensor], Tensor] = joint_loss,
    name: str = "joint",
) -> None:
    """Train backbone and exits by cross-entropy, in one phase that several recipes share.

    combine: computes the minimized scalar from the exits' losses [batch, exits].
    """

    def loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        inputs, labels = train.batch(index, run.accelerator.device)
        losses = exit_losses(model(inputs).logits, labels)
        return combine(losses), {
            "first": float(losses[:, 0].detach().mean()),
            "last": float(losses[:, -1].detach().mean()),
        }

    s = settings
    run.fit(Phase(name, EVERYTHING, train.lengths, loss, s.epochs, s.batch_size, s.lr, s.heads_lr))


def train(
    run: Run[EarlyExitNetwork],
    train: Encoded,
    dev: Encoded,
    settings: JointSettings,
    *,
    skip_warm_start: bool,
) -> dict[str, Any]:
    """Train backbone and exits (with --init: further); return dev figures and operating points."""
    warm_start(run, train, settings)
    return operating_points(run, dev, "max_probability")
