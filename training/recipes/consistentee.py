"""consistentee: a policy trained by reward decides where each instance exits (AAAI 2024, arXiv 2312.11882).

1 warm start: recipe joint, exit l weighs l.  2 the Memorized Layer m of every training instance, once, from
the warm model: the first exit from which on every exit is right, or L.  3 policies alone, all else frozen: K
trajectories for each instance with actions drawn from the policy; the reward of exiting at exit l is R = -CE
- alpha * l * (1 - m / L), the baseline its mean over the trajectories.  4 everything: the cross-entropy of
the exits that the trajectories take, plus the policies' loss. 3 and 4 alternate `rounds` times.

One alpha gives one point, at P(exit) above 0.5 ("trained"). Points at other thresholds are our extension.
Ablations: hardness=false omits (1 - m / L); stage3=false omits phase 4; actions=oracle exits at m in
training, and the policies then imitate m, since the K rewards are equal. exploration=epsilon_greedy takes the
actions of the public code, whose gradient is not that of the expected reward. Policies with other inputs, the
exact expectation and one policy for all thresholds: recipe consistentee_plus.

We differ: a last phase 3 fits the policies to the deployed exits (final_policy=false omits it); phase 3 reads
outputs without dropout, computed once; in phase 4 the K trajectories share one pass; the last exit has no
policy; an exit standardizes the pooled vector before its linear layer; learning rates decay to zero. Not
reproduced: the public code's live reward, which has no depth term.

--init replaces phase 1 by a checkpoint of recipe joint, which keeps its own pooling and epochs: as published
only if it was trained so, with --pooling cls.

Expect: four passes of training and four of evaluation over the data, two and one of them in phases 1 and 2.

    ee-train --model MODEL --data DATA --recipe consistentee --out ckpt/ --set alpha=0.03
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from offramp.models.network import EarlyExitNetwork, ExitParts
from offramp.runtime.rules import RuleSpec
from offramp.training.batches import Encoded
from offramp.training.collect import collect, exit_costs, exit_table, operating_points
from offramp.training.loop import Phase, Run
from offramp.training.losses import exit_losses
from offramp.training.recipes.joint import EVERYTHING, JointSettings, warm_start

ACTIONS = ("sampled", "oracle")
EXPLORATIONS = ("bernoulli", "epsilon_greedy")
# (pooled [batch, exits, hidden], logits [batch, exits, classes], labels [batch], row numbers [batch]) ->
# loss, figures for the log
FeaturesLoss = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class ConsistentEESettings(JointSettings):
    """Settings of recipe consistentee; those of recipe joint are its warm start's.

    alpha: the reward's price of one more exit; trajectories: the paper's K. epsilon_*: of epsilon-greedy
    actions; the share falls from start to end by a factor e every `decay` steps. policy_*: phase 3; both_*:
    phase 4. detach_policies: the policies' loss trains no other part in phase 4.
    """

    epochs: int = 2
    batch_size: int = 16
    lr: float = 2e-5
    heads_lr: float = 2e-5
    warmup: float = 0.0
    weight_decay: float = 0.0
    alpha: float = 0.03
    hardness: bool = True
    actions: str = "sampled"
    exploration: str = "bernoulli"
    epsilon_start: float = 0.05
    epsilon_end: float = 0.005
    epsilon_decay: float = 1000.0
    trajectories: int = 8
    rounds: int = 2
    stage3: bool = True
    final_policy: bool = True
    policy_epochs: int = 2
    policy_batch: int = 32
    policy_lr: float = 3e-4
    both_epochs: int = 1
    both_batch: int = 32
    both_lr: float = 3e-5
    both_heads_lr: float = 3e-5
    detach_policies: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, known in (
            ("actions", self.actions, ACTIONS),
            ("exploration", self.exploration, EXPLORATIONS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value}: choose one of {', '.join(known)}")
        if self.alpha < 0:
            raise ValueError(f"alpha={self.alpha}: a price, from 0")
        if self.trajectories < 2:
            raise ValueError("trajectories: the mean of one trajectory is no baseline; at least 2")
        if self.rounds < 0 or not (self.rounds or self.final_policy):
            raise ValueError(
                f"rounds={self.rounds} with final_policy={self.final_policy}: no policy is trained"
            )
        check_epsilon(self.epsilon_start, self.epsilon_end, self.epsilon_decay)


KIND: Literal["classifier"] = "classifier"
NEEDS_LABELS = True
SETTINGS = ConsistentEESettings
STARTS_FROM: str | None = "joint"


def parts_of(settings: ConsistentEESettings) -> ExitParts:
    """The published parts: policies on the pooled state; the first token, through BERT's pooler if text."""
    return ExitParts(policy="state", pooling="cls")


