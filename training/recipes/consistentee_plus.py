"""consistentee_plus: our variants of ConsistentEE's policy, one for all thresholds (after arXiv 2312.11882).

Phases as in recipe consistentee, with these differences, each a setting (docs/log.md has the measurements
behind the defaults):

- estimator=expected computes the sum over l of P(exit at l) * R_l exactly, since the loss of every exit is
  known in training; sampled is the paper's REINFORCE: K Bernoulli trajectories, their mean as baseline.
- policy=statistics reads the softmax of this exit and of earlier ones; state is the paper's pooled state.
- quality=agree rewards agreement with the last exit; ce is the paper's -CE; correct is a 0/1 reward.
- hardness=false omits the factor (1 - m / L); true is the paper's.
- spread: each row draws its alpha between alpha / spread and alpha * spread and its gates are shifted to
  match, so that one policy is trained for every threshold; 1 is the paper's single alpha.
- rounds=0 trains the policies once, since phase 4 lowered the exits on dev; 1 or more alternates.
- holdout keeps a share of train out of the warm start and computes rewards and m there.

Not settings: the task loss of phase 4 is weighted by P(exit at l), and exits pool the mean of the tokens.

Expect: e5-small on sst2, a minute or two after the warm start; 89.6 % on test with 58.7 % of the layers saved
(point saves-57), against 90.2 % at full depth: as accurate as max-probability, not more.

    ee-train --model MODEL --data DATA --recipe consistentee_plus --out ckpt/ --set alpha=0.02
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from offramp.models.network import EarlyExitNetwork, ExitParts
from offramp.models.policies.consistentee import POLICY_INPUTS
from offramp.training.batches import Encoded
from offramp.training.collect import operating_points
from offramp.training.loop import Phase, Run
from offramp.training.losses import exit_losses
from offramp.training.recipes.consistentee import (
    easiness,
    exit_distribution,
    exit_rewards,
    expected_figures,
    fit_on_features,
    measure_memorized,
    reinforce_loss,
    sample_exits,
)
from offramp.training.recipes.joint import EVERYTHING, JointSettings, warm_start

QUALITIES = ("ce", "correct", "agree")
ESTIMATORS = ("expected", "sampled")
POLICY_BATCH = 256
# Shift of a gate's logit for a price e times as high: P(exit) goes from 0.27 to 0.73 over a factor of 2.
SHIFT = 3.0


@dataclass(frozen=True)
class ConsistentEEPlusSettings(JointSettings):
    """Settings of recipe consistentee_plus; those of recipe joint are its warm start's.

    alpha: the reward's price of one more exit; trajectories: the paper's K.
    """

    alpha: float = 0.015
    spread: float = 5.0
    quality: str = "agree"
    hardness: bool = False
    estimator: str = "expected"
    trajectories: int = 8
    policy: str = "statistics"
    policy_epochs: int = 20
    policy_lr: float = 1e-3
    rounds: int = 0
    both_epochs: int = 1
    both_lr: float = 1e-5
    both_heads_lr: float = 1e-4
    holdout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, known in (
            ("quality", self.quality, QUALITIES),
            ("estimator", self.estimator, ESTIMATORS),
            ("policy", self.policy, POLICY_INPUTS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value}: choose one of {', '.join(known)}")
        if not 0 <= self.holdout < 0.9:
            raise ValueError(f"holdout={self.holdout}: a share of train, from 0 to below 0.9")
        if self.alpha <= 0 or self.spread < 1:
            raise ValueError(f"alpha={self.alpha}, spread={self.spread}: alpha above 0, spread from 1")
        if self.estimator == "sampled" and self.trajectories < 2:
            raise ValueError("trajectories: the mean of one trajectory is no baseline; at least 2")


KIND: Literal["classifier"] = "classifier"
NEEDS_LABELS = True
SETTINGS = ConsistentEEPlusSettings
STARTS_FROM: str | None = "joint"


def parts_of(settings: ConsistentEEPlusSettings) -> ExitParts:
    """The parts with policies, named by their inputs: "statistics", "state" or "both"."""
    return ExitParts(policy=settings.policy)


def exit_qualities(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
    """The quality part of the reward of exiting at each exit [rows, exits].

    kind: one of QUALITIES. logits [rows, exits, classes], labels [rows].
    """
    if kind == "ce":
        return -exit_losses(logits, labels)
    target = labels if kind == "correct" else logits[:, -1].argmax(-1)
    return (logits.argmax(-1) == target[:, None]).float()


def draw_alpha(rows: int, settings: ConsistentEEPlusSettings, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw each row's price, log-uniform around alpha; gives prices and the shifts of gate logits, both
    [rows].

    A higher price raises the gates by a shift that is the same at every exit. So another threshold after
    training corresponds to prices seen in training, and the threshold 0.5 corresponds to alpha itself.
    """
    log_factor = (2 * torch.rand(rows, device=device) - 1) * math.log(settings.spread)
    return settings.alpha * log_factor.exp(), SHIFT * log_factor


