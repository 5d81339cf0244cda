"""ee-calibrate: operating points of a bundle, measured on rows of data by the engine that will walk it.

Thresholds that training chose are for fp32 on torch with every exit. A bundle in int8, or one with only some
of the exits, gets points of its own here, in one of three ways:

    exit rules               every row is walked to the end in every variant; rules are swept over the outputs
    error forecasts (quee)   every price is walked (step_costs.py)
    generated text           lists of segments to skip are searched; a router learns to choose by the prompt
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import sys
from pathlib import Path

import click

from offramp.runtime.bundle.checks import read_manifest
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import (
    FILE_NAME,
    GENERATION,
    FileFact,
    ImageInput,
    Manifest,
    OperatingPoint,
)
from offramp.runtime.errors import BadBundle, BadSetting, OfframpError
from offramp.runtime.hub.resolve import require_folder
from offramp.runtime.progress import announce
from offramp.runtime.rules.sweep import SWEPT
from offramp.runtime.summary import TYPED, CommandOutput, Summary, output_options
from offramp.runtime.tuning.guarantees import ALL, CLASS, DISAGREEMENT, EXIT, RISKS, RiskOptions
from offramp.runtime.tuning.measure_points import Calibration, measure_points
from offramp.runtime.tuning.measure_routes import SEARCH_ROWS, measure_routes
from offramp.runtime.tuning.search_skips import WIDEST_BEAM

NOT_WRITTEN, INTERRUPTED = 2, 130
CONFIDENCE = 0.95  # of a guarantee, if the caller names none
SHOWN = ("full", "default")  # points whose figures the summary has, if the bundle has them

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
Points of the default variant are called default, full, dev-0.5, saves-57 and so on; those
of another variant carry its name, as in int8-default. dev-0.5 loses at most 0.5 on the rows of
FILE, against the full depth of the default variant, so that int8-dev-0.5 does in all. As the
best of many settings on these rows it may lose more on others: "low" and "high" are the
interval at 95 % of its quality, and --risk finds points that promise something.
For a bundle of recipe quee, steps are timed, and points of rule quee that charge these
milliseconds are written; a point's variant is the one in which rows start. Nothing else
should run on the machine meanwhile.
For one label a row, temperatures are fitted for each exit: one at which rules that read
probabilities (max_probability, entropy, margin, patience_confident) see how probably full depth
gives the same answer, so that one threshold is equally safe at every exit; and with labels one at
which scores of answers say how often they are right. With --coverage, each point of an exit rule
also gets the limits of sets of labels that contain the right one with this probability (ee-run
--sets). All hold for rows like those of FILE; as the points are chosen on the same rows, give
enough of them, some hundred at least.

\b
With --risk FILE must be rows that neither trained the network nor chose anything of it, drawn
as those that it will meet; rows of ee-train and of the points are recognised and refused, unless
--allow-seen says that new rows repeat old ones by nature. Of settings that
are fixed before the rows are read, from the safest on, the cheapest is taken whose risk is at
most --risk with probability --confidence (Learn-then-Test); too few rows are refused with the
number that is needed. Points risk-0.01 (int8-risk-0.01 ...) state it as "guarantee"; measured
points stay. The point default of each variant becomes that of the first --risk.
  disagreement  share of rows whose answer is not that of full depth of the default variant, or
                of words whose label is not; of embeddings 1 minus the cosine. Needs no labels
  accuracy      accuracy lost against this full depth; one label a row
  quality       share of wrong answers (one label a row), or 1 minus the cosine of embeddings
With --per class or exit the risk is kept within each of these groups; one with less than a
tenth of the rows counts as if it had a tenth.

\b
Bundles that generate text: FILE is JSON lines with "prompt" and "completion". Lists of segments
that all tokens skip are searched on --rows rows: the segment is added whose removal costs the
completions least, until 60 % of the blocks are left. Each candidate is a run over these rows; of
30 segments there are 270. Points such as skip-90 (percent of the blocks) are written. Then
the effect of routes that skip segments is measured, a router learns to choose among the routes
by the prompt, and points route-95 to route-60 are written.

\b
Exit codes: 0 written, 2 the bundle or the file cannot be used, 130 interrupted (Ctrl-C).
"""


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
    manifest = open_bundle(folder).manifest
    calibration = measure_points(folder, file, rule=rule, engine=engine, device=device, threads=threads)
    return write_calibration(folder, manifest, calibration)