def memorized_exit(right: Tensor) -> Tensor:
    """The first exit (0-based) from which on every exit is right [rows]; the last exit if that is wrong.

    right [rows, exits]: whether exits predict the label. This is ConsistentEE's Memorized Layer minus one.
    """
    right_to_the_end = right.long().flip(1).cumprod(1).sum(1)  # [rows] number of final exits all right
    return (right.shape[1] - right_to_the_end).clamp(max=right.shape[1] - 1)


def measure_memorized(run: Run[EarlyExitNetwork], rows: Encoded) -> Tensor:
    """The Memorized Layer minus one [rows] by the present network in evaluation mode."""
    collected = collect(run.network, rows, device=run.accelerator.device, description="hardness")
    return memorized_exit(collected.logits.argmax(-1) == collected.labels[:, None])


def easiness(memorized: Tensor, exits: int) -> Tensor:
    """The factor on an instance's depth penalty, 1 - m / L [rows]; 0 for the hardest instances.

    memorized [rows]: m - 1, as memorized_exit gives it; exits: L.
    """
    return 1.0 - (memorized + 1).float() / exits


def log_exit_distribution(gate_logits: Tensor) -> Tensor:
    """Logarithm of P(exit at l) of each exit [batch, exits]; gate_logits [batch, exits - 1].

    The last exit gets the remaining probability.
    """
    log_stay = logsigmoid(-gate_logits).cumsum(1)  # [batch, exits - 1] log P(no exit up to l)
    log_reached = torch.cat([torch.zeros_like(log_stay[:, :1]), log_stay], dim=1)  # [batch, exits]
    log_exit = torch.cat([logsigmoid(gate_logits), torch.zeros_like(log_stay[:, :1])], dim=1)
    return log_reached + log_exit


def exit_distribution(gate_logits: Tensor) -> Tensor:
    """P(exit at l) of each exit [batch, exits] from logits of P(exit) [batch, exits - 1]."""
    return log_exit_distribution(gate_logits).exp()


def exit_rewards(quality: Tensor, alpha: Tensor | float, easy: Tensor) -> Tensor:
    """The reward R of exiting at each exit [rows, exits]: quality - alpha * l * easy, l from 1.

    quality [rows, exits], -CE in the paper; alpha [rows] or one for all; easy (1 - m / L) [rows].
    """
    depth = torch.arange(1, quality.shape[1] + 1, device=quality.device, dtype=torch.float32)
    return quality - (alpha * easy)[:, None] * depth


def check_epsilon(start: float, end: float, decay: float) -> None:
    """Raise ValueError if these are no settings of epsilon-greedy exploration."""
    if not 0 <= end <= start <= 1 or decay <= 0:
        raise ValueError(f"epsilon_start={start}, epsilon_end={end}, epsilon_decay={decay}: 1 to 0, above 0")


def epsilon_after(steps: int, start: float, end: float, decay: float) -> float:
    """The share of actions that a coin decides after this many steps, from `start` towards `end`."""
    return end + (start - end) * math.exp(-steps / decay)


def sample_exits(gate_logits: Tensor, count: int, epsilon: float | None = None) -> Tensor:
    """Sample the exits (0-based) of `count` trajectories for each row [rows, count].

    gate_logits [rows, exits - 1]. epsilon None: every action is drawn from the policy. Else a trajectory
    exits where P(exit) is above 0.5, but at each exit, with probability epsilon, a fair coin decides.
    One draw from P(exit at l) equals a draw at every exit in turn.
    """
    action_logits = gate_logits.detach()
    if epsilon is not None:
        action_logits = ((1 - epsilon) * (action_logits > 0) + epsilon / 2).logit()
    return torch.multinomial(exit_distribution(action_logits), count, replacement=True)


