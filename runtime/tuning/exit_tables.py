"""What calibration reads from a bundle and its rows: outputs of all exits, costs, temperatures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.manifest import CLASSIFICATION, Manifest, RuleSpec
from offramp.runtime.errors import BadInput
from offramp.runtime.generator import TextGenerator
from offramp.runtime.row_session import RowSession
from offramp.runtime.rules.registry import RULES
from offramp.runtime.rules.sweep import SWEPT, ExitMacs, ExitTable, swept_rules
from offramp.runtime.tuning.calibration import stable_temperatures
from offramp.runtime.tuning.labelled import LabelledRows
from offramp.runtime.tuning.right_answers import RightAnswers, right_answers
from offramp.runtime.walker import Trace


def measure_exit_table(
    session: RowSession[Any], rows: LabelledRows, variant: str, right: RightAnswers | None = None
) -> tuple[ExitTable, NDArray[np.int64]]:
    """Walk rows at full depth in one variant; gives outputs of every exit, and lengths [rows] in tokens.

    right: None for the labels of the rows.
    """
    right = right or right_answers(session, rows)
    trace, lengths = session.at_full_depth(rows.items, variant)
    return exit_table(session.manifest.kind, trace, right), lengths


def exit_table(kind: str, trace: Trace, right: RightAnswers) -> ExitTable:
    """The table of rows that walked to the end, for a bundle of this kind of task (Manifest.kind)."""
    gated = np.isfinite(trace.gates[:, :-1]).all() and trace.gates.shape[1] > 1
    gates = np.nan_to_num(trace.gates, nan=1.0) if gated else None
    labels = right.wanted if kind == CLASSIFICATION else np.full(len(trace.logits), -1)
    answers = None
    if "settled" in swept_rules(kind) and trace.answers is not None:
        answers = np.array(trace.answers.tolist(), np.float32)  # [rows, exits, numbers]
    return ExitTable(trace.logits, gates, labels, answers, right.quality(trace))


def require_signals(rule: str, table: ExitTable) -> None:
    """Raise BadInput if a rule reads policies whose P(exit) is not finite for all rows.

    That the bundle has policies is checked before; a table of one exit needs none.
    """
    if rule == "gate" and table.gates is None and table.logits.shape[1] > 1:
        raise BadInput(
            "rule gate: P(exit) of a policy is not finite (NaN or infinite) for some rows; repair the "
            "network, or name another --rule"
        )


def macs_to_exits(manifest: Manifest, lengths: Sequence[int] | NDArray[np.int64]) -> ExitMacs:
    """The multiply-accumulates up to every exit by the manifest, for rows of these lengths [rows] in tokens.

    Exits and policies are included in the segments, so `full` is that of the full walk.
    """
    tokens = [int(length) for length in lengths]
    macs = np.array([[segment.macs.of(n) for segment in manifest.segments] for n in tokens])
    to_exit = np.array([manifest.stem.macs.of(n) for n in tokens])[:, None] + macs.cumsum(1)
    blocks = np.array([segment.blocks[-1] for segment in manifest.segments])
    return ExitMacs(to_exit, to_exit[:, -1], blocks)


def own_rule(manifest: Manifest) -> str | None:
    """The name of the rule that the bundle was exported for, or None if it has none that can be swept."""
    names = (manifest.rule.name, *(point.rule.name for point in manifest.points))
    return next((name for name in names if name in SWEPT), None)


def usual_rule(manifest: Manifest, table: ExitTable) -> str:
    """The rule that is swept for a bundle without one: gate with policies, else the first of its task."""
    if table.gates is not None:
        return "gate"
    return next(name for name in swept_rules(manifest.kind) if name != "gate")


def engine_facts(session: RowSession[Any] | TextGenerator) -> dict[str, str]:
    """Engine and device of a session, with versions, as provenance records them."""
    return {"engine": session.engine.name, "device": session.engine.device, **session.engine.facts}


@dataclass(frozen=True)
class Temperatures:
    """Temperatures of the exits of a variant: those at which its rule reads logits, and those of its scores.

    () where there are none, see RuleSpec.
    """

    rule: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()

    def give(self, spec: RuleSpec) -> RuleSpec:
        """The spec with these temperatures; those of the rule for rules that read them, and for no other."""
        read = self.rule if RULES[spec.name].certainty else ()
        return replace(spec, temperatures=read, score_temperatures=self.scores)


def fit_temperatures_of(table: ExitTable, full: NDArray[np.int64], *, labelled: bool) -> Temperatures:
    """Fit the temperatures of classification on the rows of a table.

    A rule stops where the answer will stay, so that for it a label is right if full depth gives it: full
    [rows], of the default variant. At these temperatures one threshold is equally safe at every exit. Scores
    say how often an answer is right by the labels; without labels they stay as they are.
    """
    scores = stable_temperatures(table.logits, table.labels) if labelled else ()
    return Temperatures(stable_temperatures(table.logits, full), scores)


def variant_prefix(manifest: Manifest, variant: str) -> str:
    """What the names of a variant's operating points begin with: nothing for the default variant."""
    return "" if variant == manifest.variants[0] else f"{variant}-"
