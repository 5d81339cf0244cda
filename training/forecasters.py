"""Forecasters: estimates, fitted on held-out rows, of the errors of the paths ahead, for rule quee.

Targets as in QuEE (arXiv 2406.14404; a reconstruction in everything that its abstract does not state): the
feature space is divided into clusters, the target is a path's error rate among the cluster's rows, and a
small network is fitted to it. Three other forecasters show the value of the network: its targets looked up
(table), one number for each path (mean), the true outcome (oracle).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from offramp.models.forecasts import INPUTS, Forecast
from offramp.training.outcomes import Floats, Outcomes
from offramp.training.walk_tree import Numbers


@dataclass(frozen=True)
class WalkState:
    """The state of rows in the middle of a walk, after `segment`.

    rows: indices into the outcomes. node [rows]: the walk of each row so far, in their tree.
    """

    rows: Numbers
    segment: int
    node: Numbers


# (outcomes of the walked rows, state) -> P(wrong) [rows, variants * paths], of which the rule reads the slice
# of the present variant
Forecaster = Callable[[Outcomes, WalkState], Floats]


@dataclass(frozen=True)
class ForecastFit:
    """Options of fitting the forecasters.

    clusters: number at each exit in each variant. prior: weight, in rows, of a path's mean error rate in
    every cluster. steps and lr: of the small network. seed: of everything random.
    """

    clusters: int = 24
    prior: float = 4.0
    steps: int = 400
    lr: float = 1e-2
    seed: int = 0


def k_means(points: NDArray[np.float64], count: int, seed: int, rounds: int = 30) -> NDArray[np.float64]:
    """Cluster centres [count or fewer, features] of points [rows, features] by k-means, starting from
    k-means++.
    """
    random = np.random.default_rng(seed)
    centres = points[random.integers(len(points), size=1)]
    while len(centres) < count:
        distance = _distances(points, centres).min(1)
        if not distance.sum() > 1e-12:
            break  # fewer different points than clusters
        drawn = random.choice(len(points), p=distance / distance.sum())
        centres = np.concatenate([centres, points[drawn : drawn + 1]])
    for _ in range(rounds):
        nearest = _distances(points, centres).argmin(1)
        sums = np.stack([np.bincount(nearest, column, len(centres)) for column in points.T], axis=1)
        sizes = np.bincount(nearest, minlength=len(centres))[:, None]
        moved = np.where(sizes > 0, sums / np.maximum(sizes, 1), centres)
        if np.allclose(moved, centres):
            break
        centres = moved
    return centres


@dataclass(frozen=True)
class ClusterTable:
    """The clusters of one exit's inputs and the error rate of each path in each cluster.

    mean and spread [inputs] standardize; by variant, centres [clusters, inputs] and rates [clusters, paths].
    """

    mean: Floats
    spread: Floats
    centres: tuple[NDArray[np.float64], ...]
    rates: tuple[Floats, ...]

    def look_up(self, inputs: Floats, now: int) -> Floats:
        """Error rates [rows, paths] for rows in variant `now` with these inputs [rows, inputs]."""
        nearest = _distances((inputs - self.mean) / self.spread, self.centres[now]).argmin(1)
        rates: Floats = self.rates[now][nearest]
        return rates


def fit_tables(outcomes: Outcomes, fit: ForecastFit) -> list[ClusterTable]:
    """Fit the cluster table of every exit but the last."""
    inputs, _ = outcomes.without_change()  # [rows, variants, exits, inputs]
    tables = []
    for segment in range(outcomes.exits - 1):
        exit_inputs, wrong = inputs[:, :, segment], outcomes.path_errors(segment)
        mean = exit_inputs.reshape(-1, exit_inputs.shape[-1]).mean(0)
        spread = exit_inputs.reshape(-1, exit_inputs.shape[-1]).std(0) + 1e-6
        centres, rates = [], []
        for now in range(len(outcomes.variants)):
            points = ((exit_inputs[:, now] - mean) / spread).astype(np.float64)
            centres.append(k_means(points, fit.clusters, fit.seed))
            nearest = _distances(points, centres[-1]).argmin(1)
            sizes = np.bincount(nearest, minlength=len(centres[-1]))[:, None]
            sums = np.zeros((len(centres[-1]), wrong.shape[2]))
            np.add.at(sums, nearest, wrong[:, now])
            overall = wrong[:, now].mean(0)
            rates.append(((sums + fit.prior * overall) / (sizes + fit.prior)).astype(np.float32))
        tables.append(ClusterTable(mean, spread, tuple(centres), tuple(rates)))
    return tables


def fit_networks(
    outcomes: Outcomes, tables: list[ClusterTable], fit: ForecastFit, compress: Sequence[nn.Linear] = ()
) -> nn.ModuleList:
    """Fit one small network for each exit to its table's rates, by cross-entropy on all rows at once.

    compress: for each exit, the layer by which its compact features were computed; empty if the outcomes have
    none.
    """
    all_inputs, _ = outcomes.without_change()
    count, networks = len(outcomes.variants), []
    kind = next(name for name, size in INPUTS.items() if size == all_inputs.shape[-1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit.seed)
        for segment, table in enumerate(tables):
            hidden_size = compress[segment].in_features if compress else None
            network = Forecast(count, outcomes.exits - 1 - segment, kind, hidden_size)
            if network.compress is not None and compress:
                network.compress.load_state_dict(compress[segment].state_dict())
            network.mean.copy_(torch.from_numpy(table.mean))
            network.spread.copy_(torch.from_numpy(table.spread))
            targets = [torch.from_numpy(table.look_up(all_inputs[:, n, segment], n)) for n in range(count)]
            inputs = torch.from_numpy(
                np.ascontiguousarray(all_inputs[:, :, segment])
            )  # [rows, variants, ...]
            _regress(network, inputs, torch.stack(targets, 1), fit)
            networks.append(network.eval())
    return nn.ModuleList(networks)


def network_forecaster(networks: nn.ModuleList) -> Forecaster:
    """A forecaster that computes errors by the small networks, one for each exit but the last."""

    @torch.no_grad()
    def forecast(outcomes: Outcomes, state: WalkState) -> Floats:
        network = networks[state.segment]
        assert isinstance(network, Forecast)
        logits = network.from_inputs(torch.from_numpy(_inputs_of(outcomes, state)))
        probabilities: Floats = logits.sigmoid().numpy()
        return probabilities

    return forecast


def table_forecaster(tables: list[ClusterTable]) -> Forecaster:
    """A forecaster that looks up the error rates of the row's cluster."""

    def forecast(outcomes: Outcomes, state: WalkState) -> Floats:
        table, inputs = tables[state.segment], _inputs_of(outcomes, state)
        rates = np.stack([table.look_up(inputs, now) for now in range(len(outcomes.variants))], axis=1)
        return rates.reshape(len(inputs), -1)

    return forecast


