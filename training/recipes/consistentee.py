"""consistentee: a policy learned by reward decides where each instance leaves (AAAI 2024, arXiv 2312.11882).

1 warm start: recipe joint.  2 the Memorized Layer m of every training instance, once.  3 policies alone: the
reward of leaving at exit l is R_l = quality_l - alpha * l * (1 - m / L), quality = -CE in the paper.  4
everything: the task loss of the exit that is taken plus the policy loss; 3 and 4 alternate, and 3 comes last
so that the policy fits the exits that are deployed.

Where we differ, each a setting: estimator "expected" computes the sum over l of P(leave at l) * R_l exactly,
since the loss of every exit is known in training ("sampled" is the paper's REINFORCE: K Bernoulli
trajectories, baseline their mean). The policies read the exit's softmax statistics and the evidence of
earlier exits; policy=state is the paper's pooled state. The task loss of stage 4 is weighted by P(leave at l)
instead of taken at one sampled exit. The public code's live reward (no depth term) and its deterministic
actions are not reproduced. holdout keeps a share of train out of the warm start and computes rewards and m
there, because exits look better on instances that they were trained on.

ee-train --model MODEL --data DATA --recipe consistentee --out ckpt/ --set alpha=0.02
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.models.policies import POLICY_INPUTS
from offramp.training.batches import Encoded
from offramp.training.collect import collect
from offramp.training.hardness import easiness
from offramp.training.loop import Run, Stage
from offramp.training.points import operating_points
from offramp.training.recipes.joint import EVERYTHING, Joint, exit_losses, warm_start

QUALITIES = ("ce", "correct", "agree")
ESTIMATORS = ("expected", "sampled")


@dataclass(frozen=True)
class ConsistentEE:
    """Settings of the recipe; alpha is the reward's price of one more exit, K the trajectories an
    instance.
    """

    epochs: int = 3
    batch_size: int = 32
    lr: float = 5e-5
    heads_lr: float = 1e-3
    alpha: float = 0.02
    quality: str = "ce"
    estimator: str = "expected"
    trajectories: int = 8
    policy: str = "statistics"
    policy_epochs: int = 20
    policy_lr: float = 3e-3
    rounds: int = 1
    both_epochs: int = 1
    both_lr: float = 2e-5
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
        if self.estimator == "sampled" and self.trajectories < 2:
            raise ValueError("trajectories: the mean of one trajectory is no baseline; at least 2")


SETTINGS = ConsistentEE


def policy_of(settings: ConsistentEE) -> str | None:
    """What the policies read, so that the network is built with them."""
    return settings.policy


def leave_probabilities(gates: Tensor) -> Tensor:
    """P(leave at l) [batch, exits] from logits of P(exit) [batch, exits - 1]; who leaves nowhere leaves at
    the last exit.
    """
    stay = torch.nn.functional.logsigmoid(-gates).cumsum(1)  # [batch, exits - 1] log P(still here after l)
    reached = torch.cat([torch.zeros_like(stay[:, :1]), stay], dim=1)  # [batch, exits]
    go = torch.cat([torch.nn.functional.logsigmoid(gates), torch.zeros_like(stay[:, :1])], dim=1)
    return (reached + go).exp()


def rewards(logits: Tensor, labels: Tensor, easy: Tensor, settings: ConsistentEE) -> Tensor:
    """R [rows, exits] of leaving at each exit; logits [rows, exits, classes], labels and easy (1 - m/L)
    [rows].
    """
    if settings.quality == "ce":
        quality = -exit_losses(logits, labels)
    elif settings.quality == "correct":
        quality = (logits.argmax(-1) == labels[:, None]).float()
    else:
        quality = (logits.argmax(-1) == logits[:, -1:].argmax(-1)).float()
    depth = torch.arange(1, logits.shape[1] + 1, device=logits.device, dtype=torch.float32)
    return quality - settings.alpha * depth * easy[:, None]


def policy_loss(gates: Tensor, reward: Tensor, settings: ConsistentEE) -> Tensor:
    """Scalar whose gradient raises the expected reward: gates [batch, exits - 1] logits, reward [batch,
    exits].
    """
    leave = leave_probabilities(gates)
    if settings.estimator == "expected":
        return -(leave * reward).sum(1).mean()
    # Inverse-transform sampling of the exit is a Bernoulli draw at every exit in turn, in one go.
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
        warm_start(
            run, train.take(kept), Joint(settings.epochs, settings.batch_size, settings.lr, settings.heads_lr)
        )
    seen_by_reward = train.take(judged)
    device = run.accelerator.device

    def measure() -> Tensor:
        warm = collect(run.network, train, device=device, what="hardness")
        return easiness(warm.logits, warm.labels)

    easy = run.remember("easiness", measure)
    for number in range(settings.rounds):
        _fit_policies(run, seen_by_reward, easy[judged], settings, f"policy {number + 1}")
        _fit_both(run, train, easy, settings, f"both {number + 1}")
    _fit_policies(run, seen_by_reward, easy[judged], settings, "policy last")
    seen = collect(run.network, dev, device=device, what="dev")
    return operating_points(run.network, seen, learned="gate")


def _fit_policies(run: Run, rows: Encoded, easy: Tensor, settings: ConsistentEE, name: str) -> None:
    """Policies on cached features: the rest of the network is frozen, so what it says is computed once."""
    if run.done_before():
        return
    seen = collect(run.network, rows, device=run.accelerator.device, what=f"{name}: features")
    reward = rewards(seen.logits, seen.labels, easy, settings)

    def loss(model: Any, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        chosen = torch.from_numpy(index)
        device = run.accelerator.device
        with torch.autocast(
            device.type, enabled=False
        ):  # tiny layers: bf16 would only blur the probabilities
            gates = run.network.gates(seen.pooled[chosen].to(device), seen.logits[chosen].to(device))
            expected = (leave_probabilities(gates.detach()).cpu() * reward[chosen]).sum(1).mean()
            return policy_loss(gates, reward[chosen].to(device), settings), {"reward": float(expected)}

    lengths = np.zeros(len(rows), np.int64)
    run.fit(
        Stage(
            name, ("policies",), lengths, loss, settings.policy_epochs, 256, settings.policy_lr, shared=False
        )
    )


def _fit_both(run: Run, rows: Encoded, easy: Tensor, settings: ConsistentEE, name: str) -> None:
    """Everything learns: exits from the instances that leave there, policies from the rewards of this
    moment's exits.
    """

    def loss(model: Any, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        device = run.accelerator.device
        inputs, labels = rows.batch(index, device)
        out = model(inputs, policies_see="values")
        losses = exit_losses(out.logits, labels)
        reward = rewards(
            out.logits.detach().float(), labels, easy[torch.from_numpy(index)].to(device), settings
        )
        leave = leave_probabilities(out.gates.float())
        task = (leave.detach() * losses).sum(1).mean()
        figures = {"task": float(task.detach()), "reward": float((leave.detach() * reward).sum(1).mean())}
        return task + policy_loss(out.gates.float(), reward, settings), figures

    stage = Stage(
        name,
        (*EVERYTHING, "policies"),
        rows.lengths,
        loss,
        settings.both_epochs,
        settings.batch_size,
        settings.both_lr,
        settings.heads_lr,
    )
    run.fit(stage)


def _hold_out(rows: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers for the warm start and row numbers that rewards are computed on: the same rows where
    nothing is held out.
    """
    if share == 0:
        everything = np.arange(rows)
        return everything, everything
    order = np.random.default_rng([seed, 77]).permutation(rows)
    cut = max(1, round(share * rows))
    return np.sort(order[cut:]), np.sort(order[:cut])
