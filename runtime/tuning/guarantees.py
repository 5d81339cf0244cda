"""Operating points that keep a risk: the cheapest setting of a rule whose risk is bounded (see tuning.risk).

A guarantee holds for settings that were fixed before the rows were seen. So the rule and its temperatures are
those that the bundle has, thresholds are those of fixed_settings, and rows that trained the network or chose
points or temperatures of the bundle are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.manifest import (
    CLASSIFICATION,
    EMBEDDING,
    MULTI_LABEL,
    Guarantee,
    Manifest,
    OperatingPoint,
    RuleSpec,
)
from offramp.runtime.bundle.row_samples import CALIBRATED, DEV, TRAIN, RowSample, samples_of
from offramp.runtime.errors import BadInput, BadSetting, EngineUnavailable
from offramp.runtime.progress import track
from offramp.runtime.row_session import RowSession
from offramp.runtime.rules.quality import DISAGREEMENTS
from offramp.runtime.rules.sweep import ExitMacs, ExitTable, MeasuredPoint, fixed_settings, setting_rule
from offramp.runtime.tuning.calibration import answer_logits, calibration_error, measure_calibration
from offramp.runtime.tuning.exit_tables import (
    Temperatures,
    exit_table,
    macs_to_exits,
    own_rule,
    require_signals,
    usual_rule,
    variant_prefix,
)
from offramp.runtime.tuning.labelled import LabelledRows
from offramp.runtime.tuning.right_answers import RightAnswers, right_answers
from offramp.runtime.tuning.risk import (
    LEAST_SHARE,
    GroupRisk,
    binomial_tail,
    control_risk,
    group_risks,
    rows_needed,
    upper_bound,
)
from offramp.runtime.walker import Trace

ALL, CLASS, EXIT = "all", "class", "exit"  # groups in which a risk is bounded, see Guarantee.groups
DISAGREEMENT = "disagreement"
# A file is refused if more than this share of its rows were seen before. If they had no loss at all, the risk
# of the others would be at most 1 / (1 - 0.05) of what the guarantee says.
SEEN_AT_MOST = 0.05
FALSE_ALARMS = 0.01  # how often a file with just this share is refused: rows may be the same by chance
LossTable = NDArray[np.bool_] | NDArray[np.float32] | NDArray[np.int8]  # [rows, exits]


@dataclass(frozen=True)
class RiskOptions:
    """Options of a guarantee: limits of the risk (shares), and the confidence with which each is kept.

    of: which risk, a name in RISKS. per: ALL rows, or those of each predicted CLASS or each EXIT. allow_seen:
    rows that were used before are warned of and not refused.
    """

    limits: tuple[float, ...]
    confidence: float = 0.95
    of: str = DISAGREEMENT
    per: str = ALL
    allow_seen: bool = False


@dataclass(frozen=True)
class ExitAnswers:
    """What losses are made of: the answers of every exit, those of full depth, and the right ones.

    at_exits [exits][rows]; full, right [rows]: full depth of the default variant, and labels (None without).
    """

    kind: str
    at_exits: Sequence[NDArray[Any]]
    full: NDArray[Any]
    right: NDArray[Any] | None


@dataclass(frozen=True)
class RiskKind:
    """A risk that can be bounded: the loss of every row at every exit, and what is needed for it.

    name: in Guarantee.risk, "{metric}" stands for the name of the task's quality. losses: from ExitAnswers.
    kinds: of task. low: the least loss. labels: whether it needs labels (embeddings have none and need none).
    safe: whether full depth of the default variant has no risk by definition. cure: for other kinds of task.
    """

    name: str
    losses: Callable[[ExitAnswers], LossTable]
    kinds: tuple[str, ...]
    low: float
    labels: bool
    safe: bool
    cure: str


def _disagreement(answers: ExitAnswers) -> LossTable:
    if answers.kind == CLASSIFICATION:
        different: NDArray[np.bool_] = np.stack(answers.at_exits, 1) != answers.full[:, None]
        return different
    loss = DISAGREEMENTS[answers.kind]
    rows = [[loss(row[number], full) for row in answers.at_exits] for number, full in enumerate(answers.full)]
    if answers.kind == MULTI_LABEL:  # 0 or 1, so that the bound is exact
        return np.array(rows, np.bool_)
    return np.array(rows, np.float32)


def _error_increase(answers: ExitAnswers) -> LossTable:
    assert answers.right is not None  # check_risk requires labels
    right = np.stack(answers.at_exits, 1) == answers.right[:, None]
    increase: NDArray[np.int8] = (answers.full == answers.right)[:, None].astype(np.int8) - right
    return increase


def _quality_loss(answers: ExitAnswers) -> LossTable:
    if answers.right is None:
        return _disagreement(answers)
    wrong: NDArray[np.bool_] = np.stack(answers.at_exits, 1) != answers.right[:, None]
    return wrong


RISKS: Mapping[str, RiskKind] = {
    DISAGREEMENT: RiskKind(
        *(DISAGREEMENT, _disagreement, tuple(DISAGREEMENTS), 0.0, False, True),
        cure="a number nearly always differs a little from that of full depth; use measured points",
    ),
    "accuracy": RiskKind(
        *("error_increase", _error_increase, (CLASSIFICATION,), -1.0, True, True),
        cure="only one label a row is right or wrong; use --risk-of disagreement",
    ),
    "quality": RiskKind(
        *("{metric}_loss", _quality_loss, (CLASSIFICATION, EMBEDDING), 0.0, True, False),
        cure="its quality is computed over all rows together and is no mean over them, so that it has no "
        "such bound; use --risk-of disagreement",
    ),
}


@dataclass(frozen=True)
class GuaranteedPoints:
    """Points with a guarantee, what was measured of the scores by variant, and a table for the user.

    failed: names of points that were sought and do not exist.
    """

    points: tuple[OperatingPoint, ...]
    failed: tuple[str, ...]
    scores: Mapping[str, Mapping[str, float]]
    table: str


def check_unseen(manifest: Manifest, file: Path, hashes: Collection[str], *, allow: bool = False) -> None:
    """Raise BadInput for rows that trained the network or chose points or temperatures of the bundle.

    hashes: of the rows of the file, see row_samples. Rows are known by the samples that ee-train,
    ee-calibrate and ee-split --dev leave in provenance; in older bundles, which lack them, by the file's
    name. A few rows in common are warned of; with `allow` all are.
    """
    cure = "give rows that neither trained the network nor chose anything of it"
    unless = f"{cure}; if new rows repeat old ones by nature, add --allow-seen"
    samples, warnings = samples_of(manifest.provenance), list[str]()
    for sample in samples:
        common, compared = sample.compare(hashes)
        if not common:
            continue
        among = f"among {_described(sample)} ({common} of {compared} that can be compared)"
        if not allow and _clearly_more(common, compared, SEEN_AT_MOST):
            raise BadInput(f"{file}: {common / compared:.0%} of its rows are {among}; {unless}")
        warnings.append(f"{common / compared:.1%} of its rows are {among}; the guarantee assumes new rows")
    chose = CALIBRATED if CALIBRATED in manifest.provenance else DEV
    if chose not in {sample.use for sample in samples}:
        measured = {point.data for point in manifest.points if point.guarantee is None}
        if not allow and file.name in measured:
            raise BadInput(f"{file}: the bundle's points were chosen on a file of this name; {cure}")
    if file.stem in ("train", "dev", "validation", "valid"):
        warnings.append("if the network was trained or stopped on these rows, no guarantee holds")
    for warning in warnings:
        click.echo(f"{file}: {warning}", err=True)


def warn_of_copies(file: Path, rows: int, different: int) -> None:
    """Warn if many of the rows are copies of others, of which the bounds would count each as a new draw."""
    copies = rows - different
    if copies > SEEN_AT_MOST * rows:
        click.echo(
            f"{file}: {copies} of {rows} rows are the same as another one; if they were copied, no guarantee "
            "holds: give each row once. If rows repeat by nature, as short commands do, leave them",
            err=True,
        )


def _described(sample: RowSample) -> str:
    """The rows of a sample in words."""
    of_data = f" of {sample.data!r:.60}" if sample.data else ""
    if sample.use == TRAIN:
        return f"the train rows{of_data}, on which the network was trained"
    if sample.use == DEV:
        return f"the dev rows{of_data}, on which its training chose points"
    return "the rows on which points were chosen"


def _clearly_more(count: int, rows: int, share: float) -> bool:
    """Whether `count` of `rows` random rows show that more than `share` of all are like them."""
    return 1 - binomial_tail(count - 1, rows, share) <= FALSE_ALARMS


def check_risk(manifest: Manifest, options: RiskOptions, *, labelled: bool) -> None:
    """Raise BadSetting if this risk cannot be bounded for the bundle's task."""
    risk = RISKS[options.of]
    if manifest.kind not in risk.kinds:
        raise BadSetting(f"--risk-of {options.of} is not for {manifest.task}: {risk.cure}")
    if risk.labels and not labelled and manifest.kind != EMBEDDING:
        raise BadSetting(f"--risk-of {options.of} needs labels; give them, or use --risk-of disagreement")
    if options.per == CLASS and manifest.kind != CLASSIFICATION:
        raise BadSetting(f"--per class is for bundles that give one label, not for {manifest.task}")
    for limit in options.limits:
        if not 0 < limit < 1:
            raise BadSetting(f"--risk {limit:g}: give a share between 0 and 1, such as 0.01")
    names = [f"{limit:g}" for limit in options.limits]  # of their points
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise BadSetting(f"--risk {twice} is given twice; name each limit once, in six digits at most")


