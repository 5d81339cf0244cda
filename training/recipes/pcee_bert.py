"""pcee_bert: rows exit where several exits in a row are confident (PCEE-BERT, Findings of NAACL 2022).

Loss: a weighted sum of the exits' cross-entropies, deeper ones weigh more, which is recipe joint. A counter
increases by one if an exit's entropy, as a share of its maximum, is below tau, and is reset to zero if it is
not; a row exits when the counter reaches t. Unlike in pabee, confident exits need not agree.

We differ: see recipe joint for the exits; the answer is the last exit's (averaging the confident exits is
optional in the paper); the published descending and uniform weights are not offered; tau and t are chosen
together on dev. With a joint checkpoint as --init nothing is trained.

Expect: e5-small on sst2, 15 seconds after recipe joint; 89.9 % on test with 53 % of multiply-accumulates
saved, not significantly different from max-probability on the same exits (docs/measured.md).

    ee-train --init JOINT --data DATA --recipe pcee_bert --out ckpt/
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
    """The default parts, without a policy: consecutive low entropies decide and no policy is trained."""
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
    return operating_points(run, dev, "patience_confident")
