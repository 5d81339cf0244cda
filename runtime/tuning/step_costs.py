"""Calibration of bundles that choose between variants: what every step takes here, and points in that unit.

No table of exits can say what a walk does that changes its precision on the way, so every price is walked, a
row at a time, as it will be used.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.manifest import Manifest, OperatingPoint, RuleSpec, StepCosts
from offramp.runtime.classifier import Session
from offramp.runtime.errors import BadSetting
from offramp.runtime.rules import bind
from offramp.runtime.rules.priced import WalkPoint, choose
from offramp.runtime.tuning.labelled import Labelled
from offramp.runtime.walker import Inputs, Trace, walk

SAMPLE, WARM = 40, 4  # rows that are timed, rows before them
PRICES = np.geomspace(0.01, 3.0, 10)  # errors for a full walk in the default variant


def foresees(manifest: Manifest) -> bool:
    """Whether the bundle's segments forecast errors, so that rule quee can decide."""
    outputs = next(iter(manifest.segments[0].variants.values())).outputs
    return any(tensor.name == "forecast" for tensor in outputs)


def step_costs(session: Session, rows: Labelled) -> StepCosts:
    """Milliseconds of every segment in every variant, the rule's decision behind it included: the median over
    rows of about median length, batch 1.
    """
    manifest, engine = session.manifest, session.engine
    count, variants = len(manifest.segments), manifest.variants
    given = [_inputs(session, item) for item in rows.items]
    lengths = np.array([inputs["input_ids"].shape[1] for inputs in given])
    middle = int(np.median(lengths))
    order = np.argsort(np.abs(lengths - middle), kind="stable")[:SAMPLE]
    even = StepCosts(middle, dict.fromkeys(variants, (1.0,) * count))
    rule = bind(RuleSpec("quee", {"price": 1.0, "measured": 1.0}), count, {"ms": even})
    for variant in range(len(variants)):
        engine.prepare(variant, range(count))
    spent = np.zeros((WARM + len(order), len(variants), count))
    for turn, row in enumerate([*order[:1].repeat(WARM), *order]):
        for variant in range(len(variants)):
            plan, memory = np.full((1, count), variant, np.int8), np.zeros((1, rule.width), np.float32)
            state = engine.begin(given[row])
            for segment in range(count):
                begun = time.perf_counter()
                signals = engine.step(segment, variant, state)
                if segment + 1 < count:
                    rule(signals, memory, plan, segment)
                spent[turn, variant, segment] = time.perf_counter() - begun
            engine.drop(state)
    typical = 1e3 * np.median(spent[WARM:], axis=0)  # [variants, segments]
    return StepCosts(middle, {v: tuple(t.round(5).tolist()) for v, t in zip(variants, typical, strict=True)})


def priced_points(session: Session, rows: Labelled, costs: StepCosts) -> tuple[OperatingPoint, ...]:
    """Operating points of rule quee that charge these milliseconds, each measured by walking all rows at it.

    A point starts in the variant that it names. "within" and savings are against walks to the end in the
    default variant; "ms" is what a row took in this very walk, on whatever else the machine was doing.
    """
    given = [_inputs(session, item) for item in rows.items]
    names = session.manifest.variants
    never = RuleSpec("never", {})
    _walk(session, given[:SAMPLE], never, 0, costs)  # opens and warms what all others need
    ends = [_walk(session, given, never, start, costs) for start in range(len(names))]
    walks = [(never, start, trace) for start, trace in enumerate(ends)]
    for price in PRICES:
        spec = RuleSpec("quee", {"price": float(price), "measured": 1.0})
        walks += [(spec, start, _walk(session, given, spec, start, costs)) for start in range(len(names))]
    points = [_measured(session, spec, start, trace, rows, costs) for spec, start, trace in walks]
    figures = {
        id(point): _figures(session, given, walk[2]) for point, walk in zip(points, walks, strict=True)
    }
    return tuple(
        OperatingPoint(name, point.rule, point.variant, rows.name, "dev", _told(point, figures[id(point)]))
        for name, point in choose(points, points[0], "ms").items()
    )


def check_foresees(manifest: Manifest) -> None:
    """Raise BadSetting for a bundle without error forecasts."""
    if not foresees(manifest):
        raise BadSetting(
            "rule quee: this bundle has no error forecasts; train it with ee-train --recipe quee"
        )


def _inputs(session: Session, item: str | tuple[str, str]) -> Inputs:
    return session.encode(item) if isinstance(item, str) else session.encode(*item)


def _walk(session: Session, given: Sequence[Inputs], spec: RuleSpec, start: int, costs: StepCosts) -> Trace:
    """Walk the rows one by one from a starting variant."""
    manifest = session.manifest
    count = len(manifest.segments)
    return walk(
        session.engine,
        bind(spec, count, {"ms": costs}),
        ((np.array([row]), inputs) for row, inputs in enumerate(given)),
        rows=len(given),
        segments=count,
        classes=len(manifest.labels),
        variant=start,
        limit=1,
    )


def _ends(trace: Trace) -> NDArray[np.int64]:
    """The exit (0-based) at which each row left."""
    ran = trace.variants >= 0
    exits: NDArray[np.int64] = ran.shape[1] - 1 - ran[:, ::-1].argmax(axis=1)
    return exits


def _measured(
    session: Session, spec: RuleSpec, start: int, trace: Trace, rows: Labelled, costs: StepCosts
) -> WalkPoint:
    """The walk's figures; its cost are the steps' milliseconds, which were timed in turns: the walks' own are
    minutes apart, and points would be chosen by whatever else ran in between.
    """
    at, exits = np.arange(len(rows.items)), _ends(trace)
    right = trace.logits[at, exits].argmax(-1) == rows.labels
    blocks = np.array([segment.blocks[-1] for segment in session.manifest.segments])
    steps, ran = (
        np.array(list(costs.steps.values())),
        trace.variants >= 0,
    )  # [variants, segments], [rows, ...]
    ms = steps[np.maximum(trace.variants, 0), np.arange(len(blocks))]  # [rows, segments]
    return WalkPoint(
        spec,
        session.manifest.variants[start],
        100 * float(right.mean()),
        float(blocks[exits].mean()),
        100 * float((ms * ran).sum(1).mean() / steps[0].sum()),
        100 * float((trace.variants[at, exits] != start).mean()),
    )


def _figures(session: Session, given: Sequence[Inputs], trace: Trace) -> dict[str, float]:
    """Milliseconds a row, and the multiply-accumulates and blocks that were saved, in per cent."""
    manifest, exits = session.manifest, _ends(trace)
    stages = (manifest.stem, *manifest.segments)
    tokens = [inputs["input_ids"].shape[1] for inputs in given]
    each = np.array([[stage.macs.of(n) for stage in stages] for n in tokens]).cumsum(axis=1)
    blocks = np.array([segment.blocks[-1] for segment in manifest.segments])
    spent = each[np.arange(len(given)), exits + 1].sum() / each[:, -1].sum()
    return {
        "layers_saved": 100 * (1 - float(blocks[exits].mean()) / manifest.blocks),
        "macs_saved": 100 * (1 - float(spent)),
        "ms": 1e3 * float(trace.seconds.mean()),
    }


def _told(point: WalkPoint, figures: dict[str, float]) -> dict[str, float]:
    told = {"accuracy": point.accuracy, "mean_exit": point.mean_exit, **figures}
    told |= {"ms_saved": 100 - point.cost, "changed": point.changed}
    return {name: round(value, 3) for name, value in told.items()}