def guaranteed_points(
    session: RowSession[Any],
    rows: LabelledRows,
    options: RiskOptions,
    *,
    rule: str | None = None,
    right: RightAnswers | None = None,
    coverage: float | None = None,
) -> GuaranteedPoints:
    """Find, for every variant and limit, the cheapest setting whose risk is at most the limit.

    rule: None for the bundle's own, see exit_points. right: the answers by which points state their quality;
    None for the labels of the rows. coverage: see exit_points. The points of the first limit are also called
    "default". A variant that cannot keep a limit at full depth has no point of it. Raises BadInput for too
    few rows, with the number that is needed.
    """
    manifest = session.manifest
    right = right or right_answers(session, rows)
    search = _Search(manifest, rows, options, right)
    points: list[OperatingPoint] = []
    failed: list[str] = []
    scores: dict[str, Mapping[str, float]] = {}
    lines = [search.head]
    for variant in track(manifest.variants, "measuring variants", unit="variant"):
        try:
            trace, lengths = session.at_full_depth(rows.items, variant)
        except (BadSetting, EngineUnavailable) as problem:
            if variant == manifest.variants[0]:
                raise
            click.echo(f"{variant} is not measured, its points stay as they were: {problem}", err=True)
            continue
        raw = exit_table(manifest.kind, trace, right)
        swept = rule or own_rule(manifest) or usual_rule(manifest, raw)
        require_signals(swept, raw)
        chosen = search.choose(variant, trace, raw, swept, lengths)
        for number, limit in enumerate(options.limits):
            prefix = variant_prefix(manifest, variant)
            if limit not in chosen:
                failed.append(f"{prefix}risk-{limit:g}")
                lines.append(search.failure(variant, limit))
                continue
            point, guarantee, groups = chosen[limit]
            exits = raw.exits(point.rule)
            calibration = None
            if coverage is not None:
                scale = point.rule.score_temperatures
                calibration = measure_calibration(
                    raw.logits, exits, raw.labels, coverage, np.array(scale) if scale else None
                )
            safe = OperatingPoint(
                f"{prefix}risk-{limit:g}",
                *(point.rule, variant, rows.name, "calibration"),
                point.stated_figures(raw.measure.name),
                *(calibration, guarantee, point.exit_rows),
            )
            points += [safe] if number else [replace(safe, name=f"{prefix}default"), safe]
            lines += _point_lines(safe, groups, manifest)
            if number == 0 and manifest.kind == CLASSIFICATION and not right.agreement:
                scores[variant] = _held_out_scores(raw, exits, point.rule)
    if not points:
        raise BadInput(f"{rows.name}: {'; '.join(lines[1:])}; ask for a higher --risk")
    least = f"{search.name} <= {min(options.limits):g} at confidence {options.confidence:g}"
    lines.append(f"{least} needs {search.needed} rows at least, of which none has a loss")
    return GuaranteedPoints(tuple(points), tuple(failed), scores, "\n".join(lines))


