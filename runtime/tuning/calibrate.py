"""ee-calibrate: operating points of a bundle, measured on labelled rows by the engine that will walk it.

Thresholds chosen in training belong to fp32 on torch with every exit. A bundle in int8, or one that keeps
only some exits, gets points of its own here: every row is walked to the end in every variant, rules are swept
over what the exits said, and the manifest is written again. A bundle that forecasts errors walks at every
price instead (offramp.runtime.tuning.step_costs).
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import (
    FILE_NAME,
    GENERATION,
    ImageInput,
    Manifest,
    OperatingPoint,
    StepCosts,
)
from offramp.runtime.classifier import Session
from offramp.runtime.errors import BadSetting, EngineUnavailable, OfframpError
from offramp.runtime.loading import load
from offramp.runtime.rules.sweep import SWEPT, Costs, ExitTable, Point, choose_points
from offramp.runtime.tuning.calibrate_generation import calibrated_text
from offramp.runtime.tuning.labelled import Labelled, read_labelled
from offramp.runtime.tuning.step_costs import check_foresees, foresees, priced_points, step_costs

HELP = """Measure a bundle on the labelled rows of FILE (a dev set, never the test set) and write operating
points for each of its variants into its manifest.

\b
FILE is JSON lines with "text" (and "text_b") and "label": the label's name or its number.
For images "image", a path seen from FILE's folder, or FILE is a folder of folders of images,
one for each label and called so.
Points of the default variant are called default, full, within-0.5, saves-57 and so on; those
of another variant carry its name, as in int8-default. "within" is held against the full
depth of the default variant, so that int8-within-0.5 loses at most 0.5 in all.
A bundle of recipe quee has its steps timed, and points of rule quee that charge these
milliseconds; a point's variant is the one in which rows start. Let nothing else run.


\b
Bundles that generate text: FILE is JSON lines with "prompt" and "completion". What routes past
segments do to the completions is measured, a router learns to choose among them by the
prompt, and points route-95 to route-60 (percent of the blocks) are written.

