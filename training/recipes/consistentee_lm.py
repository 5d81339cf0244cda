"""consistentee_lm: ConsistentEE for language models, a policy decision per token (arXiv 2312.11882).

The backbone is frozen. 1 heads: exits are trained on the next token, weights proportional to their block.  2
policies: one linear layer an exit on the normed hidden state, trained by REINFORCE over K trajectories with
their mean as baseline. The reward of exiting after block l is R = -CE - alpha * l * (1 - m / L), where m, a
token's Memorized Layer, is the first exit from which on every exit predicts the right token.  3 exits: each
is trained on the tokens that exit there. At run time a token exits after the first exit with P(exit) above
0.5, and the first token of an answer is computed at full depth.

As in the public LLaMA code: actions are epsilon-greedy, one of the K trajectories never exits (expert), a
trajectory's log-probability is divided by the number of its exits (per_layer), policies rest in phase 3.
These make the gradient another one than the expected reward's; exploration=bernoulli, expert=false,
per_layer=false give that. Further settings: hardness=false omits (1 - m / L), as that code's live reward
does; both_policies=true trains policies in phase 3, as for classifiers; target=model trains phase 1 on the
last block's probabilities.

We differ: an exit is a translator, a residual linear map before the one shared head. The paper's is a copy of
the head for each layer, adapted by LoRA, which a small model with a tied head and a bundle cannot hold; its
rates are a tenth of ours, batches have 128 rows. Every token attends to keys and values of the full depth, so
features do not depend on the policy: exact for a bundle's cache "deferred", an approximation of "propagated"
ones. The public code pairs rewards with another token's depth, rewards tokens of the prompt and counts blocks
from 0; here reward and depth belong to one token, only completions take part, blocks count from 1. Policies
start at P(exit) = 0.5.

Expect: dev in training.json has CALM's confidence and cosine at the policy's depth, their thresholds tuned on
dev itself, which favours them. No figure of the paper was available for comparison.

    ee-train --model MODEL --data DATA --recipe consistentee_lm --exits 10,20 --set alpha=0.02 --out ckpt/
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.models.decoder import DecoderNetwork
from offramp.runtime.errors import BadSetting
from offramp.training.lm_data import IGNORED, TokenRows
from offramp.training.loop import Phase, Run
from offramp.training.recipes.consistentee import (
    EXPLORATIONS,
    check_epsilon,
    epsilon_after,
    exit_distribution,
    memorized_exit,
    reinforce_loss,
    sample_exits,
)
from offramp.training.token_exits import (
    collect_tokens,
    compare_rules,
    exit_logits,
    may_exit_early,
    policy_logits,
    sample_tokens,
    states_at_exits,
)

TARGETS = ("data", "model")
POLICY_BATCH = 1024  # tokens a step of phase 2
DEV_ROWS = 64


@dataclass(frozen=True)
class ConsistentEELMSettings:
    """Settings of recipe consistentee_lm.

    alpha: price of a block in nats; trajectories: K; tokens_per_batch: most tokens of a batch of rows that
    phases 1 and 3 use, sampled if there are more; policy_tokens: most tokens of phase 2. epsilon_*: of
    epsilon-greedy actions; the share falls from start to end by a factor e in `decay` calls of a policy, of
    which a step has one for each exit. both_*: phase 3.
    """

    epochs: int = 1
    batch_size: int = 8
    heads_lr: float = 3e-3
    target: str = "data"
    alpha: float = 0.01
    hardness: bool = True
    exploration: str = "epsilon_greedy"
    epsilon_start: float = 0.1
    epsilon_end: float = 0.0
    epsilon_decay: float = 20_000.0
    trajectories: int = 4
    expert: bool = True
    per_layer: bool = True
    policy_epochs: int = 5
    policies_lr: float = 3e-4
    policy_tokens: int = 100_000
    both_epochs: int = 1
    both_heads_lr: float = 3e-4
    both_policies: bool = False
    tokens_per_batch: int = 1024

    def __post_init__(self) -> None:
        if min(self.batch_size, self.policy_tokens, self.tokens_per_batch) < 1:
            raise ValueError(f"batch_size, policy_tokens and tokens_per_batch are at least 1: {self}")
        if min(self.epochs, self.policy_epochs, self.both_epochs) < 0 or self.alpha < 0:
            raise ValueError(f"epochs and alpha are no less than 0: {self}")
        if min(self.heads_lr, self.policies_lr, self.both_heads_lr) <= 0:
            raise ValueError(f"learning rates must be positive: {self}")
        if self.trajectories < 2:
            raise ValueError("trajectories: the mean of one trajectory is no baseline; at least 2")
        for name, value, known in (
            ("target", self.target, TARGETS),
            ("exploration", self.exploration, EXPLORATIONS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value}: choose among {', '.join(known)}")
        check_epsilon(self.epsilon_start, self.epsilon_end, self.epsilon_decay)


KIND: Literal["decoder"] = "decoder"
SETTINGS = ConsistentEELMSettings
STARTS_FROM: str | None = None


def prepare(network: DecoderNetwork, exits: tuple[int, ...], settings: ConsistentEELMSettings) -> None:
    """Add the translators and policies that the network lacks; raises BadSetting if it has other exits."""
    early = [block for block in exits if block < network.block_count]
    if not early:
        raise BadSetting("--exits: consistentee_lm needs one before the last block")
    existing = sorted(int(name) for name in network.exits)
    if existing not in ([], early):
        raise BadSetting(f"--exits {early}: the model has exits after blocks {existing}; name these")
    if not existing:
        network.add_exits(early)
    for block in early:
        if str(block) not in network.policies:
            policy = nn.Linear(network.hidden_size, 1)
            for parameter in policy.parameters():  # P(exit) is 0.5 for every token and every seed
                nn.init.zeros_(parameter)
            network.policies[str(block)] = policy


def exit_rewards(
    losses: Tensor, right: Tensor, exits: tuple[int, ...], settings: ConsistentEELMSettings
) -> Tensor:
    """The reward of exiting at each exit [tokens, exits]; losses in nats and right, both [tokens, exits]."""
    depth = torch.tensor(exits, device=losses.device, dtype=torch.float32)  # blocks
    easy = 1 - depth[memorized_exit(right)] / exits[-1]
    price = settings.alpha * (easy if settings.hardness else torch.ones_like(easy))
    return -losses - price[:, None] * depth


def sample_trajectories(gate_logits: Tensor, step: int, settings: ConsistentEELMSettings) -> Tensor:
    """Sample the exits (0-based) of K trajectories for each token [tokens, K] at a step of a phase.

    gate_logits [tokens, exits - 1].
    """
    s, epsilon = settings, None
    if s.exploration == "epsilon_greedy":
        calls = step * gate_logits.shape[1]
        epsilon = epsilon_after(calls, s.epsilon_start, s.epsilon_end, s.epsilon_decay)
    sampled = sample_exits(gate_logits, s.trajectories, epsilon)
    if s.expert:
        sampled[:, 0] = gate_logits.shape[1]
    return sampled


def train(
    run: Run[DecoderNetwork],
    rows: dict[str, TokenRows],
    exits: tuple[int, ...],
    settings: ConsistentEELMSettings,
) -> dict[str, Any]:
    """Run all phases; return dev figures of exits, policies and CALM's rules."""
    prepare(run.network, exits, settings)  # for callers other than ee-train
    run.network.to(run.accelerator.device)
    _fit_heads(run, rows["train"], exits, settings)
    _fit_policies(run, rows["train"], exits, settings)
    if settings.both_epochs:
        _fit_taken_exits(run, rows["train"], exits, settings)
    if "dev" not in rows:
        return {}
    s, index = settings, list(range(min(DEV_ROWS, len(rows["dev"]))))
    outputs = collect_tokens(run.network, rows["dev"], index, exits, s.batch_size, s.tokens_per_batch)
    return {"dev": compare_rules(run.network, outputs, exits)}


