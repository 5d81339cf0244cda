"""ee-calibrate on a bundle that generates: what routes do to its texts, and the router that chooses.

Every text's completion is read once by every route of the menu, behind its prompt at full depth. Half of the
texts teach the router; on the other half prices are chosen and points are measured, both by log-likelihood.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import FILE_NAME, FileFact, Manifest, OperatingPoint, RuleSpec
from offramp.runtime.engines.base import Array
from offramp.runtime.engines.ort_decoder import DecoderEngine
from offramp.runtime.errors import BadInput
from offramp.runtime.generate import past
from offramp.runtime.generator import Writer
from offramp.runtime.loading import load
from offramp.runtime.rules.route import FILE, Route, menu
from offramp.runtime.rules.router import Router, fit
from offramp.runtime.sequence import Lane

LONGEST = 64  # tokens of a completion that are read
SHARES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6)  # of all blocks: mean depths that points are made for
FEWEST = 8  # texts


def read_pairs(file: Path, session: Writer) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompts and completions of JSON lines; BadInput names the line."""
    found = []
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as problem:
        raise BadInput(f"{file}: {problem.strerror}; name a file of JSON lines") from problem
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            prompt, completion = value["prompt"], value["completion"]
            if not (isinstance(prompt, str) and isinstance(completion, str)):
                raise ValueError("prompt and completion must be texts")
        except (ValueError, KeyError, TypeError) as problem:
            what = f"field {problem} is missing" if isinstance(problem, KeyError) else str(problem)
            raise BadInput(f"{file}, line {number}: {what}; expected prompt and completion") from problem
        before, after = session.ids_of(prompt), session.continued(completion)[:LONGEST]
        if before and len(after) > 1:
            found.append((before[-(session.longest - len(after)) :], after))
    if len(found) < FEWEST:
        raise BadInput(
            f"{file}: {len(found)} rows with a prompt and two tokens behind it, {FEWEST} are needed"
        )
    return found


def scored(
    engine: DecoderEngine, routes: Sequence[Route], prompt: list[int], completion: list[int]
) -> tuple[Array, list[float]]:
    """The hidden state that a router sees, and by route the mean log-likelihood (nats) of the completion but
    for its first token, which is the prompt's own.
    """
    lane = Lane(engine)
    lane.feed(prompt)
    seen: Array = lane.advance(0, len(prompt)).hidden[-1].copy()
    lane.through(1, len(prompt))
    scores = []
    for route in routes:
        lane.truncate(len(prompt))
        lane.feed(completion[:-1])
        logits = lane.cache.logits(past(lane, route.skipped, len(completion)).leaving)
        top = logits.max(1)
        said = logits[np.arange(len(logits)), completion[1:]]
        scores.append(float((said - top - np.log(np.exp(logits - top[:, None]).sum(1))).mean()))
    return seen, scores


def calibrated_text(folder: Path, file: Path, threads: int | None = None) -> tuple[Manifest, str]:
    """Measure, write router and points into the bundle; gives the new manifest and a table."""
    with load(folder, rule="never", threads=threads, share=False) as session:
        assert isinstance(session, Writer)
        routes, rows = menu(session.manifest), read_pairs(file, session)
        if len(routes) == 1:
            raise BadInput(f"{folder}: of {len(session.manifest.segments)} segments no route leaves any out")
        told = [scored(session.decoder, routes, *row) for row in rows]
        features = np.array([seen for seen, _ in told], np.float64)
        scores = np.array([score for _, score in told])
        facts = {"rows": len(rows), "engine": session.engine.name, "device": session.engine.device}
        facts |= dict(session.engine.facts)
        variant = session.variant
    costs = np.array([route.blocks for route in routes], np.float64)
    half = len(rows) // 2
    router = fit(features[:half], scores[:half], costs)
    points = _points(router, features[half:], scores[half:], variant, file.stem)
    manifest = write_router(folder, open_bundle(folder).manifest, router, points, facts)
    return manifest, _table(routes, scores, points, router)


def _points(
    router: Router, features: np.ndarray, scores: np.ndarray, variant: str, data: str
) -> tuple[OperatingPoint, ...]:
    full, rows, found = float(router.costs.max()), np.arange(len(scores)), []
    for share in SHARES:
        price = router.price_for(features, share * full)
        way = router.choose(features, price)
        measured = {
            "depth": float(router.costs[way].mean()),
            "nats": -float(scores[rows, way].mean()),
            "nats_full": -float(scores[:, 0].mean()),
        }
        spec = RuleSpec("route", {"price": price})
        found.append(OperatingPoint(f"route-{round(100 * share)}", spec, variant, data, "dev", measured))
    return tuple(found)


def write_router(
    folder: Path,
    manifest: Manifest,
    router: Router,
    points: tuple[OperatingPoint, ...],
    facts: Mapping[str, Any],
) -> Manifest:
    """Put a router and its points into a bundle; the manifest, which makes them count, comes last."""
    data = router.to_bytes()
    kept = tuple(point for point in manifest.points if point.rule.name != "route")
    new = dataclasses.replace(
        manifest,
        points=(*kept, *points),
        files={**manifest.files, FILE: FileFact(hashlib.sha256(data).hexdigest(), len(data))},
        provenance={**manifest.provenance, "routed": dict(facts)},
    )
    Manifest.from_json(new.to_json(), source=str(folder / FILE_NAME))  # what we write, we can read
    for name, content in ((FILE, data), (FILE_NAME, new.to_json().encode("utf-8"))):
        beside = folder.with_name(f".{folder.name}.{name}.new")
        beside.write_bytes(content)
        os.replace(beside, folder / name)
    return new


def _table(
    routes: Sequence[Route], scores: np.ndarray, points: Sequence[OperatingPoint], router: Router
) -> str:
    lines = [f"{'route':14}{'blocks':>7}{'nats a token':>14}"]
    for route, score in zip(routes, scores.mean(0), strict=True):
        lines.append(f"{route.name:14}{route.blocks:7d}{-score:14.4f}")
    lines += ["", f"{'point':14}{'depth':>7}{'nats a token':>14}{'full depth':>12}"]
    for point in points:
        said = point.measured
        lines.append(f"{point.name:14}{said['depth']:7.2f}{said['nats']:14.4f}{said['nats_full']:12.4f}")
    return "\n".join(
        [*lines, "", f"error of the router's forecasts, 1 where it knows nothing: {router.error:.3f}"]
    )
