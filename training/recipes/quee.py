"""quee: exit, or continue in a cheaper precision, by error forecasts; post-training (arXiv 2406.14404).

A reconstruction: the abstract states that errors of paths are predicted by small networks whose targets come
from a discretized feature space, and that the choice weighs them against cost; everything else here is ours.
Backbone and exits are unchanged (--init), or trained by recipe joint first. Then, on dev alone, which was not
used to train them:

1 every row runs along every walk: each precision of `variants`, and from every exit on each that it may
change to (simulated).  2 at each exit and in each precision k-means divides what a forecast reads into
clusters; a path's error rate in a cluster is its target.  3 a small network at each exit is fitted to the
targets.  4 the price of rule quee is chosen by replaying its walks. For 4 each half of the dev rows is
forecast by networks that were fitted on the other half; the exported networks are fitted on all of it.

Settings: variants (of fp32, int8, int4, and int6, which is only simulated and cannot be exported). changes:
most changes of precision in a walk; order=down allows only changes to fewer bits, order=free all. inputs of a
forecast: statistics of the softmax (certainty, entropy, margin), features (8 principal components of the
exit's pooled vector), or both. clusters, prior, steps and forecast_lr of the fit. forecaster=mlp is the one
that is exported. With table, mean or oracle training.json has the points of that forecaster and the
checkpoint has no forecasts. Dev frontiers of all four, of the network with each kind of inputs, of exiting
alone and of quantizing alone, are always reported.

Number of paths: with down, V variants and L exits there are about V L^2 / 2 walks with one change and, for
three variants, L^3 / 6 with two; for 12 exits and fp32, int8, int4 all of them cost as much as 38 walks at
full depth. A forecast plans no second change, so that it has 1 + V * exits ahead numbers a variant; the
second is decided when the row gets there. It reads the present precision, not those before it.
Operating points are in bit operations; ee-calibrate measures milliseconds and points in them.

    ee-train --init CKPT --data DATA --recipe quee --out ckpt/ --set variants=fp32,int8,int4
    ee-split ckpt/ --variants fp32,int8,int4
    ee-calibrate dev.jsonl --bundle bundle/

Expect: e5-small on sst2, 872 dev rows in fp32 and int8, three minutes on one core after recipe joint. With
one change in any order and statistics alone: 89.8 % on test with 57 % of multiply-accumulates and 97 % of bit
operations saved, as exiting alone does in int8 (docs/measured.md).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from offramp.models.forecasts import INPUTS
from offramp.models.network import EarlyExitNetwork, ExitParts
from offramp.models.precision import PRECISIONS
from offramp.runtime.rules.quee import MAX_CHANGES
from offramp.runtime.rules.walk_points import WalkPoint, choose_walk_points
from offramp.training.batches import Encoded
from offramp.training.collect import collect
from offramp.training.forecasters import (
    Forecaster,
    ForecastFit,
    WalkState,
    fit_networks,
    fit_tables,
    mean_forecaster,
    network_forecaster,
    oracle_forecaster,
    table_forecaster,
)
from offramp.training.loop import Run
from offramp.training.outcomes import (
    Floats,
    Outcomes,
    collect_outcomes,
    compression_layers,
    fit_compression,
    pack_outcomes,
    unpack_outcomes,
)
from offramp.training.recipes.joint import JointSettings, warm_start
from offramp.training.replay import (
    WalkCosts,
    bit_costs,
    full_depth_point,
    hull_accuracy,
    price_frontier,
    static_points,
    upper_hull,
)
from offramp.training.walk_tree import WalkTree, grow_tree

FORECASTERS = ("mlp", "table", "mean", "oracle")
ORDERS = ("down", "free")
FOLDS = 2
# Percent of the full cost at which frontiers are compared.
SHARES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 10.0, 25.0, 50.0, 75.0)


@dataclass(frozen=True)
class QueeSettings:
    """Settings of recipe quee; epochs to heads_lr are those of the warm start without --init."""

    epochs: int = 3
    batch_size: int = 32
    lr: float = 5e-5
    heads_lr: float = 1e-3
    variants: str = "fp32,int8"
    changes: int = 2
    order: str = "down"
    inputs: str = "both"
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
        for name, value, known in (
            ("forecaster", self.forecaster, FORECASTERS),
            ("order", self.order, ORDERS),
            ("inputs", self.inputs, INPUTS),
            ("changes", self.changes, range(1, MAX_CHANGES + 1)),
        ):
            if value not in known:
                raise ValueError(f"{name}={value}: choose one of {', '.join(map(str, known))}")
        bits = [PRECISIONS[name].weight_bits for name in names]
        if self.order == "down" and bits != sorted(bits, reverse=True):
            raise ValueError(f"variants={self.variants}: with order=down the fewest bits come last")
        if self.clusters < 1 or self.steps < 1 or self.prior < 0:
            raise ValueError("clusters and steps must be 1 or more, prior 0 or more")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the variants, the default first."""
        return tuple(name.strip() for name in self.variants.split(","))

    def tree(self, exits: int) -> WalkTree:
        """All walks through this number of exits that these settings allow."""
        return grow_tree(len(self.names), exits, self.changes, increase=self.order == "free")

    def fit(self, seed: int) -> ForecastFit:
        """The options of the forecasters' fit by these settings and a seed."""
        return ForecastFit(self.clusters, self.prior, self.steps, self.forecast_lr, seed)


