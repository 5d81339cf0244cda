"""What rule speculative learns of drafts: acceptance rates, times of steps, and budgets for trying."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator

import numpy as np

# Limits between classes of a draft's probability. Its order is informative, its value less so: early exits of
# layerskip are right twice as often as their probability predicts.
CLASSES = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7)
# Acceptance rate of an exit before any draft was compared, and its weight in drafts. At this rate hardly any
# exit pays, so that exits are probed first.
PRIOR_RATE, PRIOR_DRAFTS = 0.3, 2.0
# Added to the rate, divided by the root of the number of drafts: an exit that would pay at the sum is probed.
OPTIMISM = 0.6
# Least lengths of the classes of a lookup's match, acceptance rates before any was compared, and their weight
# in lookups. Weights are halved at the second number for a session, at the third for a text.
MATCH_CLASSES = (2, 3, 4, 5, 6, 8, 12)
PRIOR_MATCH_RATES = (0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85)
PRIOR_MATCHES, MATCHES_KEPT, TEXT_MATCHES_KEPT = 4.0, 500.0, 32.0
TIME_SLOPE = 0.1  # time of a further token in a step, as a share of one token's, until it was measured
# In tokens of full depth: the largest budget, and the loss of one round at most, as a round may be
# interrupted by other work.
LARGEST_BUDGET, LARGEST_LOSS = 8.0, 3.0


class AcceptanceRate:
    """The acceptance rate of drafts of one source, in total and by the probability of the drafts.

    prior_rate: the rate before any draft was compared.
    """

    def __init__(self, prior_rate: float = PRIOR_RATE) -> None:
        self._prior_rate = prior_rate
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
        """Acceptance rate of all drafts; shrunk towards the prior while few were compared."""
        drafts = float(self._drafts.sum())
        return (float(self._right.sum()) + self._prior_rate * PRIOR_DRAFTS) / (drafts + PRIOR_DRAFTS)

    def optimistic(self) -> float:
        """An upper estimate of the overall acceptance rate, larger while few drafts were compared."""
        return min(0.99, self.overall() + OPTIMISM / math.sqrt(float(self._drafts.sum()) + 1))

    def at_probability(self, probability: float) -> float:
        """Acceptance rate of drafts with this probability.

        It is shrunk towards the overall rate while few were seen.
        """
        number = int(np.searchsorted(CLASSES, probability))
        right, drafts = float(self._right[number]), float(self._drafts[number])
        return (right + self.overall() * PRIOR_DRAFTS) / (drafts + PRIOR_DRAFTS)


class MatchRates:
    """Acceptance rates of lookups by the length of their match, in tokens.

    session: the rates of the whole session, of a text's own rates; these are shrunk towards them while few
    lookups of a length were compared in the text, and every lookup is counted in both.
    """

    def __init__(self, session: MatchRates | None = None) -> None:
        self._right, self._seen = [0.0] * len(MATCH_CLASSES), [0.0] * len(MATCH_CLASSES)
        self._session, self._kept = session, MATCHES_KEPT if session is None else TEXT_MATCHES_KEPT

    def record(self, length: int, right: bool) -> None:
        """Count a lookup whose match had this length, from 2 on."""
        number = bisect_right(MATCH_CLASSES, length) - 1
        if self._seen[number] >= self._kept:
            self._seen[number] /= 2
            self._right[number] /= 2
        self._seen[number] += 1
        self._right[number] += right
        if self._session is not None:
            self._session.record(length, right)

    def rate(self, length: int) -> float:
        """Acceptance rate of lookups whose match has this length."""
        return self._rate_of_class(bisect_right(MATCH_CLASSES, length) - 1)

    def rates_from(self, length: int, count: int) -> Iterator[float]:
        """Acceptance rates of lookups whose matches have this length and the next ones, `count` in all."""
        number, last = bisect_right(MATCH_CLASSES, length) - 1, len(MATCH_CLASSES) - 1
        rate = self._rate_of_class(number)
        for at in range(length, length + count):
            if number < last and at >= MATCH_CLASSES[number + 1]:
                number += 1
                rate = self._rate_of_class(number)
            yield rate

    def _rate_of_class(self, number: int) -> float:
        prior = PRIOR_MATCH_RATES[number] if self._session is None else self._session._rate_of_class(number)
        return (self._right[number] + prior * PRIOR_MATCHES) / (self._seen[number] + PRIOR_MATCHES)


class StepTimes:
    """Measured seconds of a decoder's steps by kind, segment and tokens.

    Kinds are "segment", "head", "draft" for the head that drafts, and "block" for the draft block.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, int, int], float] = {}
        self.records = 0  # so far; what was computed from the times is old when it has changed

    def record(self, kind: str, segment: int, tokens: int, seconds: float) -> None:
        """Add a measured time to the running mean.

        The first step on a number of tokens is not counted, as it binds memory.
        """
        key = kind, segment, tokens
        known = self._seconds.get(key)
        self.records += 1
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

    def expected_draft(self) -> float:
        """Expected seconds of the head that drafts; those of the full head until it was measured."""
        return self.expected("draft", 0, 1) or self.expected("head", 0, 1)

    def expected_block(self) -> float:
        """Expected seconds of the draft block on one token; 0 until it was measured."""
        return self.expected("block", 0, 1)

    def expected_from_exit(self, exit: int, segments: int, tokens: int) -> float:
        """Expected seconds of a step on tokens from an exit (0: from the start) through the head."""
        return self.expected_from_exits(segments, tokens, exit)[0]

    def expected_from_exits(self, segments: int, tokens: int, first: int = 0) -> list[float]:
        """Expected seconds of a step on tokens from each exit, from `first` on, through the head."""
        seconds = max(1e-9, self.expected("head", 0, tokens))
        from_exits = []
        for segment in range(segments - 1, first - 1, -1):
            seconds += self.expected("segment", segment, tokens)
            from_exits.append(seconds)
        return from_exits[::-1]

    def knows_one_token(self, segments: int) -> bool:
        """Whether the steps of one token through all segments and the head were measured."""
        return all(self.expected("segment", segment, 1) for segment in range(segments)) and bool(
            self.expected("head", 0, 1)
        )


class Budget:
    """What rounds may lose against rounds without drafts, in tokens of full depth.

    It is `first` at the beginning of a session, and grows by a share of all tokens and by what rounds gained,
    up to LARGEST_BUDGET.
    """

    def __init__(self, share: float, first: float) -> None:
        self._share, self._left = share, first

    @property
    def is_left(self) -> bool:
        """Whether something may be lost."""
        return self._left > 0

    def add_tokens(self, tokens: int) -> None:
        """Add the share of further tokens of the session."""
        self._left = min(self._left + self._share * tokens, LARGEST_BUDGET)

    def settle(self, gained: float) -> None:
        """Count a round that gained so many tokens; less than 0: it lost them."""
        self._left = min(self._left + max(gained, -LARGEST_LOSS), LARGEST_BUDGET)