def mean_forecaster(fitted: Outcomes) -> Forecaster:
    """A forecaster that gives each path its mean error rate, the same for all rows."""
    rates = [fitted.path_errors(segment).mean(0) for segment in range(fitted.exits - 1)]

    def forecast(outcomes: Outcomes, state: WalkState) -> Floats:
        return np.broadcast_to(rates[state.segment].ravel(), (len(state.rows), rates[state.segment].size))

    return forecast


def oracle_forecaster(outcomes: Outcomes, state: WalkState) -> Floats:
    """The true outcome of each path, 1 for wrong [rows, variants * paths], which bounds any forecaster."""
    rows, now = np.arange(len(state.rows)), outcomes.tree.variant[state.node]
    wrong = outcomes.path_errors(state.segment)[state.rows]  # [rows, variants, paths]
    wrong[rows, now] = outcomes.errors_from(state.rows, state.node)
    return wrong.reshape(len(rows), -1)


def _inputs_of(outcomes: Outcomes, state: WalkState) -> Floats:
    """The forecast's inputs [rows, inputs] at the exit after the state's segment."""
    inputs: Floats = outcomes.inputs[state.rows, state.node]
    return inputs


def _regress(network: Forecast, inputs: torch.Tensor, targets: torch.Tensor, fit: ForecastFit) -> None:
    rows, count, paths = targets.shape
    optimizer = torch.optim.Adam(network.parameters(), lr=fit.lr)
    same = torch.arange(count)
    for _ in range(fit.steps):
        logits = network.from_inputs(inputs.flatten(0, 1)).view(rows, count, count, paths)[:, same, same]
        loss = functional.binary_cross_entropy_with_logits(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _distances(points: NDArray[np.floating], centres: NDArray[np.floating]) -> NDArray[np.float64]:
    """Squared distances [points, centres]."""
    distances: NDArray[np.float64] = np.square(points[:, None] - centres[None]).sum(-1)
    return distances
