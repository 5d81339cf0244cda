"""Rule skip: the same segments are skipped for every token of an answer (after arXiv 2410.20022)."""

from __future__ import annotations

from dataclasses import dataclass, field

from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.rules.base import ExitTest, Floats, Plan, Signals, full_plan, never_exits


def skipped_segments(segments: int, run: int) -> frozenset[int]:
    """Segments (0-based) to skip so that `run` of them are run.

    What lies between the first and the last is divided into equal parts, one for each skipped segment, and
    the middle of each part is skipped.
    """
    count = segments - run
    return frozenset(1 + int((part + 0.5) * (segments - 2) / count) for part in range(count))


def thinned_plan(segments: int, variant: int, skipped: frozenset[int]) -> Plan:
    """Every segment but the skipped ones, in one variant [1, segments]."""
    plan = full_plan(segments, variant)
    plan[0, sorted(skipped)] = -1
    return plan


@dataclass(frozen=True)
class Skip:
    """Every token of an answer skips the same segments; the prompt and the first token run all."""

    spec: RuleSpec
    skipped: frozenset[int]
    width: int = field(default=0, init=False)

    @property
    def exit_test(self) -> ExitTest:
        """The plan is fixed before the walk; see Rule.exit_test."""
        return never_exits

    def first_plan(self, segments: int, variant: int, hidden: Floats | None = None) -> Plan:
        """The thinned plan; see Rule.first_plan."""
        return thinned_plan(segments, variant, self.skipped)

    def __call__(self, signals: Signals, memory: Floats, plan: Plan, segment: int) -> tuple[Plan, Floats]:
        return plan, memory
