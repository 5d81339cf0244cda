"""consistentee: a policy trained by reward decides where each instance exits (AAAI 2024, arXiv 2312.11882).

1 warm start: recipe joint.  2 the Memorized Layer m of every training instance, once.  3 policies alone: the
reward of exiting at exit l is R_l = quality_l - alpha * l * (1 - m / L).  4 everything: the task loss of the
chosen exit plus the policy loss. 3 and 4 alternate, and 3 comes last, so that the policy fits the exits that
are deployed.

Where we differ, each a setting (docs/log.md has the measurements behind the defaults):

- estimator=expected computes the sum over l of P(exit at l) * R_l exactly, since the loss of every exit is
  known in training; sampled is the paper's REINFORCE: K Bernoulli trajectories, their mean as baseline.
- policy=statistics reads the softmax of this exit and of earlier ones; state is the paper's pooled state.
- quality=agree rewards agreement with the last exit; ce is the paper's -CE; correct is a 0/1 reward.
- hardness=false omits the factor (1 - m / L); true is the paper's.
- spread: each row draws its alpha between alpha / spread and alpha * spread and its gates are shifted to
  match, so that one policy is trained for every threshold; 1 is the paper's single alpha.
- rounds=0 omits phase 4, since it lowered the exits on dev; 1 or more alternates as the paper does.
- holdout keeps a share of train out of the warm start and computes rewards and m there.

Not settings: the task loss of phase 4 is weighted by P(exit at l) instead of taken at one sampled exit, and
the public code's live reward (no depth term) and its actions without exploration are not reproduced.

Expect: e5-small on sst2, a minute or two after the warm start; 89.6 % on test with 58.7 % of the layers saved
(point saves-57), against 90.2 % at full depth: as accurate as max-probability, not more.

    ee-train --model MODEL --data DATA --recipe consistentee --out ckpt/ --set alpha=0.02
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from offramp.models.network import EarlyExitNetwork, ExitParts
from offramp.models.policies.consistentee import POLICY_INPUTS
from offramp.training.batches import Encoded
from offramp.training.collect import collect, operating_points
from offramp.training.loop import Phase, Run
from offramp.training.recipes.joint import EVERYTHING, JointSettings, exit_losses, warm_start

QUALITIES = ("ce", "correct", "agree")
ESTIMATORS = ("expected", "sampled")
# Shift of a gate's logit for a price e times as high: P(exit) goes from 0.27 to 0.73 over a factor of 2.
SHIFT = 3.0


@dataclass(frozen=True)
class ConsistentEESettings:
    """Settings of recipe consistentee; alpha: the reward's price of one more exit; trajectories: the paper's
    K.
    """

    epochs: int = 3
    batch_size: int = 32
    lr: float = 5e-5
    heads_lr: float = 1e-3
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
SETTINGS = ConsistentEESettings
STARTS_FROM: str | None = "joint"


def parts_of(settings: ConsistentEESettings) -> ExitParts:
    """The parts with policies, named by their inputs: "statistics" or "state"."""
    return ExitParts(policy=settings.policy)


def memorized_exit(right: Tensor) -> Tensor:
    """The first exit (0-based) from which on every exit is right [rows]; the last exit if that is wrong.

    right [rows, exits]: whether exits predict the label. This is ConsistentEE's Memorized Layer minus one.
    """
    right_to_the_end = right.long().flip(1).cumprod(1).sum(1)  # [rows] number of final exits all right
    return (right.shape[1] - right_to_the_end).clamp(max=right.shape[1] - 1)


def easiness(logits: Tensor, labels: Tensor) -> Tensor:
    """The factor on an instance's depth penalty, 1 - m / L [rows]; 0 for the hardest instances.

    m is the Memorized Layer, 1-based; logits [rows, exits, classes] in evaluation mode, labels [rows].
    """
    right = logits.argmax(-1) == labels[:, None]  # [rows, exits]
    return 1.0 - (memorized_exit(right) + 1).float() / logits.shape[1]


def exit_distribution(gate_logits: Tensor) -> Tensor:
    """P(exit at l) of each exit [batch, exits] from logits of P(exit) [batch, exits - 1].

    The last exit gets the remaining probability.
    """
    log_stay = logsigmoid(-gate_logits).cumsum(1)  # [batch, exits - 1] log P(no exit up to l)
    log_reached = torch.cat([torch.zeros_like(log_stay[:, :1]), log_stay], dim=1)  # [batch, exits]
    log_exit = torch.cat([logsigmoid(gate_logits), torch.zeros_like(log_stay[:, :1])], dim=1)
    return (log_reached + log_exit).exp()


def exit_qualities(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
    """The quality part of the reward of exiting at each exit [rows, exits].

    kind: one of QUALITIES. logits [rows, exits, classes], labels [rows].
    """
    if kind == "ce":
        return -exit_losses(logits, labels)
    target = labels if kind == "correct" else logits[:, -1].argmax(-1)
    return (logits.argmax(-1) == target[:, None]).float()


def exit_rewards(quality: Tensor, alpha: Tensor, easy: Tensor) -> Tensor:
    """The reward R of exiting at each exit [rows, exits]: quality [rows, exits], alpha, easy (1 - m / L)
    [rows].
    """
    depth = torch.arange(1, quality.shape[1] + 1, device=quality.device, dtype=torch.float32)
    return quality - (alpha * easy)[:, None] * depth


def draw_alpha(rows: int, settings: ConsistentEESettings, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw each row's price, log-uniform around alpha; gives prices and the shifts of gate logits, both
    [rows].

    A higher price raises the gates by a shift that is the same at every exit. So another threshold after
    training corresponds to prices seen in training, and the threshold 0.5 corresponds to alpha itself.
    """
    log_factor = (2 * torch.rand(rows, device=device) - 1) * math.log(settings.spread)
    return settings.alpha * log_factor.exp(), SHIFT * log_factor


