"""How the rows of requests are walked: at a point, or by a budget that requests share; and their audits."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from offramp.runtime.audit import Audit, AuditOptions, AuditPlan, plan_audit
from offramp.runtime.budget import STATISTICS, WINDOW_ROWS, Budget, BudgetOptions, open_budget
from offramp.runtime.bundle.manifest import Manifest, OperatingPoint, RuleSpec
from offramp.runtime.errors import BadSetting, OfframpError, RunWarning
from offramp.runtime.inputs.text import AnyRow
from offramp.runtime.row_session import RowAnswer, RowSession
from offramp.runtime.rules.quality import DISAGREEMENTS
from offramp.runtime.serving.scheduler import RowOptions, Scheduler

LOG = logging.getLogger("offramp.serve")
MOST_BUDGETS = 8  # budgets that requests name, beside the server's own
BUDGET_REST = 600.0  # seconds after which a budget that no request names gives its place to another one
OWN = "server"  # name of the server's own setting if no point of the bundle has its rule and variant
Numbers = tuple[int, int]  # of a rule and a variant; see RowSession.add_point


class TooManyBudgets(OfframpError, RuntimeError):
    """Requests name more budgets than a server holds; retry_after: seconds until a place may be free."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Wanted:
    """What a request asks of the walk of its rows; None: the server's own setting.

    point: an operating point. max_risk: the cheapest point whose guarantee is at most this; with a budget,
    its points are among those. max_depth: most blocks that are run. budget_ms, budget_depth: mean
    milliseconds of an answer, or mean share of the blocks, over all rows for which the same is asked.
    """

    point: str | None = None
    max_risk: float | None = None
    max_depth: int | None = None
    budget_ms: float | None = None
    budget_depth: float | None = None


@dataclass(frozen=True)
class WatchOptions:
    """Budgets and audits of a server, as its command gives them.

    budget_ms, budget_depth: the budget of rows whose request names nothing, one of them at most. budget_of,
    budget_window: statistic and window of every budget. max_risk: of the points of the server's own budget.
    audit: None for no audits.
    """

    budget_ms: float | None = None
    budget_depth: float | None = None
    budget_of: str = STATISTICS[0]
    budget_window: int = WINDOW_ROWS
    max_risk: float | None = None
    audit: AuditOptions | None = None

    def __post_init__(self) -> None:
        if self.has_budget:
            self.budget(self.budget_ms, self.budget_depth, self.max_risk)  # raises BadSetting
        elif self.max_risk is not None:
            raise BadSetting("max_risk is for a budget: give budget_ms or budget_depth")
        else:  # of budgets that requests will name
            self.budget(None, 1.0, None)

    @property
    def has_budget(self) -> bool:
        """Whether rows are walked by a budget if their request names nothing."""
        return self.budget_ms is not None or self.budget_depth is not None

    def budget(self, ms: float | None, depth: float | None, max_risk: float | None) -> BudgetOptions:
        """The options of a budget of this server; raises BadSetting."""
        return BudgetOptions(ms, depth, self.budget_of, self.budget_window, max_risk)


class ServedAudit(Audit[tuple[AnyRow, RowAnswer]]):
    """An audit whose rows join the walk of all others, so that no answer waits for it.

    start: begins a walk to the end, or gives None if too many wait; such a row is dropped. tell: gets the
    kind and the text of each warning.
    """

    def __init__(
        self,
        plan: AuditPlan,
        session: RowSession[Any],
        start: Callable[[AnyRow], Future[Any] | None],
        on_exceeded: Callable[[], None],
        tell: Callable[[str, str], None],
    ) -> None:
        # The thread that walks rows for Audit never starts here: _submit takes its place.
        super().__init__(plan, session._audited_loss, on_exceeded)
        self._session, self._start, self._tell = session, start, tell
        names, segments = session.manifest.variants, len(session.manifest.segments)
        self._all_steps = tuple((segment + 1, names[0]) for segment in range(segments))
        self.dropped = 0

    def _submit(self, item: tuple[AnyRow, RowAnswer]) -> None:
        row, answer = item
        if answer.windows == 1 and answer.steps == self._all_steps:
            self.add(0.0)
            return
        future = self._start(row)
        if future is None:
            self.dropped += 1
            return
        future.add_done_callback(partial(self._compare, answer))

    def _compare(self, answer: RowAnswer, walked: Future[Any]) -> None:
        """Count the disagreement of an answer with that of a walk to the end."""
        if walked.cancelled():  # the server closes the bundle
            return
        problem = walked.exception()
        if isinstance(problem, Exception):
            self._fail(problem)
        else:
            session = self._session
            disagreement = DISAGREEMENTS[session.manifest.kind]
            self.add(disagreement(session._decision(answer), session._decision(walked.result())))
        self._warn(0)

    def _warn(self, stacklevel: int) -> None:
        with self._changed:
            messages, self._messages = self._messages, []
        for category, message in messages:
            self._tell(category.__name__, message)


