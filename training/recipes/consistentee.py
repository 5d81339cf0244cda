"""consistentee: a policy learned by reward decides where each instance leaves (AAAI 2024, arXiv 2312.11882).

1 warm start: recipe joint.  2 the Memorized Layer m of every training instance, once.  3 policies alone: the
reward of leaving at exit l is R_l = quality_l - alpha * l * (1 - m / L).  4 everything: the task loss of the
exit that is taken plus the policy loss. 3 and 4 alternate, and 3 comes last, so that the policy fits the
exits that are deployed.

Where we differ, each a setting (docs/log.md has the measurements behind the defaults):

- estimator=expected computes the sum over l of P(leave at l) * R_l exactly, since the loss of every exit is
  known in training; sampled is the paper's REINFORCE: K Bernoulli trajectories, their mean as baseline.
- policy=statistics reads the exit's softmax and what earlier exits said; state is the paper's pooled state.
- quality=agree rewards agreeing with the last exit; ce is the paper's -CE; correct is a 0/1 reward.
- hardness=false drops the factor (1 - m / L); true is the paper's.
- spread: each row draws its alpha between alpha / spread and alpha * spread and its gates are shifted to
  match, so that one policy is trained for every threshold; 1 is the paper's single alpha.
- rounds=0 leaves stage 4 out, since it lowered the exits on dev; 1 or more alternates as the paper does.
- holdout keeps a share of train out of the warm start and computes rewards and m there.

Not settings: the task loss of stage 4 is weighted by P(leave at l) instead of taken at one sampled exit, and
the public code's live reward (no depth term) and its actions without exploration are not reproduced.

Expect: e5-small on sst2, a minute or two after the warm start; 89.6 % on test with 58.7 % of the layers saved
(point saves-57), against 90.2 % at full depth: as accurate as max-probability, not more.

    ee-train --model MODEL --data DATA --recipe consistentee --out ckpt/ --set alpha=0.02
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from offramp.models.policies.consistentee import POLICY_INPUTS
from offramp.training.batches import Encoded
from offramp.training.collect import collect
from offramp.training.hardness import easiness
from offramp.training.loop import Run, Stage
from offramp.training.points import operating_points
from offramp.training.recipes.joint import EVERYTHING, Joint, exit_losses, warm_start

QUALITIES = ("ce", "correct", "agree")
ESTIMATORS = ("expected", "sampled")
SHIFT = (
    3.0  # of a gate's logit for a price e times as high: P(exit) goes from 0.27 to 0.73 over a factor of 2
)


@dataclass(frozen=True)
class ConsistentEE:
    """Settings of the recipe; alpha is the reward's price of one more exit, trajectories the paper's K."""

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


SETTINGS = ConsistentEE
STARTS_FROM = "joint"


def policy_of(settings: ConsistentEE) -> str | None:
    """What the policies read, so that the network is built with them."""
    return settings.policy


def leave_probabilities(gates: Tensor) -> Tensor:
    """P(leave at l) [batch, exits] from logits of P(exit) [batch, exits - 1]; the last exit takes who is
    left.
    """
    stay = logsigmoid(-gates).cumsum(1)  # [batch, exits - 1] log P(still here after l)
    reached = torch.cat([torch.zeros_like(stay[:, :1]), stay], dim=1)  # [batch, exits]
    go = torch.cat([logsigmoid(gates), torch.zeros_like(stay[:, :1])], dim=1)
    return (reached + go).exp()


def qualities(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
    """What leaving at each exit is worth [rows, exits]: logits [rows, exits, classes], labels [rows]."""
    if kind == "ce":
        return -exit_losses(logits, labels)
    target = labels if kind == "correct" else logits[:, -1].argmax(-1)
    return (logits.argmax(-1) == target[:, None]).float()


def rewards(quality: Tensor, alpha: Tensor, easy: Tensor) -> Tensor:
    """R [rows, exits] of leaving at each exit: quality [rows, exits], alpha and easy (1 - m / L) [rows]."""
    depth = torch.arange(1, quality.shape[1] + 1, device=quality.device, dtype=torch.float32)
    return quality - (alpha * easy)[:, None] * depth


def draw_alpha(rows: int, settings: ConsistentEE, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each row's price, log-uniform around alpha, and the shift of its gates' logits that goes with it,
    [rows].

    A dearer exit opens the gates by a shift that is the same at every exit. So moving the threshold after
    training is what training has practised, and the threshold 0.5 belongs to alpha itself.
    """
    draw = (2 * torch.rand(rows, device=device) - 1) * math.log(settings.spread)
    return settings.alpha * draw.exp(), SHIFT * draw


