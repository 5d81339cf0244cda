"""Budgets: hold the mean or 95th percentile of milliseconds or depth, by moving among operating points."""

from __future__ import annotations

import threading
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from offramp.runtime.bundle.manifest import Manifest, OperatingPoint, RuleSpec
from offramp.runtime.errors import BadSetting, BudgetExceeded

STATISTICS = ("mean", "p95")
WINDOW_ROWS = 1000
LEAST_WINDOW = 20
TOLERANCE = 0.05  # a window exceeds its budget if its mean is over it by more than this share
OVER = 0.05  # share of the rows that may be over a budget for the 95th percentile
OVER_TOLERANCE = 0.01
# Gain of the controller in a window, and the most of it that one correction uses: many rows may be walked
# between two decisions. A loop gain under 2 is stable, so a stream may cost four times what is estimated.
_GAINS = {"mean": (40.0, 0.5), "p95": (100.0, 4.0)}
_LEAST_ROWS, _LEAST_SHARE = 8, 0.2  # rows before time is estimated; the gain of one row in short windows
_RECENT = 64  # rows whose time is compared with their depth


@dataclass(frozen=True)
class BudgetOptions:
    """A budget as the caller gives it; see load().

    ms: milliseconds of an answer; depth: blocks run, as a share of all blocks. statistic: one of STATISTICS.
    window: rows over which it is held. max_risk: the largest limit of a guarantee that a point may have.
    """

    ms: float | None = None
    depth: float | None = None
    statistic: str = STATISTICS[0]
    window: int = WINDOW_ROWS
    max_risk: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ms is not None and self.depth is not None:
            raise BadSetting("budget_ms and budget_depth: give one of them; one controller holds one budget")
        if self.ms is None and self.depth is None:
            raise BadSetting(
                "budget_of, budget_window and max_risk are for a budget: give budget_ms or budget_depth"
            )
        if self.ms is not None and not 0 < self.ms < float("inf"):
            raise BadSetting(f"budget_ms {self.ms:g}: expected milliseconds above 0")
        if self.depth is not None and not 0 < self.depth <= 1:
            raise BadSetting(f"budget_depth {self.depth:g}: expected a share of the blocks above 0, to 1")
        if self.statistic not in STATISTICS:
            raise BadSetting(f"budget_of {self.statistic!r}: choose one of {', '.join(STATISTICS)}")
        if self.window < LEAST_WINDOW:
            raise BadSetting(f"budget_window {self.window}: expected {LEAST_WINDOW} rows or more")
        if self.max_risk is not None and not 0 <= self.max_risk < 1:
            raise BadSetting(f"max_risk {self.max_risk:g}: expected a share from 0 to below 1")

    @property
    def target(self) -> float:
        """The budget in its unit."""
        value = self.depth if self.ms is None else self.ms
        assert value is not None  # checked above
        return value

    @property
    def unit(self) -> str:
        """Its unit, "ms" or "depth"."""
        return "depth" if self.ms is None else "ms"


@dataclass(frozen=True)
class BudgetPoint:
    """An operating point that a budget may use.

    depth: mean blocks, as a share of all, of the rows it was measured on. limit: that of its guarantee.
    """

    name: str
    rule: RuleSpec
    depth: float
    limit: float | None = None


@dataclass(frozen=True)
class BudgetReport:
    """What a budget held so far.

    unit: "ms" or "depth". statistic, target: those asked for. rows: answers. mean: of all of them. over: the
    share of them above the target. windows: complete windows, one after another; exceeded: those in which the
    budget was not held. worst: the largest mean of a window or, for p95, the largest share above the target.
    shares: of the rows by point, the cheapest first.
    """

    unit: str
    statistic: str
    target: float
    rows: int
    mean: float
    over: float
    windows: int
    exceeded: int
    worst: float
    shares: dict[str, float]

    def __str__(self) -> str:
        asked = f"{self.statistic} {self.unit} {self.target:g}"
        points = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items() if share)
        return (
            f"{asked}: mean {self.mean:.4g}, {self.over:.1%} of the rows over {self.target:g}; exceeded in "
            f"{self.exceeded} of {self.windows} windows; points: {points or 'none'}"
        )


