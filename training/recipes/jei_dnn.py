"""jei_dnn: gates on the exits' uncertainty, taught which exit would have been cheapest (arXiv 2310.09163).

1 backbone: recipe joint, or --init.  2 warm-up: the exits but the last learn on the frozen backbone, exit l
weighs L - l, each stops early by its accuracy on dev.  3 gates and exits in turns, gates first. Gates: target
t_l = 1 for l >= l*, where l* = argmin over l of CE_l + price * cost_l (the last exit among them, cost 1), by
BCE with positives weighted min(5, #0 / #1), counted on dev before every epoch. Exits: see weighting. Policy
jei holds the gates' chain; a row leaves where the conditional is above one half (point "trained").

price is the paper's lambda: a sweep is a run for every price. Points at other thresholds than that of
"trained" come from one run and are our extension.

weighting: as_intended weighs CE_l by P_l, the probability of leaving there, scaled to the size of the sum of
CE_l. as_run is what the public code computes: there the scale is not detached, so the weights cancel out of
the gradient and what is left is the plain sum. backbone: frozen as published; tuned lets exit turns train
backbone and last exit too.

We differ: costs are multiply-accumulates of the row's tokens, exits and gates included, as a share of the
whole walk (theirs: each linear layer once); AdamW with warm-up and decay (theirs: SGD and a cosine); the
backbone of stage 1 has learned all exits (theirs: the last alone); exits go on from there, and the start
counts as a candidate of early stopping; turns are shortened until there are three, and gates have the last.

Expect: e5-small on sst2, two minutes on one core after recipe joint; 89.5 % on test with 52 % of
multiply-accumulates saved (docs/comparison.md).

    ee-train --init JOINT --data DATA --recipe jei_dnn --out ckpt/ --set price=0.5
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from offramp.models.network import EarlyExitNetwork
from offramp.models.policies.jei import exit_probabilities
from offramp.training.batches import Encoded
from offramp.training.collect import Collected, collect
from offramp.training.early_stopping import BestExits
from offramp.training.frontier import costs_of
from offramp.training.frozen import early_logits, fit_exits
from offramp.training.loop import Run, Stage
from offramp.training.points import operating_points
from offramp.training.recipes.joint import EVERYTHING, Joint, exit_losses, warm_start

WEIGHTINGS = ("as_run", "as_intended")
BACKBONES = ("frozen", "tuned")
MOST = 5.0  # a gate's rare positives weigh that much at most
FEWEST = 0.1  # rows of a kind that are counted at least


@dataclass(frozen=True)
class JeiDnn(Joint):
    """Settings: stage 1 as in recipe joint; warm_* of stage 2; switch is batches a turn of stage 3."""

    backbone: str = "frozen"
    weighting: str = "as_run"
    price: float = 0.5
    warm_epochs: int = 10
    warm_lr: float = 1e-3
    patience: int = 2
    turn_epochs: int = 15
    turn_batch: int = 64
    switch: int = 200
    exits_lr: float = 3e-4
    gates_lr: float = 3e-2
    tuned_lr: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, known in (
            ("backbone", self.backbone, BACKBONES),
            ("weighting", self.weighting, WEIGHTINGS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value}: choose one of {', '.join(known)}")
        if self.price < 0 or min(self.patience, self.turn_epochs, self.turn_batch, self.switch) < 1:
            raise ValueError(f"price from 0; patience, turn_epochs, turn_batch and switch from 1: {self}")


SETTINGS = JeiDnn
STARTS_FROM = "joint"


def policy_of(settings: JeiDnn) -> str | None:
    """The gates."""
    return "jei"


def gate_targets(losses: Tensor, costs: Tensor, price: float) -> Tensor:
    """1 at the exit with the least CE_l + price * cost_l and behind it [batch, exits - 1]; losses and costs
    [batch, exits].
    """
    best = (losses + price * costs).argmin(1, keepdim=True)  # [batch, 1]
    return (torch.arange(losses.shape[1] - 1, device=losses.device) >= best).float()


def positive_weights(targets: Tensor) -> Tensor:
    """min(5, rows of target 0 / rows of target 1) of each gate [exits - 1]; targets [rows, exits - 1]."""
    ones = targets.sum(0)
    return ((len(targets) - ones).clamp(min=FEWEST) / ones.clamp(min=FEWEST)).clamp(max=MOST)


def exit_turn_loss(losses: Tensor, leave: Tensor, weighting: str) -> Tensor:
    """Scalar that teaches exits: losses and P(leave at l) [batch, exits], the same exits in both.

    A row that leaves at none of them (P sums to zero) has no weights: as_run takes its plain sum, as_intended
    nothing.
    """
    total = losses.sum(1)
    weighted = (leave * losses).sum(1)  # [batch]
    lost = weighted <= 1e-12
    scale = total / weighted.masked_fill(lost, 1.0)
    if weighting == "as_intended":
        rows = weighted * scale.detach()
    else:
        rows = torch.where(lost, total, weighted * scale)
    return rows.mean() / losses.shape[1]


def own_gates(network: EarlyExitNetwork, logits: Tensor) -> Tensor:
    """Logits of g [batch, exits - 1], the gates before the chain; logits [batch, exits, classes]."""
    return torch.stack([gate.gate_logit(logits[:, at]) for at, gate in enumerate(network.policies)], 1)  # type: ignore[operator]


def turn_of(step: int, steps: int, switch: int) -> int:
    """Number of a step's turn; even ones, the last among them, are the gates'."""
    turns = max(3, round(steps / switch)) // 2 * 2 + 1
    return step * turns // steps


def train(
    run: Run, train: Encoded, dev: Encoded, settings: JeiDnn, *, skip_warm_start: bool
) -> dict[str, Any]:
    """All stages; gives dev figures and the operating points chosen on dev."""
    device = run.accelerator.device
    if not skip_warm_start:
        warm_start(run, train, settings)
    seen, judged = (collect(run.network, rows, device=device, what="features") for rows in (train, dev))
    _warm_up(run, seen, judged, settings)
    _in_turns(run, train, dev, seen, judged, settings)
    found = operating_points(run, dev, "gate")
    return {**found, "published_points": ["trained"]}  # one a price; the others are the extension


def _warm_up(run: Run, seen: Collected, dev: Collected, settings: JeiDnn) -> None:
    exits = seen.logits.shape[1]
    weights = torch.arange(exits - 1, 0, -1.0)  # L - l
    best = BestExits(run, dev, patience=settings.patience, name="warm-up")
    each = ceil(len(seen.labels) / settings.turn_batch)  # steps an epoch

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        best.judge(run.position["step"] // each)
        losses = exit_losses(logits, seen.labels[rows].to(logits.device))
        return (losses * (weights * best.learning).to(losses.device)).sum(1).mean() / weights.sum()

    lr, epochs = settings.warm_lr, settings.warm_epochs
    fit_exits(run, seen, loss, name="warm-up", epochs=epochs, batch_size=settings.turn_batch, lr=lr)
    if run.between:
        best.judge(epochs)
        best.restore()


def _in_turns(
    run: Run, train: Encoded, dev: Encoded, seen: Collected, dev_seen: Collected, settings: JeiDnn
) -> None:
    if run.done_before():
        return
    network, device, frozen = run.network, run.accelerator.device, settings.backbone == "frozen"
    each = ceil(len(train) / settings.turn_batch)
    steps = each * settings.turn_epochs
    costs = cost_shares(network, train.lengths)
    weights: dict[int, Tensor] = {}  # epoch -> of the gates' positives

    def say(index: np.ndarray, model: Any) -> tuple[Tensor, Tensor]:
        """Logits [batch, exits, classes] and labels of rows today."""
        if not frozen:
            inputs, labels = train.batch(index, device)
            return model(inputs).logits, labels
        rows = torch.from_numpy(index)
        with torch.autocast(device.type, enabled=False):  # as in the warm-up
            logits = early_logits(network, seen.pooled[rows].to(device))
        last = seen.logits[rows, -1:].to(device)
        return torch.cat([logits, last], 1), seen.labels[rows].to(device)

    def loss(model: Any, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        step = run.position["step"]
        epoch = step // each
        if epoch not in weights:
            counted = _counting(run, dev, dev_seen, settings)
            weights[epoch] = run.remember(f"positives-{epoch}", counted).to(device)
        if turn_of(step, steps, settings.switch) % 2:
            logits, labels = say(index, model)
            with torch.no_grad():
                leave = exit_probabilities(own_gates(network, logits.float()).sigmoid())
            if not frozen:  # the last exit learns too, from the rows that are left
                leave = torch.cat([leave, 1 - leave.sum(1, keepdim=True)], 1)
            losses = exit_losses(logits, labels)[:, : leave.shape[1]]
            return exit_turn_loss(losses, leave, settings.weighting), {"turn": 1.0}
        network.eval()  # gates will meet exits without dropout
        with torch.no_grad():
            logits, labels = say(index, model)
            rows = costs[torch.from_numpy(index)].to(device)
            targets = gate_targets(exit_losses(logits, labels), rows, settings.price)
        network.train()
        with torch.autocast(device.type, enabled=False):
            gates = own_gates(network, logits.float())
            missed = binary_cross_entropy_with_logits(gates, targets, pos_weight=weights[epoch])
        return missed, {"turn": 0.0, "optimal": float(1 + (1 - targets).sum(1).mean())}

    learns = ("exits", "policies") if frozen else (*EVERYTHING, "policies")
    lengths = np.zeros(len(train), np.int64) if frozen else train.lengths
    s = settings
    stage = Stage("turns", learns, lengths, loss, s.turn_epochs, s.turn_batch, s.tuned_lr, s.exits_lr)
    run.fit(replace(stage, policies_lr=s.gates_lr, shared=not frozen))


def _counting(run: Run, dev: Encoded, seen: Collected, settings: JeiDnn) -> Callable[[], Tensor]:
    """What counts the gates' targets on dev, with the exits of the moment."""

    def count() -> Tensor:
        network, device = run.network, run.accelerator.device
        learns = network.training
        network.eval()
        with torch.no_grad():
            if settings.backbone == "frozen":
                early = early_logits(network, seen.pooled.to(device)).cpu()
                logits = torch.cat([early, seen.logits[:, -1:]], 1)
            else:
                logits = collect(network, dev, device=device, what="dev").logits
        network.train(learns)
        losses = exit_losses(logits, seen.labels)
        return positive_weights(gate_targets(losses, cost_shares(network, dev.lengths), settings.price))

    return count


def cost_shares(network: EarlyExitNetwork, lengths: np.ndarray) -> Tensor:
    """Multiply-accumulates to every exit as a share of the whole walk [rows, exits], lengths in tokens."""
    to_exit = costs_of(network, lengths).to_exit
    return torch.from_numpy(to_exit / to_exit[:, -1:]).float()
