"""quee: leave, or go on in a cheaper precision, by error forecasts; post-training (arXiv 2406.14404).

A reconstruction: the abstract says that errors of paths are predicted by small networks whose targets come
from a discretized feature space, and that the choice weighs them against cost; everything else here is ours.
Backbone and exits stay as they are (--init), or learn by recipe joint first. Then, on dev alone, which they
have never seen:

1 every row runs in every precision of `variants`, and from every exit on in every other (simulated).  2 at
each exit and in each precision k-means cuts the statistics of the softmax (certainty, entropy, margin) into
clusters; a path's error rate in a cluster is its target.  3 a small network an exit learns the targets.  4
the price of rule quee is chosen by replaying its walks. For 4 the dev rows are forecast by networks that were
fitted on the other half of dev; the networks that are kept are fitted on all of it.

Settings: variants (of fp32, int8, int4, and int6, which is simulated alone and cannot be exported); clusters,
prior, steps and forecast_lr of the fit; forecaster=mlp is the one that is exported. With table, mean or
oracle the points of that forecaster stand in training.json and the checkpoint has no forecasts. Dev frontiers
of all four, of leaving alone and of quantizing alone, are always there.
Operating points are stated in bit operations; ee-calibrate measures milliseconds and points in them.

    ee-train --init CKPT --data DATA --recipe quee --out ckpt/
    ee-split ckpt/ --variants fp32,int8
    ee-calibrate dev.jsonl --bundle bundle/

Expect: e5-small on sst2, 872 dev rows in fp32 and int8, three minutes on one core after recipe joint; 89.8 %
on test with 57 % of multiply-accumulates and 97 % of bit operations saved, as leaving alone in int8 does
(docs/comparison.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.models.precision import PRECISIONS
from offramp.runtime.rules.walk_points import WalkPoint, choose_walk_points
from offramp.training.batches import Encoded
from offramp.training.forecasters import (
    Fit,
    Forecaster,
    Place,
    by_mean,
    by_network,
    by_table,
    by_truth,
    fit_networks,
    make_tables,
)
from offramp.training.loop import Run
from offramp.training.outcomes import Floats, Outcomes, collect_outcomes, pack, unpack
from offramp.training.recipes.joint import Joint, warm_start
from offramp.training.replanning import (
    Ledger,
    accuracy_at,
    bit_ledger,
    frontier,
    full_depth,
    hull,
    static_points,
)

FORECASTERS = ("mlp", "table", "mean", "oracle")
FOLDS = 2
SHARES = (
    1.0,
    2.0,
    3.0,
    4.0,
    5.0,
    6.0,
    10.0,
    25.0,
    50.0,
    75.0,
)  # per cent of the full cost to compare at


@dataclass(frozen=True)
class Quee:
    """Settings of the recipe; epochs to heads_lr are the warm start's, where there is no --init."""

    epochs: int = 3
    batch_size: int = 32
    lr: float = 5e-5
    heads_lr: float = 1e-3
    variants: str = "fp32,int8"
    forecaster: str = "mlp"
    clusters: int = 24
    prior: float = 4.0
    steps: int = 400
    forecast_lr: float = 1e-2

    def __post_init__(self) -> None:
        names = self.names
        unknown = [name for name in names if name not in PRECISIONS]
        if unknown or names[0] != "fp32" or len(set(names)) != len(names):
            raise ValueError(
                f"variants={self.variants}: fp32 first, then of {', '.join(PRECISIONS)}, each once"
            )
        if self.forecaster not in FORECASTERS:
            raise ValueError(f"forecaster={self.forecaster}: choose one of {', '.join(FORECASTERS)}")
        if self.clusters < 1 or self.steps < 1 or self.prior < 0:
            raise ValueError("clusters and steps must be 1 or more, prior 0 or more")

    @property
    def names(self) -> tuple[str, ...]:
        """The variants, the default first."""
        return tuple(name.strip() for name in self.variants.split(","))

    def fit(self, seed: int) -> Fit:
        """What the forecasters are fitted with."""
        return Fit(self.clusters, self.prior, self.steps, self.forecast_lr, seed)


SETTINGS = Quee
STARTS_FROM = "joint"


def policy_of(settings: Quee) -> str | None:
    """No policy: the forecast decides; those of an earlier recipe are dropped."""
    return None


