"""Operating points of a bundle that generates text: routes, and the router that chooses them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from offramp.runtime.bundle.manifest import OperatingPoint, RuleSpec
from offramp.runtime.errors import BadInput
from offramp.runtime.generator import TextGenerator
from offramp.runtime.loading import load_generator
from offramp.runtime.rules import Floats, bind
from offramp.runtime.rules.route import ROUTER_FILE, Route, Router, fit_router, list_routes
from offramp.runtime.rules.skip import thinned_plan
from offramp.runtime.tuning.exit_tables import engine_facts
from offramp.runtime.tuning.labelled import read_pairs
from offramp.runtime.tuning.measure_points import Calibration
from offramp.runtime.walker import walk_one

ROUTE_SHARES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6)  # mean depths of route points, as shares of all blocks


def measure_routes(folder: Path, file: Path, threads: int | None = None) -> Calibration:
    """Fit the router of a bundle that generates text, and measure its route points.

    Each completion is run by every route, after its prompt at full depth. The router is fitted on half of the
    rows; on the other half prices are chosen and points are measured, both by log-likelihood.
    """
    with load_generator(folder, rule="never", threads=threads, share=False, global_pool=True) as session:
        manifest, routes = session.manifest, list_routes(session.manifest)
        rows = read_pairs(file, session.longest, session.encode_prompt, session.encode_continuation)
        if len(routes) == 1:
            raise BadInput(f"{folder}: no route skips any of the {len(manifest.segments)} segments")
        scored = [route_scores(session, routes, *row) for row in rows]
        facts = {"rows": len(rows), **engine_facts(session)}
        variant = session.variant
    features = np.array([hidden for hidden, _ in scored], np.float64)  # [rows, hidden]
    scores = np.array([row for _, row in scored])  # [rows, routes]
    half = len(rows) // 2
    router = fit_router(
        features[:half], scores[:half], np.array([route.blocks for route in routes], np.float64)
    )
    points = _route_points(router, features[half:], scores[half:], variant, file.stem)
    kept = tuple(point for point in manifest.points if point.rule.name != "route")
    files, table = {ROUTER_FILE: router.to_bytes()}, _route_table(routes, scores, points, router)
    return Calibration((*kept, *points), manifest.rule, "routed", facts, files=files, table=table)


def route_scores(
    session: TextGenerator, routes: Sequence[Route], prompt: list[int], completion: list[int]
) -> tuple[Floats, list[float]]:
    """Score a completion by each route; gives the hidden state [hidden] that the router reads, and the
    scores.

    A score is the mean log-likelihood in nats of the tokens after the first, which the prompt predicts.
    """
    engine, segments = session.engine, len(session.manifest.segments)
    variant = session.manifest.variants.index(session.variant)
    never = bind(RuleSpec("never", {}), segments)
    sequence = engine.begin({"input_ids": np.array([prompt], np.int64)})
    prompt_hidden = walk_one(engine, never, sequence, [variant] * segments)[0].signals.hidden
    assert prompt_hidden is not None  # decoders always give it
    hidden = prompt_hidden[-1].copy()
    sequence.rows = len(completion) - 1
    scores = []
    for route in routes:
        sequence.truncate(len(prompt))
        sequence.feed(completion[:-1])
        plan = thinned_plan(segments, variant, route.skipped)[0].tolist()
        logits = walk_one(engine, never, sequence, plan)[-1].signals.logits  # [tokens, vocabulary]
        top = logits.max(1)
        predicted = logits[np.arange(len(logits)), completion[1:]]
        scores.append(float((predicted - top - np.log(np.exp(logits - top[:, None]).sum(1))).mean()))
    engine.drop(sequence)
    return hidden, scores


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


def _route_table(
    routes: Sequence[Route], scores: np.ndarray, points: Sequence[OperatingPoint], router: Router
) -> str:
    lines = [f"{'route':14}{'blocks':>7}{'nats a token':>14}"]
    for route, score in zip(routes, scores.mean(0), strict=True):
        lines.append(f"{route.name:14}{route.blocks:7d}{-score:14.4f}")
    lines += ["", f"{'point':14}{'depth':>7}{'nats a token':>14}{'full depth':>12}"]
    for point in points:
        nats = point.measured
        lines.append(f"{point.name:14}{nats['depth']:7.2f}{nats['nats']:14.4f}{nats['nats_full']:12.4f}")
    error = f"error of the router's forecasts, 1 without any knowledge: {router.error:.3f}"
    return "\n".join([*lines, "", error])
