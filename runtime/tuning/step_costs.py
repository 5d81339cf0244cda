"""Calibration of bundles that choose between variants: the time of every step, and points in milliseconds.

A table of exits at full depth does not contain walks that change their variant, so every price is walked, one
row at a time, as in later use.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.manifest import Manifest, OperatingPoint, RuleSpec, StepCosts
from offramp.runtime.errors import BadSetting
from offramp.runtime.inputs.text import Text
from offramp.runtime.row_session import RowSession
from offramp.runtime.rules import Floats, Plan, Rule, Signals, bind
from offramp.runtime.rules.base import full_plan
from offramp.runtime.rules.quee import walk_limits
from offramp.runtime.rules.walk_points import WalkPoint, choose_walk_points
from offramp.runtime.tuning.labelled import LabelledRows
from offramp.runtime.tuning.right_answers import RightAnswers, right_answers
from offramp.runtime.walker import Inputs, Trace, walk, walk_one

TIMED_ROWS, WARM_UP_ROWS = 40, 4
PRICES = np.geomspace(0.01, 3.0, 10)  # errors that a full walk in the default variant may cost
Tokens = NDArray[np.int64]  # lengths of rows [rows]


def has_forecast(manifest: Manifest) -> bool:
    """Whether the bundle's segments forecast errors, so that rule quee can decide."""
    outputs = manifest.segments[0].first_graph.outputs
    return any(tensor.name == "forecast" for tensor in outputs)


def require_forecast(manifest: Manifest) -> None:
    """Raise BadSetting for a bundle without error forecasts."""
    if not has_forecast(manifest):
        raise BadSetting(
            "rule quee: this bundle has no error forecasts; train it with ee-train --recipe quee"
        )


@dataclass(frozen=True)
class KeepPlan:
    """A rule that computes another rule's decisions and ignores them, so that a timed walk runs every
    segment.
    """

    rule: Rule
    exit_test = None

    @property
    def spec(self) -> RuleSpec:
        """The other rule's specification."""
        return self.rule.spec

    @property
    def width(self) -> int:
        """Numbers that the other rule remembers of a row."""
        return self.rule.width

    def first_plan(self, segments: int, variant: int, hidden: Floats | None = None) -> Plan:
        """Every segment; see Rule.first_plan."""
        return full_plan(segments, variant)

    def __call__(self, signals: Signals, memory: Floats, plan: Plan, segment: int) -> tuple[Plan, Floats]:
        _, memory = self.rule(signals, memory, plan, segment)
        return plan, memory


def measure_step_costs(session: RowSession[Any], items: Sequence[Text], tokens: Tokens) -> StepCosts:
    """Measure milliseconds of every segment in every variant at batch 1, the decision of rule quee included.

    They are medians over rows of about median length. tokens: lengths of the items.
    """
    manifest, engine = session.manifest, session.engine
    count, variants = len(manifest.segments), manifest.variants
    middle = int(np.median(tokens))
    nearest = np.argsort(np.abs(tokens - middle), kind="stable")[:TIMED_ROWS]
    inputs = {int(row): _encode_item(session, items[row]) for row in nearest}
    even = StepCosts(middle, dict.fromkeys(variants, (1.0,) * count))
    rule = KeepPlan(bind(RuleSpec("quee", {"price": 1.0, "measured": 1.0}), count, {"ms": even}))
    for variant in range(len(variants)):
        engine.prepare(variant, range(count))
    seconds = np.zeros((WARM_UP_ROWS + len(nearest), len(variants), count))
    for turn, row in enumerate([*nearest[:1].repeat(WARM_UP_ROWS), *nearest]):
        for variant in range(len(variants)):
            state = engine.begin(inputs[int(row)])
            started = time.perf_counter()
            steps = walk_one(engine, rule, state, [variant] * count)
            seconds[turn, variant] = np.diff([started, *(step.ended for step in steps)])
            engine.drop(state)
    medians = 1e3 * np.median(seconds[WARM_UP_ROWS:], axis=0)  # [variants, segments]
    return StepCosts(
        middle, {name: tuple(ms.round(5).tolist()) for name, ms in zip(variants, medians, strict=True)}
    )


