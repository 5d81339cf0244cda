"""cosee: every step simulates exits at random thresholds; a row trains most where it exits (AAAI 2025).

COSEE (arXiv 2412.13236) has one stage. In every step `draws` thresholds of the signal are drawn, and for each
one the exit e of every row is found. The weight of exit l for that row is softmax over l of -d * |l - e|,
where d grows linearly from 0 to `decay` over the training: all exits learn the same at first, and at the end
each exit learns from the rows that leave there. The loss is the weighted cross-entropy, the mean over
thresholds and rows, plus `calibration` times a hinge loss at every exit but the last: the mean signal of the
right rows and that of the wrong rows shall lie at least `margin` apart. Rows exit by the signal.

Seen: the abstract and the authors' code (He-Jianing/COSEE, commit 6e20f29); not the paper's equations and
tables. The values of the settings are those of its script for SST-2.

We differ: rates, epochs and exits are those of recipe joint (the code: 10 epochs, rate 2e-5, one tanh pooler
on the first token, which --pooling cls gives). The signal is the top probability or the entropy; the code's
own choice, 1 / (1 + sum of exp(logits)), is no exit rule here, and its temperature is 1. The range of the
thresholds of an epoch is that of the signals of RANGE_ROWS rows at its start, without dropout (the code: of
all batches of the epoch before). Extension: thresholds=quantile draws quantiles of the batch's signals, so
that simulated exits spread over all depths; with thresholds=uniform, as published, most rows may leave at the
first exits once the signals are sharp. At the end the last exit learns from the rows that reach it alone, so
that its accuracy on all rows, "full" in training.json, can lie below that of a walk.

Expect: a step takes the time of one of recipe joint; accuracy is not measured yet.

    ee-train --model MODEL --data DATA --recipe cosee --out ckpt/
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from offramp.models.network import EarlyExitNetwork, ExitParts
from offramp.training.batches import Encoded
from offramp.training.collect import collect, operating_points
from offramp.training.loop import Phase, Run
from offramp.training.losses import exit_losses
from offramp.training.recipes.deebert import fine_tune
from offramp.training.recipes.joint import EVERYTHING, JointSettings

SIGNALS = ("max_probability", "entropy")  # also the names of the exit rules that read them
THRESHOLDS = ("uniform", "quantile")
RANGE_ROWS = 1024  # of the training rows, for the range of an epoch's thresholds


@dataclass(frozen=True)
class CoseeSettings(JointSettings):
    """Settings of recipe joint and those of the simulated exits.

    signal: one of SIGNALS. thresholds: one of THRESHOLDS. draws: thresholds a step. decay: of the weights
    with the distance from the exit, at the end of the training. calibration: factor on the hinge loss of the
    signals; margin: the difference of signals from which it is 0.
    """

    weights: str = "uniform"
    signal: str = "max_probability"
    thresholds: str = "uniform"
    draws: int = 5
    decay: float = 10.0
    calibration: float = 0.1
    margin: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, known in (
            ("signal", self.signal, SIGNALS),
            ("thresholds", self.thresholds, THRESHOLDS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value}: choose one of {', '.join(known)}")
        if self.draws < 1 or min(self.decay, self.calibration, self.margin) < 0:
            raise ValueError(f"draws from 1; decay, calibration and margin from 0: {self}")
        refuse_joint_losses(self, "cosee")


def refuse_joint_losses(settings: JointSettings, recipe: str, *, weights: bool = True) -> None:
    """Raise ValueError for settings of recipe joint that a recipe with weights for every row does not read.

    weights: whether the setting of that name is one of them.
    """
    if weights and settings.weights != "uniform":
        raise ValueError(f"weights={settings.weights}: recipe {recipe} weighs the exits of every row itself")
    if settings.distill:
        raise ValueError(f"distill={settings.distill}: recipe {recipe} has no distillation")


KIND: Literal["classifier"] = "classifier"
NEEDS_LABELS = True
SETTINGS = CoseeSettings
STARTS_FROM: str | None = None


def parts_of(settings: CoseeSettings) -> ExitParts:
    """The default parts, without a policy: the signal decides."""
    return ExitParts()


def exit_signals(logits: Tensor, signal: str) -> Tensor:
    """The signal of every exit [batch, exits], in 0..1; logits [batch, exits, classes].

    The entropy is a share of its maximum, log(classes).
    """
    log_probabilities = logits.float().log_softmax(-1)
    if signal == "max_probability":
        return log_probabilities.amax(-1).exp()
    return -(log_probabilities.exp() * log_probabilities).sum(-1) / math.log(logits.shape[-1])


def simulated_exits(signals: Tensor, thresholds: Tensor, signal: str) -> Tensor:
    """The exit (0-based) at which each row leaves under each threshold [draws, batch].

    signals [batch, exits], that of the last exit is not read; thresholds [draws].
    """
    early, limits = signals[None, :, :-1], thresholds[:, None, None]
    exits = early >= limits if signal == "max_probability" else early <= limits
    return torch.cat([exits, torch.ones_like(exits[..., :1])], -1).int().argmax(-1)


def distance_weights(exits: int, decay: float) -> Tensor:
    """The weights of all exits [exits] for rows that leave at each exit [exits]; rows sum to 1."""
    number = torch.arange(exits, dtype=torch.float32)
    return (-decay * (number[:, None] - number).abs()).softmax(-1)


def row_weights(signals: Tensor, thresholds: Tensor, signal: str, decay: float) -> Tensor:
    """The weights of every row's losses [batch, exits], the mean over thresholds; each row's sum is 1.

    signals [batch, exits], thresholds [draws].
    """
    table = distance_weights(signals.shape[1], decay).to(signals.device)
    weights: Tensor = table[simulated_exits(signals, thresholds, signal)]  # [draws, batch, exits]
    return weights.mean(0)


def calibration_loss(signals: Tensor, right: Tensor, margin: float, signal: str) -> Tensor:
    """The hinge loss of the early exits' signals, a scalar: max(0, margin - gap), mean over exits.

    signals and right (bool) [batch, exits]. gap: how much surer the mean of the right rows is than that of
    the wrong ones. Exits at which all rows are right, or all wrong, do not count.
    """
    signals, right = signals[:, :-1], right[:, :-1].to(signals.dtype)
    rights = right.sum(0)  # [exits - 1]
    wrongs = len(right) - rights
    of_right = (signals * right).sum(0) / rights.clamp(min=1)
    gap = of_right - (signals * (1 - right)).sum(0) / wrongs.clamp(min=1)
    if signal == "entropy":  # the lower, the surer
        gap = -gap
    counts = (rights > 0) & (wrongs > 0)
    return ((margin - gap).clamp(min=0) * counts).sum() / counts.sum().clamp(min=1)


def train(
    run: Run[EarlyExitNetwork],
    train: Encoded,
    dev: Encoded,
    settings: CoseeSettings,
    *,
    skip_warm_start: bool,
) -> dict[str, Any]:
    """Train backbone and exits in one phase (with --init: further); return dev figures and points."""
    s, device = settings, run.accelerator.device
    fine_tune_first(run, train, s, skip_warm_start=skip_warm_start)
    batches = math.ceil(len(train) / s.batch_size)  # of an epoch
    world = run.accelerator.num_processes
    total = batches * s.epochs // world
    ranges = {0: torch.tensor([0.0, 1.0])}  # of thresholds, by epoch

    def draw_thresholds(signals: Tensor) -> Tensor:
        drawn = torch.rand(s.draws, device=device)
        if s.thresholds == "quantile":
            return torch.quantile(signals[:, :-1].flatten(), drawn)
        epoch = run.position["step"] * world // batches
        if epoch not in ranges:
            ranges[epoch] = run.compute_once(f"signals-{epoch}", lambda: _signal_range(run, train, s.signal))
        low, high = (float(limit) for limit in ranges[epoch])
        return low + (high - low) * drawn

    def loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        inputs, labels = train.batch(index, device)
        logits = model(inputs, gradient=s.gradient).logits
        signals = exit_signals(logits, s.signal)
        with torch.no_grad():
            decay = s.decay * run.position["step"] / total
            weights = row_weights(signals, draw_thresholds(signals), s.signal, decay)
        task = (weights * exit_losses(logits, labels)).sum(1).mean()
        right = logits.argmax(-1) == labels[:, None]
        calibration = calibration_loss(signals, right, s.margin, s.signal)
        figures = {
            "task": float(task.detach()),
            "calibration": float(calibration.detach()),
            "first_weight": float(weights[:, 0].mean()),
            "last_weight": float(weights[:, -1].mean()),
        }
        return task + s.calibration * calibration, figures

    sizes = (s.batch_size, s.lr, s.heads_lr, s.warmup, s.weight_decay)
    run.fit(Phase("cosee", EVERYTHING, train.lengths, loss, s.epochs, *sizes))
    return operating_points(run, dev, s.signal)


def fine_tune_first(
    run: Run[EarlyExitNetwork], train: Encoded, settings: JointSettings, *, skip_warm_start: bool
) -> None:
    """Train backbone and last exit alone for plain_epochs, unless a checkpoint replaces this phase."""
    epochs = settings.plain_epochs
    if epochs and not skip_warm_start:
        fine_tune(run, train, replace(settings, epochs=epochs, plain_epochs=0, gradient="full"))


def _signal_range(run: Run[EarlyExitNetwork], train: Encoded, signal: str) -> Tensor:
    """The least and the greatest signal [2] of the early exits on some training rows."""
    rows = np.random.default_rng([run.seed, 41]).permutation(len(train))[:RANGE_ROWS]
    device = run.accelerator.device
    logits = collect(run.network, train.take(rows), device=device, description="signals").logits
    signals = exit_signals(logits[:, :-1], signal)
    return torch.stack([signals.min(), signals.max()])