class _Search:
    """The search for settings that keep a risk: losses of rows, tests in their fixed order, and refusals."""

    def __init__(
        self, manifest: Manifest, rows: LabelledRows, options: RiskOptions, right: RightAnswers
    ) -> None:
        self.manifest, self.options, self.right = manifest, options, right
        self.risk = RISKS[options.of]
        self._full: NDArray[Any] | None = None  # answers of full depth of the default variant, walked first
        self._labels = None if right.agreement else right.wanted
        self.name = self.risk.name.format(metric=right.reader.metric)
        self._rows, self._file = len(rows.items), rows.name
        self.needed = 0  # rows, see rows_needed
        self._at_full_depth: dict[str, LossTable] = {}  # losses [rows] by variant
        self.head = (
            f"{'point':18}{'variant':8}{self.name:>15}{'confidence':>12}{'rows':>7}{'observed':>10}{'bound':>9}"
            f"{'blocks saved %':>16}{'MACs saved %':>14}  rule"
        )

    def choose(
        self, variant: str, trace: Trace, raw: ExitTable, rule: str, lengths: NDArray[np.int64]
    ) -> dict[float, tuple[MeasuredPoint, Guarantee, list[GroupRisk]]]:
        """By limit: the cheapest valid setting in a variant, its guarantee, and the risks of its groups."""
        options, risk = self.options, self.risk
        reader, places, exits = self.right.reader, self.right.places, raw.logits.shape[1]
        answers = [reader.at_exits(trace, exit, places) for exit in range(exits)]
        self._full = answers[-1] if self._full is None else self._full
        losses = risk.losses(ExitAnswers(self.manifest.kind, answers, self._full, self._labels))
        self._at_full_depth[variant] = losses[:, -1]
        temperatures = bundle_temperatures(self.manifest, variant)
        read = temperatures.give(RuleSpec(rule, {})).temperatures
        table, macs = raw.at_temperatures(read), macs_to_exits(self.manifest, lengths)
        sequences = fixed_settings(rule, exits)
        specs = [RuleSpec("never", {}), *(setting_rule(rule, value) for part in sequences for value in part)]
        ends = np.cumsum([1, *(len(part) for part in sequences)])
        order = [list(range(start, end)) for start, end in pairwise(ends.tolist())] or [[]]
        safe = risk.safe and variant == self.manifest.variants[0]
        if not safe:
            order[0].insert(0, 0)  # full depth is tested first
        self._require_rows(losses, len(order))
        at = np.stack([table.exits(spec) for spec in specs])  # [settings, rows]
        numbers = np.arange(self._rows)
        groups, count = self._groups(answers, at)
        chosen = {}
        for limit in options.limits:
            valid = control_risk(
                losses[numbers, at],
                order,
                limit,
                options.confidence,
                low=risk.low,
                groups=groups,
                group_count=count,
            )
            kept = [*([0] if safe else []), *valid.tolist()]
            if not kept:
                continue
            cheapest = min(kept, key=lambda index: _cost(macs, at[index]))
            row_losses = losses[numbers, at[cheapest]]
            bound = upper_bound(row_losses, options.confidence, low=risk.low)
            guarantee = Guarantee(
                *(self.name, limit, options.confidence, self._rows, round(float(row_losses.mean()), 6)),
                *(round(bound.value, 6), bound.name, options.per),
            )
            spec = temperatures.give(specs[cheapest])
            of_groups = list[GroupRisk]()
            if groups is not None:
                of_groups = group_risks(row_losses, groups[cheapest], options.confidence, low=risk.low)
            chosen[limit] = (macs.point(spec, at[cheapest], table), guarantee, of_groups)
        return chosen

    def failure(self, variant: str, limit: float) -> str:
        """The line of a variant that has no point for a limit."""
        losses = self._at_full_depth[variant]
        bound = upper_bound(losses, self.options.confidence, low=self.risk.low).value
        return (
            f"{variant}: none keeps {self.name} <= {limit:g} at confidence {self.options.confidence:g}: "
            f"its full depth has {losses.mean():.4f} on these rows, bound {bound:.4f}"
        )

    def _groups(
        self, answers: Sequence[NDArray[Any]], at: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64] | None, int]:
        """The group of each row at each setting [settings, rows], and the number of groups."""
        if self.options.per == ALL:
            return None, 0
        if self.options.per == EXIT:
            return at, len(self.manifest.segments)
        labels: NDArray[np.int64] = np.stack(answers, 1)[np.arange(self._rows), at]
        return labels, len(self.manifest.labels)

    def _require_rows(self, losses: LossTable, sequences: int) -> None:
        """Raise BadInput if the rows are too few for the least limit, even if none of them had a loss."""
        limit, confidence = min(self.options.limits), self.options.confidence
        of_one = 1 - (1 - confidence) / sequences  # sequences share the error
        needed = rows_needed(
            *(limit, of_one),
            low=self.risk.low,
            binary=losses.dtype == np.bool_,
            grouped=self.options.per != ALL,
        )
        self.needed = max(self.needed, needed)
        if self._rows >= needed:
            return
        groups = "" if self.options.per == ALL else f" for every {self.options.per}"
        raise BadInput(
            f"{self._file}: {self._rows} rows; {self.name} of at most {limit:g}{groups} with confidence "
            f"{confidence:g} needs at least {needed} rows, and more if any of them has a loss; give more "
            "rows, or a higher --risk"
        )