def _fit_heads(
    run: Run[DecoderNetwork], rows: TokenRows, exits: tuple[int, ...], s: ConsistentEELMSettings
) -> None:
    weights = [block / sum(exits[:-1]) for block in exits[:-1]]

    def loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        ids, targets = rows.batch(index, run.accelerator.device)
        where = sample_tokens(targets != IGNORED, s.tokens_per_batch)
        states, _ = states_at_exits(run.network, ids, where, exits)
        goal = targets[where]
        if s.target == "model":
            with torch.no_grad():
                goal = next(exit_logits(run.network, states[:, -1:], exits[-1:])).softmax(-1)
        total, figures = torch.zeros((), device=ids.device), {}
        logits_by_exit = exit_logits(run.network, states, exits[:-1])
        for block, weight, logits in zip(exits[:-1], weights, logits_by_exit, strict=True):
            exit_loss = functional.cross_entropy(logits, goal, reduction="sum") / max(1, len(goal))
            figures[f"exit_{block}"] = float(exit_loss.detach())
            total = total + weight * exit_loss
        return total, figures

    trains, lr = ("exits",), s.heads_lr
    run.fit(Phase("heads", trains, rows.lengths, loss, s.epochs, s.batch_size, lr, shared=False))


def _fit_policies(
    run: Run[DecoderNetwork], rows: TokenRows, exits: tuple[int, ...], s: ConsistentEELMSettings
) -> None:
    """Train policies on cached features, since all other parts are frozen and their outputs do not change."""
    if run.skip_finished_phase():
        return
    device = run.accelerator.device
    order = np.random.default_rng([run.seed, 78]).permutation(len(rows))
    counts = np.array([max(0, len(rows.ids[row]) - rows.starts[row] - 1) for row in order])
    index = order[: max(1, int((counts.cumsum() <= s.policy_tokens).sum()))].tolist()
    with run.accelerator.autocast():  # as in the other phases: in float32 it takes three times as long
        outputs = collect_tokens(run.network, rows, index, exits, s.batch_size, s.tokens_per_batch)
    reward = exit_rewards(outputs.losses, outputs.right, exits, s)

    def loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        batch = torch.from_numpy(index).to(device)
        gate_logits = policy_logits(run.network, outputs.states[batch], exits)
        sampled = sample_trajectories(gate_logits, run.position["step"], s)
        value = reinforce_loss(gate_logits, reward[batch], sampled, per_layer=s.per_layer)
        return value, _figures(gate_logits, reward[batch], exits)

    lengths, epochs, lr = np.zeros(len(outputs), np.int64), s.policy_epochs, s.policies_lr
    run.fit(Phase("policies", ("policies",), lengths, loss, epochs, POLICY_BATCH, lr, shared=False))