KIND: Literal["classifier"] = "classifier"
NEEDS_LABELS = True
SETTINGS = QueeSettings
STARTS_FROM: str | None = "joint"


def parts_of(settings: QueeSettings) -> ExitParts:
    """The default parts, without a policy: the forecast decides, and earlier policies are removed."""
    return ExitParts()


def train(
    run: Run[EarlyExitNetwork],
    train: Encoded,
    dev: Encoded,
    settings: QueeSettings,
    *,
    skip_warm_start: bool,
) -> dict[str, Any]:
    """Fit forecasts on dev and choose operating points there; return dev figures, points and frontiers."""
    if not skip_warm_start:
        joint = JointSettings(settings.epochs, settings.batch_size, settings.lr, settings.heads_lr)
        warm_start(run, train, joint)
    network, names, fit = run.network, settings.names, settings.fit(run.seed)
    device, tree = run.accelerator.device, settings.tree(len(run.network.spec.exits))

    def measure_compression() -> Tensor:
        pooled = collect(network, dev, device=device, description="dev").pooled
        return torch.stack([fit_compression(pooled[:, index]) for index in range(pooled.shape[1] - 1)])

    compress = compression_layers(run.compute_once("compression", measure_compression))

    def measure_outcomes() -> Tensor:
        on_device = [copy.deepcopy(layer).to(device) for layer in compress]
        description = "dev, every walk"
        return pack_outcomes(
            collect_outcomes(network, dev, names, tree, on_device, device=device, description=description)
        )

    all_inputs = unpack_outcomes(run.compute_once("outcomes", measure_outcomes), names, tree, dev.lengths)
    outcomes = all_inputs.select_inputs(settings.inputs)
    if settings.forecaster == "mlp":
        layers = compress if settings.inputs != "statistics" else ()
        network.forecasts = fit_networks(outcomes, fit_tables(outcomes, fit), fit, layers).to(device)
        network.spec = dataclasses.replace(network.spec, forecast=names, forecast_inputs=settings.inputs)
    costs = bit_costs(network, dev.lengths, names)
    forecasters = fit_by_halves(outcomes, fit, run.seed)
    points = {kind: price_frontier(outcomes, forecasters[kind], costs) for kind in FORECASTERS}
    ablation = {f"mlp of {settings.inputs}": points["mlp"]}
    for kind in INPUTS:
        if kind != settings.inputs:
            other = all_inputs.select_inputs(kind)
            forecaster = fit_by_halves(other, fit, run.seed, ("mlp",))["mlp"]
            ablation[f"mlp of {kind}"] = price_frontier(other, forecaster, costs)
    full = full_depth_point(outcomes, costs)
    run.log(phase="forecasts", rows=len(dev), variants=list(names), full_depth=full.accuracy)
    _, wrong = outcomes.without_change()
    chosen = choose_walk_points(points[settings.forecaster], full, costs.unit)
    exits_alone = fit_exits_by_halves(outcomes, fit, run.seed)
    return {
        "dev": {
            "exit_accuracy": [round(100 * float(1 - value), 2) for value in wrong[:, 0].mean(0)],
            "full_depth": full.accuracy,
            "rows": len(dev),
            "tokens": costs.stated.tokens,
        },
        ("operating_points" if settings.forecaster == "mlp" else f"points of {settings.forecaster}"): [
            _point_as_json(name, point, costs) for name, point in chosen.items()
        ],
        "frontiers": compare_frontiers({**points, **ablation}, outcomes, exits_alone, costs),
    }


