"""Rule skip: the same segments are skipped for every token of an answer (after arXiv 2410.20022)."""

from __future__ import annotations

from dataclasses import dataclass, field

from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.rules.base import ExitTest, Floats, Plan, Signals, full_plan, never_exits


def skipped_segments(segments: int, run: int) -> frozenset[int]:
    """Choose the segments (0-based) to skip so that `run` segments are run.

    The segments between the first and the last are divided into equal parts, one for each skipped segment,
    and the middle of each part is skipped.
    """
    count = segments - run
    return frozenset(1 + int((part + 0.5) * (segments - 2) / count) for part in range(count))


def thinned_plan(segments: int, variant: int, skipped: frozenset[int]) -> Plan:
    """The plan [1, segments] that runs every segment but the skipped ones, in one variant."""
    plan = full_plan(segments, variant)
    plan[0, sorted(skipped)] = -1
    return plan


@dataclass(frozen=True)
class SkipRule:
    """Rule skip: every token of an answer skips the same segments; prompt and first token run all."""

    spec: RuleSpec
    skipped: frozenset[int]
    width: int = field(default=0, init=False)

    @property
    def exit_test(self) -> ExitTest:
        """A test that is always False, as the plan is fixed before the walk; see Rule.exit_test."""
        return never_exits

    def first_plan(self, segments: int, variant: int, hidden: Floats | None = None) -> Plan:
        """The plan without the skipped segments; see Rule.first_plan."""
        return thinned_plan(segments, variant, self.skipped)

    def __call__(self, signals: Signals, memory: Floats, plan: Plan, segment: int) -> tuple[Plan, Floats]:
        return plan, memory
