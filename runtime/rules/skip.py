"""Rule skip: the same segments are skipped for every token of an answer (after arXiv 2410.20022).

Which ones is a number, so many are run and the others are skipped evenly, or a list, such as ee-calibrate
searches (tuning.search_skips).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.errors import BadSetting
from offramp.runtime.rules.base import ExitTest, Floats, Plan, Signals, full_plan, never_exits

LIST = ":-"  # in the text of a rule, between its name and the segments that it skips


def skipped_segments(segments: int, run: int) -> frozenset[int]:
    """Choose the segments (0-based) to skip so that `run` segments are run.

    The segments between the first and the last are divided into equal parts, one for each skipped segment,
    and the middle of each part is skipped.
    """
    count = segments - run
    return frozenset(1 + int((part + 0.5) * (segments - 2) / count) for part in range(count))


def listed_segments(spec: RuleSpec, segments: int) -> frozenset[int]:
    """The segments (0-based) that the list of a spec names, of so many segments.

    Raises BadSetting for a segment that does not exist or is named twice, and for a list of all.
    """
    for number in spec.skipped:
        if not 1 <= number <= segments:
            raise BadSetting(
                f"rule skip: segment {number} does not exist; there are segments 1 to {segments}"
            )
    skipped = frozenset(number - 1 for number in spec.skipped)
    if len(skipped) < len(spec.skipped):
        raise BadSetting(f"rule skip: {list(spec.skipped)} names a segment twice; name each once")
    if len(skipped) == segments:
        raise BadSetting(f"rule skip: all {segments} segments are skipped; leave one at least")
    return skipped


def spec_of_list(skipped: Iterable[int]) -> RuleSpec:
    """The spec of rule skip for a list of segments (0-based)."""
    return RuleSpec("skip", {}, skipped=tuple(sorted(segment + 1 for segment in skipped)))


def read_list(text: str) -> RuleSpec:
    """Read a rule with its list of segments (from 1), such as "skip:-3-7-9"; raises BadSetting."""
    name, _, numbers = text.partition(LIST)
    if name != "skip":
        raise BadSetting(f"rule {text!r}: only rule skip has a list of segments, such as skip:-3-7-9")
    words = numbers.split("-")
    if not all(word.isascii() and word.isdigit() and len(word) < 6 for word in words):
        raise BadSetting(
            f"rule {text!r}: expected the segments to skip, a minus sign before each, such as skip:-3-7-9"
        )
    return RuleSpec("skip", {}, skipped=tuple(map(int, words)))


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
