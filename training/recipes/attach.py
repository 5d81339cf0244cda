"""attach: a fine-tuned model keeps every answer of its own and gets exits, from text without labels.

Backbone and the model's own head are frozen: the last exit gives the model's logits. The network runs once
on every row, and the other exits are trained on what it gave: an exit's probabilities are compared with those
of the model (distillation, Hinton et al., arXiv 1503.02531), loss (1 - labels) * T^2 KL + labels * CE, the
mean over exits; other tasks have losses of their own, see training.losses. Operating points are chosen on dev
by agreement with full depth, since no label is needed.

With --unfreeze another phase trains everything, and all exits learn from the logits of the model as it was
given: answers at full depth may change; training.json states the percentage of dev rows whose answer is
still that of the model (same_as_given). Agreement is with the new full depth.

    ee-train --model my-finetuned/ --data traffic.txt --recipe attach --out ckpt/
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from offramp.models.network import GRADIENTS, EarlyExitNetwork, ExitParts
from offramp.runtime.errors import BadSetting
from offramp.training.batches import Encoded
from offramp.training.collect import (
    collect,
    default_rule,
    label_numbers,
    operating_points,
    start_exits,
)
from offramp.training.features import Features, compute_features, feature_bytes
from offramp.training.loop import Phase, Run
from offramp.training.losses import TaskLosses, losses_of
from offramp.training.options import BadModel
from offramp.training.recipes.joint import EVERYTHING, loss_weights


@dataclass(frozen=True)
class AttachSettings:
    """Settings of recipe attach.

    labels: share of the loss that the labels of rows that have one take. temperature: T of both
    distributions. unfreeze: epochs of the phase that trains everything; 0 keeps the model as it is.
    unfreeze_lr, unfreeze_batch: of that phase, whose exits keep the rate lr. gradient: which exits' gradients
    a block gets there, see share_gradient in models.network. disk_gb: most gigabytes of hidden states on
    disk; of more rows a random part is used while the network is frozen, and a line says so.
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-3
    labels: float = 0.5
    temperature: float = 2.0
    weight_decay: float = 0.01
    unfreeze: int = 0
    unfreeze_lr: float = 2e-5
    unfreeze_batch: int = 32
    gradient: str = "full"
    disk_gb: float = 8.0

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.unfreeze_batch) < 1 or self.unfreeze < 0:
            raise ValueError(f"epochs and batches must be positive, unfreeze not negative: {self}")
        if not 0 <= self.labels <= 1 or min(self.temperature, self.lr, self.disk_gb) <= 0:
            raise ValueError(f"labels is a share, temperature, lr and disk_gb are above 0: {self}")
        if self.gradient not in GRADIENTS:
            raise ValueError(f"gradient={self.gradient}: choose one of {', '.join(GRADIENTS)}")


KIND: Literal["classifier"] = "classifier"
NEEDS_LABELS = False
SETTINGS = AttachSettings
STARTS_FROM: str | None = None


def parts_of(settings: AttachSettings) -> ExitParts:
    """Exits with attention pooling and two layers, without a policy."""
    return ExitParts(pooling="attention", head="mlp")


def imitation_losses(
    task: TaskLosses, given: Tensor, target: Tensor, labels: Tensor, settings: AttachSettings
) -> Tensor:
    """The loss of every exit [batch, exits].

    given [batch, exits, outputs]: what the exits give; target [batch, outputs]: what the model gives; labels
    [batch, …]: as encoded rows hold them, of which some may be unknown.
    """
    known = task.known(labels)
    losses = task.divergence(given, target[:, None], settings.temperature)
    by_label = task.by_label(given[known], labels[known])
    mixed = (1 - settings.labels) * losses[known] + settings.labels * by_label
    return losses.masked_scatter(known[:, None].expand_as(losses), mixed)


def check_answers(full_depth: Tensor) -> None:
    """Raise BadModel if what the model gives [rows or words, outputs] is no number in some rows."""
    wrong = int((~full_depth.isfinite().all(-1)).sum())
    if wrong:
        raise BadModel(
            f"the model as it was given answers {wrong} of {len(full_depth)} training rows with NaN or "
            "infinity; nothing can be learned from it: save a model whose answers are numbers"
        )


def rows_that_fit(run: Run[EarlyExitNetwork], rows: Encoded, settings: AttachSettings) -> Encoded:
    """The rows whose hidden states fit on disk: all, or as many as fit, drawn by the run's seed."""
    sizes = feature_bytes(run.network, rows)
    limit = settings.disk_gb * 1e9
    if sizes.sum() <= limit:
        return rows
    order = np.random.default_rng(run.seed).permutation(len(rows))
    count = max(1, int(np.searchsorted(sizes[order].cumsum(), limit, side="right")))
    print(
        f"the exits learn from {count} of {len(rows)} rows: hidden states of all would take "
        f"{sizes.sum() / 1e9:.1f} GB on disk; --set disk_gb={np.ceil(sizes.sum() / 1e9):.0f} uses all",
        file=sys.stderr,
    )
    return rows.take(np.sort(order[:count]))