def policy_loss(gates: Tensor, reward: Tensor, settings: ConsistentEE) -> Tensor:
    """Scalar whose gradient raises the expected reward: gates [batch, exits - 1] logits, reward [batch,
    exits].
    """
    leave = leave_probabilities(gates)
    if settings.estimator == "expected":
        return -(leave * reward).sum(1).mean()
    # One draw from P(leave at l) is a Bernoulli draw at every exit in turn.
    chosen = torch.multinomial(leave.detach(), settings.trajectories, replacement=True)  # [batch, K]
    gained = reward.gather(1, chosen)
    advantage = gained - gained.mean(1, keepdim=True)
    return -(advantage * leave.clamp(min=1e-9).log().gather(1, chosen)).mean()


def train(
    run: Run, train: Encoded, dev: Encoded, settings: ConsistentEE, *, skip_warm_start: bool
) -> dict[str, Any]:
    """All stages; gives dev figures and the operating points chosen on dev."""
    kept, judged = _hold_out(len(train), settings.holdout, run.seed)
    if not skip_warm_start:
        joint = Joint(settings.epochs, settings.batch_size, settings.lr, settings.heads_lr)
        warm_start(run, train.take(kept), joint)
    device = run.accelerator.device

    def measure() -> Tensor:
        if not settings.hardness:
            return torch.ones(len(train))
        warm = collect(run.network, train, device=device, what="hardness")
        return easiness(warm.logits, warm.labels)

    easy = run.remember("easiness", measure)
    rewarded = train.take(judged)
    for number in range(settings.rounds):
        _fit_policies(run, rewarded, easy[judged], settings, f"policy {number + 1}")
        _fit_both(run, train, easy, settings, f"both {number + 1}")
    _fit_policies(run, rewarded, easy[judged], settings, "policy last")
    return operating_points(run, dev, "gate")


def _fit_policies(run: Run, rows: Encoded, easy: Tensor, settings: ConsistentEE, name: str) -> None:
    """Policies on cached features: the rest of the network is frozen, so what it says is computed once."""
    if run.done_before():
        return
    device = run.accelerator.device
    seen = collect(run.network, rows, device=device, what=f"{name}: features")
    quality = qualities(seen.logits, seen.labels, settings.quality)

    def loss(model: Any, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        chosen = torch.from_numpy(index)
        alpha, shift = draw_alpha(len(index), settings, device)
        with torch.autocast(
            device.type, enabled=False
        ):  # tiny layers: bf16 would only blur the probabilities
            gates = run.network.gate_logits(seen.pooled[chosen].to(device), seen.logits[chosen].to(device))
            reward = rewards(quality[chosen].to(device), alpha, easy[chosen].to(device))
            return policy_loss(gates + shift[:, None], reward, settings), _figures(gates, reward)

    lengths = np.zeros(len(rows), np.int64)
    epochs = settings.policy_epochs
    run.fit(Stage(name, ("policies",), lengths, loss, epochs, 256, settings.policy_lr, shared=False))


def _fit_both(run: Run, rows: Encoded, easy: Tensor, settings: ConsistentEE, name: str) -> None:
    """Everything learns: exits from the instances that leave there, policies from today's exits' rewards."""
    device = run.accelerator.device

    def loss(model: Any, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        inputs, labels = rows.batch(index, device)
        out = model(inputs, detach_policies=True)
        quality = qualities(out.logits.detach().float(), labels, settings.quality)
        alpha, shift = draw_alpha(len(index), settings, device)
        reward = rewards(quality, alpha, easy[torch.from_numpy(index)].to(device))
        gates = out.gate_logits.float() + shift[:, None]
        task = (leave_probabilities(gates.detach()) * exit_losses(out.logits, labels)).sum(1).mean()
        return task + policy_loss(gates, reward, settings), {
            "task": float(task.detach()),
            **_figures(gates, reward),
        }

    learns = (*EVERYTHING, "policies")
    run.fit(
        Stage(
            name,
            learns,
            rows.lengths,
            loss,
            settings.both_epochs,
            settings.batch_size,
            settings.both_lr,
            settings.both_heads_lr,
        )
    )


def _figures(gates: Tensor, reward: Tensor) -> dict[str, float]:
    leave = leave_probabilities(gates.detach())
    depth = torch.arange(1, leave.shape[1] + 1, device=leave.device)
    return {"reward": float((leave * reward).sum(1).mean()), "exit": float((leave * depth).sum(1).mean())}


def _hold_out(rows: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers for the warm start and row numbers for the rewards: all for both where nothing is held
    out.
    """
    if share == 0:
        everything = np.arange(rows)
        return everything, everything
    order = np.random.default_rng([seed, 77]).permutation(rows)
    cut = max(1, round(share * rows))
    return np.sort(order[cut:]), np.sort(order[:cut])
