"""layer_selection: controllers decide which tokens skip which blocks (ENLSP 2024, arXiv 2410.20022).

Controllers of models.controllers are trained by hard Gumbel softmax with straight-through gradients at
temperature tau.
Loss: cross-entropy + alpha * mean over the controlled blocks of the share of answer tokens that run them.
Tokens of a prompt run all blocks; hidden states are detached before a controller reads them. input=fixed is
the published control experiment, whose controllers read ones: the difference is the value of hidden states.

We differ: backbone=frozen trains controllers alone (published: all; backbone=trained), they run nearly all
blocks at first (start), and the token that skips a block is the one that predicts, not the one that is
predicted; the first answer token is predicted by the prompt's last, which runs all blocks.

Published: hidden states add little over the control; our measurement is in docs/log.md.

    ee-train --model MODEL --data DATA --recipe layer_selection --set alpha=1 --out ckpt/
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.models.controllers import INPUTS, Controllers, controllers_of
from offramp.models.decoder import BlockMask, DecoderNetwork
from offramp.training.lm_data import IGNORED, TokenRows
from offramp.training.loop import Phase, Run
from offramp.training.token_exits import may_exit_early

BACKBONES = ("frozen", "trained")
EVALUATION_BATCH = 8


@dataclass(frozen=True)
class LayerSelectionSettings:
    """Settings of recipe layer_selection.

    alpha: price of running all blocks, in nats a token; tau: temperature of the gradients; start: logit of
    running before training; lr: of all trained parameters.
    """

    epochs: int = 1
    batch_size: int = 8
    lr: float = 1e-3
    alpha: float = 1.0
    tau: float = 1.0
    start: float = 2.0
    input: str = "hidden"
    backbone: str = "frozen"

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1 or self.lr <= 0 or self.tau <= 0:
            raise ValueError(f"epochs, batch_size, lr and tau must be positive: {self}")
        if self.alpha < 0:
            raise ValueError(f"alpha is no less than 0: {self}")
        for name, value, known in (("input", self.input, INPUTS), ("backbone", self.backbone, BACKBONES)):
            if value not in known:
                raise ValueError(f"{name}={value}: choose among {', '.join(known)}")


KIND: Literal["decoder"] = "decoder"
SETTINGS = LayerSelectionSettings
STARTS_FROM: str | None = None


def prepare(network: DecoderNetwork, exits: tuple[int, ...], settings: LayerSelectionSettings) -> None:
    """Add new controllers to the network, for all blocks but the first and the last."""
    network.controllers = Controllers(
        network.block_count, network.hidden_size, input=settings.input, start=settings.start
    )


def controlled_blocks(
    controllers: Controllers, may_skip: Tensor, tau: float | None, shares: list[Tensor]
) -> BlockMask:
    """A block mask of the blocks that controllers choose: sampled at temperature tau or, for None, the
    likelier.

    may_skip [batch, seq]: tokens that are controlled; others run all blocks. The share of them that runs each
    controlled block is appended to `shares`.
    """

    def block_mask(block: int, hidden: Tensor) -> Tensor | None:
        number = block + 1
        if str(number) not in controllers:
            return None
        if tau is None:
            runs = (controllers.margin(number, hidden) > 0).to(hidden.dtype)
        else:
            runs = controllers.sample(number, hidden, tau)
        shares.append((runs * may_skip).sum() / may_skip.sum().clamp(min=1))
        return torch.where(may_skip, runs, 1.0)

    return block_mask


def train(
    run: Run[DecoderNetwork],
    rows: dict[str, TokenRows],
    exits: tuple[int, ...],
    settings: LayerSelectionSettings,
) -> dict[str, Any]:
    """Train the controllers in one phase; return dev figures with and without them."""
    controllers, train_rows, s = controllers_of(run.network), rows["train"], settings
    if controllers is None:
        raise ValueError("call prepare(network, exits, settings) before creating the run")

    def loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        ids, targets = train_rows.batch(index, run.accelerator.device)
        shares: list[Tensor] = []
        states = model(ids, controlled_blocks(controllers, may_exit_early(targets), s.tau, shares))
        learned = targets != IGNORED
        logits = run.network.head(states[-1][learned]).float()  # [tokens, vocabulary]
        task = functional.cross_entropy(logits, targets[learned])
        share = torch.stack(shares).mean()
        return task + s.alpha * share, {"task": float(task.detach()), "block_share": float(share.detach())}

    trains = ("controllers",) if s.backbone == "frozen" else ("model", "controllers")
    lengths = train_rows.lengths
    run.fit(Phase("controllers", trains, lengths, loss, s.epochs, s.batch_size, s.lr, warmup=0.05))
    controllers.fold_fixed_input()
    return {"dev": measure_controllers(run, rows["dev"])} if "dev" in rows else {}


@torch.no_grad()
def measure_controllers(run: Run[DecoderNetwork], rows: TokenRows, max_rows: int = 64) -> dict[str, Any]:
    """Evaluate the controllers' likelier choice on the first `max_rows` rows, beside running all blocks.

    Gives the number of controlled tokens, their loss in nats with all blocks and with the controllers, mean
    blocks run, and the share of tokens that run each controlled block.
    """
    network, device = run.network, run.accelerator.device
    controllers = controllers_of(network)
    assert controllers is not None
    network.eval()
    token_count, full_loss, controlled_loss = 0, 0.0, 0.0
    block_shares = torch.zeros(len(controllers), device=device)
    count = min(max_rows, len(rows))
    for start in range(0, count, EVALUATION_BATCH):
        ids, targets = rows.batch(range(start, min(start + EVALUATION_BATCH, count)), device)
        controlled, shares = may_exit_early(targets), list[Tensor]()
        tokens = int(controlled.sum())
        if not tokens:
            continue
        states = network(ids, controlled_blocks(controllers, controlled, None, shares))
        controlled_loss += _loss_sum(network, states[-1], targets, controlled)
        full_loss += _loss_sum(network, network(ids)[-1], targets, controlled)
        block_shares += torch.stack(shares) * tokens
        token_count += tokens
    block_shares = block_shares / max(1, token_count)
    return {
        "tokens": token_count,
        "loss_full": round(full_loss / max(1, token_count), 4),
        "loss": round(controlled_loss / max(1, token_count), 4),
        "depth": round(network.block_count - len(controllers) + float(block_shares.sum()), 3),
        "block_shares": [round(share, 4) for share in block_shares.tolist()],
    }


def _loss_sum(network: DecoderNetwork, hidden: Tensor, targets: Tensor, where: Tensor) -> float:
    logits = network.head(hidden[where]).float()
    return float(functional.cross_entropy(logits, targets[where], reduction="sum"))