class Setting:
    """How rows are walked for all requests that ask the same: at one point, or by a budget among several.

    name: of the point or the budget. spec: its rule, that of the cheapest point of a budget. numbers: those
    of its point, or of each point of its budget. deepest: those of full depth. last_used: when a request
    asked for it last (time.monotonic).
    """

    def __init__(
        self,
        name: str,
        spec: RuleSpec,
        numbers: Sequence[Numbers],
        deepest: Numbers,
        tell: Callable[[str, str], None],
        budget: Budget | None = None,
    ) -> None:
        self.name, self.spec, self.budget = name, spec, budget
        self.audit: ServedAudit | None = None
        self.last_used = time.monotonic()
        self._numbers, self._deepest, self._tell = tuple(numbers), deepest, tell
        self._is_deep = False
        self._lock = threading.Lock()
        self._costs: list[tuple[float, int]] = []  # seconds and depth of answers that the budget has not seen
        self._open = self._needed = 0  # rows that were drawn and not answered; answers until it sees them

    def draw(self) -> Numbers:
        """The numbers of rule and variant by which the next row is walked."""
        if self._is_deep:
            return self._deepest
        return self._numbers[0 if self.budget is None else self.budget.draw()[0]]

    def options(self, segments: int | None = None) -> RowOptions:
        """How the next row is walked; segments: most of them, None for all.

        The row must be given to a scheduler, which tells when it ended.
        """
        if self.budget is None and self.audit is None:
            return RowOptions(*self.draw(), segments)
        with self._lock:
            self._open += 1
        return RowOptions(*self.draw(), segments, partial(self._ended, segments is None))

    def stay_at_full_depth(self) -> None:
        """Walk rows to the end from here on."""
        self._is_deep = True
        if self.budget is not None:
            self.budget.release(len(self.budget.points) - 1)

    def _ended(self, is_whole: bool, row: AnyRow, answer: RowAnswer | None) -> None:
        """Let budget and audit count a row; is_whole: whether its request did not limit its depth."""
        self._let_budget_count(answer)
        if self.audit is not None and answer is not None and is_whole:
            self.audit.observe((row, answer), answer.exit, answer.windows)

    def _let_budget_count(self, answer: RowAnswer | None) -> None:
        """Show answers to the budget, all at once when those drawn before its last decision were given.

        With a decision after each answer, the many rows that are under way at once would be answers to
        decisions of long ago, and the controller would overshoot again and again.
        """
        with self._lock:
            self._open -= 1
            if self.budget is None:
                return
            if answer is not None:
                self._costs.append((answer.seconds, answer.depth))
            if self._open and len(self._costs) < self._needed:
                return
            costs, self._costs, self._needed = self._costs, [], self._open
        for seconds, depth in costs:
            try:
                self.budget.observe(seconds, depth)
            except RunWarning as warning:  # ee-serve makes errors of them, so that they are in its log
                self._tell(type(warning).__name__, str(warning))