def write_calibration(folder: Path, manifest: Manifest, calibration: Calibration) -> Manifest:
    """Write the files and then the manifest of a calibrated bundle; gives the new manifest.

    Each file is either completely written or unchanged. The manifest is last, since files are valid only by
    its entries. New files wait beside the bundle, so that a killed process leaves nothing in it; in it if
    that place is on another disk or cannot be written, as beside a mounted folder. manifest: the one that was
    measured; raises BadBundle if the bundle has another one by now, whose points would be lost.
    """
    if open_bundle(folder).manifest != manifest:
        raise BadBundle(
            f"{folder / FILE_NAME}: it changed while it was measured, perhaps by another ee-calibrate; "
            "nothing was written, measure again"
        )
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
    contents = {**calibration.files, FILE_NAME: text.encode("utf-8")}
    real = folder.resolve()  # "." has no name, and a link may lead to another disk
    is_beside = real.stat().st_dev == real.parent.stat().st_dev and os.access(real.parent, os.W_OK)
    place, prefix = (real.parent, f".{real.name}") if is_beside else (real, "")
    waiting = {name: place / f"{prefix}.{name}.new" for name in contents}
    try:
        for name, data in contents.items():
            waiting[name].write_bytes(data)
        for name, path in waiting.items():  # after all are written, as a full disk must change nothing
            os.replace(path, folder / name)
    finally:
        for path in waiting.values():
            path.unlink(missing_ok=True)
    return new


