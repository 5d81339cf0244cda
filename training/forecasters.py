"""Forecasters: estimates, fitted on held-out rows, of the errors of the paths ahead, for rule quee.

Targets as in QuEE (arXiv 2406.14404; a reconstruction in everything that its abstract does not state): the
feature space is divided into clusters, the target is a path's error rate among the cluster's rows, and a
small network is fitted to it. Three other forecasters show the value of the network: its targets looked up
(table), one number for each path (mean), the true outcome (oracle).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from offramp.models.forecasts import Forecast
from offramp.training.outcomes import Floats, Numbers, Outcomes


@dataclass(frozen=True)
class WalkState:
    """The state of rows in the middle of a walk, after `segment`.

    rows: indices into the outcomes. now [rows]: the present variant; start [rows]: the variant before a
    change; change [rows]: the last exit before it.
    """

    rows: Numbers
    segment: int
    now: Numbers
    start: Numbers
    change: Numbers


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
    """The clusters of one exit's statistics and the error rate of each path in each cluster.

    mean and spread [3] standardize the statistics; by variant, centres [clusters, 3] and rates [clusters,
    paths].
    """

    mean: Floats
    spread: Floats
    centres: tuple[NDArray[np.float64], ...]
    rates: tuple[Floats, ...]

    def look_up(self, statistics: Floats, now: int) -> Floats:
        """Error rates [rows, paths] for rows in variant `now` with these statistics [rows, 3]."""
        nearest = _distances((statistics - self.mean) / self.spread, self.centres[now]).argmin(1)
        rates: Floats = self.rates[now][nearest]
        return rates


def fit_tables(outcomes: Outcomes, fit: ForecastFit) -> list[ClusterTable]:
    """Fit the cluster table of every exit but the last."""
    statistics, _ = outcomes.without_change()  # [rows, variants, exits, 3]
    tables = []
    for segment in range(outcomes.exits - 1):
        here, wrong = statistics[:, :, segment], outcomes.path_errors(segment)
        mean = here.reshape(-1, here.shape[-1]).mean(0)
        spread = here.reshape(-1, here.shape[-1]).std(0) + 1e-6
        centres, rates = [], []
        for now in range(len(outcomes.variants)):
            points = ((here[:, now] - mean) / spread).astype(np.float64)
            centres.append(k_means(points, fit.clusters, fit.seed))
            nearest = _distances(points, centres[-1]).argmin(1)
            sizes = np.bincount(nearest, minlength=len(centres[-1]))[:, None]
            sums = np.zeros((len(centres[-1]), wrong.shape[2]))
            np.add.at(sums, nearest, wrong[:, now])
            overall = wrong[:, now].mean(0)
            rates.append(((sums + fit.prior * overall) / (sizes + fit.prior)).astype(np.float32))
        tables.append(ClusterTable(mean, spread, tuple(centres), tuple(rates)))
    return tables


def fit_networks(outcomes: Outcomes, tables: list[ClusterTable], fit: ForecastFit) -> nn.ModuleList:
    """Fit one small network for each exit to its table's rates, by cross-entropy on all rows at once."""
    statistics, _ = outcomes.without_change()
    count, networks = len(outcomes.variants), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit.seed)
        for segment, table in enumerate(tables):
            network = Forecast(count, outcomes.exits - 1 - segment)
            network.mean.copy_(torch.from_numpy(table.mean))
            network.spread.copy_(torch.from_numpy(table.spread))
            targets = [torch.from_numpy(table.look_up(statistics[:, n, segment], n)) for n in range(count)]
            inputs = torch.from_numpy(np.ascontiguousarray(statistics[:, :, segment]))  # [rows, variants, 3]
            _regress(network, inputs, torch.stack(targets, 1), fit)
            networks.append(network.eval())
    return nn.ModuleList(networks)


def network_forecaster(networks: nn.ModuleList) -> Forecaster:
    """A forecaster that computes errors by the small networks, one for each exit but the last."""

    @torch.no_grad()
    def forecast(outcomes: Outcomes, state: WalkState) -> Floats:
        network = networks[state.segment]
        assert isinstance(network, Forecast)
        logits = network.from_statistics(torch.from_numpy(_statistics_of(outcomes, state)))
        probabilities: Floats = logits.sigmoid().numpy()
        return probabilities

    return forecast


def table_forecaster(tables: list[ClusterTable]) -> Forecaster:
    """A forecaster that looks up the error rates of the row's cluster."""

    def forecast(outcomes: Outcomes, state: WalkState) -> Floats:
        table, statistics = tables[state.segment], _statistics_of(outcomes, state)
        rates = np.stack([table.look_up(statistics, now) for now in range(len(outcomes.variants))], axis=1)
        return rates.reshape(len(statistics), -1)

    return forecast


def mean_forecaster(fitted: Outcomes) -> Forecaster:
    """A forecaster that gives each path its mean error rate, the same for all rows."""
    rates = [fitted.path_errors(segment).mean(0) for segment in range(fitted.exits - 1)]

    def forecast(outcomes: Outcomes, state: WalkState) -> Floats:
        return np.broadcast_to(rates[state.segment].ravel(), (len(state.rows), rates[state.segment].size))

    return forecast


def oracle_forecaster(outcomes: Outcomes, state: WalkState) -> Floats:
    """The true outcome of each path, 1 for wrong [rows, variants * paths], which bounds any forecaster."""
    wrong = outcomes.path_errors(state.segment)[state.rows]  # [rows, variants, paths]
    changed = np.flatnonzero(state.start != state.now)
    if len(changed):
        # After a change only the exits ahead in the same variant can be taken.
        rows, now = state.rows[changed], state.now[changed]
        after = outcomes.wrong[rows, state.start[changed], now, state.change[changed]][:, state.segment :]
        ahead = after.shape[1] - 1
        wrong[changed, now, 0] = after[:, 0]
        columns = 1 + now[:, None] * ahead + np.arange(ahead)
        wrong[changed[:, None], now[:, None], columns] = after[:, 1:]
    return wrong.reshape(len(state.rows), -1)


def _statistics_of(outcomes: Outcomes, state: WalkState) -> Floats:
    """The statistics [rows, 3] of the exit after the state's segment."""
    statistics: Floats = outcomes.statistics[state.rows, state.start, state.now, state.change, state.segment]
    return statistics


def _regress(network: Forecast, inputs: torch.Tensor, targets: torch.Tensor, fit: ForecastFit) -> None:
    rows, count, paths = targets.shape
    optimizer = torch.optim.Adam(network.parameters(), lr=fit.lr)
    same = torch.arange(count)
    for _ in range(fit.steps):
        logits = network.from_statistics(inputs.flatten(0, 1)).view(rows, count, count, paths)[:, same, same]
        loss = functional.binary_cross_entropy_with_logits(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _distances(points: NDArray[np.floating], centres: NDArray[np.floating]) -> NDArray[np.float64]:
    """Squared distances [points, centres]."""
    distances: NDArray[np.float64] = np.square(points[:, None] - centres[None]).sum(-1)
    return distances