def reinforce_loss(
    gate_logits: Tensor, reward: Tensor, sampled: Tensor, *, per_layer: bool = False
) -> Tensor:
    """The policies' REINFORCE loss, a scalar; its baseline is the mean reward of a row's trajectories.

    gate_logits [rows, exits - 1], reward [rows, exits], sampled exits (0-based) [rows, K]. As a trajectory
    is part of its own baseline, the gradient is (K - 1) / K of that of the expected reward. per_layer: a
    trajectory's log-probability is divided by the number of its exits, as in the public code for LLaMA.
    """
    sampled_reward = reward.gather(1, sampled)
    advantage = sampled_reward - sampled_reward.mean(1, keepdim=True)
    log_probability = log_exit_distribution(gate_logits).gather(1, sampled)
    if per_layer:
        log_probability = log_probability / (sampled + 1)
    return -(advantage * log_probability).mean(1).sum() / max(1, len(gate_logits))


def take_actions(
    gate_logits: Tensor, reward: Tensor, memorized: Tensor, settings: ConsistentEESettings, step: int
) -> tuple[Tensor, Tensor]:
    """The exits (0-based) that the trajectories take [batch, K], and the policies' loss, a scalar.

    gate_logits [batch, exits - 1], reward [batch, exits], memorized [batch]: m - 1. With oracle actions K is
    1.
    """
    s = settings
    if s.actions == "oracle":
        exits_taken = memorized[:, None]
        return exits_taken, -log_exit_distribution(gate_logits).gather(1, exits_taken).mean()
    epsilon = None
    if s.exploration == "epsilon_greedy":
        epsilon = epsilon_after(step, s.epsilon_start, s.epsilon_end, s.epsilon_decay)
    exits_taken = sample_exits(gate_logits, s.trajectories, epsilon)
    return exits_taken, reinforce_loss(gate_logits, reward, exits_taken)


def taken_exit_loss(losses: Tensor, exits_taken: Tensor) -> Tensor:
    """The task loss of phase 4, a scalar: the mean loss over trajectories of the exit that each takes.

    losses [batch, exits], exits_taken (0-based) [batch, K].
    """
    return losses.gather(1, exits_taken).mean()


def train(
    run: Run[EarlyExitNetwork],
    train: Encoded,
    dev: Encoded,
    settings: ConsistentEESettings,
    *,
    skip_warm_start: bool,
) -> dict[str, Any]:
    """Run all phases; return dev figures, operating points, and the distribution of the Memorized Layer.

    memorized_layers: the share of training rows by exit. memorized_on_dev: figures of exiting at m on dev,
    which needs the labels: the bound that oracle actions have.
    """
    if not skip_warm_start:
        warm_start(run, train, settings)
    memorized = run.compute_once("memorized", lambda: measure_memorized(run, train))
    for number in range(1, settings.rounds + 1):
        _fit_policies(run, train, memorized, settings, f"policy {number}")
        if settings.stage3:
            _fit_exits_and_policies(run, train, memorized, settings, f"both {number}")
    if settings.final_policy:
        _fit_policies(run, train, memorized, settings, "policy last")
    counts = torch.bincount(memorized, minlength=len(run.network.spec.exits))
    return {
        **operating_points(run, dev, "gate"),
        "published_points": ["trained"],  # one for each alpha; the others are our extension
        "memorized_layers": [round(count / len(memorized), 4) for count in counts.tolist()],
        "memorized_on_dev": _figures_at_memorized(run, dev),
    }


