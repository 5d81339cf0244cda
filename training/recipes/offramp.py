"""offramp: ordinary fine-tuning, then exits on the frozen network, then everything (the default for labels).

Exits read the tokens by attention pooling and have two layers. 1 fine-tuning: backbone and last exit alone.
2 exits: the network is frozen and its hidden states are stored; the other exits learn from its logits and
from the labels, half and half (recipe attach). 3 everything: backbone and exits by the same loss, where a
block gets the mean of the exits' gradients. The logits to be imitated stay those of phase 1: this is
meant to keep full depth at what ordinary fine-tuning reaches. Rows exit by their top probability.

Phase 2 begins from exits that fit no network yet: trained with the backbone from the start, they change it
before they know anything (Kumar et al., arXiv 2202.10054, on heads). Cost: 6 epochs of the whole network at
the defaults, where recipe joint has 3, and one pass that stores hidden states. With --init phase 1 is left
out. Phase 1 is also left out for embeddings, which have no labels.

    ee-train --model MODEL --data DATA --recipe offramp --out ckpt/
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from offramp.models.network import EarlyExitNetwork, ExitParts
from offramp.models.tasks import EMBEDDING
from offramp.training.batches import Encoded
from offramp.training.collect import default_rule, fit_thresholds, operating_points
from offramp.training.features import compute_features
from offramp.training.loop import Run
from offramp.training.recipes.attach import (
    AttachSettings,
    fit_everything,
    fit_exits,
    full_depth_of_all,
    rows_that_fit,
)
from offramp.training.recipes.deebert import fine_tune
from offramp.training.recipes.joint import JointSettings


@dataclass(frozen=True)
class OfframpSettings:
    """Settings of recipe offramp.

    epochs: of phase 1; 0 leave it out. joint_epochs: of phase 3; 0 keep the fine-tuned network as it is.
    batch_size, lr: of both. heads_lr: of the exits, in all phases. exit_epochs, exit_batch: of phase 2.
    distill: share of the loss that compares an exit with the fine-tuned network instead of the label;
    temperature: of both in this comparison. gradient: see share_gradient in models.network. warmup: share of
    the steps of phase 1 in which the learning rates rise. disk_gb: see AttachSettings.
    """

    epochs: int = 3
    batch_size: int = 32
    lr: float = 5e-5
    heads_lr: float = 1e-3
    exit_epochs: int = 10
    exit_batch: int = 64
    joint_epochs: int = 3
    distill: float = 0.5
    temperature: float = 2.0
    gradient: str = "equilibrium"
    warmup: float = 0.1
    weight_decay: float = 0.01
    disk_gb: float = 8.0

    def __post_init__(self) -> None:
        if min(self.epochs, self.joint_epochs) < 0:
            raise ValueError(f"epochs={self.epochs}, joint_epochs={self.joint_epochs}: 0 or more")
        if not 0 <= self.distill <= 1:
            raise ValueError(f"distill={self.distill}: 0 to 1")
        self.fine_tuning()
        self.imitation()

    def fine_tuning(self) -> JointSettings:
        """The settings of phase 1."""
        return JointSettings(
            epochs=max(1, self.epochs),
            batch_size=self.batch_size,
            lr=self.lr,
            heads_lr=self.heads_lr,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
        )

    def imitation(self) -> AttachSettings:
        """The settings of phases 2 and 3."""
        return AttachSettings(
            epochs=self.exit_epochs,
            batch_size=self.exit_batch,
            lr=self.heads_lr,
            labels=1 - self.distill,
            temperature=self.temperature,
            weight_decay=self.weight_decay,
            unfreeze=self.joint_epochs,
            unfreeze_lr=self.lr,
            unfreeze_batch=self.batch_size,
            gradient=self.gradient,
            disk_gb=self.disk_gb,
        )


KIND: Literal["classifier"] = "classifier"
NEEDS_LABELS = True
SETTINGS = OfframpSettings
STARTS_FROM: str | None = None


def parts_of(settings: OfframpSettings) -> ExitParts:
    """Exits with attention pooling and two layers, without a policy."""
    return ExitParts(pooling="attention", head="mlp")


def train(
    run: Run[EarlyExitNetwork],
    train: Encoded,
    dev: Encoded,
    settings: OfframpSettings,
    *,
    skip_warm_start: bool,
) -> dict[str, Any]:
    """Run the phases (with --init the last two); return dev figures and operating points."""
    network, imitation = run.network, settings.imitation()
    if settings.epochs and not skip_warm_start and network.spec.task != EMBEDDING:
        fine_tune(run, train, settings.fine_tuning())
    if len(network.spec.exits) > 1:
        rows = rows_that_fit(run, train, imitation)
        features = compute_features(run, rows)
        fit_exits(run, rows, features, imitation)
        if imitation.unfreeze:
            fit_everything(run, train, full_depth_of_all(run, train, features), imitation)
    fit_thresholds(run, dev)
    return operating_points(run, dev, default_rule(network))
