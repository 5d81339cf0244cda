"""jei_dnn: gates on the exits' uncertainty are trained to open at the cheapest exit (arXiv 2310.09163).

1 ordinary fine-tuning of the backbone and its last exit, as in recipe deebert, or --init; frozen afterwards.
2 warm-up: new linear exits train on the frozen backbone, the exit after l others weighs L - l, each stops
early by its accuracy on dev.  3 gates and exits train in turns, gates first. Gates: target t_l = 1 for l >=
l*, where l* = argmin over l of CE_l + price * cost_l (the last exit included, cost 1), by BCE with positives
weighted min(5, #0 / #1), counted on dev before every epoch. Exits: see weighting. Policy jei computes the
conditional; a row exits where it is above one half (point "trained"). SGD: rate 0.01, momentum 0.9, weight
decay 5e-4, constant in the warm-up, in the turns a cosine to 2e-4.

price is the paper's lambda: a sweep is one run for every price. Points at thresholds other than that of
"trained" come from one run and are our extension.

weighting: as_intended weighs CE_l by P_l, the probability of exiting there, scaled to the size of the sum of
CE_l. as_run is what the public code computes: there the scale is not detached, so the weights cancel in the
gradient and the plain sum remains.

Extensions: backbone=tuned lets exit turns train backbone and last exit too; new_exits=false continues with
the exits of --init, such as those of recipe joint; optimizer=adamw, with warm-up and decay.

We differ: costs are multiply-accumulates of the row's tokens, exits and gates included, as a share of the
whole walk (the public code: each linear layer once); an exit standardizes its input, which reads the mean of
the tokens (the paper's: images, the first token; ask for it with --pooling cls); the weights of the warm-up
are divided by L, without which this rate diverges at 12 exits; turns go on from epoch to epoch (the public
code: every epoch begins with the gates, so that small data would never train the exits), at least turn_steps
of them, the number of 10 epochs of CIFAR-10, and the last turn is the gates'.

Expect: e5-small on sst2, two minutes on one core after recipe deebert. Measured so far with joint's backbone
and exits and with AdamW alone: 89.5 % on test with 52 % of multiply-accumulates saved (docs/measured.md).

    ee-train --init DEEBERT --data DATA --recipe jei_dnn --out ckpt/ --set price=0.5
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from offramp.models.network import EarlyExitNetwork, ExitParts
from offramp.models.policies.jei import JeiGate, exit_probabilities
from offramp.training.batches import Encoded
from offramp.training.collect import Collected, collect, exit_costs, operating_points
from offramp.training.frozen import EarlyStopping, early_logits, exits_phase, reset_early_exits
from offramp.training.loop import OPTIMIZERS, Phase, Run
from offramp.training.losses import exit_losses
from offramp.training.recipes.deebert import fine_tune
from offramp.training.recipes.joint import EVERYTHING, JointSettings

WEIGHTINGS = ("as_run", "as_intended")
BACKBONES = ("frozen", "tuned")
MAX_POSITIVE_WEIGHT = 5.0  # of a gate's rare positives
MIN_COUNT = 0.1  # of rows of a target, which avoids a division by zero


SGD_DECAY, SGD_LAST_SHARE = 5e-4, 0.02  # weight decay; last rate as a share of the first, 2e-4 of 0.01


@dataclass(frozen=True)
class Rates:
    """Learning rates of the warm-up, and of exits and gates in their turns."""

    warm: float
    exits: float
    gates: float


RATES = {"sgd": Rates(0.01, 0.01, 0.01), "adamw": Rates(1e-3, 3e-4, 3e-2)}


@dataclass(frozen=True)
class JeiDnnSettings(JointSettings):
    """Settings of recipe jei_dnn: phase 1 as in recipe joint; warm_*: phase 2; switch: batches of a turn.

    A learning rate of 0 is the optimizer's of RATES. turn_epochs: at least, and so many more that there are
    turn_steps steps if the backbone is frozen.
    """

    backbone: str = "frozen"
    weighting: str = "as_run"
    price: float = 0.5
    optimizer: str = "sgd"
    new_exits: bool = True
    warm_epochs: int = 20
    warm_lr: float = 0.0
    patience: int = 2
    turn_epochs: int = 10
    turn_steps: int = 7000
    turn_batch: int = 64
    switch: int = 200
    exits_lr: float = 0.0
    gates_lr: float = 0.0
    tuned_lr: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, known in (
            ("backbone", self.backbone, BACKBONES),
            ("weighting", self.weighting, WEIGHTINGS),
            ("optimizer", self.optimizer, OPTIMIZERS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value}: choose one of {', '.join(known)}")
        if self.price < 0 or min(self.patience, self.turn_epochs, self.turn_batch, self.switch) < 1:
            raise ValueError(f"price from 0; patience, turn_epochs, turn_batch and switch from 1: {self}")
        if self.backbone == "tuned" and self.optimizer != "adamw":
            raise ValueError("backbone=tuned needs optimizer=adamw: the rate of sgd is for exits and gates")

    @property
    def rates(self) -> Rates:
        """The learning rates: those that are set, else the optimizer's."""
        usual = RATES[self.optimizer]
        return Rates(self.warm_lr or usual.warm, self.exits_lr or usual.exits, self.gates_lr or usual.gates)

    def adapt(self, phase: Phase, last_share: float) -> Phase:
        """The phase with the optimizer of these settings.

        last_share: the rate at the end as a share of the first, for sgd.
        """
        if self.optimizer == "adamw":
            return phase
        sgd = replace(phase, optimizer="sgd", decay="cosine", last_share=last_share)
        return replace(sgd, warmup=0.0, weight_decay=SGD_DECAY, clip=math.inf)

    def epochs_of_turns(self, steps_per_epoch: int) -> int:
        """How many epochs the turns take."""
        enough = ceil(self.turn_steps / steps_per_epoch) if self.backbone == "frozen" else 0
        return max(self.turn_epochs, enough)