class Settings:
    """All settings of one bundle: the server's own, those of points, and the budgets that requests name.

    name: of the bundle, for the log. point: that of the server's own setting. Raises BadSetting if the bundle
    cannot hold the server's budget, or promises nothing that its audit could check.
    """

    def __init__(
        self,
        name: str,
        session: RowSession[Any],
        scheduler: Scheduler[Any],
        watch: WatchOptions,
        point: str | None = None,
    ) -> None:
        self._name, self._session, self._scheduler, self._watch = name, session, scheduler, watch
        self._lock = threading.Lock()  # requests of several threads may ask for the same new setting
        self._points: dict[str, Setting] = {}
        self._budgets: dict[BudgetOptions, Setting] = {}
        self._own_budget: BudgetOptions | None = None
        manifest = session.manifest
        if watch.has_budget:
            if point is not None:
                raise BadSetting("point: a budget moves among points; leave it out")
            self._own_budget = watch.budget(
                _short(watch.budget_ms), _short(watch.budget_depth), _short(watch.max_risk)
            )
            self.own = self._open_budget(self._own_budget)
        else:
            same = [p.name for p in manifest.points if (p.rule, p.variant) == (session.rule, session.variant)]
            known = point or ("default" if "default" in same else next(iter(same), None))
            self.own = self._make(known or OWN, session.rule, session.variant, [session.draw()])
            if known is not None:
                self._points[known] = self.own
        self._add_audit(self.own, session.rule, session.variant, required=True)

    def all(self) -> list[Setting]:
        """Every setting that requests have asked for, the server's own first."""
        with self._lock:
            others = (*self._points.values(), *self._budgets.values())
        return [self.own, *(setting for setting in others if setting is not self.own)]

    def find(self, wanted: Wanted) -> Setting:
        """The setting that a request asks for.

        Raises BadSetting for points, risks and budgets that the bundle does not have, or that contradict each
        other, and TooManyBudgets.
        """
        names = [
            field for field in ("point", "budget_ms", "budget_depth") if getattr(wanted, field) is not None
        ]
        if len(names) > 1:
            raise BadSetting(f"{' and '.join(names)}: give one of them")
        if wanted.point is not None and wanted.max_risk is not None:
            raise BadSetting("point and max_risk: give one of them")
        point = wanted.point
        with self._lock:
            if names and point is None:
                return self._at_budget(wanted)
            if wanted.max_risk is not None:
                point = cheapest_point(self._session.manifest, wanted.max_risk).name
            return self.own if point is None else self._at_point(point)

    def full_depth(self, variant: str) -> Numbers:
        """The numbers of the rule that runs every segment in a variant."""
        with self._lock:
            return self._session.full_depth(variant)

    def _at_point(self, point: str) -> Setting:
        setting = self._points.get(point)
        if setting is None:
            numbers = self._session.add_point(point)
            entry = next(entry for entry in self._session.manifest.points if entry.name == point)
            setting = self._make(point, entry.rule, entry.variant, [numbers])
            self._add_audit(setting, entry.rule, entry.variant)
            self._points[point] = setting
        return setting

    def _at_budget(self, wanted: Wanted) -> Setting:
        """The setting of a budget that a request names; the one that rested longest makes place for it."""
        options = self._watch.budget(
            _short(wanted.budget_ms), _short(wanted.budget_depth), _short(wanted.max_risk)
        )
        if options == self._own_budget:
            return self.own
        now, setting = time.monotonic(), self._budgets.get(options)
        if setting is None:
            setting = self._open_budget(options)
            if len(self._budgets) >= MOST_BUDGETS:
                oldest = min(self._budgets, key=lambda known: self._budgets[known].last_used)
                rest = BUDGET_REST - (now - self._budgets[oldest].last_used)
                if rest > 0:
                    names = ", ".join(known.name for known in self._budgets.values())
                    raise TooManyBudgets(
                        f"{setting.name}: requests have named {MOST_BUDGETS} other budgets within the last "
                        f"{BUDGET_REST:g} seconds, and the server holds no more; ask for one of: {names}",
                        rest,
                    )
                del self._budgets[oldest]
            self._add_audit(setting, self._session.rule, self._session.variant)
            self._budgets[options] = setting
        setting.last_used = now
        return setting

    def _open_budget(self, options: BudgetOptions) -> Setting:
        session = self._session
        field = f"budget_{options.unit}"
        try:
            budget = open_budget(session.manifest, session.rule, session.variant, options)
        except BadSetting as problem:
            reason = str(problem).removeprefix("budget: ").removeprefix(f"{field} {options.target:g}: ")
            raise BadSetting(f"{field} {options.target:g}: {reason}") from None
        points = {point.name for point in session.manifest.points}
        numbers = [
            session.add_point(point.name) if point.name in points else session.full_depth(session.variant)
            for point in budget.points
        ]
        risk = "" if options.max_risk is None else f", max_risk {options.max_risk:g}"
        name = f"{field} {options.target:g}{risk}"
        return self._make(name, budget.points[0].rule, session.variant, numbers, budget)

    def _make(
        self,
        name: str,
        spec: RuleSpec,
        variant: str,
        numbers: Sequence[Numbers],
        budget: Budget | None = None,
    ) -> Setting:
        session = self._session
        never = (p.name for p in session.manifest.points if (p.rule.name, p.variant) == ("never", variant))
        full = next(never, None)  # a point may state other probabilities than the bare rule
        deepest = session.full_depth(variant) if full is None else session.add_point(full)
        return Setting(name, spec, numbers, deepest, partial(self._tell, name), budget)

    def _add_audit(self, setting: Setting, spec: RuleSpec, variant: str, *, required: bool = False) -> None:
        """Audit the rows of a setting; if it promises nothing, raise BadSetting or leave the audit out."""
        options, session = self._watch.audit, self._session
        if options is None:
            return
        limits = None if setting.budget is None else [point.limit for point in setting.budget.points]
        try:
            plan = plan_audit(session.manifest, spec, variant, options, limits)
        except BadSetting:
            if required:
                raise
            return
        full = RowOptions(*session.full_depth(session.manifest.variants[0]))
        setting.audit = ServedAudit(
            plan,
            session,
            lambda row: self._scheduler.submit_background(row, full),
            setting.stay_at_full_depth,
            partial(self._tell, setting.name),
        )

    def _tell(self, setting: str, kind: str, message: str) -> None:
        """Write a line about a setting to the log; it has no text of requests."""
        facts = {"time": round(time.time(), 3), "warning": kind, "model": self._name, "setting": setting}
        LOG.warning(json.dumps(facts | {"message": message}))


def cheapest_point(manifest: Manifest, max_risk: float) -> OperatingPoint:
    """The point of least depth that guarantees a risk of at most this; raises BadSetting if there is none."""
    promised = [p for p in manifest.points if p.guarantee is not None and p.guarantee.limit <= max_risk]
    if not promised:
        limits = sorted({p.guarantee.limit for p in manifest.points if p.guarantee is not None})
        known = ", ".join(f"{limit:g}" for limit in limits) or "none"
        raise BadSetting(
            f"max_risk {max_risk:g}: the risks that points of this bundle guarantee: {known}; "
            "ee-calibrate --risk makes such points"
        )
    return min(promised, key=lambda point: point.measured.get("mean_exit", float(manifest.blocks)))


def _short(value: float | None) -> float | None:
    """A number with the digits that names of settings have, so that equal names are one setting."""
    return None if value is None else float(f"{value:g}")
