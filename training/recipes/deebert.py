"""deebert: fine-tune first, then the exits on the frozen backbone; entropy decides (DeeBERT, ACL 2020).

1 ordinary fine-tuning: backbone and last exit by CE_L.  2 everything of stage 1 is frozen, the other exits
learn by sum over l < L of CE_l. A row leaves at the first exit whose entropy is below a threshold.

We differ: an exit is one linear layer on the standardized mean of the tokens (theirs has a pooler of its
own), stage 2 runs on cached features, exit_epochs epochs of seconds each (theirs: 3 epochs of the whole
network), and warm-up, decay and rates are those of recipe joint. With --init stage 1 is taken from there: a
checkpoint of this recipe or of fastbert, whose stage 1 is the same.

Expect: e5-small on sst2, some 11 minutes on one core; 89.7 % on test with 51 % of multiply-accumulates saved,
not apart from max-probability on recipe joint, below it on trec6 (docs/comparison.md).

    ee-train --model MODEL --data DATA --recipe deebert --out ckpt/
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from offramp.training.batches import Encoded
from offramp.training.collect import collect
from offramp.training.frozen import fit_exits
from offramp.training.loop import Run
from offramp.training.points import operating_points
from offramp.training.recipes.joint import Joint, exit_losses, warm_start


@dataclass(frozen=True)
class DeeBert(Joint):
    """Settings of the recipe: stage 1 as in recipe joint, then exit_epochs over features at exit_lr."""

    exit_epochs: int = 10
    exit_batch: int = 64
    exit_lr: float = 1e-3


SETTINGS = DeeBert
STARTS_FROM = None


def policy_of(settings: DeeBert) -> str | None:
    """The entropy decides, nothing learned."""
    return None


def last_alone(losses: Tensor) -> Tensor:
    """Ordinary fine-tuning: losses [batch, exits] -> scalar."""
    return losses[:, -1].mean()


def train(
    run: Run, train: Encoded, dev: Encoded, settings: DeeBert, *, skip_warm_start: bool
) -> dict[str, Any]:
    """Both stages, or the second alone; gives dev figures and operating points."""
    device = run.accelerator.device
    if not skip_warm_start:
        warm_start(run, train, settings, last_alone, "fine-tuning")
    if not run.done_before():
        seen = collect(run.network, train, device=device, what="features")

        def loss(logits: Tensor, rows: Tensor) -> Tensor:
            return exit_losses(logits, seen.labels[rows].to(device)).sum(1).mean()

        sizes = {"epochs": settings.exit_epochs, "batch_size": settings.exit_batch}
        fit_exits(run, seen, loss, name="exits", lr=settings.exit_lr, **sizes)
    return operating_points(run, dev, "entropy")
