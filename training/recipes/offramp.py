"""offramp: joint training of all exits with the settings that won on dev over all data sets (the default).

It is recipe joint with better exits: attention pooling, so that each exit learns which tokens it reads, two
layers an exit instead of one, early exits that learn from the last one as well as from the labels, and
gradients that are averaged over the exits. Every part is an option of ee-train or a setting of recipe joint,
and any recipe can take it. Rows exit by their top probability.

    ee-train --model MODEL --data DATA --recipe offramp --out ckpt/
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from offramp.models.network import EarlyExitNetwork, ExitParts
from offramp.training.batches import Encoded
from offramp.training.collect import default_rule, fit_thresholds, operating_points
from offramp.training.loop import Run
from offramp.training.recipes.joint import JointSettings, warm_start


@dataclass(frozen=True)
class OfframpSettings(JointSettings):
    """Settings of recipe joint with other defaults."""

    gradient: str = "equilibrium"
    distill: float = 0.5


KIND: Literal["classifier"] = "classifier"
NEEDS_LABELS = True
SETTINGS = OfframpSettings
STARTS_FROM: str | None = None


def parts_of(settings: OfframpSettings) -> ExitParts:
    """Exits with attention pooling and two layers, without a policy."""
    return ExitParts(pooling="attention", head="mlp")


def train(
    run: Run[EarlyExitNetwork],
    train: Encoded,
    dev: Encoded,
    settings: OfframpSettings,
    *,
    skip_warm_start: bool,
) -> dict[str, Any]:
    """Train backbone and exits (with --init: further); return dev figures and operating points."""
    warm_start(run, train, settings)
    fit_thresholds(run, dev)
    return operating_points(run, dev, default_rule(run.network))