def train(
    run: Run[EarlyExitNetwork],
    train: Encoded,
    dev: Encoded,
    settings: AttachSettings,
    *,
    skip_warm_start: bool,
) -> dict[str, Any]:
    """Train the exits but the last on the frozen network (with --init: further); return dev figures and
    points.
    """
    network, s = run.network, settings
    if not network.spec.own_head:
        raise BadSetting(
            "recipe attach needs a model with a trained head, saved as *ForSequenceClassification, "
            "*ForTokenClassification or *ForImageClassification, or --task sentence-embedding; for a "
            "backbone without a head say --recipe offramp"
        )
    if len(network.spec.exits) == 1:
        raise BadSetting("recipe attach trains the exits before the last: name earlier blocks in --exits")
    rows = rows_that_fit(run, train, s)
    features = compute_features(run, rows)
    check_answers(features.full_depth)
    start_exits(run, features.full_depth.squeeze(-1))
    fit_exits(run, rows, features, s)
    rule, decisions, device = default_rule(network), network.task.decisions, run.accelerator.device
    if not s.unfreeze:
        return operating_points(run, dev, rule, agreement=True)

    def dev_answers() -> Tensor:
        given = collect(network, dev, device=device, description="dev").logits[:, -1]
        return given if decisions is None else decisions(given, None)

    given = run.compute_once("dev_answers", dev_answers)  # before anything of the model changes
    fit_everything(run, train, full_depth_of_all(run, train, features), s)
    results = operating_points(run, dev, rule, agreement=True)
    if decisions is None:  # numbers change by a little: none is the same
        return results
    same = 100 * float((dev_answers() == given).float().mean())
    return results | {"dev": results["dev"] | {"same_as_given": round(same, 2)}}


def fit_exits(
    run: Run[EarlyExitNetwork], rows: Encoded, features: Features, settings: AttachSettings
) -> None:
    """Train the exits but the last on the features of a frozen network, by its logits and by labels."""
    s, network, device = settings, run.network, run.accelerator.device
    task, labels = losses_of(network), torch.from_numpy(rows.label)
    early = tuple(f"exits.{number}." for number in range(len(network.spec.exits) - 1))

    def loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        chosen = torch.from_numpy(label_numbers(rows, index))
        with torch.autocast(device.type, enabled=False):  # small layers: bf16 would only lose precision
            given = features.early_logits(network, index)
            target = features.full_depth[chosen].to(device)
            losses = imitation_losses(task, given, target, labels[chosen].to(device), s)
        each = losses.detach().mean(0)
        return losses.mean(), {"first": float(each[0]), "last": float(each[-1])}

    sizes = (s.epochs, s.batch_size, s.lr)
    run.fit(Phase("exits", early, rows.lengths, loss, *sizes, weight_decay=s.weight_decay, shared=False))


def full_depth_of_all(run: Run[EarlyExitNetwork], rows: Encoded, features: Features) -> Tensor:
    """The logits of the last exit for all rows [rows or words, outputs], also for those without features.

    Called before anything but earlier exits changes; after a resume it is read from the run's folder.
    """
    if len(features.full_depth) == len(rows.label):
        return features.full_depth
    network, device = run.network, run.accelerator.device

    def compute() -> Tensor:
        return collect(network, rows, device=device, description="full depth").logits[:, -1].contiguous()

    return run.compute_once("full_depth_of_all", compute)


def fit_everything(
    run: Run[EarlyExitNetwork], rows: Encoded, target: Tensor, settings: AttachSettings
) -> None:
    """Train backbone and all exits by labels and by the logits `target` that the network gave before."""
    s, task = settings, losses_of(run.network)

    def loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        inputs, labels = rows.batch(index, run.accelerator.device)
        given = model(inputs, gradient=s.gradient).logits
        wanted = target[torch.from_numpy(label_numbers(rows, index))].to(given.device)
        each = imitation_losses(task, given, wanted, labels, s).mean(0)
        return (each * loss_weights(each, "linear")).sum(), {"last": float(each[-1].detach())}

    sizes = (s.unfreeze, s.unfreeze_batch, s.unfreeze_lr, s.lr)
    run.fit(Phase("everything", EVERYTHING, rows.lengths, loss, *sizes, weight_decay=s.weight_decay))
