"""berxit: the last exit alone and all exits learn in turns, and a layer learns when to exit (EACL 2021).

Even steps minimise CE_L, odd steps the sum of all CE_l. At every step the learning-to-exit layer, one linear
layer on the pooled state for all exits, is taught by squared error whether the exit is wrong; its loss is
added. A row leaves where it says that the exit is right (policy lte, rule gate).

We differ: the exits are those of recipe joint (theirs: linear on BERT's pooler), rates likewise, and the
threshold is chosen on dev; regression is not built. With --init everything is trained further from there.

Expect: e5-small on sst2, some 10 minutes on one core; 85.2 % on test with 50 % of multiply-accumulates saved,
the weakest here: 3.4 below max-probability on recipe joint (docs/comparison.md).

    ee-train --model MODEL --data DATA --recipe berxit --out ckpt/
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from offramp.training.batches import Encoded
from offramp.training.loop import Run, Stage
from offramp.training.points import operating_points
from offramp.training.recipes.joint import EVERYTHING, Joint, exit_losses

SETTINGS = Joint
STARTS_FROM = None


def policy_of(settings: Joint) -> str | None:
    """The learning-to-exit layer."""
    return "lte"


def task_loss(losses: Tensor, step: int) -> Tensor:
    """The last exit on even steps, the sum of all on odd ones: losses [batch, exits] -> scalar."""
    return (losses.sum(1) if step % 2 else losses[:, -1]).mean()


def telling_loss(gates: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Squared error of P(wrong), summed over the exits but the last, mean over rows.

    gates [batch, exits - 1] logits of P(right), logits [batch, exits, classes], labels [batch].
    """
    wrong = (logits[:, :-1].argmax(-1) != labels[:, None]).float()
    return ((-gates).sigmoid() - wrong).square().sum(1).mean()


def train(
    run: Run, train: Encoded, dev: Encoded, settings: Joint, *, skip_warm_start: bool
) -> dict[str, Any]:
    """The one stage; gives dev figures and operating points."""

    def loss(model: Any, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        inputs, labels = train.batch(index, run.accelerator.device)
        out = model(inputs)
        task = task_loss(exit_losses(out.logits, labels), run.position["step"])
        telling = telling_loss(out.gate_logits.float(), out.logits, labels)
        return task + telling, {"task": float(task.detach()), "telling": float(telling.detach())}

    s = settings
    learns = (*EVERYTHING, "policies")
    run.fit(Stage("berxit", learns, train.lengths, loss, s.epochs, s.batch_size, s.lr, s.heads_lr))
    return operating_points(run, dev, "gate")
