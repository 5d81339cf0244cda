"""Operating points of a bundle that generates text: searched skip lists, routes, and the router of these."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from offramp.runtime.bundle.manifest import OperatingPoint, RuleSpec
from offramp.runtime.errors import BadInput
from offramp.runtime.loading import load_generator
from offramp.runtime.progress import track
from offramp.runtime.rules.route import ROUTE_SHARES, ROUTER_FILE, Route, Router, fit_router, list_routes
from offramp.runtime.rules.skip import spec_of_list
from offramp.runtime.tuning.completions import score_plans
from offramp.runtime.tuning.exit_tables import engine_facts
from offramp.runtime.tuning.labelled import read_pairs
from offramp.runtime.tuning.measure_points import Calibration
from offramp.runtime.tuning.search_skips import SkipList, search_skips

SEARCH_ROWS = 16  # rows on which skip lists are searched, by default


def measure_routes(
    folder: Path,
    file: Path,
    threads: int | None = None,
    *,
    search_rows: int = SEARCH_ROWS,
    beam: int = 1,
) -> Calibration:
    """Search skip lists of a bundle that generates text, fit its router, and measure points of both.

    Each completion is run by every list and route, after its prompt at full depth. Lists are searched on the
    first search_rows rows, at most half of all (0: the bundle keeps the lists that it has); beam: see
    search_skips. The router is fitted on the first half of the rows; on the other half prices are chosen and
    points are measured. All of this is by log-likelihood.
    """
    with load_generator(folder, rule="never", threads=threads, share=False, global_pool=True) as session:
        manifest, variant = session.manifest, session.variant
        rows = read_pairs(file, session.longest, session.encode_prompt, session.encode_continuation)
        half = len(rows) // 2
        searched, lists = min(half, search_rows), dict[str, SkipList]()
        if searched:
            lists = _named_lists(search_skips(session, rows[:searched], beam), manifest.blocks)
        kept = [point for point in manifest.points if point.rule.name != "route"]
        kept = [point for point in kept if not (searched and point.rule.skipped)]
        unmeasured = [
            OperatingPoint(name, spec_of_list(skip_list.skipped), variant, file.stem, "dev", {})
            for name, skip_list in lists.items()
        ]
        routes = list_routes(dataclasses.replace(manifest, points=(*kept, *unmeasured)))
        if len(routes) == 1:
            raise BadInput(f"{folder}: no route skips any of the {len(manifest.segments)} segments")
        plans = [route.skipped for route in routes]
        plans += [skip_list.skipped for skip_list in lists.values() if skip_list.skipped not in plans]
        scored = [score_plans(session, plans, *row) for row in track(rows, "scoring routes", unit="row")]
        facts = {
            "rows": len(rows),
            "search_rows": searched,
            "measured_rows": len(rows) - half,
            **engine_facts(session),
        }
    features = np.array([hidden for hidden, _ in scored], np.float64)  # [rows, hidden]
    every_score = np.array([row for _, row in scored])  # [rows, plans]
    scores = every_score[:, : len(routes)]
    router = fit_router(
        features[:half], scores[:half], np.array([route.blocks for route in routes], np.float64)
    )
    route_points = _route_points(router, features[half:], scores[half:], variant, file.stem)
    means = dict(zip(plans, every_score[half:].mean(0).tolist(), strict=True))
    skip_points = _skip_points(unmeasured, lists, means)
    files = {ROUTER_FILE: router.to_bytes()}
    table = _table(routes, scores, (*route_points, *skip_points), router)
    points = (*kept, *route_points, *skip_points)
    return Calibration(points, manifest.rule, "routed", facts, files=files, table=table)


def _named_lists(lists: Sequence[SkipList], blocks: int) -> dict[str, SkipList]:
    """The lists by names of points, such as skip-90 for 90 % of the blocks; of equal names the first."""
    named = dict[str, SkipList]()
    for skip_list in lists:
        named.setdefault(f"skip-{round(100 * skip_list.blocks / blocks)}", skip_list)
    return named


def _skip_points(
    unmeasured: Sequence[OperatingPoint],
    lists: Mapping[str, SkipList],
    means: Mapping[frozenset[int], float],
) -> tuple[OperatingPoint, ...]:
    """The points with what was measured; means: mean log-likelihoods by skipped segments."""
    points = []
    for point in unmeasured:
        skip_list = lists[point.name]
        measured = {
            "depth": float(skip_list.blocks),
            "nats": -means[skip_list.skipped],
            "nats_full": -means[frozenset()],
        }
        points.append(dataclasses.replace(point, measured=measured))
    return tuple(points)


def _route_points(
    router: Router, features: np.ndarray, scores: np.ndarray, variant: str, data: str
) -> tuple[OperatingPoint, ...]:
    full, rows, points = float(router.costs.max()), np.arange(len(scores)), []
    for share in ROUTE_SHARES:
        price = router.price_for_cost(features, share * full)
        routes = router.choose_routes(features, price)
        measured = {
            "depth": float(router.costs[routes].mean()),
            "nats": -float(scores[rows, routes].mean()),
            "nats_full": -float(scores[:, 0].mean()),
        }
        spec = RuleSpec("route", {"price": price})
        points.append(OperatingPoint(f"route-{round(100 * share)}", spec, variant, data, "dev", measured))
    return tuple(points)


def _table(
    routes: Sequence[Route], scores: np.ndarray, points: Sequence[OperatingPoint], router: Router
) -> str:
    lines = [f"{'route':14}{'blocks':>7}{'nats a token':>14}"]
    for route, score in zip(routes, scores.mean(0), strict=True):
        lines.append(f"{route.name:14}{route.blocks:7d}{-score:14.4f}")
    names = f"{'point':14}{'depth':>7}{'nats a token':>14}{'full depth':>12}{'perplexity':>12}"
    lines += ["", f"{names}  skipped"]
    for point in points:
        nats = point.measured
        figures = f"{nats['depth']:7.2f}{nats['nats']:14.4f}{nats['nats_full']:12.4f}"
        skipped = "".join(f"-{number}" for number in point.rule.skipped) or "by the prompt"
        lines.append(f"{point.name:14}{figures}{_perplexity(nats['nats']):12.2f}  {skipped}")
    error = f"error of the router's forecasts, 1 without any knowledge: {router.error:.3f}"
    return "\n".join([*lines, "", error])


def _perplexity(nats: float) -> float:
    """The perplexity of so many nats a token; infinite where a float has no room for it."""
    return math.exp(nats) if nats < 700 else math.inf