def train(run: Run, train: Encoded, dev: Encoded, settings: Quee, *, skip_warm_start: bool) -> dict[str, Any]:
    """Fit forecasts on dev and choose operating points there; gives dev figures, points and frontiers."""
    if not skip_warm_start:
        warm_start(run, train, Joint(settings.epochs, settings.batch_size, settings.lr, settings.heads_lr))
    network, names, fit = run.network, settings.names, settings.fit(run.seed)
    device = run.accelerator.device

    def measure() -> Any:
        return pack(collect_outcomes(network, dev, names, device=device, what="dev, every path"))

    outcomes = unpack(run.remember("outcomes", measure), names, dev.lengths)
    if settings.forecaster == "mlp":
        network.forecasts = fit_networks(outcomes, make_tables(outcomes, fit), fit).to(device)
        network.spec = dataclasses.replace(network.spec, forecast=names)
    ledger = bit_ledger(network, dev.lengths, names)
    forecasters = cross_fitted(outcomes, fit, run.seed)
    points = {kind: frontier(outcomes, forecasters[kind], ledger) for kind in FORECASTERS}
    full = full_depth(outcomes, ledger)
    run.log(stage="forecasts", rows=len(dev), variants=list(names), full_depth=full.accuracy)
    _, wrong = outcomes.straight()
    chosen = choose_walk_points(points[settings.forecaster], full, ledger.unit)
    return {
        "dev": {
            "exit_accuracy": [round(100 * float(1 - value), 2) for value in wrong[:, 0].mean(0)],
            "full_depth": full.accuracy,
            "rows": len(dev),
            "tokens": ledger.stated.tokens,
        },
        ("operating_points" if settings.forecaster == "mlp" else f"points of {settings.forecaster}"): [
            _as_json(name, point, ledger) for name, point in chosen.items()
        ],
        "frontiers": compare(points, outcomes, cross_fitted_exits(outcomes, fit, run.seed), ledger),
    }


def fitted(outcomes: Outcomes, fit: Fit) -> dict[str, Forecaster]:
    """The four forecasters by name, fitted on all rows of these outcomes."""
    tables = make_tables(outcomes, fit)
    networks = by_network(fit_networks(outcomes, tables, fit))
    return {"mlp": networks, "table": by_table(tables), "mean": by_mean(outcomes), "oracle": by_truth}


def cross_fitted(outcomes: Outcomes, fit: Fit, seed: int) -> dict[str, Forecaster]:
    """The four forecasters by name, each row forecast by those that were fitted without its half."""
    fold = np.random.default_rng([seed, 31]).permutation(len(outcomes)) % FOLDS  # [rows]
    by_fold = [fitted(outcomes.take(np.flatnonzero(fold != number)), fit) for number in range(FOLDS)]

    def spread(kind: str) -> Forecaster:
        def forecast(rows: Outcomes, place: Place) -> Floats:
            parts = np.stack([found[kind](rows, place) for found in by_fold])  # [folds, rows, paths]
            return parts[fold[place.rows], np.arange(len(place.rows))]

        return forecast

    return {kind: spread(kind) for kind in FORECASTERS}


def cross_fitted_exits(outcomes: Outcomes, fit: Fit, seed: int) -> dict[str, Forecaster]:
    """For each variant, forecasts of leaving alone: the network that knows no other variant."""
    return {name: cross_fitted(outcomes.only([name]), fit, seed)["mlp"] for name in outcomes.variants}


def compare(
    quee: Mapping[str, list[WalkPoint]], outcomes: Outcomes, exits: Mapping[str, Forecaster], ledger: Ledger
) -> dict[str, Any]:
    """Frontiers on one cost axis from the same outcomes: quee by forecaster, leaving alone in each variant by
    the same kind of forecast, quantizing alone, and lots drawn between static exits of all variants.

    quee: points by forecaster; exits: forecasters of outcomes.only([variant]), by variant. Gives accuracy on
    each line's hull at SHARES of the full cost (None: below its cheapest point), and the hulls.
    """
    lines = {f"quee, {kind}": points for kind, points in quee.items()}
    for number, name in enumerate(outcomes.variants):
        alone = outcomes.only([name])
        lines[f"leaving alone, {name}"] = frontier(alone, exits[name], ledger.only([number]))
    static = static_points(outcomes, ledger)
    lines["quantizing alone"] = [p for p in static if p.rule.parameters["exit"] == outcomes.exits]
    lines["lots between static exits"] = static
    hulls = {name: hull(points) for name, points in lines.items()}
    return {
        "unit": ledger.unit,
        "accuracy_at": {
            name: {f"{share:g}": _rounded(accuracy_at(line, share)) for share in SHARES}
            for name, line in hulls.items()
        },
        "hulls": {
            name: [[round(p.cost, 3), round(p.accuracy, 3)] for p in line] for name, line in hulls.items()
        },
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _as_json(name: str, point: WalkPoint, ledger: Ledger) -> dict[str, Any]:
    depth = float(ledger.blocks.sum())
    figures = {
        "accuracy": point.accuracy,
        "mean_exit": point.mean_exit,
        "layers_saved": 100 * (1 - point.mean_exit / depth),
        "bops_saved": 100 - point.cost,
        "changed": point.changed,
    }
    return {
        "name": name,
        "rule": {"name": point.rule.name, "parameters": dict(point.rule.parameters)},
        "variant": point.variant,
        "data": "",
        "split": "dev",
        "measured": {key: round(value, 3) for key, value in figures.items()},
    }