class Budget:
    """A controller that draws the point of each row, so that a stream costs what was asked for.

    Points in the order of their depth form a frontier, on which a position stands for a depth: a row between
    two points is walked at one of them, drawn at random with a seed. After each row the position moves by the
    difference of budget and cost (an integral controller; for p95 the difference of 0.05 and 1 for a row over
    the budget). The differences of a window thus add up to the move of the position over the gain: while the
    position is inside of the frontier, the mean of every window is within 1 / 40 of the frontier's width of
    the budget, whatever the stream does, if single rows are walked. It is the argument of adaptive conformal
    inference (Gibbs and Candès, arXiv 2106.00170). At the cheapest point a debt gathers, of at most what half
    a window pays back there; at full depth nothing is saved up.
    """

    def __init__(self, options: BudgetOptions, points: Sequence[BudgetPoint], blocks: int) -> None:
        self.options = options
        self.points = tuple(points)
        self.window = options.window
        gain, self._most = _GAINS[options.statistic]
        self._gain = min(gain / options.window, _LEAST_SHARE)
        self._blocks = blocks
        self._costs = [point.depth for point in points]
        self._width = self._costs[-1] - self._costs[0]
        self._timed = options.unit == "ms"
        self._mean = options.statistic == "mean"
        self._position = 0.0  # 0: the cheapest point, 1: the deepest; below 0, a debt
        if self._mean and not self._timed:
            self._position = self._at_depth(options.target)
        self._recent: deque[float] = deque(maxlen=_RECENT)  # milliseconds of a walk to full depth, estimated
        self._full_ms: float | None = None
        self._error, self._rows = 0.0, 0  # of the rows since the last decision
        self._drawn = [0] * len(points)
        self._lock = threading.Lock()
        from random import Random  # here: other sessions do not need it

        self._random = Random(options.seed).random
        self._all = _Costs()
        self._now = _Costs()  # of the window that is not complete
        self._windows = self._exceeded = 0
        self._worst = 0.0
        self._released: int | None = None

    def draw(self, rows: int = 1) -> list[int]:
        """The numbers of the points at which the next rows are walked."""
        with self._lock:
            if self._released is not None:
                return [self._released] * rows
            self._decide()
            lower, share = self._mix()
            numbers = [lower + (self._random() < share) for _ in range(rows)]
            for number in numbers:
                self._drawn[number] += 1
            return numbers

    def observe(self, seconds: float, blocks_run: int) -> None:
        """Count an answer: its seconds and the blocks that were run.

        Warns with BudgetExceeded when a window is the first one that exceeds the budget.
        """
        depth = blocks_run / self._blocks
        cost = 1e3 * seconds if self._timed else depth
        with self._lock:
            if self._timed:
                self._recent.append(1e3 * seconds / depth)
            target = self.options.target
            self._error += target - cost if self._mean else OVER - (cost > target)
            self._rows += 1
            for costs in (self._all, self._now):
                costs.add(cost, target, self._position <= 0)
            message = self._end_window() if self._now.rows == self.window else None
        if message is not None:
            warnings.warn(message, BudgetExceeded, stacklevel=4)

    def release(self, number: int) -> None:
        """Stop the control: draw gives this number from here on, and the budget may be exceeded."""
        with self._lock:
            self._released = number

    def after_fork(self) -> None:
        """Forget the lock, which a thread of the parent process may have held."""
        self._lock = threading.Lock()

    def report(self) -> BudgetReport:
        """What was held so far."""
        with self._lock:
            options, total, drawn = self.options, self._all, sum(self._drawn)
            shares = {
                point.name: number / max(drawn, 1)
                for point, number in zip(self.points, self._drawn, strict=True)
            }
            return BudgetReport(
                options.unit,
                options.statistic,
                options.target,
                total.rows,
                total.mean,
                total.over,
                self._windows,
                self._exceeded,
                self._worst,
                shares,
            )

    def _decide(self) -> None:
        """Move the position by what the rows since the last decision cost."""
        if not self._rows:
            return
        if self._timed and self._mean and (self._full_ms is None or self._all.rows % _RECENT == 0):
            first = self._full_ms is None
            if len(self._recent) < _LEAST_ROWS:
                return
            self._full_ms = sorted(self._recent)[
                len(self._recent) // 2
            ]  # a mean would count the opening of segments
            if first:
                self._position = self._at_depth(self.options.target / self._full_ms)
        scale = 1.0
        if self._mean:
            scale = self._width * (self._full_ms or 1.0)
        step = min(self._gain * self._rows, self._most) * self._error / self._rows / scale
        # What the cheapest point pays back of a row of the budget, in widths of the frontier.
        paid = OVER
        if self._mean:
            paid = max(self.options.target / (self._full_ms or 1.0) - self._costs[0], 0.0) / self._width
        most_debt = self._gain * self.window / 2 * paid
        self._position = min(max(self._position + step, -most_debt), 1.0)
        self._error, self._rows = 0.0, 0

    def _mix(self) -> tuple[int, float]:
        """The point below the position, and the share of the rows that take the one above it."""
        depth = self._costs[0] + max(self._position, 0.0) * self._width
        lower = min(bisect_right(self._costs, depth), len(self._costs) - 1) - 1
        return lower, (depth - self._costs[lower]) / (self._costs[lower + 1] - self._costs[lower])

    def _at_depth(self, depth: float) -> float:
        return min(max((depth - self._costs[0]) / self._width, 0.0), 1.0)

    def _end_window(self) -> str | None:
        """Judge the window that is complete; gives the text of the warning if it is the first to exceed."""
        window, target, unit = self._now, self.options.target, self.options.unit
        self._now = _Costs()
        self._windows += 1
        figure = window.mean if self._mean else window.over
        self._worst = max(self._worst, figure)
        allowed = OVER + max(OVER_TOLERANCE, 1 / (self._gain * self.window))
        if figure <= (target * (1 + TOLERANCE) if self._mean else allowed):
            return None
        self._exceeded += 1
        if self._exceeded > 1:
            return None
        what = f"a mean {unit} of {figure:.4g}" if self._mean else f"{figure:.1%} of the rows over it"
        share, cheapest = window.cheapest / window.rows, self.points[0].name
        why = f"{share:.0%} of them were walked at {cheapest}, the cheapest point allowed"
        if self._released is not None:
            why = "the audit has set rows to full depth"
        return (
            f"the budget of {self.options.statistic} {unit} {target:g} was not held: the last {window.rows} "
            f"rows had {what}; {why}"
        )


