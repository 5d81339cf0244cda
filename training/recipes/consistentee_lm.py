"""consistentee_lm: ConsistentEE for language models, a policy a token; only heads learn (arXiv 2312.11882).

The backbone is frozen. 1 heads: exits learn the next token, weights proportional to their block.  2 policies:
REINFORCE over K trajectories, the mean as baseline; leaving behind block l is worth R = -CE - alpha * l * (1
- m / L), where m, a token's Memorized Layer, is the first exit from which on every exit says the right token.
3 both: exits learn the tokens that leave there, policies go on. As at run time, a token leaves behind the
first exit with P(exit) above 0.5, and the first token of an answer is said at full depth.

We differ: an exit is a translator, a residual linear map before the one shared head, and stands for the
paper's copy of the head with LoRA. Every token attends to keys and values of the full depth, so features need
no policy: exact for a bundle's cache "deferred", an approximation of "propagated" ones. The public code pairs
rewards with another token's depth, rewards tokens of the prompt, counts blocks from 0 and leaves out (1 - m /
L); here reward and depth are of one token, only completions take part, blocks count from 1. Actions are drawn
from the policy, without epsilon; trajectories are compared with the mean of the others, which is the same
gradient but for a factor of K / (K - 1). In stage 3 m is that of the exits of that moment.

Settings: target=model has stage 1 learn what the last block says; hardness=false drops (1 - m / L), as the
public LLaMA code does; expert=true makes one of the K never exit, as it does too, at the price of a bias.

Expect: dev in training.json has CALM's confidence and cosine at the policy's depth, their thresholds tuned on
dev itself, which flatters them. No figure of the paper to hold this against was found.

    ee-train --model MODEL --data DATA --recipe consistentee_lm --exits 10,20 --set alpha=0.02 --out ckpt/
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.models.decoder import DecoderNetwork
from offramp.training.loop import Run, Stage
from offramp.training.recipes.consistentee import leave_probabilities
from offramp.training.settings import BadSetting
from offramp.training.texts import IGNORED, Texts
from offramp.training.token_hardness import (
    compared,
    exit_logits,
    gates_of,
    hidden_at,
    listen,
    may_leave,
    memorized_block,
    some,
)

TARGETS = ("data", "model")
POLICY_BATCH = 1024  # tokens a step of stage 2
DEV_ROWS = 64


@dataclass(frozen=True)
class ConsistentEELM:
    """Settings of the recipe; alpha: price of a block in nats, trajectories: K, tokens_per_batch: most that
    stages 1 and 3 learn from a batch of rows, drawn where there are more; policy_tokens: most of stage 2.
    """

    epochs: int = 1
    batch_size: int = 8
    heads_lr: float = 3e-3
    target: str = "data"
    alpha: float = 0.01
    hardness: bool = True
    trajectories: int = 4
    expert: bool = False
    policy_epochs: int = 5
    policies_lr: float = 3e-4
    policy_tokens: int = 100_000
    both_epochs: int = 1
    both_heads_lr: float = 3e-4
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
        if self.target not in TARGETS:
            raise ValueError(f"target={self.target}: choose among {', '.join(TARGETS)}")


SETTINGS = ConsistentEELM
STARTS_FROM = None
GENERATES = True


def prepare(network: DecoderNetwork, exits: tuple[int, ...], settings: ConsistentEELM) -> None:
    """Give the network what it lacks of translators and policies, before a run reads what an earlier one
    left; raises BadSetting where its exits are others.
    """
    early = [block for block in exits if block < network.block_count]
    if not early:
        raise BadSetting("--exits: consistentee_lm needs one before the last block")
    have = sorted(int(name) for name in network.exits)
    if have not in ([], early):
        raise BadSetting(f"--exits {early}: the model has exits behind blocks {have}; name these")
    if not have:
        network.add_exits(early)
    for block in early:
        if str(block) not in network.policies:
            policy = nn.Linear(network.hidden_size, 1)
            for parameter in policy.parameters():  # 0.5 for every token: no chance in where it begins
                nn.init.zeros_(parameter)
            network.policies[str(block)] = policy


def rewards(losses: Tensor, right: Tensor, exits: tuple[int, ...], settings: ConsistentEELM) -> Tensor:
    """R [tokens, exits] of leaving at each exit: losses [tokens, exits] nats, right [tokens, exits]."""
    depth = torch.tensor(exits, device=losses.device, dtype=torch.float32)  # blocks
    easy = 1 - memorized_block(right, exits) / exits[-1]
    price = settings.alpha * (easy if settings.hardness else torch.ones_like(easy))
    return -losses - price[:, None] * depth


def draw(gates: Tensor, settings: ConsistentEELM) -> Tensor:
    """Exits at which K trajectories of each token leave [tokens, K]: gates [tokens, exits - 1] logits.

    One draw from P(leave at l) is a Bernoulli draw at every exit in turn.
    """
    leave = leave_probabilities(gates.detach())
    chosen = torch.multinomial(leave, settings.trajectories, replacement=True)
    if settings.expert:
        chosen[:, 0] = leave.shape[1] - 1
    return chosen


def policy_loss(gates: Tensor, reward: Tensor, chosen: Tensor) -> Tensor:
    """Scalar whose gradient raises the expected reward: gates [tokens, exits - 1] logits, reward [tokens,
    exits], chosen [tokens, K].
    """
    gained = reward.gather(1, chosen)
    count = chosen.shape[1]
    # Against the mean of the others: with itself among them the gradient were (K - 1) / K of the true one.
    advantage = (gained - gained.mean(1, keepdim=True)) * count / (count - 1)
    said = leave_probabilities(gates).clamp(min=1e-30).log().gather(1, chosen)
    return -(advantage * said).mean(1).sum() / max(1, len(gates))


def train(
    run: Run, texts: dict[str, Texts], exits: tuple[int, ...], settings: ConsistentEELM
) -> dict[str, Any]:
    """All stages; gives what dev says of exits, policies and CALM's rules."""
    prepare(run.network, exits, settings)  # where nobody did: a run that begins
    run.network.to(run.accelerator.device)
    _fit_heads(run, texts["train"], exits, settings)
    _fit_policies(run, texts["train"], exits, settings)
    if settings.both_epochs:
        _fit_both(run, texts["train"], exits, settings)
    if "dev" not in texts:
        return {}
    s, index = settings, list(range(min(DEV_ROWS, len(texts["dev"]))))
    said = listen(run.network, texts["dev"], index, exits, s.batch_size, s.tokens_per_batch)
    return {"dev": compared(run.network, said, exits)}


