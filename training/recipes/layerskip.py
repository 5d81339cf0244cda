"""layerskip: layer dropout and early-exit losses through the one head, so that exits draft well (ACL 2024).

Every row of a batch skips block l (0-based, of L) with probability dropout * (2^(l / (L - 1)) - 1). Loss:
cross-entropy after the last block and after each exit, weights L and scale * l, divided by their sum; final
norm and head are shared (LayerSkip, arXiv 2404.16710). curriculum: rotational trains the exits in turn, one a
step; gradual starts with the deepest and trains all of them from half of the training on.

We differ: only the blocks of --exits are trained to exit, where a bundle is divided into segments;
target=model trains exits on the last block's probabilities, not differentiated, instead of the text, because
a draft is compared with the last block. Dropped blocks are computed and not used, and still write keys and
values.

Expect: see benchmarks/results/layerskip.json for SmolLM2-135M on 2 cores.

    ee-train --model MODEL --data DATA --recipe layerskip --exits 5,10 --out ckpt/
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.models.decoder import BlockMask, DecoderNetwork
from offramp.training.lm_data import IGNORED, TokenRows
from offramp.training.loop import Phase, Run

CURRICULA, TARGETS = ("all", "rotational", "gradual"), ("data", "model")
EVALUATION_BATCH = 8


@dataclass(frozen=True)
class LayerSkipSettings:
    """Settings of recipe layerskip; scale: weight of the exits' losses against the last block's."""

    epochs: int = 1
    batch_size: int = 8
    lr: float = 1e-4
    dropout: float = 0.1
    scale: float = 1.0
    curriculum: str = "rotational"
    target: str = "data"

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1 or self.lr <= 0:
            raise ValueError(f"epochs, batch_size and lr must be positive: {self}")
        if not 0 <= self.dropout < 1 or self.scale <= 0:
            raise ValueError(f"dropout is a share below 1, scale is positive: {self}")
        for name, value, known in (
            ("curriculum", self.curriculum, CURRICULA),
            ("target", self.target, TARGETS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value}: choose among {', '.join(known)}")


KIND: Literal["decoder"] = "decoder"
SETTINGS = LayerSkipSettings
STARTS_FROM: str | None = None


def prepare(network: DecoderNetwork, exits: tuple[int, ...], settings: LayerSkipSettings) -> None:
    """Add nothing, since exits share the model's own head."""


def layer_dropout(rows: int, blocks: int, max_rate: float, device: torch.device) -> BlockMask:
    """A block mask: rows skip blocks at random, block l with rate max_rate * (2^(l / (L - 1)) - 1)."""
    rates = [max_rate * (2 ** (block / max(1, blocks - 1)) - 1) for block in range(blocks)]
    runs = torch.rand(blocks, rows, device=device) >= torch.tensor(rates, device=device)[:, None]

    def block_mask(block: int, hidden: Tensor) -> Tensor | None:
        if bool(runs[block].all()):
            return None
        return runs[block][:, None].expand(hidden.shape[:2]).to(hidden.dtype)

    return block_mask


def trained_exits(exits: Sequence[int], curriculum: str, step: int, steps: int) -> list[int]:
    """The exits that are trained at a step (0-based) of `steps` under a curriculum, one of CURRICULA."""
    if curriculum == "rotational":
        return [exits[step % len(exits)]] if exits else []
    if curriculum == "gradual":
        count = math.ceil(len(exits) * min(1.0, 2 * (step + 1) / steps))
        return list(exits[len(exits) - count :])
    return list(exits)


def train(
    run: Run[DecoderNetwork],
    rows: dict[str, TokenRows],
    exits: tuple[int, ...],
    settings: LayerSkipSettings,
) -> dict[str, Any]:
    """Train the model in one phase; return each exit's loss on dev and its agreement with the last block."""
    train_rows, blocks = rows["train"], run.network.block_count
    early = [block for block in exits if block < blocks]
    s = settings
    steps = s.epochs * math.ceil(len(train_rows) / s.batch_size)

    def loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        ids, targets = train_rows.batch(index, run.accelerator.device)
        states = model(ids, layer_dropout(len(ids), blocks, s.dropout, ids.device))
        learned = targets != IGNORED
        last_logits = run.network.head(states[-1][learned]).float()  # [tokens, vocabulary]
        count = max(1, len(last_logits))  # a batch may have no token to learn
        total = blocks * functional.cross_entropy(last_logits, targets[learned], reduction="sum") / count
        figures, weights = {"last": float(total.detach()) / blocks}, float(blocks)
        goal = last_logits.detach().softmax(-1) if s.target == "model" else targets[learned]
        for block in trained_exits(early, s.curriculum, run.position["step"], steps):
            exit_logits = run.network.head(states[block - 1][learned]).float()
            exit_loss = functional.cross_entropy(exit_logits, goal, reduction="sum") / count
            agreeing = int((exit_logits.argmax(-1) == last_logits.argmax(-1)).sum())
            figures[f"exit_{block}"] = float(exit_loss.detach())
            figures[f"agrees_{block}"] = agreeing / count
            total, weights = total + s.scale * block * exit_loss, weights + s.scale * block
        return total / weights, figures

    lengths = train_rows.lengths
    run.fit(Phase("layerskip", ("model",), lengths, loss, s.epochs, s.batch_size, s.lr, warmup=0.05))
    return {"dev": measure_exits(run, rows["dev"], early)} if "dev" in rows else {}


@torch.no_grad()
def measure_exits(
    run: Run[DecoderNetwork], rows: TokenRows, exits: Sequence[int], max_rows: int = 64
) -> dict[str, Any]:
    """Evaluate the exits and the last block on the first `max_rows` rows.

    Gives by block the loss in nats a token, and the share of tokens for which the likeliest next token is the
    last block's.
    """
    network, device = run.network, run.accelerator.device
    network.eval()
    blocks = [*exits, network.block_count]
    losses, agreeing, tokens = {b: 0.0 for b in blocks}, {b: 0 for b in blocks}, 0
    count = min(max_rows, len(rows))
    for start in range(0, count, EVALUATION_BATCH):
        ids, targets = rows.batch(range(start, min(start + EVALUATION_BATCH, count)), device)
        learned = targets != IGNORED
        states = network(ids)
        last = network.head(states[-1][learned]).argmax(-1)
        tokens += int(learned.sum())
        for block in blocks:
            logits = network.head(states[block - 1][learned]).float()
            losses[block] += float(functional.cross_entropy(logits, targets[learned], reduction="sum"))
            agreeing[block] += int((logits.argmax(-1) == last).sum())
    return {
        "tokens": tokens,
        "exits": blocks,
        "loss": [round(losses[block] / tokens, 4) for block in blocks],
        "agrees": [round(agreeing[block] / tokens, 4) for block in blocks],
    }