@dataclass
class _Costs:
    """Sums over some rows: their number, cost, those over the budget, those at the cheapest point."""

    rows: int = 0
    total: float = 0.0
    many: int = 0
    cheapest: int = 0

    def add(self, cost: float, target: float, at_cheapest: bool) -> None:
        self.rows += 1
        self.total += cost
        self.many += cost > target
        self.cheapest += at_cheapest

    @property
    def mean(self) -> float:
        return self.total / max(self.rows, 1)

    @property
    def over(self) -> float:
        return self.many / max(self.rows, 1)


def open_budget(manifest: Manifest, rule: RuleSpec, variant: str, options: BudgetOptions) -> Budget:
    """A controller over the points of a bundle with the name of this rule and this variant.

    If the rule is "never", over those of the only other rule that points of the variant have. Full depth
    counts as a point, with max_risk in the default variant alone. Raises BadSetting if fewer than two points
    are allowed, or if the budget is below what the cheapest can reach by its measured figures.
    """
    family = _family(manifest, rule, variant)
    points = budget_points(manifest, family, variant, options.max_risk)
    if len(points) < 2:
        names = ", ".join(point.name for point in points) or "none"
        risk = "" if options.max_risk is None else f" with a guarantee of at most {options.max_risk:g}"
        cure = "ee-calibrate" if options.max_risk is None else f"ee-calibrate --risk {options.max_risk:g}"
        raise BadSetting(
            f"budget: it needs two points of rule {family} in {variant}{risk}, and there is {names}; write "
            f"points with {cure}"
        )
    cheapest = points[0]
    least = cheapest.depth if options.statistic == "mean" else _p95_depth(manifest, cheapest)
    if options.unit == "depth" and options.target < least * (1 - 1e-9):
        raise BadSetting(
            f"budget_depth {options.target:g}: {cheapest.name}, the cheapest point allowed, was measured at "
            f"a {options.statistic} of {least:.3f} of the blocks; give at least that, or allow cheaper points"
        )
    return Budget(options, points, manifest.blocks)


def budget_points(
    manifest: Manifest, rule: str, variant: str, max_risk: float | None = None
) -> tuple[BudgetPoint, ...]:
    """The points of a rule and variant that a budget may use, the cheapest first, full depth among them.

    Of several at one depth, the first with the strictest guarantee. Points that state no mean exit are left
    out. max_risk: points without a guarantee of at most this limit are left out.
    """
    is_default = variant == manifest.variants[0]
    points = [
        BudgetPoint(point.name, point.rule, point.measured["mean_exit"] / manifest.blocks, _limit(point))
        for point in manifest.points
        if (point.rule.name, point.variant) == (rule, variant) and "mean_exit" in point.measured
    ]
    if is_default or max_risk is None:  # in another variant, full depth answers otherwise than the default
        never = RuleSpec("never", {})
        same = (entry for entry in manifest.points if (entry.rule.name, entry.variant) == ("never", variant))
        full = next(same, None)
        name, spec = ("full depth", never) if full is None else (full.name, full.rule)
        points.append(BudgetPoint(name, spec, 1.0, 0.0 if is_default else None))
    if max_risk is not None:
        points = [point for point in points if point.limit is not None and point.limit <= max_risk]
    points.sort(key=lambda point: (point.depth, 1.0 if point.limit is None else point.limit))
    return tuple(
        point
        for number, point in enumerate(points)
        if not number or point.depth > points[number - 1].depth + 1e-6
    )


def _limit(point: OperatingPoint) -> float | None:
    return None if point.guarantee is None else point.guarantee.limit


def _family(manifest: Manifest, rule: RuleSpec, variant: str) -> str:
    """The name of the rule whose points a budget uses."""
    if rule.name != "never":
        return rule.name
    names = dict.fromkeys(point.rule.name for point in manifest.points if point.variant == variant)
    names.pop("never", None)
    if len(names) > 1:
        raise BadSetting(f"budget: name the rule of its points, one of: {', '.join(names)}")
    return next(iter(names), rule.name)


def _p95_depth(manifest: Manifest, cheapest: BudgetPoint) -> float:
    """The least depth, as a share of the blocks, that 95 % of the rows of a point can keep to.

    By the exits of its calibration rows; without them, only the first exit is a bound.
    """
    blocks = [segment.blocks[-1] for segment in manifest.segments if segment.blocks]
    for point in manifest.points:
        if point.name == cheapest.name and point.exit_rows:
            reached, needed = 0, (1 - OVER) * sum(point.exit_rows) - 1e-9
            for rows, block in zip(point.exit_rows, blocks, strict=True):
                reached += rows
                if reached >= needed:
                    return block / manifest.blocks
    return blocks[0] / manifest.blocks
