"""ee-calibrate: operating points of a bundle, measured on rows of data by the engine that will walk it.

Thresholds that training chose are for fp32 on torch with every exit. A bundle in int8, or one with only some
of the exits, gets points of its own here, in one of three ways:

    exit rules               every row is walked to the end in every variant; rules are swept over the outputs
    error forecasts (quee)   every price is walked (step_costs.py)
    generated text           every route is scored on completions; a router learns to choose by the prompt
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.checks import read_manifest
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import (
    CLASSIFICATION,
    FILE_NAME,
    GENERATION,
    FileFact,
    ImageInput,
    Manifest,
    OperatingPoint,
    RuleSpec,
    StepCosts,
)
from offramp.runtime.bundle.manifest import Calibration as AnswerCalibration
from offramp.runtime.errors import BadInput, BadSetting, EngineUnavailable, OfframpError
from offramp.runtime.generator import TextGenerator
from offramp.runtime.loading import load_generator, load_row_session
from offramp.runtime.row_session import RowSession
from offramp.runtime.rules import Floats, bind
from offramp.runtime.rules.resolve import resolve_rule
from offramp.runtime.rules.route import ROUTER_FILE, Route, Router, fit_router, list_routes
from offramp.runtime.rules.skip import thinned_plan
from offramp.runtime.rules.sweep import SWEPT, ExitMacs, ExitTable, choose_points, swept_rules
from offramp.runtime.tuning.calibration import measure_calibration
from offramp.runtime.tuning.labelled import LabelledRows, read_pairs, read_perhaps_labelled
from offramp.runtime.tuning.right_answers import RightAnswers, right_answers
from offramp.runtime.tuning.step_costs import (
    has_forecast,
    measure_step_costs,
    measure_walk_points,
    require_forecast,
)
from offramp.runtime.walker import walk_one

ROUTE_SHARES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6)  # mean depths of route points, as shares of all blocks

HELP = """Measure a bundle on the rows of FILE (a dev set, never the test set) and write operating points for
each of its variants into its manifest.

\b
FILE is JSON lines with "text" (and "text_b") and "label": the label's name or its number.
For images "image", a path relative to FILE's folder, or FILE is a folder that holds a folder
of images for each label, with the label's name.
Several labels: "labels", a list of names or numbers. Labels of tokens: "tokens" and "tags" (or
"ner_tags" or "labels"), or "text" and "entities", a list of objects with "start", "end" and
"label". Regression: "label" is a number.
Points state "accuracy", of labels or entities "f1", of numbers "spearman", all in percent.
Without labels (plain lines of text too), and with --agreement, right is what full depth of the
default variant answers, and points state "agreement" instead: of embeddings always, as the mean
cosine.
Points of the default variant are called default, full, within-0.5, saves-57 and so on; those
of another variant carry its name, as in int8-default. "within" is against the full depth of
the default variant, so that int8-within-0.5 loses at most 0.5 in all.
For a bundle of recipe quee, steps are timed, and points of rule quee that charge these
milliseconds are written; a point's variant is the one in which rows start. Nothing else
should run on the machine meanwhile.
With --coverage, each point of an exit rule also gets a temperature for each exit, so that an
answer states a probability that holds, and the limits of sets of labels that contain the
right one with this probability (ee-run --sets). They hold for rows like those of FILE; as
the points are chosen on the same rows, give enough of them, some hundred at least.

\b
Bundles that generate text: FILE is JSON lines with "prompt" and "completion". The effect on
the completions of routes that skip segments is measured, a router learns to choose among the
routes by the prompt, and points route-95 to route-60 (percent of the blocks) are written.

