"""branchynet: every exit learns with equal weight and rows leave where the entropy is low (arXiv 1709.01686).

Loss: the weighted sum of the exits' cross-entropies; a row leaves at the first exit whose softmax has an
entropy below a threshold (BranchyNet, Teerapittayanon et al., ICPR 2016).

We differ: weights are equal (the paper leaves them to the user), their sum is a mean, the threshold is one
for all exits (the paper's can differ) and is chosen on dev, and the backbone is a pretrained transformer.

Expect: e5-small on sst2, some 10 minutes on one core; 89.7 % on test with 52 % of multiply-accumulates saved,
0.3 below max-probability on recipe joint (docs/comparison.md).

    ee-train --model MODEL --data DATA --recipe branchynet --out ckpt/
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from offramp.training.batches import Encoded
from offramp.training.loop import Run
from offramp.training.points import operating_points
from offramp.training.recipes.joint import Joint, warm_start

SETTINGS = Joint
STARTS_FROM = None


def policy_of(settings: Joint) -> str | None:
    """The entropy decides, nothing learned."""
    return None


def uniform(losses: Tensor) -> Tensor:
    """Mean over rows and exits: losses [batch, exits] -> scalar."""
    return losses.mean()


def train(
    run: Run, train: Encoded, dev: Encoded, settings: Joint, *, skip_warm_start: bool
) -> dict[str, Any]:
    """Train backbone and exits (after --init: further); gives dev figures and operating points."""
    warm_start(run, train, settings, uniform, "branchynet")
    return operating_points(run, dev, "entropy")