KIND: Literal["classifier"] = "classifier"
NEEDS_LABELS = True
SETTINGS = JeiDnnSettings
STARTS_FROM: str | None = "deebert"


def parts_of(settings: JeiDnnSettings) -> ExitParts:
    """The parts with policies, "jei": gates on the exits' uncertainty."""
    return ExitParts(policy="jei")


def gate_targets(losses: Tensor, costs: Tensor, price: float) -> Tensor:
    """The gates' targets [batch, exits - 1]: 1 from the exit with the least CE_l + price * cost_l on, else 0.

    losses and costs [batch, exits].
    """
    best = (losses + price * costs).argmin(1, keepdim=True)  # [batch, 1]
    return (torch.arange(losses.shape[1] - 1, device=losses.device) >= best).float()


def positive_weights(targets: Tensor) -> Tensor:
    """The weight of each gate's positive targets [exits - 1]: min(5, rows of target 0 / rows of target 1).

    targets [rows, exits - 1].
    """
    ones = targets.sum(0)
    zeros = len(targets) - ones
    return (zeros.clamp(min=MIN_COUNT) / ones.clamp(min=MIN_COUNT)).clamp(max=MAX_POSITIVE_WEIGHT)


def exit_turn_loss(losses: Tensor, probabilities: Tensor, weighting: str) -> Tensor:
    """The loss of an exit turn, a scalar: losses and P(exit at l) [batch, exits], the same exits in both.

    For a row that exits at none of them (P sums to zero), as_run uses its plain sum, as_intended zero.
    """
    total = losses.sum(1)
    weighted = (probabilities * losses).sum(1)  # [batch]
    no_exit = weighted <= 1e-12
    scale = total / weighted.masked_fill(no_exit, 1.0)
    if weighting == "as_intended":
        row_losses = weighted * scale.detach()
    else:
        row_losses = torch.where(no_exit, total, weighted * scale)
    return row_losses.mean() / losses.shape[1]


def single_gate_logits(network: EarlyExitNetwork, logits: Tensor) -> Tensor:
    """Logits of each gate's own probability g [batch, exits - 1], before it is made conditional on reaching
    it.

    logits [batch, exits, classes].
    """
    columns = []
    for index, gate in enumerate(network.policies):
        assert isinstance(gate, JeiGate)
        columns.append(gate.gate_logit(logits[:, index]))
    return torch.stack(columns, 1)


def turn_number(step: int, steps: int, switch: int) -> int:
    """The number of the turn that a step belongs to; even turns, the last among them, train the gates."""
    turn_count = max(3, round(steps / switch)) // 2 * 2 + 1
    return step * turn_count // steps


def train(
    run: Run[EarlyExitNetwork],
    train: Encoded,
    dev: Encoded,
    settings: JeiDnnSettings,
    *,
    skip_warm_start: bool,
) -> dict[str, Any]:
    """Run all phases; return dev figures and the operating points chosen on dev."""
    device = run.accelerator.device
    if not skip_warm_start:
        fine_tune(run, train, settings)
    if settings.new_exits and run.between_phases:
        reset_early_exits(run.network, run.seed)
    features, dev_features = (
        collect(run.network, rows, device=device, description="features") for rows in (train, dev)
    )
    _warm_up(run, features, dev_features, settings)
    _fit_in_turns(run, train, dev, features, dev_features, settings)
    points = operating_points(run, dev, "gate")
    return {**points, "published_points": ["trained"]}  # one a price; the others are our extension