\b
Exit codes: 0 written, 2 the bundle or the file cannot be used.
"""


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


def calibrate_classifier(
    folder: Path,
    file: Path,
    *,
    rule: str | None = None,
    engine: str = "ort",
    device: str | None = None,
    threads: int | None = None,
) -> Manifest:
    """Calibrate the bundle in `folder` on the rows of `file`; writes and returns its new manifest.

    rule: see exit_points. Raises BadInput for the file, and what load() raises.
    """
    calibration = measure_points(folder, file, rule=rule, engine=engine, device=device, threads=threads)
    return write_calibration(folder, open_bundle(folder).manifest, calibration)


def write_calibration(folder: Path, manifest: Manifest, calibration: Calibration) -> Manifest:
    """Write the files and then the manifest of a calibrated bundle; gives the new manifest.

    Each file is either completely written or unchanged. The manifest is last, since files are valid only by
    its entries.
    """
    hashes = {
        name: FileFact(hashlib.sha256(data).hexdigest(), len(data))
        for name, data in calibration.files.items()
    }
    new = dataclasses.replace(
        manifest,
        points=calibration.points,
        rule=calibration.rule,
        files={**manifest.files, **hashes},
        provenance={**manifest.provenance, calibration.provenance_key: dict(calibration.facts)},
        costs={**manifest.costs, **calibration.costs},
    )
    text = new.to_json()
    read_manifest(text, source=str(folder / FILE_NAME))  # the new manifest must be readable
    for name, data in {**calibration.files, FILE_NAME: text.encode("utf-8")}.items():
        beside = folder.with_name(f".{folder.name}.{name}.new")
        beside.write_bytes(data)
        os.replace(beside, folder / name)
    return new


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
) -> Calibration:
    """Measure operating points of a bundle that answers texts or images.

    rule: that of the points; None for quee if the bundle has forecasts, else see exit_points. coverage: see
    exit_points; BadSetting with rule quee, and for tasks other than classification. agreement: choose by
    agreement with full depth of the default variant, even if rows have labels; always so for rows without.
    """
    options = {"engine": engine, "device": device, "threads": threads, "share": False}
    with load_row_session(folder, rule="never", **options) as session:
        manifest = session.manifest
        _check_options(manifest, rule, coverage)
        images = isinstance(manifest.input, ImageInput)
        rows, labelled = read_perhaps_labelled(file, session.labels, images=images, kind=manifest.kind)
        right = right_answers(session, rows, agreement=agreement or not labelled)
        if not labelled and not agreement and right.reader.has_labels:
            click.echo(f"{file} has no labels: points are chosen by agreement with full depth", err=True)
        costs: dict[str, StepCosts] = {}
        if rule == "quee" or (rule is None and has_forecast(manifest)):
            require_forecast(manifest)
            if coverage is not None:
                raise BadSetting(
                    "--coverage is for rules that only exit: name one with --rule, such as max_probability"
                )
            _, tokens = session.at_full_depth(rows.items)
            costs["ms"] = measure_step_costs(session, rows.items, tokens)
            points = measure_walk_points(session, rows, tokens, costs["ms"], right)
        else:
            points = exit_points(session, rows, rule, coverage, right)
        facts = {"rows": len(rows.items), **_engine_facts(session)}
    default = next(point for point in points if point.name == "default")
    return Calibration(points, default.rule, "calibrated", facts, costs, table=_point_table(points))


def exit_points(
    session: RowSession[Any],
    rows: LabelledRows,
    rule: str | None = None,
    coverage: float | None = None,
    right: RightAnswers | None = None,
) -> tuple[OperatingPoint, ...]:
    """Choose operating points for every variant of a bundle by sweeping a rule over the outputs of all exits.

    rule: None for the bundle's rule or, if it has none, gate with policies; without policies max_probability,
    or settled for numbers and embeddings. A variant that the session's engine cannot walk (int8 on TensorRT)
    keeps the points that the bundle has. coverage: of the label sets of calibrated answers; None to measure
    no calibration. right: None for the labels of the rows.
    """
    manifest = session.manifest
    rule = rule or _sweepable_rule(manifest)
    right = right or right_answers(session, rows)
    points: list[OperatingPoint] = []
    reference = None
    for variant in manifest.variants:
        try:
            table, lengths = measure_exit_table(session, rows, variant, right)
        except (BadSetting, EngineUnavailable) as problem:
            if reference is None:  # the default variant must be measured: the others are compared with it
                raise
            click.echo(f"{variant} is not measured, its points stay as they were: {problem}", err=True)
            points += [point for point in manifest.points if point.variant == variant]
            continue
        swept = rule or usual_rule(manifest, table)
        chosen = choose_points(swept, table, macs_to_exits(manifest, lengths), reference=reference)
        reference = chosen["full"].accuracy if reference is None else reference
        prefix = "" if variant == manifest.variants[0] else f"{variant}-"
        for name, point in chosen.items():
            calibration = None if coverage is None else _point_calibration(point.rule, table, coverage)
            figures = point.figures(table.measure.name)
            place = (variant, rows.name, "dev")
            points.append(OperatingPoint(prefix + name, point.rule, *place, figures, calibration))
    return tuple(points)


def measure_exit_table(
    session: RowSession[Any], rows: LabelledRows, variant: str, right: RightAnswers | None = None
) -> tuple[ExitTable, NDArray[np.int64]]:
    """Walk rows at full depth in one variant; gives outputs of every exit, and lengths [rows] in tokens.

    right: None for the labels of the rows.
    """
    right = right or right_answers(session, rows)
    trace, lengths = session.at_full_depth(rows.items, variant)
    gated = np.isfinite(trace.gates[:, :-1]).all() and trace.gates.shape[1] > 1
    gates = np.nan_to_num(trace.gates, nan=1.0) if gated else None
    kind = session.manifest.kind
    labels = right.wanted if kind == CLASSIFICATION else np.full(len(lengths), -1)
    answers = None
    if "settled" in swept_rules(kind) and trace.answers is not None:
        answers = np.array(trace.answers.tolist(), np.float32)  # [rows, exits, numbers]
    return ExitTable(trace.logits, gates, labels, answers, right.quality(trace)), lengths


def macs_to_exits(manifest: Manifest, lengths: Sequence[int] | NDArray[np.int64]) -> ExitMacs:
    """The multiply-accumulates up to every exit by the manifest, for rows of these lengths [rows] in tokens.

    Exits and policies are included in the segments, so `full` is that of the full walk.
    """
    tokens = [int(length) for length in lengths]
    macs = np.array([[segment.macs.of(n) for segment in manifest.segments] for n in tokens])
    to_exit = np.array([manifest.stem.macs.of(n) for n in tokens])[:, None] + macs.cumsum(1)
    blocks = np.array([segment.blocks[-1] for segment in manifest.segments])
    return ExitMacs(to_exit, to_exit[:, -1], blocks)


def measure_routes(folder: Path, file: Path, threads: int | None = None) -> Calibration:
    """Fit the router of a bundle that generates text, and measure its route points.

    Each completion is run by every route, after its prompt at full depth. The router is fitted on half of the
    rows; on the other half prices are chosen and points are measured, both by log-likelihood.
    """
    with load_generator(folder, rule="never", threads=threads, share=False) as session:
        manifest, routes = session.manifest, list_routes(session.manifest)
        rows = read_pairs(file, session.longest, session.encode_prompt, session.encode_continuation)
        if len(routes) == 1:
            raise BadInput(f"{folder}: no route skips any of the {len(manifest.segments)} segments")
        scored = [route_scores(session, routes, *row) for row in rows]
        facts = {"rows": len(rows), **_engine_facts(session)}
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


def _check_options(manifest: Manifest, rule: str | None, coverage: float | None) -> None:
    """Check that the bundle's task has the rule and the calibration that are asked for."""
    if coverage is not None and manifest.kind != CLASSIFICATION:
        raise BadSetting(
            f"--coverage is for bundles that give one label; the task of this one is {manifest.task}"
        )
    if rule is not None and (rule != "quee" or manifest.kind != CLASSIFICATION):
        resolve_rule(manifest, rule=RuleSpec(rule, {}))


