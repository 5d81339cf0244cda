"""fastbert: exits learn from the last exit's answers on the frozen backbone (FastBERT, ACL 2020).

1 ordinary fine-tuning: backbone and last exit, the teacher, by CE_L.  2 everything of stage 1 is frozen, the
other exits, the students, learn by the sum of KL(teacher || student). A row leaves at the first exit whose
entropy, as a share of its maximum, is below a threshold (their "speed").

We differ: a student is one linear layer on the standardized mean of the tokens (theirs: linear,
self-attention and two linear layers), it learns from the training rows alone (theirs may be unlabeled rows
besides), on cached features. With --init stage 1 is taken from there; that of recipe deebert is the same.

Expect: e5-small on sst2, a minute and a half on one core after stage 1; 89.5 % on test with 52 % of
multiply-accumulates saved, not apart from max-probability on recipe joint (docs/comparison.md).

    ee-train --model MODEL --data DATA --recipe fastbert --out ckpt/
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from offramp.training.batches import Encoded
from offramp.training.collect import collect
from offramp.training.frozen import fit_exits
from offramp.training.loop import Run
from offramp.training.points import operating_points
from offramp.training.recipes.deebert import DeeBert, last_alone
from offramp.training.recipes.joint import warm_start

SETTINGS = DeeBert
STARTS_FROM = "deebert"


def policy_of(settings: DeeBert) -> str | None:
    """The entropy decides, nothing learned."""
    return None


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), summed over exits, mean over rows: student [batch, exits, classes] and teacher
    [batch, classes] are logits.
    """
    soft = teacher.softmax(-1)[:, None]  # [batch, 1, classes]
    gap = teacher.log_softmax(-1)[:, None] - student.log_softmax(-1)  # [batch, exits, classes]
    return (soft * gap).sum((1, 2)).mean()


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
            return distance(logits, seen.logits[rows, -1].to(device))

        sizes = {"epochs": settings.exit_epochs, "batch_size": settings.exit_batch}
        fit_exits(run, seen, loss, name="students", lr=settings.exit_lr, **sizes)
    return operating_points(run, dev, "entropy")
