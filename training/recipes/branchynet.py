"""branchynet: all exits train with equal weight, and rows exit where the entropy is low (arXiv 1709.01686).

Loss: the weighted sum of the exits' cross-entropies; a row exits at the first exit whose softmax has an
entropy below a threshold (BranchyNet, Teerapittayanon et al., ICPR 2016).

We differ: weights are equal (the paper leaves them to the user), their sum is a mean, the threshold is one
for all exits (the paper's can differ) and is chosen on dev, and the backbone is a pretrained transformer.

Expect: e5-small on sst2, about 10 minutes on one core; 89.7 % on test with 52 % of multiply-accumulates
saved, 0.3 below max-probability on recipe joint (docs/measured.md).

    ee-train --model MODEL --data DATA --recipe branchynet --out ckpt/
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from offramp.models.network import EarlyExitNetwork, ExitParts
from offramp.training.batches import Encoded
from offramp.training.collect import operating_points
from offramp.training.loop import Run
from offramp.training.recipes.joint import JointSettings, warm_start

KIND: Literal["classifier"] = "classifier"
NEEDS_LABELS = True
SETTINGS = JointSettings
STARTS_FROM: str | None = None


def parts_of(settings: JointSettings) -> ExitParts:
    """The default parts, without a policy: the entropy decides and no policy is trained."""
    return ExitParts()


def mean_loss(losses: Tensor) -> Tensor:
    """The mean loss over rows and exits, a scalar; losses [batch, exits]."""
    return losses.mean()


def train(
    run: Run[EarlyExitNetwork],
    train: Encoded,
    dev: Encoded,
    settings: JointSettings,
    *,
    skip_warm_start: bool,
) -> dict[str, Any]:
    """Train backbone and exits (with --init: further); return dev figures and operating points."""
    warm_start(run, train, settings, mean_loss, "branchynet")
    return operating_points(run, dev, "entropy")