def _sweepable_rule(manifest: Manifest) -> str | None:
    """The name of the rule that the bundle was exported for, or None if it has none that can be swept."""
    names = (manifest.rule.name, *(point.rule.name for point in manifest.points))
    return next((name for name in names if name in SWEPT), None)


def usual_rule(manifest: Manifest, table: ExitTable) -> str:
    """The rule that is swept for a bundle without one: gate with policies, else the first of its task."""
    if table.gates is not None:
        return "gate"
    return next(name for name in swept_rules(manifest.kind) if name != "gate")


def _point_calibration(rule: RuleSpec, table: ExitTable, coverage: float) -> AnswerCalibration:
    return measure_calibration(table.logits, table.exits(rule), table.labels, coverage)


def _engine_facts(session: RowSession[Any] | TextGenerator) -> dict[str, str]:
    return {"engine": session.engine.name, "device": session.engine.device, **session.engine.facts}


def _point_table(points: Sequence[OperatingPoint]) -> str:
    quality = next(iter(points[0].measured))  # it is the first figure
    lines = [f"{'point':18}{'variant':8}{quality + ' %':>12}{'mean exit':>11}{'MACs saved %':>14}  rule"]
    for point in points:
        measured = point.measured
        parameters = " ".join(f"{key}={value:.4g}" for key, value in point.rule.parameters.items())
        # Points of a variant that was not measured may state another quality.
        good = f"{measured[quality]:.2f}" if quality in measured else "-"
        lines.append(
            f"{point.name:18}{point.variant:8}{good:>12}{measured['mean_exit']:11.2f}"
            f"{measured['macs_saved']:14.2f}  {point.rule.name} {parameters}".rstrip()
        )
    return "\n".join(lines)


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


