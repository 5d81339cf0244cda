"""berxit: alternating training of the last exit and of all exits, and a learning-to-exit layer (EACL 2021).

Even steps minimize CE_L, odd steps the sum of all CE_l. At every step the learning-to-exit layer, one linear
layer on the pooled state for all exits, is trained by squared error to predict whether the exit is wrong; its
loss is added. A row exits where the layer predicts that the exit is right (policy lte, rule gate).

We differ: exits and rates are those of recipe joint (the paper's exits: linear on BERT's pooler), and the
threshold is chosen on dev; regression is not implemented. With --init all parts are trained further. Setting
gradient belongs to the odd steps: on even ones the last exit alone gives a gradient.

Expect: e5-small on sst2, about 10 minutes on one core; 85.2 % on test with 50 % of multiply-accumulates
saved, the lowest of all recipes: 3.4 below max-probability on recipe joint (docs/measured.md).

    ee-train --model MODEL --data DATA --recipe berxit --out ckpt/
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from offramp.models.network import EarlyExitNetwork, ExitParts
from offramp.training.batches import Encoded
from offramp.training.collect import operating_points
from offramp.training.loop import Phase, Run
from offramp.training.losses import exit_losses
from offramp.training.recipes.joint import EVERYTHING, JointSettings


@dataclass(frozen=True)
class BerxitSettings(JointSettings):
    """Settings of recipe joint; those of losses that this recipe does not have are refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights != JointSettings.weights:
            raise ValueError(f"weights={self.weights}: recipe berxit has the sum of all exits' losses")
        if self.distill or self.plain_epochs:
            raise ValueError(
                f"distill={self.distill}, plain_epochs={self.plain_epochs}: recipe berxit has neither"
            )


KIND: Literal["classifier"] = "classifier"
NEEDS_LABELS = True
SETTINGS = BerxitSettings
STARTS_FROM: str | None = None


def parts_of(settings: BerxitSettings) -> ExitParts:
    """The parts with policies, "lte": one learning-to-exit layer for all exits."""
    return ExitParts(policy="lte")


def task_loss(losses: Tensor, step: int) -> Tensor:
    """The last exit's loss on even steps, the sum of all on odd ones, a scalar; losses [batch, exits]."""
    return (losses.sum(1) if step % 2 else losses[:, -1]).mean()


def policy_loss(gate_logits: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Squared error of P(wrong), summed over the exits but the last, mean over rows.

    gate_logits [batch, exits - 1]: logits of P(right); logits [batch, exits, classes], labels [batch].
    """
    wrong = (logits[:, :-1].argmax(-1) != labels[:, None]).float()
    return ((-gate_logits).sigmoid() - wrong).square().sum(1).mean()


def train(
    run: Run[EarlyExitNetwork],
    train: Encoded,
    dev: Encoded,
    settings: BerxitSettings,
    *,
    skip_warm_start: bool,
) -> dict[str, Any]:
    """Train all parts in one phase; return dev figures and operating points."""
    s = settings

    def loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        step = run.position["step"]
        inputs, labels = train.batch(index, run.accelerator.device)
        outputs = model(inputs, gradient=s.gradient if step % 2 else "full")
        task = task_loss(exit_losses(outputs.logits, labels), step)
        policy = policy_loss(outputs.gate_logits.float(), outputs.logits, labels)
        return task + policy, {"task": float(task.detach()), "policy": float(policy.detach())}

    trains = (*EVERYTHING, "policies")
    sizes = (s.batch_size, s.lr, s.heads_lr, s.warmup, s.weight_decay)
    run.fit(Phase("berxit", trains, train.lengths, loss, s.epochs, *sizes))
    return operating_points(run, dev, "gate")