\b
Exit codes: 0 written, 2 the bundle or the file cannot be used.
"""


def exit_table(session: Session, rows: Labelled, variant: str) -> tuple[ExitTable, NDArray[np.int64]]:
    """What every exit says of the rows in one variant, walked at full depth, and their lengths in tokens
    [rows].
    """
    trace, lengths = session.at_full_depth(rows.items, variant)
    gated = np.isfinite(trace.gates[:, :-1]).all() and trace.gates.shape[1] > 1
    gates = np.nan_to_num(trace.gates, nan=1.0) if gated else None
    return ExitTable(trace.logits, gates, rows.labels), lengths


def costs_of(manifest: Manifest, lengths: Sequence[int] | NDArray[np.int64]) -> Costs:
    """Multiply-accumulates to every exit for rows of these lengths [rows] in tokens, as the manifest says.

    What exits and policies cost is inside the segments' figures, so `full` is the full walk's.
    """
    tokens = [int(length) for length in lengths]
    each = np.array([[stage.macs.of(n) for stage in manifest.segments] for n in tokens])
    to_exit = np.array([manifest.stem.macs.of(n) for n in tokens])[:, None] + each.cumsum(1)
    blocks = np.array([segment.blocks[-1] for segment in manifest.segments])
    return Costs(to_exit, to_exit[:, -1], blocks)


def calibrate(session: Session, rows: Labelled, rule: str | None = None) -> tuple[OperatingPoint, ...]:
    """Operating points of every variant of the session's bundle; rule None: the bundle's own, or where it has
    none, gate with policies and max_probability without.

    Of variants that the session's engine does not walk (int8 on TensorRT) the bundle's own points are kept.
    """
    manifest = session.manifest
    rule = rule or _own_rule(manifest)
    found: list[OperatingPoint] = []
    reference = None
    for variant in manifest.variants:
        try:
            table, lengths = exit_table(session, rows, variant)
        except (BadSetting, EngineUnavailable) as problem:
            if reference is None:  # the default has to be measured: the others are compared with it
                raise
            click.echo(f"{variant} is not measured, its points stay as they were: {problem}", err=True)
            found += [point for point in manifest.points if point.variant == variant]
            continue
        chosen = rule or ("max_probability" if table.gates is None else "gate")
        points = choose_points(chosen, table, costs_of(manifest, lengths), reference=reference)
        reference = points["full"].accuracy if reference is None else reference
        prefix = "" if variant == manifest.variants[0] else f"{variant}-"
        found += [_named(prefix + name, point, variant, rows) for name, point in points.items()]
    return tuple(found)


def calibrated(
    folder: Path,
    file: Path,
    *,
    rule: str | None = None,
    engine: str = "ort",
    device: str | None = None,
    threads: int | None = None,
) -> Manifest:
    """Measure the bundle in `folder` on the rows of `file` and write its manifest anew; gives the new one.

    Raises BadInput for the file, and what load() raises.
    """
    with load(folder, rule="never", engine=engine, device=device, threads=threads, share=False) as session:
        images = isinstance(session.manifest.input, ImageInput)
        rows = read_labelled(file, session.labels, images=images)
        costs: dict[str, StepCosts] = {}
        if rule == "quee" or (rule is None and foresees(session.manifest)):
            check_foresees(session.manifest)
            costs["ms"] = step_costs(session, rows)
            points = priced_points(session, rows, costs["ms"])
        else:
            points = calibrate(session, rows, rule)
        facts = {"rows": len(rows.items), "engine": session.engine.name, "device": session.engine.device}
        return rewrite(folder, session.manifest, points, {**facts, **session.engine.facts}, costs)


def rewrite(
    folder: Path,
    manifest: Manifest,
    points: tuple[OperatingPoint, ...],
    facts: Mapping[str, Any],
    costs: Mapping[str, StepCosts],
) -> Manifest:
    """Write the manifest with these points and the rule of "default" in place of the bundle's, and these
    costs beside its other ones; whole or not at all.
    """
    default = next(point for point in points if point.name == "default")
    provenance = {**manifest.provenance, "calibrated": dict(facts)}
    told = {**manifest.costs, **costs}
    new = dataclasses.replace(manifest, points=points, rule=default.rule, provenance=provenance, costs=told)
    Manifest.from_json(new.to_json(), source=str(folder / FILE_NAME))  # what we write, we can read
    beside = folder.with_name(f".{folder.name}.{FILE_NAME}.new")
    beside.write_text(new.to_json(), encoding="utf-8")
    os.replace(beside, folder / FILE_NAME)
    return new


def _own_rule(manifest: Manifest) -> str | None:
    """The rule for which the bundle was made, None where it names none that can be swept."""
    names = (manifest.rule.name, *(point.rule.name for point in manifest.points))
    return next((name for name in names if name in SWEPT), None)


def _named(name: str, point: Point, variant: str, rows: Labelled) -> OperatingPoint:
    return OperatingPoint(name, point.rule, variant, rows.name, "dev", point.figures())


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
@click.option("--threads", type=click.IntRange(min=1), help="Threads [default: one a core].")
def main(
    file: Path, bundle: str, rule: str | None, engine: str, device: str | None, threads: int | None
) -> None:
    try:
        if open_bundle(bundle).manifest.task == GENERATION:
            others = {"--rule": rule, "--device": device, "--engine": None if engine == "ort" else engine}
            if flag := next((name for name, wish in others.items() if wish), None):
                raise BadSetting(f"{flag} is for bundles that classify; {bundle} generates text")
            click.echo(calibrated_text(Path(bundle), file, threads)[1])
            return
        manifest = calibrated(Path(bundle), file, rule=rule, engine=engine, device=device, threads=threads)
    except OfframpError as problem:
        click.echo(f"ee-calibrate: {problem}", err=True)
        sys.exit(2)
    click.echo(f"{'point':18}{'variant':8}{'accuracy %':>11}{'mean exit':>11}{'MACs saved %':>14}  rule")
    for point in manifest.points:
        said = point.measured
        numbers = " ".join(f"{key}={value:.4g}" for key, value in point.rule.parameters.items())
        click.echo(
            f"{point.name:18}{point.variant:8}{said['accuracy']:11.2f}{said['mean_exit']:11.2f}"
            f"{said['macs_saved']:14.2f}  {point.rule.name} {numbers}".rstrip()
        )


if __name__ == "__main__":
    main(prog_name="ee-calibrate")
