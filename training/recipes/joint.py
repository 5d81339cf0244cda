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

from offramp.models.network import GRADIENTS, EarlyExitNetwork, ExitParts
from offramp.training.batches import Encoded
from offramp.training.collect import default_rule, fit_thresholds, operating_points
from offramp.training.loop import Phase, Run
from offramp.training.losses import label_divergence, losses_of

EVERYTHING = ("backbone", "exits", "pooler")
WEIGHTS = ("linear", "uniform", "descending", "learned")


@dataclass(frozen=True)
class JointSettings:
    """Settings of recipe joint and of every recipe's joint warm start.

    heads_lr: learning rate of the exits, which have no pretrained weights. plain_epochs: epochs before that
    in which the last exit alone is trained (ordinary fine-tuning; "mixed" training). weights: of the exits'
    losses, see loss_weights. gradient: which exits' gradients a block gets, see share_gradient in
    models.network. distill: share of the loss of an early exit that compares it with the last exit's
    probabilities instead of the label; temperature: of both in this comparison. warmup: share of the steps in
    which the learning rates rise.
    """

    epochs: int = 3
    batch_size: int = 32
    lr: float = 5e-5
    heads_lr: float = 1e-3
    plain_epochs: int = 0
    weights: str = "linear"
    gradient: str = "full"
    distill: float = 0.0
    temperature: float = 2.0
    warmup: float = 0.1
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1 or self.lr <= 0:
            raise ValueError(f"epochs, batch_size and lr must be positive: {self}")
        for name, value, known in (
            ("weights", self.weights, WEIGHTS),
            ("gradient", self.gradient, GRADIENTS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value}: choose one of {', '.join(known)}")
        if not 0 <= self.distill <= 1 or self.temperature <= 0:
            raise ValueError(f"distill={self.distill}, temperature={self.temperature}: 0 to 1, above 0")


KIND: Literal["classifier"] = "classifier"
NEEDS_LABELS = True
SETTINGS = JointSettings
STARTS_FROM: str | None = None


def parts_of(settings: JointSettings) -> ExitParts:
    """The default parts, without a policy: this recipe trains no policy."""
    return ExitParts()


def loss_weights(losses: Tensor, kind: str) -> Tensor:
    """Weights of the exits' mean losses [exits], which sum to 1; losses [exits].

    linear: the exit's number (PABEE). uniform: equal. descending: later exits weigh less, L + 1 - l. learned:
    proportional to 1 / loss, where the weights of Kendall et al. (arXiv 1705.07115), exp(-s) with the penalty
    s, have their optimum.
    """
    number = torch.arange(1, len(losses) + 1, device=losses.device, dtype=losses.dtype)
    weights = {
        "linear": number,
        "uniform": torch.ones_like(number),
        "descending": number.flip(0),
        "learned": 1 / losses.detach().clamp(min=1e-3),
    }[kind]
    return weights / weights.sum()


def joint_loss(losses: Tensor, kind: str = "linear") -> Tensor:
    """The weighted mean loss over exits, a scalar; losses [batch, exits], kind: see loss_weights."""
    each = losses.mean(0)
    return (each * loss_weights(each, kind)).sum()


def distillation_losses(logits: Tensor, temperature: float) -> Tensor:
    """The divergence of every exit from the last one [batch, exits], 0 for the last.

    logits [batch, exits, classes]. No gradient flows into the last exit.
    """
    return label_divergence(logits, logits[:, -1:].detach(), temperature)


def warm_start(
    run: Run[EarlyExitNetwork],
    train: Encoded,
    settings: JointSettings,
    combine: Callable[[Tensor], Tensor] | None = None,
    name: str = "joint",
) -> None:
    """Train backbone and exits by the loss of the network's task, in one or two phases that recipes share.

    combine: computes the minimized scalar from the exits' losses [batch, exits]; None: the weighted mean of
    the settings.
    """
    s = settings
    combined = (lambda losses: joint_loss(losses, s.weights)) if combine is None else combine
    task = losses_of(run.network)

    def loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        inputs, labels = train.batch(index, run.accelerator.device)
        logits = model(inputs, gradient=s.gradient).logits
        known = task.known(labels)  # all but words without a label
        logits, labels = logits[known], labels[known]
        losses = task.by_label(logits, labels)
        figures = {
            "first": float(losses[:, 0].detach().mean()),
            "last": float(losses[:, -1].detach().mean()),
        }
        if s.distill:
            imitation = task.divergence(logits, logits[:, -1:].detach(), s.temperature)
            early = (1 - s.distill) * losses + s.distill * imitation
            losses = torch.cat([early[:, :-1], losses[:, -1:]], 1)
        return combined(losses), figures

    def plain_loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        inputs, labels = train.batch(index, run.accelerator.device)
        known = task.known(labels)
        return task.by_label(model(inputs).logits[known][:, -1:], labels[known]).mean(), {}

    sizes = (s.batch_size, s.lr, s.heads_lr, s.warmup, s.weight_decay)
    if s.plain_epochs:
        run.fit(Phase("plain", EVERYTHING, train.lengths, plain_loss, s.plain_epochs, *sizes))
    run.fit(Phase(name, EVERYTHING, train.lengths, loss, s.epochs, *sizes))


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
    fit_thresholds(run, dev)
    return operating_points(run, dev, default_rule(run.network))
