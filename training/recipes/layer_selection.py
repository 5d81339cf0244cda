"""layer_selection: every block learns which tokens may go past it (ENLSP 2024 workshop, arXiv 2410.20022).

Controllers of models.controllers, hard Gumbel softmax with straight-through gradients at temperature tau.
Loss: cross-entropy + alpha * mean over the controlled blocks of the share of answer tokens that run them.
Tokens of a prompt run everything; hidden states are detached before a controller reads them. input=fixed is
the published control, whose controllers read ones: what hidden states are worth is the difference.

We differ: backbone=frozen trains controllers alone (published: all; backbone=trained), they begin by running
nearly everything (start), and the token that goes past a block is the one that predicts, not the one that is
predicted; the first answer token is predicted by the prompt's last, which runs everything.

Published: hidden states add little over the control; benchmarks/depth.py measures it.

    ee-train --model MODEL --data DATA --recipe layer_selection --set alpha=1 --out ckpt/
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from offramp.models.controllers import INPUTS, Controllers, controllers_of
from offramp.models.decoder import BlockMask, DecoderNetwork
from offramp.training.loop import Run, Stage
from offramp.training.texts import IGNORED, Texts
from offramp.training.token_hardness import may_leave

BACKBONES = ("frozen", "trained")


@dataclass(frozen=True)
class LayerSelection:
    """Settings of the recipe; alpha: price of running all blocks, in nats a token; tau: softness of
    gradients; start: logit of running before training; lr: of all that learns.
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


SETTINGS = LayerSelection
STARTS_FROM = None
GENERATES = True


def prepare(network: DecoderNetwork, exits: tuple[int, ...], settings: LayerSelection) -> None:
    """Give the network its controllers, before a run reads what an earlier one left."""
    made = Controllers(network.block_count, network.hidden_size, input=settings.input, start=settings.start)
    network.controllers = made


def draws(controllers: Controllers, may: Tensor, tau: float | None, ran: list[Tensor]) -> BlockMask:
    """Blocks that tokens run, drawn at temperature tau, or, where None, the likelier; the mean over tokens
    that `may` [batch, seq] of each controlled block is put in `ran`.
    """

    def decide(block: int, hidden: Tensor) -> Tensor | None:
        number = block + 1
        if str(number) not in controllers:
            return None
        if tau is None:
            share = (controllers.margin(number, hidden) > 0).to(hidden.dtype)
        else:
            share = controllers.sample(number, hidden, tau)
        ran.append((share * may).sum() / may.sum().clamp(min=1))
        return torch.where(may, share, 1.0)

    return decide


def train(
    run: Run, texts: dict[str, Texts], exits: tuple[int, ...], settings: LayerSelection
) -> dict[str, Any]:
    """The one stage; gives what dev says with and without the controllers."""
    controllers, rows, s = controllers_of(run.network), texts["train"], settings
    if controllers is None:
        raise ValueError("call prepare(network, exits, settings) before the run is made")

    def loss(model: Any, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        ids, following = rows.batch(index, run.accelerator.device)
        ran: list[Tensor] = []
        states = model(ids, draws(controllers, may_leave(following), s.tau, ran))
        learned = following != IGNORED
        logits = run.network.head(states[-1][learned]).float()  # [tokens, vocabulary]
        said = functional.cross_entropy(logits, following[learned])
        share = torch.stack(ran).mean()
        return said + s.alpha * share, {"said": float(said.detach()), "ran": float(share.detach())}

    learns = ("controllers",) if s.backbone == "frozen" else ("model", "controllers")
    run.fit(Stage("controllers", learns, rows.lengths, loss, s.epochs, s.batch_size, s.lr, warmup=0.05))
    controllers.fold_fixed_input()
    return {"dev": measure(run, texts["dev"])} if "dev" in texts else {}


@torch.no_grad()
def measure(run: Run, rows: Texts, most: int = 64) -> dict[str, Any]:
    """Over the first `most` rows: answer tokens, loss of what they predict with every block and with the
    likelier choice of the controllers, blocks run a token, and the share of tokens that run each block.
    """
    network, device = run.network, run.accelerator.device
    controllers = controllers_of(network)
    assert controllers is not None
    network.eval()
    count, full, chosen = 0, 0.0, 0.0
    shares = torch.zeros(len(controllers), device=device)
    for start in range(0, min(most, len(rows)), 8):
        ids, following = rows.batch(range(start, min(start + 8, most, len(rows))), device)
        may, ran = may_leave(following), list[Tensor]()
        tokens = int(may.sum())
        if not tokens:
            continue
        states = network(ids, draws(controllers, may, None, ran))
        chosen += _summed(network, states[-1], following, may)
        full += _summed(network, network(ids)[-1], following, may)
        shares += torch.stack(ran) * tokens
        count += tokens
    shares = shares / max(1, count)
    return {
        "tokens": count,
        "loss_full": round(full / max(1, count), 4),
        "loss": round(chosen / max(1, count), 4),
        "depth": round(network.block_count - len(controllers) + float(shares.sum()), 3),
        "ran": [round(share, 4) for share in shares.tolist()],
    }


def _summed(network: DecoderNetwork, hidden: Tensor, following: Tensor, where: Tensor) -> float:
    logits = network.head(hidden[where]).float()
    return float(functional.cross_entropy(logits, following[where], reduction="sum"))
