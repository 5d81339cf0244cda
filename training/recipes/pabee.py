"""pabee: rows leave where exits have agreed several times in a row (PABEE, NeurIPS 2020, arXiv 2006.04152).

Loss: sum over exits l of l * CE_l / sum of l, which is recipe joint. A row leaves at the exit that is the
t-th in a row to say what the exit before it said.

We differ: see recipe joint for the exits; regression is not built. With --init a joint checkpoint nothing is
trained, only the points of the rule are chosen.

Expect: e5-small on sst2, a quarter of a minute after recipe joint; 86.9 % on test with 51 % of
multiply-accumulates saved, 2.2 below max-probability on the same exits (docs/comparison.md).

    ee-train --init JOINT --data DATA --recipe pabee --out ckpt/
"""

from __future__ import annotations

from typing import Any

from offramp.training.batches import Encoded
from offramp.training.loop import Run
from offramp.training.points import operating_points
from offramp.training.recipes.joint import Joint, warm_start

SETTINGS = Joint
STARTS_FROM = "joint"


def policy_of(settings: Joint) -> str | None:
    """Agreement decides, nothing learned."""
    return None


def train(
    run: Run, train: Encoded, dev: Encoded, settings: Joint, *, skip_warm_start: bool
) -> dict[str, Any]:
    """Recipe joint, unless --init brings it; gives dev figures and operating points."""
    if not skip_warm_start:
        warm_start(run, train, settings)
    return operating_points(run, dev, "patience")
