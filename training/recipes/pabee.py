"""pabee: rows exit where exits have agreed several times in a row (PABEE, NeurIPS 2020, arXiv 2006.04152).

Loss: sum over exits l of l * CE_l / sum of l, which is recipe joint. A row exits once t exits in a row have
predicted the same label as the exit before each.

We differ: see recipe joint for the exits; regression is not implemented. With a joint checkpoint as --init
nothing is trained, only the points of the rule are chosen.

Expect: e5-small on sst2, 15 seconds after recipe joint; 86.9 % on test with 51 % of multiply-accumulates
saved, 2.2 below max-probability on the same exits (docs/measured.md).

    ee-train --init JOINT --data DATA --recipe pabee --out ckpt/
"""

from __future__ import annotations

from typing import Any, Literal

from offramp.models.network import EarlyExitNetwork, ExitParts
from offramp.training.batches import Encoded
from offramp.training.collect import operating_points
from offramp.training.loop import Run
from offramp.training.recipes.joint import JointSettings, warm_start

KIND: Literal["classifier"] = "classifier"
NEEDS_LABELS = True
SETTINGS = JointSettings
STARTS_FROM: str | None = "joint"


def parts_of(settings: JointSettings) -> ExitParts:
    """The default parts, without a policy: agreement of exits decides and no policy is trained."""
    return ExitParts()


def train(
    run: Run[EarlyExitNetwork],
    train: Encoded,
    dev: Encoded,
    settings: JointSettings,
    *,
    skip_warm_start: bool,
) -> dict[str, Any]:
    """Train as recipe joint unless --init replaces it; return dev figures and operating points."""
    if not skip_warm_start:
        warm_start(run, train, settings)
    return operating_points(run, dev, "patience")