def policy_loss(gate_logits: Tensor, reward: Tensor, settings: ConsistentEESettings) -> Tensor:
    """The policies' loss, a scalar whose minimization raises the expected reward.

    gate_logits [batch, exits - 1], reward [batch, exits].
    """
    exit_at = exit_distribution(gate_logits)
    if settings.estimator == "expected":
        return -(exit_at * reward).sum(1).mean()
    # One draw from P(exit at l) equals a Bernoulli draw at every exit in turn.
    sampled = torch.multinomial(exit_at.detach(), settings.trajectories, replacement=True)  # [batch, K]
    sampled_reward = reward.gather(1, sampled)
    advantage = sampled_reward - sampled_reward.mean(1, keepdim=True)
    return -(advantage * exit_at.clamp(min=1e-9).log().gather(1, sampled)).mean()


def train(
    run: Run[EarlyExitNetwork],
    train: Encoded,
    dev: Encoded,
    settings: ConsistentEESettings,
    *,
    skip_warm_start: bool,
) -> dict[str, Any]:
    """Run all phases; return dev figures and the operating points chosen on dev."""
    warm_rows, reward_rows = _hold_out(len(train), settings.holdout, run.seed)
    if not skip_warm_start:
        joint = JointSettings(settings.epochs, settings.batch_size, settings.lr, settings.heads_lr)
        warm_start(run, train.take(warm_rows), joint)
    device = run.accelerator.device

    def measure_easiness() -> Tensor:
        if not settings.hardness:
            return torch.ones(len(train))
        collected = collect(run.network, train, device=device, description="hardness")
        return easiness(collected.logits, collected.labels)

    easy = run.compute_once("easiness", measure_easiness)
    rewarded = train.take(reward_rows)
    for number in range(settings.rounds):
        _fit_policies(run, rewarded, easy[reward_rows], settings, f"policy {number + 1}")
        _fit_exits_and_policies(run, train, easy, settings, f"both {number + 1}")
    _fit_policies(run, rewarded, easy[reward_rows], settings, "policy last")
    return operating_points(run, dev, "gate")


def _fit_policies(
    run: Run[EarlyExitNetwork], rows: Encoded, easy: Tensor, settings: ConsistentEESettings, name: str
) -> None:
    """Train policies on cached features, since the rest of the network is frozen and its outputs do not
    change.
    """
    if run.skip_finished_phase():
        return
    device = run.accelerator.device
    features = collect(run.network, rows, device=device, description=f"{name}: features")
    quality = exit_qualities(features.logits, features.labels, settings.quality)

    def loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        batch = torch.from_numpy(index)
        alpha, shift = draw_alpha(len(index), settings, device)
        # Tiny layers: bf16 would only lose precision of the probabilities.
        with torch.autocast(device.type, enabled=False):
            pooled, logits = features.pooled[batch].to(device), features.logits[batch].to(device)
            gate_logits = run.network.gate_logits(pooled, logits)
            reward = exit_rewards(quality[batch].to(device), alpha, easy[batch].to(device))
            value = policy_loss(gate_logits + shift[:, None], reward, settings)
            return value, _figures(gate_logits, reward)

    lengths = np.zeros(len(rows), np.int64)
    epochs = settings.policy_epochs
    run.fit(Phase(name, ("policies",), lengths, loss, epochs, 256, settings.policy_lr, shared=False))


def _fit_exits_and_policies(
    run: Run[EarlyExitNetwork], rows: Encoded, easy: Tensor, settings: ConsistentEESettings, name: str
) -> None:
    """Train all parts: exits on the instances that exit there, policies by the current exits' rewards."""
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
        figures = {"task": float(task.detach()), **_figures(gate_logits, reward)}
        return task + policy_loss(gate_logits, reward, settings), figures

    s, trains = settings, (*EVERYTHING, "policies")
    run.fit(Phase(name, trains, rows.lengths, loss, s.both_epochs, s.batch_size, s.both_lr, s.both_heads_lr))


def _figures(gate_logits: Tensor, reward: Tensor) -> dict[str, float]:
    """The expected reward and exit (1-based) of a batch, for the log."""
    exit_at = exit_distribution(gate_logits.detach())
    depth = torch.arange(1, exit_at.shape[1] + 1, device=exit_at.device)
    return {"reward": float((exit_at * reward).sum(1).mean()), "exit": float((exit_at * depth).sum(1).mean())}


def _hold_out(rows: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers for the warm start and row numbers for the rewards; all rows for both if share is 0."""
    if share == 0:
        everything = np.arange(rows)
        return everything, everything
    order = np.random.default_rng([seed, 77]).permutation(rows)
    count = max(1, round(share * rows))
    return np.sort(order[count:]), np.sort(order[:count])