def measure_walk_points(
    session: RowSession[Any],
    rows: LabelledRows,
    tokens: Tokens,
    costs: StepCosts,
    right: RightAnswers | None = None,
) -> tuple[OperatingPoint, ...]:
    """Measure operating points of rule quee with these step costs, each by walking all rows at it.

    A point starts in the variant that it names. "dev-X" and savings are relative to full depth in the
    default variant. "ms" is the time of a row in this walk, other load of the machine included. tokens:
    lengths of the rows. right: None for the labels of the rows.
    """
    right = right or right_answers(session, rows)
    inputs = [_encode_item(session, item) for item in rows.items]
    starts = range(len(session.manifest.variants))
    never = RuleSpec("never", {})
    _walk_rows(session, inputs[:TIMED_ROWS], never, 0, costs)  # opens the segments before they are timed
    limits = walk_limits(session.manifest)
    specs = [never]
    specs += [RuleSpec("quee", {"price": float(price), "measured": 1.0, **limits}) for price in PRICES]
    points, measured = list[WalkPoint](), list[dict[str, float]]()
    for spec in specs:
        for start in starts:
            trace = _walk_rows(session, inputs, spec, start, costs)
            point = _walk_point(session, spec, start, trace, right, costs)
            points.append(point)
            measured.append(_point_figures(session.manifest, point, trace, tokens, right.name))
    chosen = choose_walk_points(points, points[0], "ms")
    numbers = {id(point): number for number, point in enumerate(points)}
    return tuple(
        OperatingPoint(name, point.rule, point.variant, rows.name, "dev", measured[numbers[id(point)]])
        for name, point in chosen.items()
    )


def _encode_item(session: RowSession[Any], item: Text) -> Inputs:
    return session.encode(item) if isinstance(item, str) else session.encode(*item)


def _walk_rows(
    session: RowSession[Any], inputs: Sequence[Inputs], spec: RuleSpec, start: int, costs: StepCosts
) -> Trace:
    """Walk the rows one by one from a starting variant."""
    manifest = session.manifest
    count = len(manifest.segments)
    return walk(
        session.engine,
        bind(spec, count, {"ms": costs}),
        ((np.array([row]), arrays) for row, arrays in enumerate(inputs)),
        rows=len(inputs),
        segments=count,
        classes=len(manifest.labels),
        variant=start,
        limit=1,
    )


def _exits(trace: Trace) -> NDArray[np.int64]:
    """The exit (0-based) at which each row left [rows]."""
    was_run = trace.variants >= 0
    exits: NDArray[np.int64] = was_run.shape[1] - 1 - was_run[:, ::-1].argmax(axis=1)
    return exits


def _walk_point(
    session: RowSession[Any], spec: RuleSpec, start: int, trace: Trace, right: RightAnswers, costs: StepCosts
) -> WalkPoint:
    """The figures of a walk; its cost is the sum of the step costs and not the measured time.

    Steps were timed in turns. Whole walks are minutes apart, so that a comparison of their measured times
    would include changes of the machine's load.
    """
    exits = _exits(trace)
    blocks = np.array([segment.blocks[-1] for segment in session.manifest.segments])
    steps = np.array(list(costs.steps.values()))  # [variants, segments]
    ms = steps[np.maximum(trace.variants, 0), np.arange(len(blocks))]  # [rows, segments]
    return WalkPoint(
        spec,
        session.manifest.variants[start],
        accuracy=right.score(trace, exits),
        mean_exit=float(blocks[exits].mean()),
        cost=100 * float((ms * (trace.variants >= 0)).sum(1).mean() / steps[0].sum()),
        changed=100 * float(((trace.variants >= 0) & (trace.variants != start)).any(axis=1).mean()),
    )


def _point_figures(
    manifest: Manifest, point: WalkPoint, trace: Trace, tokens: Tokens, quality: str
) -> dict[str, float]:
    """The figures of a point in the manifest: milliseconds a row, the others in percent or blocks.

    quality: the name of the quality of the answers.
    """
    exits, graphs = _exits(trace), (manifest.stem, *manifest.segments)
    macs = np.array([[graph.macs.of(int(n)) for graph in graphs] for n in tokens]).cumsum(axis=1)
    full = int(macs[:, -1].sum())
    share = macs[np.arange(len(tokens)), exits + 1].sum() / full if full else 1.0  # none counted, none saved
    figures = {
        quality: point.accuracy,
        "mean_exit": point.mean_exit,
        "layers_saved": 100 * (1 - point.mean_exit / manifest.blocks),
        "macs_saved": 100 * (1 - float(share)),
        "ms": 1e3 * float(trace.seconds.mean()),
        "ms_saved": 100 - point.cost,
        "changed": point.changed,
    }
    return {name: round(value, 3) for name, value in figures.items()}
