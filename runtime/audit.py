"""Audits: a random share of the rows is walked to the end in the background; exits are compared, too."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from offramp.runtime.bundle.manifest import CLASSIFICATION, EMBEDDING, Manifest, OperatingPoint, RuleSpec
from offramp.runtime.errors import BadSetting, DriftWarning, RunWarning, SessionClosed
from offramp.runtime.pipeline import BackgroundTask
from offramp.runtime.rules.quality import AGREEMENT, DISAGREEMENTS
from offramp.runtime.sequential import ConfidenceSequence, ExitTest

ON_DRIFT = ("warn", "full-depth")
CONFIDENCE = 0.99  # of the confidence sequence of the disagreement
FALSE_ALARM = 0.01  # probability that the test of exits ever reports a change that is none
DISAGREEMENT = "disagreement"  # the risk of a guarantee that an audit can check
MOST_WAITING = 8  # rows that wait for their audit; then the next answer waits for one audit
# Tasks of which a measured agreement is 100 minus the mean of the losses that an audit counts.
_MEAN_AGREEMENT = (CLASSIFICATION, EMBEDDING)

T = TypeVar("T")


@dataclass(frozen=True)
class AuditOptions:
    """An audit as the caller gives it; see load().

    share: of the rows that are walked to the end. limit: the disagreement that is promised; None for that of
    the operating point. on_drift: one of ON_DRIFT.
    """

    share: float | None = None
    limit: float | None = None
    on_drift: str = ON_DRIFT[0]
    seed: int = 0

    def __post_init__(self) -> None:
        if self.share is None:
            raise BadSetting("audit_limit and on_drift are for an audit: give audit, a share of the rows")
        if not 0 < self.share <= 1:
            raise BadSetting(f"audit {self.share:g}: expected a share of the rows, above 0, at most 1")
        if self.limit is not None and not 0 < self.limit < 1:
            raise BadSetting(f"audit_limit {self.limit:g}: expected a share of the rows between 0 and 1")
        if self.on_drift not in ON_DRIFT:
            raise BadSetting(f"on_drift {self.on_drift!r}: choose one of {', '.join(ON_DRIFT)}")


@dataclass(frozen=True)
class AuditPlan:
    """What an audit compares with.

    limit: the disagreement that is promised, by `source`. exit_rows: calibration rows by exit, none if exits
    cannot be compared, for the reason `not_compared`.
    """

    share: float
    limit: float
    source: str
    on_drift: str
    seed: int
    exit_rows: tuple[int, ...] = ()
    not_compared: str = ""


@dataclass(frozen=True)
class AuditReport:
    """What an audit knows so far.

    rows: answers. audited: those that were compared with full depth of the default variant; share: of the
    rows that are drawn for it. disagreement: their mean loss (0..1); low, high: an interval for it that holds
    at all times with probability `confidence`, and whose ends cross if it changed. limit, source: the
    disagreement that is promised, and by what.
    exceeded_at: rows answered when the lower end passed the limit; None if it did not. full_depth: whether
    rows are walked to the end since. exits: rows by exit, until they are seen to differ, and
    calibration_exits those of the calibration; both empty if they are not compared, for the reason
    not_compared. exits_changed_at: rows answered when the test reported other exits, which it does without
    reason with probability false_alarm at most. failed: audits that ended in an error of the engine.
    """

    rows: int
    share: float
    audited: int
    disagreement: float
    low: float
    high: float
    confidence: float
    limit: float
    source: str
    exceeded_at: int | None
    full_depth: bool
    exits: tuple[int, ...]
    calibration_exits: tuple[int, ...]
    not_compared: str
    exits_changed_at: int | None
    false_alarm: float
    failed: int

    def __str__(self) -> str:
        end = "within it" if self.exceeded_at is None else f"exceeded at row {self.exceeded_at}"
        if self.full_depth:
            end += ", at full depth since"
        if self.not_compared:
            exits = f"exits not compared: {self.not_compared}"
        elif self.exits_changed_at is None:
            exits = "exits as in the calibration"
        else:
            exits = f"exits differ from the calibration's since row {self.exits_changed_at} at the latest"
        if self.failed:
            exits += f"; {self.failed} audits failed"
        interval = f"{self.low:.2%} to {self.high:.2%}"
        if self.low > self.high:
            interval = f"it changed: at times below {self.high:.2%}, at times above {self.low:.2%}"
        return (
            f"{self.audited} of {self.rows} rows, disagreement {self.disagreement:.2%} "
            f"({interval} at {self.confidence:.0%}), limit {self.limit:.2%} "
            f"({self.source}): {end}; {exits}"
        )


def plan_audit(
    manifest: Manifest,
    rule: RuleSpec,
    variant: str,
    options: AuditOptions,
    budget_limits: Sequence[float | None] | None = None,
) -> AuditPlan:
    """Find what an audit compares with, for answers of a rule in a variant.

    budget_limits: the limits of the guarantees of the points among which a budget moves, if there is one.
    Raises BadSetting if there is nothing to compare, or no limit.
    """
    assert options.share is not None  # checked by AuditOptions
    if manifest.kind not in DISAGREEMENTS:
        raise BadSetting(
            f"audit: answers of {manifest.task} have no disagreement, as numbers always differ a little; "
            "leave it out"
        )
    if rule.name == "never" and variant == manifest.variants[0] and budget_limits is None:
        raise BadSetting("audit: all rows are walked to the end, there is nothing to compare; leave it out")
    points = [point for point in manifest.points if (point.rule, point.variant) == (rule, variant)]
    if options.limit is not None:
        limit, source = options.limit, "audit_limit"
    elif budget_limits is not None:
        limit, source = _budget_limit(budget_limits)
    else:
        limit, source = _point_limit(manifest, points)
    exit_rows: tuple[int, ...] = ()
    reason = ""
    if budget_limits is not None:
        reason = "a budget moves among points"
    else:
        exit_rows = next((point.exit_rows for point in points if point.exit_rows), ())
        reason = "" if exit_rows else "no point of this setting has them; ee-calibrate writes them"
    return AuditPlan(options.share, limit, source, options.on_drift, options.seed, exit_rows, reason)


def _budget_limit(limits: Sequence[float | None]) -> tuple[float, str]:
    known = [limit for limit in limits if limit is not None]
    if len(known) < len(limits) or not max(known):
        raise BadSetting(
            "audit: the points of the budget guarantee no disagreement; give max_risk, or audit_limit, the "
            "disagreement with full depth that you allow"
        )
    return max(known), "the guarantees of the budget's points"


def _point_limit(manifest: Manifest, points: Sequence[OperatingPoint]) -> tuple[float, str]:
    """The limit of the strictest guarantee of disagreement; else the measured one, where points state it."""
    guaranteed = [
        (point.guarantee.limit, f"guarantee of {point.name}")
        for point in sorted(points, key=lambda point: point.name == "default")  # others say more
        if point.guarantee is not None and point.guarantee.risk == DISAGREEMENT
    ]
    if guaranteed:
        return min(guaranteed, key=lambda promise: promise[0])
    if manifest.kind in _MEAN_AGREEMENT:
        for point in points:
            # The lower end of its interval: the figure itself is as often too high as too low.
            agreement = point.measured.get("low", point.measured.get(AGREEMENT, 0.0))
            if AGREEMENT in point.measured and agreement < 100:
                return 1 - agreement / 100, f"measured for {point.name}"
    names = ", ".join(point.name for point in points) or "no operating point of this rule and variant"
    raise BadSetting(
        f"audit: no disagreement is promised ({names}); walk at a point of ee-calibrate --risk, or give "
        "audit_limit, the disagreement with full depth that you allow"
    )


class Audit(Generic[T]):
    """Draws rows for an audit, runs the audits in a thread while there are some, and counts what they show.

    loss: the disagreement (0..1) of one item with full depth, which may wait for the session. The thread
    exists only while rows wait. on_exceeded: called once, in that thread, when the limit is passed.
    """

    def __init__(
        self, plan: AuditPlan, loss: Callable[[T], float], on_exceeded: Callable[[], None] = lambda: None
    ) -> None:
        self.plan = plan
        self._loss = loss
        self._on_exceeded = on_exceeded
        self._sequence = ConfidenceSequence(CONFIDENCE, [plan.limit])
        self._exits = ExitTest(plan.exit_rows, FALSE_ALARM, plan.seed) if plan.exit_rows else None
        from random import Random  # here: other sessions do not need it

        self._random = Random(plan.seed).random
        self._share = plan.share
        self._rows = 0
        self._exceeded_at: int | None = None
        self._changed_at: int | None = None
        self._messages: list[tuple[type[RunWarning], str]] = []
        self._failed = 0
        self._begin()

    def observe(self, item: T, exit: int, windows: int = 1) -> None:
        """Count an answer that was given, and perhaps draw it for an audit.

        exit: its exit (1-based). windows: how many windows of a text were walked; exits of several are not
        those of one walk, so they are not compared. Warns with DriftWarning when the limit was passed, and
        when exits differ from those of the calibration, once each.
        """
        with self._changed:
            self._rows += 1
            if self._exits is not None and windows == 1 and self._changed_at is None and self._share:
                self._exits.add(exit - 1)
                if self._exits.changed:
                    self._changed_at = self._rows
                    self._messages.append((DriftWarning, self._exits_message()))
            drawn = self._random() < self._share
        if drawn:
            self._submit(item)
        if self._messages:
            self._warn(stacklevel=5)

    def add(self, loss: float) -> None:
        """Count the disagreement (0..1) of one audited row."""
        with self._changed:
            self._sequence.add(loss)
            if self._exceeded_at is not None or self._sequence.low < self.plan.limit:
                return
            self._exceeded_at = self._rows
            self._messages.append((DriftWarning, self._limit_message()))
            if self.plan.on_drift == "full-depth":
                self._share = 0.0  # rows at full depth disagree with nothing, and leave at the last exit
        if self.plan.on_drift == "full-depth":
            self._on_exceeded()

    def report(self) -> AuditReport:
        """Finish the audits that wait, and report; warns as observe does."""
        with self._changed:
            while self._running:
                self._changed.wait()
            sequence, plan = self._sequence, self.plan
            report = AuditReport(
                rows=self._rows,
                share=plan.share,
                audited=sequence.count,
                disagreement=sequence.mean,
                low=sequence.low,
                high=sequence.high,
                confidence=CONFIDENCE,
                limit=plan.limit,
                source=plan.source,
                exceeded_at=self._exceeded_at,
                full_depth=self._exceeded_at is not None and plan.on_drift == "full-depth",
                exits=() if self._exits is None else tuple(self._exits.counts),
                calibration_exits=plan.exit_rows,
                not_compared=plan.not_compared,
                exits_changed_at=self._changed_at,
                false_alarm=FALSE_ALARM,
                failed=self._failed,
            )
        if self._messages:
            self._warn(stacklevel=4)
        return report

    def close(self) -> None:
        """Drop the audits that wait, and wait for the end of the one that runs."""
        with self._changed:
            self._waiting.clear()
            while self._running:
                self._changed.wait()

    def after_fork(self) -> None:
        """Start without rows that wait in a child process, where the thread of its parent is not."""
        self._begin()

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[T] = deque()
        self._running = False

    def _submit(self, item: T) -> None:
        with self._changed:
            # Walks lock the session in turns without fairness: rows would gather while others are walked.
            while len(self._waiting) >= MOST_WAITING:
                self._changed.wait()
            self._waiting.append(item)
            if self._running:
                return
            self._running = True
        BackgroundTask(self._run_waiting, None)

    def _run_waiting(self, nothing: None) -> None:
        """Audit the rows that wait, until there are none."""
        while True:
            with self._changed:
                if not self._waiting:
                    self._running = False
                    self._changed.notify_all()
                    return
                item = self._waiting.popleft()
                self._changed.notify_all()
            try:
                self.add(self._loss(item))
            except SessionClosed:
                pass  # closed meanwhile: the audit is dropped like those that wait
            except Exception as problem:  # of the engine: answers may still be possible
                self._fail(problem)

    def _fail(self, problem: Exception) -> None:
        with self._changed:
            self._failed += 1
            if self._failed == 1:
                text = f"audit: a row could not be walked to the end: {problem}"
                self._messages.append((RunWarning, text))

    def _warn(self, stacklevel: int) -> None:
        """Warn in the caller's thread, whose filters apply."""
        with self._changed:
            messages, self._messages = self._messages, []
        for category, message in messages:
            warnings.warn(message, category, stacklevel=stacklevel)

    def _limit_message(self) -> str:
        sequence, plan = self._sequence, self.plan
        then = "; rows are walked to the end from here on" if plan.on_drift == "full-depth" else ""
        return (
            f"audit: answers disagree with full depth more than {plan.limit:.2%} ({plan.source}): at least "
            f"{sequence.low:.2%}, {sequence.mean:.2%} of {sequence.count} audited rows, after {self._rows} "
            f"answers{then}"
        )

    def _exits_message(self) -> str:
        return (
            f"audit: after {self._rows} answers, rows leave at other exits than the calibration rows "
            f"(false alarm: {FALSE_ALARM:.0%} at most); what was measured or guaranteed may not hold for them"
        )