def require_writable(folder: Path) -> None:
    """Raise PermissionError if a bundle cannot be written: before a measurement, which takes minutes."""
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "the folder cannot be written", str(folder))


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
    "--risk",
    "risks",
    type=click.FloatRange(0.0, 1.0, min_open=True, max_open=True),
    multiple=True,
    help="Instead of measuring points, find those that keep this risk, such as 0.01; may be given several "
    "times, the first is that of point default.",
)
@click.option(
    "--confidence",
    type=click.FloatRange(0.0, 1.0, min_open=True, max_open=True),
    default=CONFIDENCE,
    help="Of --risk: the probability, over the draw of the rows, with which it is kept.",
)
@click.option(
    "--risk-of", type=click.Choice(tuple(RISKS)), default=DISAGREEMENT, help="Which risk; see above."
)
@click.option(
    "--per",
    type=click.Choice([ALL, CLASS, EXIT]),
    default=ALL,
    help="Keep the risk over all rows, or also among the rows of each answered class, or of each exit.",
)
@click.option(
    "--allow-seen",
    is_flag=True,
    help="Of --risk: take rows that training or calibration had, too. Give it only if new rows repeat old "
    "ones by nature, as short commands do.",
)
@click.option(
    "--agreement", is_flag=True, help="Choose points by agreement with full depth, though rows have labels."
)
@click.option(
    "--rows",
    type=click.IntRange(min=0),
    help="For generated text: rows, at most half of FILE, on which lists of segments to skip are searched; "
    f"0 searches none.  [default: {SEARCH_ROWS}]",
)
@click.option(
    "--beam",
    type=click.IntRange(1, WIDEST_BEAM),
    help="For generated text: lists of each length that the search keeps; it takes so many times as long.  "
    "[default: 1]",
)
@output_options
def main(
    file: Path,
    bundle: str,
    rule: str | None,
    engine: str,
    device: str | None,
    threads: int | None,
    coverage: float | None,
    risks: tuple[float, ...],
    confidence: float,
    risk_of: str,
    per: str,
    allow_seen: bool,
    agreement: bool,
    rows: int | None,
    beam: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run ee-calibrate: measure a bundle and write its new manifest."""
    folder, output = Path(bundle), CommandOutput(quiet, as_json)
    try:
        folder = require_folder(bundle, "ee-calibrate")
        of_risk = (confidence, risk_of, per, allow_seen)
        if not risks and of_risk != (CONFIDENCE, DISAGREEMENT, ALL, False):
            raise BadSetting(
                "--confidence, --risk-of, --per and --allow-seen say more of a risk: give it with --risk "
                "(0.01, say)"
            )
        manifest = open_bundle(folder).manifest
        require_writable(folder)
        if manifest.task == GENERATION:
            options: dict[str, object] = {"--rule": rule, "--device": device, "--coverage": coverage}
            options |= {"--agreement": agreement, "--risk": risks}
            options["--engine"] = None if engine == "ort" else engine
            if flag := next((name for name, value in options.items() if value), None):
                raise BadSetting(f"{flag} is not for generated text, the task of {bundle}")
            with output.progress(), announce("measuring routes"):
                search_rows = SEARCH_ROWS if rows is None else rows
                calibration = measure_routes(folder, file, threads, search_rows=search_rows, beam=beam or 1)
        else:
            if rows is not None or beam is not None:
                name = "--beam" if rows is None else "--rows"
                raise BadSetting(f"{name} is for bundles that generate text; the task of {bundle} is another")
            with output.progress(), announce("measuring operating points"):
                calibration = measure_points(
                    *(folder, file),
                    rule=rule,
                    engine=engine,
                    device=device,
                    threads=threads,
                    coverage=coverage,
                    agreement=agreement,
                    risk=RiskOptions(risks, confidence, risk_of, per, allow_seen) if risks else None,
                )
        manifest = write_calibration(folder, manifest, calibration)
    except (KeyboardInterrupt, click.Abort):
        click.echo("ee-calibrate: interrupted; nothing was calibrated", err=True)
        sys.exit(INTERRUPTED)
    except OfframpError as problem:
        click.echo(f"ee-calibrate: {problem}", err=True)
        sys.exit(NOT_WRITTEN)
    except OSError as problem:
        place = problem.filename or folder
        click.echo(f"ee-calibrate: {place}: {problem.strerror or problem}; nothing was calibrated", err=True)
        sys.exit(NOT_WRITTEN)
    output.table(calibration.table)
    output.finish(calibration_summary(bundle, file, manifest, calibration))


def calibration_summary(bundle: str, file: Path, manifest: Manifest, calibration: Calibration) -> Summary:
    """What ee-calibrate writes at its end; manifest: the new one."""
    count, written = calibration.facts["rows"], json.loads(manifest.to_json())
    shown = [point for point in manifest.points if point.name in SHOWN] or list(manifest.points[:2])
    rows = [
        ("bundle", bundle),
        ("measured on", f"{_measured_rows(calibration)} rows of {file}"),
        *((f"point {point.name}", _figures_text(point)) for point in shown),
        ("all points", ", ".join(point.name for point in manifest.points)),
    ]
    facts = {
        "bundle": bundle,
        "file": str(file),
        "rows": count,
        "rule": written["rule"],
        "points": written["points"],
    }
    if isinstance(manifest.input, ImageInput):
        return Summary("Bundle calibrated", rows, facts, ("ee-inspect", bundle))
    command, title = ("ee-run", "--bundle", bundle, "--stats"), TYPED
    return Summary("Bundle calibrated", rows, facts, command, title)


def _measured_rows(calibration: Calibration) -> str:
    """The number of rows on which points were measured: of pairs, those on which nothing was fitted."""
    rows = calibration.facts["rows"]
    measured = calibration.facts.get("measured_rows", rows)
    return f"{measured}" if measured == rows else f"{measured} of {rows}"


def _figures_text(point: OperatingPoint) -> str:
    """What was measured or is guaranteed for a point, in one line."""
    guarantee, measured = point.guarantee, point.measured
    if measured.keys() >= {"nats", "nats_full", "depth"}:  # of generated text
        nats, depth = measured["nats"], measured["depth"]
        return f"{nats:.3f} nats a token at {depth:.1f} blocks, {measured['nats_full']:.3f} at full depth"
    quality = next(iter(measured), None)  # it is the first figure; a point may state none
    parts = ["nothing measured"] if quality is None else [f"{quality} {measured[quality]:.2f} %"]
    if guarantee is not None:
        of = "" if guarantee.groups == "all" else f" of each {guarantee.groups}"
        promise = f"{guarantee.risk}{of} at most {guarantee.limit:g}"
        parts = [f"{promise} with confidence {guarantee.confidence:g}"]
    for key, unit in (("macs_saved", "computation"), ("ms_saved", "time")):
        parts += [f"{measured[key]:.1f} % of the {unit} saved"] if key in measured else []
    return ", ".join(parts)


if __name__ == "__main__":
    main(prog_name="ee-calibrate")
