"""attach: a fine-tuned model keeps every answer of its own and gets exits, from text without labels.

Backbone and the model's own head are frozen: the last exit gives the model's logits. The network runs once
on every row, and the other exits are trained on what it gave: an exit's probabilities are compared with those
of the model (distillation, Hinton et al., arXiv 1503.02531), loss (1 - labels) * T^2 KL + labels * CE, the
mean over exits. Operating points are chosen on dev by agreement with full depth, since no label is needed.

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
from torch.nn import functional

from offramp.models.network import EarlyExitNetwork, ExitParts
from offramp.runtime.errors import BadSetting
from offramp.training.batches import Encoded
from offramp.training.collect import collect, operating_points
from offramp.training.data import NO_LABEL
from offramp.training.features import compute_features, token_feature_bytes
from offramp.training.loop import Phase, Run
from offramp.training.recipes.joint import EVERYTHING, exit_losses, loss_weights


@dataclass(frozen=True)
class AttachSettings:
    """Settings of recipe attach.

    labels: share of the loss that the labels of rows that have one take. temperature: T of both
    distributions. unfreeze: epochs of the phase that trains everything; 0 keeps the model as it is.
    unfreeze_lr, unfreeze_batch: of that phase, whose exits keep the rate lr. disk_gb: most gigabytes of
    hidden states on disk; of more rows a random part is used, and a line says so.
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
    disk_gb: float = 8.0

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.unfreeze_batch) < 1 or self.unfreeze < 0:
            raise ValueError(f"epochs and batches must be positive, unfreeze not negative: {self}")
        if not 0 <= self.labels <= 1 or min(self.temperature, self.lr, self.disk_gb) <= 0:
            raise ValueError(f"labels is a share, temperature, lr and disk_gb are above 0: {self}")


KIND: Literal["classifier"] = "classifier"
NEEDS_LABELS = False
SETTINGS = AttachSettings
STARTS_FROM: str | None = None


def parts_of(settings: AttachSettings) -> ExitParts:
    """Exits with attention pooling and two layers, without a policy."""
    return ExitParts(pooling="attention", head="mlp")


def imitation_losses(logits: Tensor, target: Tensor, labels: Tensor, settings: AttachSettings) -> Tensor:
    """The loss of every exit [batch, exits].

    logits [batch, exits, classes]; target [batch, classes]: the model's logits; labels [batch], NO_LABEL
    where there is none.
    """
    temperature = settings.temperature
    soft = (logits.float() / temperature).log_softmax(-1)
    wanted = (target.float() / temperature).log_softmax(-1)[:, None].expand_as(soft)
    divergence = functional.kl_div(soft, wanted, reduction="none", log_target=True).sum(-1)
    known = labels != NO_LABEL
    share = settings.labels * known.float()[:, None]
    by_label = exit_losses(logits, labels.clamp(min=0))
    return (1 - share) * temperature**2 * divergence + share * by_label


def rows_that_fit(run: Run[EarlyExitNetwork], rows: Encoded, settings: AttachSettings) -> Encoded:
    """The rows whose hidden states fit on disk: all, or as many as fit, drawn by the run's seed."""
    sizes = token_feature_bytes(run.network, rows)
    limit = settings.disk_gb * 1e9
    if run.network.spec.pooling != "attention" or sizes.sum() <= limit:
        return rows
    order = np.random.default_rng(run.seed).permutation(len(rows))
    count = max(1, int(np.searchsorted(sizes[order].cumsum(), limit, side="right")))
    print(
        f"attach: {count} of {len(rows)} rows are used: hidden states of all would take "
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
            "recipe attach needs a model with a trained head, saved as *ForSequenceClassification or "
            "*ForImageClassification; for a backbone without one say --recipe offramp"
        )
    if len(network.spec.exits) == 1:
        raise BadSetting("recipe attach trains the exits before the last: name earlier blocks in --exits")
    rows = rows_that_fit(run, train, s)
    labels, device = torch.from_numpy(rows.label), run.accelerator.device
    early = tuple(f"exits.{number}." for number in range(len(network.spec.exits) - 1))
    features = compute_features(run, rows)

    def exits_loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        chosen = torch.from_numpy(index)
        with torch.autocast(device.type, enabled=False):  # small layers: bf16 would only lose precision
            logits = features.early_logits(network, index)
            target = features.full_depth[chosen].to(device)
            losses = imitation_losses(logits, target, labels[chosen].to(device), s)
        agrees = (logits.argmax(-1) == target.argmax(-1)[:, None]).float().mean(0)
        return losses.mean(), {"agrees_first": float(agrees[0]), "agrees_last": float(agrees[-1])}

    sizes = (s.epochs, s.batch_size, s.lr)
    run.fit(
        Phase("exits", early, rows.lengths, exits_loss, *sizes, weight_decay=s.weight_decay, shared=False)
    )
    if not s.unfreeze:
        return operating_points(run, dev, "max_probability", agreement=True)

    def dev_answers() -> Tensor:
        return collect(network, dev, device=device, description="dev").logits[:, -1].argmax(-1)

    given = run.compute_once("dev_answers", dev_answers)  # before anything of the model changes
    run.fit(_everything(run, rows, features.full_depth, s))
    results = operating_points(run, dev, "max_probability", agreement=True)
    same = 100 * float((dev_answers() == given).float().mean())
    return results | {"dev": results["dev"] | {"same_as_given": round(same, 2)}}


def _everything(run: Run[EarlyExitNetwork], rows: Encoded, target: Tensor, settings: AttachSettings) -> Phase:
    """The phase that trains backbone and all exits by the logits that the model gave before."""
    s = settings

    def loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        inputs, labels = rows.batch(index, run.accelerator.device)
        logits = model(inputs).logits
        wanted = target[torch.from_numpy(index)].to(logits.device)
        each = imitation_losses(logits, wanted, labels, s).mean(0)
        return (each * loss_weights(each, "linear")).sum(), {"last": float(each[-1].detach())}

    sizes = (s.unfreeze, s.unfreeze_batch, s.unfreeze_lr, s.lr)
    return Phase("everything", EVERYTHING, rows.lengths, loss, *sizes, weight_decay=s.weight_decay)
