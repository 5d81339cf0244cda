"""Operating points of a bundle for texts or images, measured on rows by the engine that walks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from offramp.runtime.bundle.manifest import (
    CLASSIFICATION,
    ImageInput,
    Manifest,
    OperatingPoint,
    RuleSpec,
    StepCosts,
)
from offramp.runtime.bundle.row_samples import CALIBRATED, ROWS_SAMPLE, row_hashes, row_sample
from offramp.runtime.errors import BadSetting, EngineUnavailable
from offramp.runtime.loading import load_row_session
from offramp.runtime.progress import track
from offramp.runtime.row_session import RowSession
from offramp.runtime.rules.quee import WALK_LIMITS, walk_limits
from offramp.runtime.rules.resolve import resolve_rule
from offramp.runtime.rules.sweep import choose_points
from offramp.runtime.tuning.calibration import measure_calibration, score_figures
from offramp.runtime.tuning.exit_tables import (
    Temperatures,
    engine_facts,
    fit_temperatures_of,
    macs_to_exits,
    measure_exit_table,
    own_rule,
    require_signals,
    usual_rule,
    variant_prefix,
)
from offramp.runtime.tuning.guarantees import (
    RiskOptions,
    check_risk,
    check_unseen,
    guaranteed_points,
    warn_of_copies,
)
from offramp.runtime.tuning.labelled import LabelledRows, read_perhaps_labelled
from offramp.runtime.tuning.right_answers import RightAnswers, right_answers
from offramp.runtime.tuning.step_costs import (
    has_forecast,
    measure_step_costs,
    measure_walk_points,
    require_forecast,
)


@dataclass(frozen=True)
class Calibration:
    """The results of a calibration, before they are written into the bundle.

    points: all points of the new manifest. rule: its rule. facts: its provenance under provenance_key. costs,
    files: added to those of the manifest. table: for the user.
    """

    points: tuple[OperatingPoint, ...]
    rule: RuleSpec
    provenance_key: str
    facts: Mapping[str, Any]
    costs: Mapping[str, StepCosts] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    table: str = ""


def measure_points(
    folder: Path,
    file: Path,
    *,
    rule: str | None = None,
    engine: str = "ort",
    device: str | None = None,
    threads: int | None = None,
    coverage: float | None = None,
    agreement: bool = False,
    risk: RiskOptions | None = None,
) -> Calibration:
    """Measure operating points of a bundle that answers texts or images.

    rule: that of the points; None for quee if the bundle has forecasts, else see exit_points. coverage: see
    exit_points; BadSetting with rule quee, and for tasks other than classification. agreement: choose by
    agreement with full depth of the default variant, even if rows have labels; always so for rows without.
    risk: find points that keep a risk, see guaranteed_points, and leave the measured ones as they are.
    """
    options = {"engine": engine, "device": device, "threads": threads, "share": False, "global_pool": True}
    with load_row_session(folder, rule="never", **options) as session:
        manifest = session.manifest
        prices = rule == "quee" or (rule is None and has_forecast(manifest))
        _check_options(manifest, rule, prices, {"--coverage": coverage, "--risk": risk})
        images = isinstance(manifest.input, ImageInput)
        rows, labelled = read_perhaps_labelled(file, session.labels, images=images, kind=manifest.kind)
        hashes = row_hashes(map(Path, map(str, rows.items)) if images else rows.items)
        if risk is not None:
            check_risk(manifest, risk, labelled=labelled and not agreement)
            check_unseen(manifest, file, hashes, allow=risk.allow_seen)
            warn_of_copies(file, len(rows.items), len(set(hashes)))
        right = right_answers(session, rows, agreement=agreement or not labelled)
        if not labelled and not agreement and right.reader.has_labels and risk is None:
            click.echo(f"{file} has no labels: points are chosen by agreement with full depth", err=True)
        facts: dict[str, Any] = {"rows": len(rows.items), **engine_facts(session)}
        facts[ROWS_SAMPLE] = row_sample(hashes)
        if limits := walk_limits(manifest):  # other rules replace the points that have them
            facts[WALK_LIMITS] = limits
        if risk is not None:
            kept = guaranteed_points(session, rows, risk, rule=rule, right=right, coverage=coverage)
            names = {*kept.failed, *(point.name for point in kept.points)}
            others = [point for point in manifest.points if point.name not in names]
            # A default that is a copy of a point which these rows do not confirm goes with it.
            failed = [replace(point, name="") for point in manifest.points if point.name in kept.failed]
            others = [point for point in others if replace(point, name="") not in failed]
            points = (*kept.points, *others)
            table = "\n".join([kept.table, *_score_lines(kept.scores)])
            facts |= {"scores": kept.scores} if kept.scores else {}
            return Calibration(points, _default_rule(points, manifest), "guaranteed", facts, table=table)
        if prices:
            require_forecast(manifest)
            _, tokens = session.at_full_depth(rows.items)
            costs = {"ms": measure_step_costs(session, rows.items, tokens)}
            measured = ExitPoints(measure_walk_points(session, rows, tokens, costs["ms"], right), {})
        else:
            costs, measured = {}, exit_points(session, rows, rule, coverage, right)
            facts |= {"scores": measured.scores} if measured.scores else {}
    names = {point.name for point in measured.points}
    # Other measured points do not change what was shown of a point that keeps a risk.
    safe = (point for point in manifest.points if point.guarantee is not None and point.name not in names)
    points = (*measured.points, *safe)
    table = "\n".join([_point_table(measured.points), *_score_lines(measured.scores)])
    return Calibration(points, _default_rule(points, manifest), CALIBRATED, facts, costs, table=table)


def _default_rule(points: Sequence[OperatingPoint], manifest: Manifest) -> RuleSpec:
    """The rule of the point "default"; that of the bundle without such a point."""
    return next((point.rule for point in points if point.name == "default"), manifest.rule)


@dataclass(frozen=True)
class ExitPoints:
    """Operating points of a rule that only exits, and figures of their scores by variant (score_figures)."""

    points: tuple[OperatingPoint, ...]
    scores: Mapping[str, Mapping[str, float]]


def exit_points(
    session: RowSession[Any],
    rows: LabelledRows,
    rule: str | None = None,
    coverage: float | None = None,
    right: RightAnswers | None = None,
) -> ExitPoints:
    """Choose operating points for every variant of a bundle by sweeping a rule over the outputs of all exits.

    rule: None for the bundle's rule or, if it has none, gate with policies; without policies max_probability,
    or settled for numbers and embeddings. For one label a row, temperatures are fitted for every exit, see
    fit_temperatures_of. A variant that the session's engine cannot walk (int8 on
    TensorRT) keeps the points that the bundle has. coverage: of the label sets of calibrated answers; None to
    measure none. right: None for the labels of the rows.
    """
    manifest = session.manifest
    rule = rule or own_rule(manifest)
    right = right or right_answers(session, rows)
    one_label = manifest.kind == CLASSIFICATION
    fits = one_label and not right.agreement
    full = None  # labels that full depth of the default variant gives
    points: list[OperatingPoint] = []
    scores: dict[str, Mapping[str, float]] = {}
    reference = None
    for variant in track(manifest.variants, "measuring variants", unit="variant"):
        try:
            raw, lengths = measure_exit_table(session, rows, variant, right)
        except (BadSetting, EngineUnavailable) as problem:
            if reference is None:  # the default variant must be measured: the others are compared with it
                raise
            click.echo(f"{variant} is not measured, its points stay as they were: {problem}", err=True)
            points += [point for point in manifest.points if point.variant == variant]
            continue
        swept, temperatures = rule or usual_rule(manifest, raw), Temperatures()
        require_signals(swept, raw)
        if one_label:
            full = raw.logits[:, -1].argmax(-1) if full is None else full
            temperatures = fit_temperatures_of(raw, full, labelled=fits)
        table = raw.at_temperatures(temperatures.give(RuleSpec(swept, {})).temperatures)
        chosen = choose_points(swept, table, macs_to_exits(manifest, lengths), reference=reference)
        reference = chosen["full"].accuracy if reference is None else reference
        if fits:
            exits = table.exits(chosen["default"].rule)
            scores |= {variant: figures} if (figures := score_figures(raw.logits, exits, raw.labels)) else {}
        prefix = variant_prefix(manifest, variant)
        for name, point in chosen.items():
            calibration = None
            if coverage is not None:
                exits = table.exits(point.rule)
                scale = np.array(temperatures.scores) if temperatures.scores else None
                calibration = measure_calibration(raw.logits, exits, raw.labels, coverage, scale)
            points.append(
                OperatingPoint(
                    prefix + name,
                    temperatures.give(point.rule),
                    *(variant, rows.name, "dev"),
                    point.stated_figures(table.measure.name),
                    calibration,
                    exit_rows=point.exit_rows,
                )
            )
    return ExitPoints(tuple(points), scores)


def _check_options(
    manifest: Manifest, rule: str | None, prices: bool, exits_only: Mapping[str, object]
) -> None:
    """Check that the bundle's task has the rule and what is asked for.

    prices: whether rule quee is measured. exits_only: options, by name, for rules that only exit.
    """
    if exits_only["--coverage"] is not None and manifest.kind != CLASSIFICATION:
        raise BadSetting(
            f"--coverage is for bundles that give one label; the task of this one is {manifest.task}"
        )
    if rule is not None and (rule != "quee" or manifest.kind != CLASSIFICATION):
        resolve_rule(manifest, rule=RuleSpec(rule, {}))
    if prices and (flag := next((name for name, value in exits_only.items() if value is not None), None)):
        raise BadSetting(f"{flag} is for rules that only exit: name one with --rule, such as max_probability")


def _score_lines(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Lines that say how well the probabilities of answers hold, by variant, raw and at temperatures."""
    lines = []
    for variant, figures in scores.items():
        line = f"scores, {variant}: calibration error {figures['ece_raw']:.2f} %"
        line += f" -> {figures['ece']:.2f} % at temperatures" if "ece" in figures else ""
        if "set_size" in figures:
            line += f"; sets at 95 % {figures['set_size_raw']:.2f} -> {figures['set_size']:.2f} labels"
        lines.append(line)
    return lines


def _point_table(points: Sequence[OperatingPoint]) -> str:
    quality = next(iter(points[0].measured))  # it is the first figure
    head = f"{'point':18}{'variant':8}{quality + ' %':>12}{'95 % interval':>17}{'mean exit':>11}"
    lines = [f"{head}{'MACs saved %':>14}  rule"]
    for point in points:
        measured = point.measured
        parameters = " ".join(f"{key}={value:.4g}" for key, value in point.rule.parameters.items())
        # Points of a variant that was not measured may state another quality, or nothing at all.
        good, depth, saved = (
            f"{measured[name]:.2f}" if name in measured else "-"
            for name in (quality, "mean_exit", "macs_saved")
        )
        interval = f"{measured['low']:.2f} - {measured['high']:.2f}" if "low" in measured else "-"
        lines.append(
            f"{point.name:18}{point.variant:8}{good:>12}{interval:>17}{depth:>11}{saved:>14}  "
            f"{point.rule.name} {parameters}".rstrip()
        )
    return "\n".join(lines)