def _fit_taken_exits(
    run: Run[DecoderNetwork], rows: TokenRows, exits: tuple[int, ...], s: ConsistentEELMSettings
) -> None:
    """Train exits on the tokens that exit there and, if asked, policies by the current exits' rewards."""

    def loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        ids, targets = rows.batch(index, run.accelerator.device)
        where = sample_tokens(may_exit_early(targets), s.tokens_per_batch)
        states, _ = states_at_exits(run.network, ids, where, exits)
        goal, losses, right = targets[where], [], []
        for logits in exit_logits(run.network, states, exits):
            losses.append(functional.cross_entropy(logits, goal, reduction="none"))
            right.append(logits.argmax(-1) == goal)
        exit_losses = torch.stack(losses, 1)
        gate_logits = policy_logits(run.network, states, exits)
        sampled = sample_trajectories(gate_logits, run.position["step"], s)
        task = exit_losses.gather(1, sampled).mean(1).sum() / max(1, len(goal))
        reward = exit_rewards(exit_losses.detach(), torch.stack(right, 1), exits, s)
        figures = {"task": float(task.detach()), **_figures(gate_logits, reward, exits)}
        if s.both_policies:
            task = task + reinforce_loss(gate_logits, reward, sampled, per_layer=s.per_layer)
        return task, figures

    name, trains = ("both", ("exits", "policies")) if s.both_policies else ("taken exits", ("exits",))
    lr, epochs = s.both_heads_lr, s.both_epochs
    phase = Phase(name, trains, rows.lengths, loss, epochs, s.batch_size, lr, shared=False)
    run.fit(replace(phase, policies_lr=s.policies_lr))


def _figures(gate_logits: Tensor, reward: Tensor, exits: tuple[int, ...]) -> dict[str, float]:
    """The expected reward and depth in blocks of a batch, for the log."""
    exit_at = exit_distribution(gate_logits.detach())
    count = max(1, len(gate_logits))
    depth = exit_at @ torch.tensor(exits, device=exit_at.device, dtype=exit_at.dtype)
    return {"reward": float((exit_at * reward).sum()) / count, "depth": float(depth.sum()) / count}