def _cost(macs: ExitMacs, exits: NDArray[np.int64]) -> tuple[float, int]:
    """What rows with these exits [rows] cost: multiply-accumulates; blocks where the manifest has none."""
    return float(macs.to_exit[np.arange(len(exits)), exits].sum()), int(macs.blocks[exits].sum())


def bundle_temperatures(manifest: Manifest, variant: str) -> Temperatures:
    """The temperatures of a variant's exits by its operating points; none of a kind if no point has any."""
    points = sorted(manifest.points, key=lambda point: point.guarantee is not None)  # measured ones first
    rules = [point.rule for point in points if point.variant == variant]
    return Temperatures(
        next((rule.temperatures for rule in rules if rule.temperatures), ()),
        next((rule.score_temperatures for rule in rules if rule.score_temperatures), ()),
    )


def _held_out_scores(raw: ExitTable, exits: NDArray[np.int64], rule: RuleSpec) -> dict[str, float]:
    """Calibration error (percent) of a walk's answers, raw and at the temperatures of its scores."""
    scaled = raw.at_temperatures(rule.score_temperatures)
    tables = {"ece_raw": raw, "ece": scaled} if rule.score_temperatures else {"ece_raw": raw}
    return {
        name: round(100 * calibration_error(answer_logits(table.logits, exits), raw.labels), 3)
        for name, table in tables.items()
    }


def _point_lines(point: OperatingPoint, groups: Sequence[GroupRisk], manifest: Manifest) -> list[str]:
    """The line of a point in the table and, below it, the lines of its groups of rows."""
    guarantee, measured = point.guarantee, point.measured
    assert guarantee is not None
    parameters = " ".join(f"{key}={value:.6g}" for key, value in point.rule.parameters.items())
    lines = [
        f"{point.name:18}{point.variant:8}{f'<= {guarantee.limit:g}':>15}{guarantee.confidence:12g}"
        f"{guarantee.rows:7d}{guarantee.observed:10.4f}{guarantee.bound:9.4f}{measured['layers_saved']:16.2f}"
        f"{measured['macs_saved']:14.2f}  {point.rule.name} {parameters}".rstrip()
    ]
    for group in groups:
        name = manifest.labels[group.group] if guarantee.groups == CLASS else f"exit {group.group + 1}"
        small = (
            f"; fewer than {LEAST_SHARE:.0%} of the rows" if group.rows < LEAST_SHARE * guarantee.rows else ""
        )
        lines.append(
            f"  {name:20.20}{'':15}{'':16}{group.rows:7d}{group.observed:10.4f}{group.bound:9.4f}{small}"
        )
    return lines
