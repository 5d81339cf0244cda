"""deebert: fine-tune first, then train the exits on the frozen backbone; entropy decides (DeeBERT, ACL 2020).

1 ordinary fine-tuning: backbone and last exit by CE_L.  2 the parts of phase 1 are frozen, the other exits
are trained by the sum over l < L of CE_l. A row exits at the first exit whose entropy is below a threshold.

We differ: an exit is one linear layer on the standardized mean of the tokens (the paper's has its own
pooler), phase 2 runs on cached features, exit_epochs epochs of seconds each (the paper: 3 epochs of the whole
network), and warm-up, decay and rates are those of recipe joint. With --init phase 1 is taken from there: a
checkpoint of this recipe or of fastbert, whose phase 1 is the same.

Expect: e5-small on sst2, about 11 minutes on one core; 89.7 % on test with 51 % of multiply-accumulates
saved, not significantly different from max-probability on recipe joint, below it on trec6
(docs/measured.md).

    ee-train --model MODEL --data DATA --recipe deebert --out ckpt/
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from offramp.models.network import EarlyExitNetwork, ExitParts
from offramp.training.batches import Encoded
from offramp.training.collect import collect, operating_points
from offramp.training.frozen import exits_phase
from offramp.training.loop import Run
from offramp.training.losses import exit_losses
from offramp.training.recipes.joint import JointSettings, warm_start


@dataclass(frozen=True)
class DeeBertSettings(JointSettings):
    """Settings of recipe deebert: those of phase 1 as in recipe joint; exit_* belong to phase 2."""

    exit_epochs: int = 10
    exit_batch: int = 64
    exit_lr: float = 1e-3


KIND: Literal["classifier"] = "classifier"
NEEDS_LABELS = True
SETTINGS = DeeBertSettings
STARTS_FROM: str | None = None


def parts_of(settings: DeeBertSettings) -> ExitParts:
    """The default parts, without a policy: the entropy decides and no policy is trained."""
    return ExitParts()


def last_exit_only(losses: Tensor) -> Tensor:
    """The mean loss of the last exit, a scalar, as in ordinary fine-tuning; losses [batch, exits]."""
    return losses[:, -1].mean()


def fine_tune(run: Run[EarlyExitNetwork], train: Encoded, settings: JointSettings) -> None:
    """Train backbone and last exit alone: ordinary fine-tuning, which is phase 1 of several recipes.

    Setting gradient, which divides the gradients of several exits, has no part in it.
    """
    warm_start(run, train, replace(settings, gradient="full"), last_exit_only, "fine-tuning")


def train(
    run: Run[EarlyExitNetwork],
    train: Encoded,
    dev: Encoded,
    settings: DeeBertSettings,
    *,
    skip_warm_start: bool,
) -> dict[str, Any]:
    """Run both phases, or the second alone; return dev figures and operating points."""
    device = run.accelerator.device
    if not skip_warm_start:
        fine_tune(run, train, settings)
    if not run.skip_finished_phase():
        features = collect(run.network, train, device=device, description="features")

        def loss(logits: Tensor, rows: Tensor) -> Tensor:
            return exit_losses(logits, features.labels[rows].to(device)).sum(1).mean()

        sizes = {"epochs": settings.exit_epochs, "batch_size": settings.exit_batch}
        run.fit(exits_phase(run, features, loss, name="exits", lr=settings.exit_lr, **sizes))
    return operating_points(run, dev, "entropy")
