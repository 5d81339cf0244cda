"""Classifier, the session of a bundle that classifies texts or images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import Calibration, Manifest, RuleSpec
from offramp.runtime.engines.base import Engine, State
from offramp.runtime.inputs.text import AnyRow, Reader
from offramp.runtime.row_session import RowAnswer, RowSession, exits_of, not_finite
from offramp.runtime.rules.base import Floats, Rule, softmax
from offramp.runtime.walker import Trace

if TYPE_CHECKING:
    from offramp.runtime.audit import AuditPlan
    from offramp.runtime.budget import Budget


@dataclass(frozen=True)
class Answer:
    """The predicted label of one item, and the steps that were run for it.

    score: probability (0..1) of the label at the exit where the walk ended. exit: that exit, 1-based. depth:
    blocks run. steps: (1-based segment, variant) of each step. signals: for each step, the probability of the
    final label at its exit, and P(exit) of its policy or None. seconds: wall time from the start of the row's
    stem to its exit, including waiting for other rows and excluding tokenizing. truncated: the text was
    longer than the network can read. At an operating point that ee-calibrate --coverage measured, calibrated:
    the probability of the label at the temperature of its exit, and label_set: the labels, the likeliest
    first, of a set that contains the right one with that coverage (it may be empty); else None.

    windows: how many windows of a long text were walked (load option long_texts). With several, label and
    score come from the mean of their logits, exit, depth, steps and signals are those of the deepest one,
    seconds is the longest time, and nothing is calibrated.
    """

    label: str
    score: float
    exit: int
    depth: int
    steps: tuple[tuple[int, str], ...]
    signals: tuple[tuple[float, float | None], ...]
    seconds: float
    truncated: bool = False
    calibrated: float | None = None
    label_set: tuple[str, ...] | None = None
    windows: int = 1

    def as_json(self) -> dict[str, object]:
        """See RowAnswer."""
        return {"label": self.label, "score": round(self.score, 6)}


class Classifier(RowSession[Answer]):
    """A session that classifies texts or images; load() returns it.

    calibration: that of the operating point at which the session walks, or None; with a budget, that of its
    cheapest point, None unless all of its points have one.
    """

    usage = "this bundle classifies: call the session, or map"

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine[State],
        reader: Reader[AnyRow],
        rule: Rule,
        variant: str,
        batch_size: int,
        budget: Budget | None = None,
        audit: AuditPlan | None = None,
    ) -> None:
        self._calibrations: list[Calibration | None] = []  # of each rule
        self._temperatures: list[Floats | None] = []  # of each rule [segments, 1]
        super().__init__(bundle, engine, reader, rule, variant, batch_size, budget, audit)
        walked = self._calibrations[: self._full_number]  # not of rows that are set to full depth
        self.calibration = None if None in walked else walked[0]

    def _add_rule(self, rule: Rule, variant: str) -> int:
        """See RowSession."""
        scale = rule.spec.score_temperatures
        self._calibrations.append(find_calibration(self.manifest, rule.spec, variant))
        self._temperatures.append(np.array(scale, np.float32)[:, None] if scale else None)
        return super()._add_rule(rule, variant)

    def _decision(self, answer: RowAnswer) -> NDArray[np.generic]:
        """See RowSession."""
        assert isinstance(answer, Answer)
        return np.array(self.manifest.labels.index(answer.label))

    def _answer(self, trace: Trace, first: int, item: AnyRow, rule: int = 0) -> Answer:
        row, segments, walked = self._walked(trace, first, item)
        exit, depth, steps, seconds, truncated, windows = walked
        logits = trace.logits[row].take(segments, 0)  # [steps, classes]
        temperatures = self._temperatures[rule]
        if temperatures is not None:
            logits /= temperatures[segments]
        probabilities = softmax(logits)
        last = probabilities[-1] if windows == 1 else softmax(_mean_logits(trace, first, windows))
        label = int(last.argmax())
        score = float(last[label])
        if score != score:  # NaN, which argmax finds first
            raise not_finite(exit)
        scores = probabilities[:, label].tolist()
        gates = trace.gates[row][segments].tolist()
        calibrated, label_set = None, None
        if windows == 1:
            calibrated, label_set = self._calibrated(trace.logits[row, exit - 1], exit - 1, label, rule)
        return Answer(
            label=self.manifest.labels[label],
            score=score,
            exit=exit,
            depth=depth,
            steps=steps,
            signals=tuple((p, None if math.isnan(g) else g) for p, g in zip(scores, gates, strict=True)),
            seconds=seconds,
            truncated=truncated,
            calibrated=calibrated,
            label_set=label_set,
            windows=windows,
        )

    def _calibrated(
        self, logits: Floats, segment: int, label: int, rule: int
    ) -> tuple[float | None, tuple[str, ...] | None]:
        """The calibrated probability of a label, and the set of labels; logits [classes] of the exit."""
        calibration = self._calibrations[rule]
        if calibration is None:
            return None, None
        probabilities = softmax(logits / np.float32(calibration.temperatures[segment]))
        inside = 1.0 - probabilities <= calibration.quantiles[segment]
        order = np.argsort(-probabilities, kind="stable").tolist()
        names = tuple(self.manifest.labels[number] for number in order if inside[number])
        return float(probabilities[label]), names


def _mean_logits(trace: Trace, first: int, windows: int) -> Floats:
    """The mean over windows of the logits at the exits that they took [classes]."""
    logits: Floats = trace.logits[np.arange(first, first + windows), exits_of(trace, first, windows)].mean(0)
    return logits


def find_calibration(manifest: Manifest, rule: RuleSpec, variant: str) -> Calibration | None:
    """The calibration of the operating point with this rule and variant; None if there is none.

    Sets hold for the answers of that rule alone: another threshold sends other rows to an exit.
    """
    same = (point for point in manifest.points if (point.rule, point.variant) == (rule, variant))
    return next((point.calibration for point in same if point.calibration is not None), None)