@click.command(help=HELP, context_settings={"show_default": True})
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@click.option("--bundle", default="bundle/", metavar="DIR", help="The bundle to measure.")
@click.option(
    "--rule",
    type=click.Choice([*SWEPT, "quee"]),
    help="Rule to sweep [default: quee where there are error forecasts, else the bundle's own; gate where "
    "there are policies].",
)
@click.option("--engine", default="ort", help="Engine to measure with.")
@click.option("--device", help="Device to measure on [default: cpu for ort, cuda for trt].")
@click.option("--threads", type=click.IntRange(min=1), help="Threads [default: one per core].")
@click.option(
    "--coverage",
    type=click.FloatRange(0.0, 1.0, min_open=True, max_open=True),
    help="Probability, such as 0.95, that a set of labels contains the right one: calibrates the answers of "
    "every point [default: no calibration].",
)
@click.option(
    "--agreement", is_flag=True, help="Choose points by agreement with full depth, though rows have labels."
)
def main(
    file: Path,
    bundle: str,
    rule: str | None,
    engine: str,
    device: str | None,
    threads: int | None,
    coverage: float | None,
    agreement: bool,
) -> None:
    """Run ee-calibrate: measure a bundle and write its new manifest."""
    folder = Path(bundle)
    try:
        manifest = open_bundle(folder).manifest
        if manifest.task == GENERATION:
            options: dict[str, object] = {"--rule": rule, "--device": device, "--coverage": coverage}
            options["--agreement"] = agreement
            options["--engine"] = None if engine == "ort" else engine
            if flag := next((name for name, value in options.items() if value), None):
                raise BadSetting(f"{flag} is not for generated text, the task of {bundle}")
            calibration = measure_routes(folder, file, threads)
        else:
            calibration = measure_points(
                *(folder, file),
                rule=rule,
                engine=engine,
                device=device,
                threads=threads,
                coverage=coverage,
                agreement=agreement,
            )
        write_calibration(folder, manifest, calibration)
    except OfframpError as problem:
        click.echo(f"ee-calibrate: {problem}", err=True)
        sys.exit(2)
    click.echo(calibration.table)


if __name__ == "__main__":
    main(prog_name="ee-calibrate")
