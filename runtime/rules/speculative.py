"""Rule speculative: early exits draft tokens, the other segments verify them (LayerSkip, arXiv 2404.16710).

A token runs the first segments alone, and the head predicts the next token from there: a draft, which runs
the same segments. Then all of them run the other segments in one step, which reads the weights once, and the
head predicts what follows each of them: drafts are accepted as far as they agree with that. No segment is run
twice for a token, and the text is that of full depth.

After which segment to draft, how many tokens, and whether at all, is chosen by the acceptance rates and step
times so far, which this rule keeps for all sequences of a session. offramp.runtime.decoding does the steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.rules.base import ExitTest, Floats, Plan, Signals, full_plan, never_exits

MAX_DRAFTS = 8  # in a row
# Factors of the weights of earlier rounds in each round: 0.998 keeps about the last five hundred of the same
# exit. The weights of an exit that is not used decay more slowly, so that it is tried again about once in a
# hundred rounds.
KEPT_OF_USED, KEPT_OF_UNUSED = 0.998, 0.9995
# Limits between classes of a draft's probability. Its order is informative, its value less so: early exits of
# layerskip are right twice as often as their probability predicts.
CLASSES = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7)
PRIOR_RATE, PRIOR_DRAFTS = 0.8, 4.0  # acceptance rate before any draft was verified, and its weight in drafts
# Added to the rate, divided by the root of the number of drafts, so that exits with few drafts are tried.
OPTIMISM = 0.2
TIME_SLOPE = 0.1  # time of a further token in a step, as a share of one token's, until it was measured


class AcceptanceRate:
    """The acceptance rate of drafts of one exit, in total and by the probability of the drafts."""

    def __init__(self) -> None:
        self._right, self._drafts = np.zeros(len(CLASSES) + 1), np.zeros(len(CLASSES) + 1)

    def record(self, probability: float, right: bool) -> None:
        """Count a draft, before which every draft of its round was right."""
        number = int(np.searchsorted(CLASSES, probability))
        self._right[number] += right
        self._drafts[number] += 1

    def decay(self, kept: float) -> None:
        """Multiply the weights of all earlier rounds by this share."""
        self._right *= kept
        self._drafts *= kept

    def overall(self) -> float:
        """Acceptance rate of all drafts; shrunk towards the prior while few were verified."""
        drafts = float(self._drafts.sum())
        return (float(self._right.sum()) + PRIOR_RATE * PRIOR_DRAFTS) / (drafts + PRIOR_DRAFTS)

    def optimistic(self) -> float:
        """An upper estimate of the overall acceptance rate, larger while few drafts were verified."""
        return min(0.99, self.overall() + OPTIMISM / math.sqrt(self._drafts.sum() + 1))

    def at_probability(self, probability: float) -> float:
        """Acceptance rate of drafts with this probability.

        It is shrunk towards the overall rate while few were seen.
        """
        number = int(np.searchsorted(CLASSES, probability))
        right, drafts = float(self._right[number]), float(self._drafts[number])
        return (right + self.overall() * PRIOR_DRAFTS) / (drafts + PRIOR_DRAFTS)


class StepTimes:
    """Measured seconds of a decoder's steps by kind ("segment", "head", "draft"), segment and tokens."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, int, int], float] = {}

    def record(self, kind: str, segment: int, tokens: int, seconds: float) -> None:
        """Add a measured time to the running mean.

        The first step on a number of tokens is not counted, as it binds memory.
        """
        key = kind, segment, tokens
        known = self._seconds.get(key)
        if known is None:
            self._seconds[key] = 0.0
        elif known == 0.0:
            self._seconds[key] = seconds
        else:  # a step that was interrupted by other work counts three times its usual time at most
            self._seconds[key] += 0.1 * (min(seconds, 3 * known) - known)

    def expected(self, kind: str, segment: int, tokens: int) -> float:
        """Expected seconds of a step; estimated from the time of one token until it was measured."""
        if known := self._seconds.get((kind, segment, tokens)):
            return known
        return self._seconds.get((kind, segment, 1), 0.0) * (1 + TIME_SLOPE * (tokens - 1))

    def expected_to_exit(self, exit: int) -> float:
        """Expected seconds of one token from the first segment to an exit (1-based)."""
        return sum(self.expected("segment", segment, 1) for segment in range(exit))

    def expected_from_exit(self, exit: int, segments: int, tokens: int) -> float:
        """Expected seconds of a step on tokens from an exit (0: from the start) through the head."""
        steps = sum(self.expected("segment", segment, tokens) for segment in range(exit, segments))
        return max(1e-9, steps + self.expected("head", 0, tokens))


