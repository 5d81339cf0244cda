"""fastbert: exits are distilled from the last exit on the frozen backbone (FastBERT, ACL 2020).

1 ordinary fine-tuning: backbone and last exit, the teacher, by CE_L.  2 the parts of phase 1 are frozen, the
other exits, the students, are trained by the sum of KL(teacher || student). A row exits at the first exit
whose entropy, as a share of its maximum, is below a threshold (the paper's "speed").

We differ: a student is one linear layer on the standardized mean of the tokens (the paper's: linear,
self-attention and two linear layers), and it is trained on the training rows alone (the paper allows
unlabeled rows as well), on cached features. With --init phase 1 is taken from there; that of recipe deebert
is the same.

Expect: e5-small on sst2, a minute and a half on one core after phase 1; 89.5 % on test with 52 % of
multiply-accumulates saved, not significantly different from max-probability on recipe joint
(docs/measured.md).

    ee-train --model MODEL --data DATA --recipe fastbert --out ckpt/
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from offramp.models.network import EarlyExitNetwork, ExitParts
from offramp.training.batches import Encoded
from offramp.training.collect import collect, operating_points
from offramp.training.frozen import exits_phase
from offramp.training.loop import Run
from offramp.training.recipes.deebert import DeeBertSettings, fine_tune

KIND: Literal["classifier"] = "classifier"
NEEDS_LABELS = True
SETTINGS = DeeBertSettings
STARTS_FROM: str | None = "deebert"


def parts_of(settings: DeeBertSettings) -> ExitParts:
    """The default parts, without a policy: the entropy decides and no policy is trained."""
    return ExitParts()


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), summed over exits and averaged over rows.

    student [batch, exits, classes] and teacher [batch, classes] are logits.
    """
    targets = teacher.softmax(-1)[:, None]  # [batch, 1, classes]
    difference = teacher.log_softmax(-1)[:, None] - student.log_softmax(-1)  # [batch, exits, classes]
    return (targets * difference).sum((1, 2)).mean()


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
            return distillation_loss(logits, features.logits[rows, -1].to(device))

        sizes = {"epochs": settings.exit_epochs, "batch_size": settings.exit_batch}
        run.fit(exits_phase(run, features, loss, name="students", lr=settings.exit_lr, **sizes))
    return operating_points(run, dev, "entropy")