def policy_loss(gate_logits: Tensor, reward: Tensor, settings: ConsistentEEPlusSettings) -> Tensor:
    """The policies' loss, a scalar whose minimization raises the expected reward.

    gate_logits [batch, exits - 1], reward [batch, exits].
    """
    if settings.estimator == "sampled":
        return reinforce_loss(gate_logits, reward, sample_exits(gate_logits, settings.trajectories))
    return -(exit_distribution(gate_logits) * reward).sum(1).mean()


def train(
    run: Run[EarlyExitNetwork],
    train: Encoded,
    dev: Encoded,
    settings: ConsistentEEPlusSettings,
    *,
    skip_warm_start: bool,
) -> dict[str, Any]:
    """Run all phases; return dev figures and the operating points chosen on dev."""
    warm_rows, reward_rows = _hold_out(len(train), settings.holdout, run.seed)
    if not skip_warm_start:
        warm_start(run, train.take(warm_rows), settings)

    def measure_easiness() -> Tensor:
        if not settings.hardness:
            return torch.ones(len(train))
        return easiness(measure_memorized(run, train), len(run.network.spec.exits))

    easy = run.compute_once("easiness", measure_easiness)
    rewarded = train.take(reward_rows)
    for number in range(settings.rounds):
        _fit_policies(run, rewarded, easy[reward_rows], settings, f"policy {number + 1}")
        _fit_exits_and_policies(run, train, easy, settings, f"both {number + 1}")
    _fit_policies(run, rewarded, easy[reward_rows], settings, "policy last")
    return operating_points(run, dev, "gate")


def _fit_policies(
    run: Run[EarlyExitNetwork], rows: Encoded, easy: Tensor, settings: ConsistentEEPlusSettings, name: str
) -> None:
    def loss(
        pooled: Tensor, logits: Tensor, labels: Tensor, batch: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        alpha, shift = draw_alpha(len(batch), settings, logits.device)
        gate_logits = run.network.gate_logits(pooled, logits)
        quality = exit_qualities(logits, labels, settings.quality)
        reward = exit_rewards(quality, alpha, easy[batch].to(logits.device))
        value = policy_loss(gate_logits + shift[:, None], reward, settings)
        return value, expected_figures(gate_logits, reward)

    epochs, lr = settings.policy_epochs, settings.policy_lr
    fit_on_features(run, rows, loss, name=name, epochs=epochs, batch_size=POLICY_BATCH, lr=lr)


def _fit_exits_and_policies(
    run: Run[EarlyExitNetwork], rows: Encoded, easy: Tensor, settings: ConsistentEEPlusSettings, name: str
) -> None:
    """Train all parts: exits weighted by P(exit there), policies by the current exits' rewards."""
    device = run.accelerator.device

    def loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        inputs, labels = rows.batch(index, device)
        outputs = model(inputs, detach_policies=True)
        quality = exit_qualities(outputs.logits.detach().float(), labels, settings.quality)
        alpha, shift = draw_alpha(len(index), settings, device)
        reward = exit_rewards(quality, alpha, easy[torch.from_numpy(index)].to(device))
        gate_logits = outputs.gate_logits.float() + shift[:, None]
        weights = exit_distribution(gate_logits.detach())
        task = (weights * exit_losses(outputs.logits, labels)).sum(1).mean()
        figures = {"task": float(task.detach()), **expected_figures(gate_logits, reward)}
        return task + policy_loss(gate_logits, reward, settings), figures

    s, trains = settings, (*EVERYTHING, "policies")
    run.fit(Phase(name, trains, rows.lengths, loss, s.both_epochs, s.batch_size, s.both_lr, s.both_heads_lr))


def _hold_out(rows: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers for the warm start and row numbers for the rewards; all rows for both if share is 0."""
    if share == 0:
        everything = np.arange(rows)
        return everything, everything
    order = np.random.default_rng([seed, 77]).permutation(rows)
    count = max(1, round(share * rows))
    return np.sort(order[count:]), np.sort(order[:count])
