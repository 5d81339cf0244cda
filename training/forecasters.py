"""Forecasters: what rule quee believes of the paths ahead, fitted on held-out rows.

Targets as in QuEE (arXiv 2406.14404; a reconstruction in everything that its abstract does not say): the
feature space is cut into clusters, the target is a path's error rate among the cluster's rows, and a small
network learns it. Three others are for asking what the network is worth: its own targets looked up (table),
one number a path (mean), the truth itself (oracle).
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
class Place:
    """Where rows stand: after `segment`, in variant now [rows]; rows are numbers into the outcomes; start
    [rows] is the variant before a change, change [rows] the last exit before it.
    """

    rows: Numbers
    segment: int
    now: Numbers
    start: Numbers
    change: Numbers


# (outcomes of the rows to walk, where they stand) -> P(wrong) [rows, variants * paths], of which the slice of
# the variant now is read
Forecaster = Callable[[Outcomes, Place], Floats]


@dataclass(frozen=True)
class Fit:
    """clusters: at each exit in each variant; prior: rows' worth of a path's mean error rate that every
    cluster is given; steps and lr of the small network, seed of everything random.
    """

    clusters: int = 24
    prior: float = 4.0
    steps: int = 400
    lr: float = 1e-2
    seed: int = 0


def k_means(points: NDArray[np.float64], count: int, seed: int, rounds: int = 30) -> NDArray[np.float64]:
    """Centres [count or fewer, features] of points [rows, features], started far apart (k-means++)."""
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
class Table:
    """Cluster targets of one exit: mean and spread [3] standardize its statistics; by variant now, centres
    [clusters, 3] and rates [clusters, paths].
    """

    mean: Floats
    spread: Floats
    centres: tuple[NDArray[np.float64], ...]
    rates: tuple[Floats, ...]

    def look_up(self, seen: Floats, now: int) -> Floats:
        """Rates [rows, paths] for statistics [rows, 3] of rows in variant `now`."""
        nearest = _distances((seen - self.mean) / self.spread, self.centres[now]).argmin(1)
        found: Floats = self.rates[now][nearest]
        return found


def make_tables(outcomes: Outcomes, fit: Fit) -> list[Table]:
    """The targets of every exit but the last."""
    seen, _ = outcomes.straight()  # [rows, variants, exits, 3]
    tables = []
    for segment in range(outcomes.exits - 1):
        here, wrong = seen[:, :, segment], outcomes.paths(segment)
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
        tables.append(Table(mean, spread, tuple(centres), tuple(rates)))
    return tables


def fit_networks(outcomes: Outcomes, tables: list[Table], fit: Fit) -> nn.ModuleList:
    """A small network an exit, regressed on the table's rates by cross-entropy, all rows at once."""
    seen, _ = outcomes.straight()
    count, learned = len(outcomes.variants), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit.seed)
        for segment, table in enumerate(tables):
            network = Forecast(count, outcomes.exits - 1 - segment)
            network.mean.copy_(torch.from_numpy(table.mean))
            network.spread.copy_(torch.from_numpy(table.spread))
            targets = [torch.from_numpy(table.look_up(seen[:, n, segment], n)) for n in range(count)]
            inputs = torch.from_numpy(np.ascontiguousarray(seen[:, :, segment]))  # [rows, variants, 3]
            _regress(network, inputs, torch.stack(targets, 1), fit)
            learned.append(network.eval())
    return nn.ModuleList(learned)


def by_network(networks: nn.ModuleList) -> Forecaster:
    """What the small networks say."""

    @torch.no_grad()
    def forecast(outcomes: Outcomes, place: Place) -> Floats:
        network = networks[place.segment]
        assert isinstance(network, Forecast)
        found: Floats = network.from_statistics(torch.from_numpy(_seen(outcomes, place))).sigmoid().numpy()
        return found

    return forecast


def by_table(tables: list[Table]) -> Forecaster:
    """The clusters' own rates."""

    def forecast(outcomes: Outcomes, place: Place) -> Floats:
        table, seen = tables[place.segment], _seen(outcomes, place)
        found = np.stack([table.look_up(seen, now) for now in range(len(outcomes.variants))], axis=1)
        return found.reshape(len(seen), -1)

    return forecast


def by_mean(fitted: Outcomes) -> Forecaster:
    """One rate a path and variant, whatever the row."""
    rates = [fitted.paths(segment).mean(0) for segment in range(fitted.exits - 1)]

    def forecast(outcomes: Outcomes, place: Place) -> Floats:
        return np.broadcast_to(rates[place.segment].ravel(), (len(place.rows), rates[place.segment].size))

    return forecast


def by_truth(outcomes: Outcomes, place: Place) -> Floats:
    """Whether each path does end wrong: the bound for any forecaster."""
    found = outcomes.paths(place.segment)[place.rows]  # [rows, variants, paths]
    changed = np.flatnonzero(place.start != place.now)
    if len(changed):
        # After a change only the exits ahead in the same variant can be taken.
        rows, now = place.rows[changed], place.now[changed]
        after = outcomes.wrong[rows, place.start[changed], now, place.change[changed]][:, place.segment :]
        ahead = after.shape[1] - 1
        found[changed, now, 0] = after[:, 0]
        columns = 1 + now[:, None] * ahead + np.arange(ahead)
        found[changed[:, None], now[:, None], columns] = after[:, 1:]
    return found.reshape(len(place.rows), -1)


def _seen(outcomes: Outcomes, place: Place) -> Floats:
    """Statistics [rows, 3] of the exit where rows stand."""
    found: Floats = outcomes.seen[place.rows, place.start, place.now, place.change, place.segment]
    return found


def _regress(network: Forecast, inputs: torch.Tensor, targets: torch.Tensor, fit: Fit) -> None:
    rows, count, paths = targets.shape
    optimizer = torch.optim.Adam(network.parameters(), lr=fit.lr)
    own = torch.arange(count)
    for _ in range(fit.steps):
        said = network.from_statistics(inputs.flatten(0, 1)).view(rows, count, count, paths)[:, own, own]
        loss = functional.binary_cross_entropy_with_logits(said, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _distances(points: NDArray[np.floating], centres: NDArray[np.floating]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.square(points[:, None] - centres[None]).sum(-1)
    return found  # [points, centres]