class SpeculativeRule:
    """Rule speculative: chooses when to draft tokens and how many; each session has one object.

    It keeps statistics of all sequences of the session.
     fixed: (exit, drafts) to use in every round instead of
    choosing, for measurements. By exit (1-based; 0: rounds without a draft): offered, the drafts that were
    verified; accepted, those that were right; rounds.
    """

    width: int = 0

    def __init__(self, spec: RuleSpec, segments: int, fixed: tuple[int, int] | None = None) -> None:
        self.spec, self.fixed = spec, fixed
        self.exits = tuple(range(1, segments))
        self.offered, self.accepted = dict.fromkeys(self.exits, 0), dict.fromkeys(self.exits, 0)
        self.rounds = dict.fromkeys((0, *self.exits), 0)
        self.times = StepTimes()
        self._segments = segments
        self._rates = {exit: AcceptanceRate() for exit in self.exits}

    @property
    def exit_test(self) -> ExitTest:
        """A test that is always False, as plans are fixed before each walk; see Rule.exit_test."""
        return never_exits

    def first_plan(self, segments: int, variant: int, hidden: Floats | None = None) -> Plan:
        """The plan that runs every segment; drafting runs the first part of it, verifying the rest."""
        return full_plan(segments, variant)

    def __call__(self, signals: Signals, memory: Floats, plan: Plan, segment: int) -> tuple[Plan, Floats]:
        return plan, memory

    def choose_drafts(self, max_drafts: int) -> tuple[int, int]:
        """Choose the exit and the number of drafts with the most expected tokens a second.

        (0, 0) means that drafting is not faster.
        """
        if self.fixed is not None:
            return self.fixed[0], min(self.fixed[1], max_drafts)
        times, best_pair = self.times, (0, 0)
        best_rate = 1 / times.expected_from_exit(0, self._segments, 1)
        for exit in self.exits:
            rate, expected_tokens, all_right = self._rates[exit].optimistic(), 1.0, 1.0
            for drafts in range(1, max_drafts + 1):
                all_right *= rate
                expected_tokens += all_right
                seconds = (drafts + 1) * times.expected_to_exit(exit) + drafts * times.expected("draft", 0, 1)
                seconds += times.expected_from_exit(exit, self._segments, drafts + 1)
                if expected_tokens / seconds > best_rate:
                    best_rate, best_pair = expected_tokens / seconds, (exit, drafts)
        return best_pair

    def worth_verifying(self, exit: int, probabilities: Sequence[float]) -> bool:
        """Whether the last of these drafts is worth one more token in the verifying step.

        probabilities: those of the drafts of this round so far, from the exit's softmax.
        """
        if self.fixed is not None:
            return True
        all_right = math.prod(self._rates[exit].at_probability(probability) for probability in probabilities)
        count, times = len(probabilities), self.times
        more = times.expected_from_exit(exit, self._segments, count + 1) - times.expected_from_exit(
            exit, self._segments, count
        )
        return (
            all_right * times.expected_from_exit(0, self._segments, 1) >= times.expected_to_exit(exit) + more
        )

    def record_round(
        self, exit: int, drafts: Sequence[tuple[int, float]], tokens: Sequence[int], verified: int
    ) -> None:
        """Update acceptance rates and counts after a round.

        exit: 0 for a round without drafts. drafts: (id, probability). tokens: ids that the full depth
        predicted, as far as drafts agreed, and one more. verified: how many of the drafts were verified.
        """
        self.rounds[exit] += 1
        for other, rate in self._rates.items():
            rate.decay(KEPT_OF_USED if other == exit else KEPT_OF_UNUSED)
        if not exit:
            return
        self.offered[exit] += verified
        self.accepted[exit] += len(tokens) - 1
        # A draft that was not verified is still known to be right or wrong if all drafts before it were
        # right.
        for (draft, probability), token in zip(drafts, tokens, strict=False):
            self._rates[exit].record(probability, draft == token)