def fit_forecasters(outcomes: Outcomes, fit: ForecastFit) -> dict[str, Forecaster]:
    """Fit the four forecasters on all rows of these outcomes; gives them by name."""
    tables = fit_tables(outcomes, fit)
    # Inputs are collected, so the layers that compute compact features are not needed.
    networks = network_forecaster(fit_networks(outcomes, tables, fit))
    return {
        "mlp": networks,
        "table": table_forecaster(tables),
        "mean": mean_forecaster(outcomes),
        "oracle": oracle_forecaster,
    }


def fit_by_halves(
    outcomes: Outcomes, fit: ForecastFit, seed: int, kinds: Sequence[str] = FORECASTERS
) -> dict[str, Forecaster]:
    """Fit the four forecasters on each half of the rows; gives forecasters by name that forecast the other
    half.
    """
    fold = np.random.default_rng([seed, 31]).permutation(len(outcomes)) % FOLDS  # [rows]
    by_fold = [fit_forecasters(outcomes.take(np.flatnonzero(fold != number)), fit) for number in range(FOLDS)]

    def by_fold_of_row(kind: str) -> Forecaster:
        def forecast(rows: Outcomes, state: WalkState) -> Floats:
            forecasts = np.stack([forecasters[kind](rows, state) for forecasters in by_fold])
            return forecasts[fold[state.rows], np.arange(len(state.rows))]  # of [folds, rows, paths]

        return forecast

    return {kind: by_fold_of_row(kind) for kind in kinds}


def fit_exits_by_halves(outcomes: Outcomes, fit: ForecastFit, seed: int) -> dict[str, Forecaster]:
    """Fit a forecaster of exiting alone for each variant, on that variant only and by halves; gives them by
    name.
    """
    return {
        name: fit_by_halves(outcomes.select_variants([name]), fit, seed, ("mlp",))["mlp"]
        for name in outcomes.variants
    }


def compare_frontiers(
    quee: Mapping[str, list[WalkPoint]], outcomes: Outcomes, exits: Mapping[str, Forecaster], costs: WalkCosts
) -> dict[str, Any]:
    """Compare rule quee with exiting alone and quantizing alone on one cost axis, from the same outcomes.

    The frontiers are: quee by forecaster, exiting alone in each variant by the same kind of forecast,
    quantizing alone, and random mixtures of static exits of all variants. quee: points by forecaster; exits:
    forecasters of outcomes.select_variants([variant]), by variant. Gives accuracy on each frontier's hull at
    SHARES of the full cost (None: below its cheapest point), and the hulls.
    """
    frontiers = {f"quee, {kind}": points for kind, points in quee.items()}
    for number, name in enumerate(outcomes.variants):
        one_variant = outcomes.select_variants([name])
        frontiers[f"exiting alone, {name}"] = price_frontier(
            one_variant, exits[name], costs.select_variants([number])
        )
    static = static_points(outcomes, costs)
    frontiers["quantizing alone"] = [p for p in static if p.rule.parameters["exit"] == outcomes.exits]
    frontiers["mixtures of static exits"] = static
    hulls = {name: upper_hull(points) for name, points in frontiers.items()}
    return {
        "unit": costs.unit,
        "accuracy_at": {
            name: {f"{share:g}": _rounded(hull_accuracy(points, share)) for share in SHARES}
            for name, points in hulls.items()
        },
        "hulls": {
            name: [[round(p.cost, 3), round(p.accuracy, 3)] for p in points] for name, points in hulls.items()
        },
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _point_as_json(name: str, point: WalkPoint, costs: WalkCosts) -> dict[str, Any]:
    depth = float(costs.blocks.sum())
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