def _fit_heads(run: Run, rows: Texts, exits: tuple[int, ...], s: ConsistentEELM) -> None:
    weights = [block / sum(exits[:-1]) for block in exits[:-1]]

    def loss(model: Any, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        ids, following = rows.batch(index, run.accelerator.device)
        where = some(following != IGNORED, s.tokens_per_batch)
        states, _ = hidden_at(run.network, ids, where, exits)
        said = following[where]
        if s.target == "model":
            with torch.no_grad():
                said = next(exit_logits(run.network, states[:, -1:], exits[-1:])).softmax(-1)
        total, figures = torch.zeros((), device=ids.device), {}
        told = exit_logits(run.network, states, exits[:-1])
        for block, weight, logits in zip(exits[:-1], weights, told, strict=True):
            one = functional.cross_entropy(logits, said, reduction="sum") / max(1, len(said))
            figures[f"exit_{block}"] = float(one.detach())
            total = total + weight * one
        return total, figures

    learns, rate = ("exits",), s.heads_lr
    run.fit(Stage("heads", learns, rows.lengths, loss, s.epochs, s.batch_size, rate, shared=False))


def _fit_policies(run: Run, rows: Texts, exits: tuple[int, ...], s: ConsistentEELM) -> None:
    """Policies on cached features: all else is frozen, so what it says is computed once."""
    if run.done_before():
        return
    device = run.accelerator.device
    order = np.random.default_rng([run.seed, 78]).permutation(len(rows))
    counts = np.array([max(0, len(rows.ids[row]) - rows.starts[row] - 1) for row in order])
    index = order[: max(1, int((counts.cumsum() <= s.policy_tokens).sum()))].tolist()
    with run.accelerator.autocast():  # as in the other stages: in float32 it takes three times as long
        said = listen(run.network, rows, index, exits, s.batch_size, s.tokens_per_batch)
    reward = rewards(said.losses, said.right, exits, s)

    def loss(model: Any, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        chosen = torch.from_numpy(index).to(device)
        gates = gates_of(run.network, said.states[chosen], exits)
        worth = reward[chosen]
        return policy_loss(gates, worth, draw(gates, s)), _figures(gates, worth, exits)

    lengths, epochs, rate = np.zeros(len(said), np.int64), s.policy_epochs, s.policies_lr
    run.fit(Stage("policies", ("policies",), lengths, loss, epochs, POLICY_BATCH, rate, shared=False))


def _fit_both(run: Run, rows: Texts, exits: tuple[int, ...], s: ConsistentEELM) -> None:
    """Exits learn from the tokens that leave there, policies from today's exits' rewards."""

    def loss(model: Any, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        ids, following = rows.batch(index, run.accelerator.device)
        where = some(may_leave(following), s.tokens_per_batch)
        states, _ = hidden_at(run.network, ids, where, exits)
        said, losses, right = following[where], [], []
        for logits in exit_logits(run.network, states, exits):
            losses.append(functional.cross_entropy(logits, said, reduction="none"))
            right.append(logits.argmax(-1) == said)
        loss = torch.stack(losses, 1)
        gates = gates_of(run.network, states, exits)
        worth = rewards(loss.detach(), torch.stack(right, 1), exits, s)
        chosen = draw(gates, s)
        task = loss.gather(1, chosen).mean(1).sum() / max(1, len(said))
        figures = {"task": float(task.detach()), **_figures(gates, worth, exits)}
        return task + policy_loss(gates, worth, chosen), figures

    learns, epochs, rates = ("exits", "policies"), s.both_epochs, (s.both_heads_lr, s.policies_lr)
    run.fit(
        Stage(
            "both",
            learns,
            rows.lengths,
            loss,
            epochs,
            s.batch_size,
            rates[0],
            policies_lr=rates[1],
            shared=False,
        )
    )


def _figures(gates: Tensor, reward: Tensor, exits: tuple[int, ...]) -> dict[str, float]:
    leave = leave_probabilities(gates.detach())
    count = max(1, len(gates))
    depth = leave @ torch.tensor(exits, device=leave.device, dtype=leave.dtype)
    return {"reward": float((leave * reward).sum()) / count, "depth": float(depth.sum()) / count}