def fit_on_features(
    run: Run[EarlyExitNetwork],
    rows: Encoded,
    loss: FeaturesLoss,
    *,
    name: str,
    epochs: int,
    batch_size: int,
    lr: float,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
) -> None:
    """Train policies on features that are computed once, since all other parts are frozen."""
    if run.skip_finished_phase():
        return
    device = run.accelerator.device
    features = collect(run.network, rows, device=device, description=f"{name}: features")

    def batch_loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        batch = torch.from_numpy(index)
        pooled, logits = features.pooled[batch].to(device), features.logits[batch].to(device)
        # Tiny layers: bf16 would only lose precision of the probabilities.
        with torch.autocast(device.type, enabled=False):
            return loss(pooled, logits, features.labels[batch].to(device), batch)

    lengths = np.zeros(len(rows), np.int64)
    schedule: dict[str, Any] = {"warmup": warmup, "weight_decay": weight_decay, "shared": False}
    run.fit(Phase(name, ("policies",), lengths, batch_loss, epochs, batch_size, lr, **schedule))


def expected_figures(gate_logits: Tensor, reward: Tensor) -> dict[str, float]:
    """The expected reward and exit (1-based) of a batch, for the log."""
    exit_at = exit_distribution(gate_logits.detach())
    depth = torch.arange(1, exit_at.shape[1] + 1, device=exit_at.device)
    return {"reward": float((exit_at * reward).sum(1).mean()), "exit": float((exit_at * depth).sum(1).mean())}


def _rewards(losses: Tensor, memorized: Tensor, settings: ConsistentEESettings) -> Tensor:
    """The paper's reward at each exit [batch, exits]; losses [batch, exits], memorized [batch]."""
    easy = easiness(memorized, losses.shape[1])
    return exit_rewards(-losses, settings.alpha, easy if settings.hardness else torch.ones_like(easy))


def _fit_policies(
    run: Run[EarlyExitNetwork], rows: Encoded, memorized: Tensor, settings: ConsistentEESettings, name: str
) -> None:
    """Train the policies alone by reward (phase 3)."""

    def loss(
        pooled: Tensor, logits: Tensor, labels: Tensor, batch: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        memorized_batch = memorized[batch].to(logits.device)
        reward = _rewards(exit_losses(logits, labels), memorized_batch, settings)
        gate_logits = run.network.gate_logits(pooled, logits)
        _, policy = take_actions(gate_logits, reward, memorized_batch, settings, run.position["step"])
        return policy, expected_figures(gate_logits, reward)

    s = settings
    fit_on_features(
        run,
        rows,
        loss,
        name=name,
        epochs=s.policy_epochs,
        batch_size=s.policy_batch,
        lr=s.policy_lr,
        warmup=s.warmup,
        weight_decay=s.weight_decay,
    )


def _fit_exits_and_policies(
    run: Run[EarlyExitNetwork], rows: Encoded, memorized: Tensor, settings: ConsistentEESettings, name: str
) -> None:
    """Train all parts: each exit on the instances that exit there, policies by reward (phase 4)."""
    device, s = run.accelerator.device, settings

    def loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        inputs, labels = rows.batch(index, device)
        outputs = model(inputs, detach_policies=s.detach_policies)
        losses, gate_logits = exit_losses(outputs.logits, labels), outputs.gate_logits.float()
        memorized_batch = memorized[torch.from_numpy(index)].to(device)
        reward = _rewards(losses.detach(), memorized_batch, s)
        exits_taken, policy = take_actions(gate_logits, reward, memorized_batch, s, run.position["step"])
        task = taken_exit_loss(losses, exits_taken)
        return task + policy, {"task": float(task.detach()), **expected_figures(gate_logits, reward)}

    trains = (*EVERYTHING, "policies")
    rates: dict[str, Any] = {"heads_lr": s.both_heads_lr, "warmup": s.warmup, "weight_decay": s.weight_decay}
    run.fit(Phase(name, trains, rows.lengths, loss, s.both_epochs, s.both_batch, s.both_lr, **rates))


def _figures_at_memorized(run: Run[EarlyExitNetwork], dev: Encoded) -> dict[str, float]:
    """The figures of a walk on dev that exits at the Memorized Layer of each row."""
    collected = collect(run.network, dev, device=run.accelerator.device, description="dev, Memorized Layer")
    table, costs = exit_table(collected), exit_costs(run.network, collected.lengths)
    exits = memorized_exit(torch.from_numpy(table.right)).numpy()
    return costs.point(RuleSpec("memorized", {}), exits, table).figures()
