"""layerskip: blocks drop out and early exits learn through the one head, so that they draft well (ACL 2024).

Of a batch, every row goes past block l (0-based, of L) with probability dropout * (2^(l / (L - 1)) - 1).
Loss: cross-entropy behind the last block and behind each exit, weights L and scale * l, divided by their sum;
final norm and head are shared (LayerSkip, arXiv 2404.16710). curriculum: rotational has the exits learn in
turns, one a step; gradual begins with the deepest and has all of them from half of the training on.

We differ: only the blocks of --exits learn to exit, which is what a bundle is cut at; target=model has exits
learn what the last block says (its probabilities, not differentiated) in place of the text, which is what a
draft is judged by. Dropped blocks are computed and not used, and still leave keys and values.

Expect: see benchmarks/results/layerskip.json for SmolLM2-135M on 2 cores.

    ee-train --model MODEL --data DATA --recipe layerskip --exits 5,10 --out ckpt/
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from offramp.models.decoder import BlockMask
from offramp.training.loop import Run, Stage
from offramp.training.texts import IGNORED, Texts

CURRICULA, TARGETS = ("all", "rotational", "gradual"), ("data", "model")


@dataclass(frozen=True)
class LayerSkip:
    """Settings of the recipe; scale: weight of exits against the last block."""

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


SETTINGS = LayerSkip
STARTS_FROM = None
GENERATES = True


def drops(rows: int, blocks: int, most: float, device: torch.device) -> BlockMask:
    """Rows that go past blocks by chance: block l with probability most * (2^(l / (L - 1)) - 1)."""
    chance = [most * (2 ** (block / max(1, blocks - 1)) - 1) for block in range(blocks)]
    stays = torch.rand(blocks, rows, device=device) >= torch.tensor(chance, device=device)[:, None]

    def decide(block: int, hidden: Tensor) -> Tensor | None:
        if bool(stays[block].all()):
            return None
        return stays[block][:, None].expand(hidden.shape[:2]).to(hidden.dtype)

    return decide


def enabled(exits: Sequence[int], curriculum: str, step: int, steps: int) -> list[int]:
    """Exits that learn at this step (0-based) of so many."""
    if curriculum == "rotational":
        return [exits[step % len(exits)]] if exits else []
    if curriculum == "gradual":
        reached = math.ceil(len(exits) * min(1.0, 2 * (step + 1) / steps))
        return list(exits[len(exits) - reached :])
    return list(exits)


def train(run: Run, texts: dict[str, Texts], exits: tuple[int, ...], settings: LayerSkip) -> dict[str, Any]:
    """The one stage; gives what each exit says on dev: loss, and how often it agrees with the last block."""
    rows, blocks = texts["train"], run.network.block_count
    early = [block for block in exits if block < blocks]
    s = settings
    steps = s.epochs * math.ceil(len(rows) / s.batch_size)

    def loss(model: Any, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        ids, following = rows.batch(index, run.accelerator.device)
        states = model(ids, drops(len(ids), blocks, s.dropout, ids.device))
        learned = following != IGNORED
        logits = run.network.head(states[-1][learned]).float()  # [tokens, vocabulary]
        count = max(1, len(logits))  # a batch may have nothing to learn
        total = blocks * functional.cross_entropy(logits, following[learned], reduction="sum") / count
        figures, weights = {"last": float(total.detach()) / blocks}, float(blocks)
        said = logits.detach().softmax(-1) if s.target == "model" else following[learned]
        for block in enabled(early, s.curriculum, run.position["step"], steps):
            guess = run.network.head(states[block - 1][learned]).float()
            one = functional.cross_entropy(guess, said, reduction="sum") / count
            figures[f"exit_{block}"] = float(one.detach())
            figures[f"agrees_{block}"] = int((guess.argmax(-1) == logits.argmax(-1)).sum()) / count
            total, weights = total + s.scale * block * one, weights + s.scale * block
        return total / weights, figures

    run.fit(Stage("layerskip", ("model",), rows.lengths, loss, s.epochs, s.batch_size, s.lr, warmup=0.05))
    return {"dev": measure(run, texts["dev"], early)} if "dev" in texts else {}


@torch.no_grad()
def measure(run: Run, rows: Texts, exits: Sequence[int], most: int = 64) -> dict[str, Any]:
    """Over the first `most` rows, by block (the last too): loss a token, share of tokens on which the
    likeliest is the last block's.
    """
    network, device = run.network, run.accelerator.device
    network.eval()
    blocks = [*exits, network.block_count]
    losses, agreed, count = {b: 0.0 for b in blocks}, {b: 0 for b in blocks}, 0
    for start in range(0, min(most, len(rows)), 8):
        ids, following = rows.batch(range(start, min(start + 8, most, len(rows))), device)
        learned = following != IGNORED
        states = network(ids)
        last = network.head(states[-1][learned]).argmax(-1)
        count += int(learned.sum())
        for block in blocks:
            logits = network.head(states[block - 1][learned]).float()
            losses[block] += float(functional.cross_entropy(logits, following[learned], reduction="sum"))
            agreed[block] += int((logits.argmax(-1) == last).sum())
    return {
        "tokens": count,
        "exits": blocks,
        "loss": [round(losses[block] / count, 4) for block in blocks],
        "agrees": [round(agreed[block] / count, 4) for block in blocks],
    }