def _warm_up(
    run: Run[EarlyExitNetwork], features: Collected, dev: Collected, settings: JeiDnnSettings
) -> None:
    exits = features.logits.shape[1]
    weights = torch.arange(exits, 1, -1.0) / exits  # (L - l) / L for l from 0
    stopping = EarlyStopping(run, dev, patience=settings.patience, name="warm-up")
    steps_per_epoch = ceil(len(features.labels) / settings.turn_batch)

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        stopping.evaluate(run.position["step"] // steps_per_epoch)
        losses = exit_losses(logits, features.labels[rows].to(logits.device))
        return (losses * (weights * stopping.active).to(losses.device)).sum(1).mean()

    sizes = {"epochs": settings.warm_epochs, "batch_size": settings.turn_batch}
    phase = exits_phase(run, features, loss, name="warm-up", lr=settings.rates.warm, **sizes)
    run.fit(settings.adapt(phase, last_share=1.0))
    if run.between_phases:
        stopping.evaluate(settings.warm_epochs)
        stopping.restore_best()


def _fit_in_turns(
    run: Run[EarlyExitNetwork],
    train: Encoded,
    dev: Encoded,
    features: Collected,
    dev_features: Collected,
    settings: JeiDnnSettings,
) -> None:
    if run.skip_finished_phase():
        return
    network, device, frozen = run.network, run.accelerator.device, settings.backbone == "frozen"
    steps_per_epoch = ceil(len(train) / settings.turn_batch)
    epochs = settings.epochs_of_turns(steps_per_epoch)
    steps = steps_per_epoch * epochs
    costs = cost_shares(network, train.lengths)
    weights: dict[int, Tensor] = {}  # epoch -> of the gates' positives

    def current_logits(index: np.ndarray, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits of the current exits [batch, exits, classes], and labels [batch]."""
        if not frozen:
            inputs, labels = train.batch(index, device)
            return model(inputs).logits, labels
        rows = torch.from_numpy(index)
        with torch.autocast(device.type, enabled=False):  # as in the warm-up
            logits = early_logits(network, features.pooled[rows].to(device))
        last = features.logits[rows, -1:].to(device)
        return torch.cat([logits, last], 1), features.labels[rows].to(device)

    def loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        step = run.position["step"]
        epoch = step // steps_per_epoch
        if epoch not in weights:
            count = _positive_counter(run, dev, dev_features, settings)
            weights[epoch] = run.compute_once(f"positives-{epoch}", count).to(device)
        if turn_number(step, steps, settings.switch) % 2:
            logits, labels = current_logits(index, model)
            with torch.no_grad():
                probabilities = exit_probabilities(single_gate_logits(network, logits.float()).sigmoid())
            if not frozen:  # the last exit is trained too, on the rows that remain
                remaining = 1 - probabilities.sum(1, keepdim=True)
                probabilities = torch.cat([probabilities, remaining], 1)
            losses = exit_losses(logits, labels)[:, : probabilities.shape[1]]
            return exit_turn_loss(losses, probabilities, settings.weighting), {"turn": 1.0}
        network.eval()  # gates will read exits without dropout
        with torch.no_grad():
            logits, labels = current_logits(index, model)
            row_costs = costs[torch.from_numpy(index)].to(device)
            targets = gate_targets(exit_losses(logits, labels), row_costs, settings.price)
        network.train()
        with torch.autocast(device.type, enabled=False):
            gate_logits = single_gate_logits(network, logits.float())
            gate_loss = binary_cross_entropy_with_logits(gate_logits, targets, pos_weight=weights[epoch])
        return gate_loss, {"turn": 0.0, "optimal": float(1 + (1 - targets).sum(1).mean())}

    trains = ("exits", "policies") if frozen else (*EVERYTHING, "policies")
    lengths = np.zeros(len(train), np.int64) if frozen else train.lengths
    s, rates = settings, settings.rates
    phase = Phase("turns", trains, lengths, loss, epochs, s.turn_batch, s.tuned_lr, rates.exits)
    run.fit(s.adapt(replace(phase, policies_lr=rates.gates, shared=not frozen), SGD_LAST_SHARE))


def _positive_counter(
    run: Run[EarlyExitNetwork], dev: Encoded, features: Collected, settings: JeiDnnSettings
) -> Callable[[], Tensor]:
    """A function that computes the weights of the gates' positives on dev, with the current exits."""

    def count() -> Tensor:
        network, device = run.network, run.accelerator.device
        was_training = network.training
        network.eval()
        with torch.no_grad():
            if settings.backbone == "frozen":
                early = early_logits(network, features.pooled.to(device)).cpu()
                logits = torch.cat([early, features.logits[:, -1:]], 1)
            else:
                logits = collect(network, dev, device=device, description="dev").logits
        network.train(was_training)
        losses = exit_losses(logits, features.labels)
        return positive_weights(gate_targets(losses, cost_shares(network, dev.lengths), settings.price))

    return count


def cost_shares(network: EarlyExitNetwork, lengths: np.ndarray) -> Tensor:
    """Multiply-accumulates up to every exit as a share of the whole walk [rows, exits]; lengths in tokens."""
    to_exit = exit_costs(network, lengths).to_exit
    return torch.from_numpy(to_exit / to_exit[:, -1:]).float()
