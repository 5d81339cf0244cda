"""Self-speculative decoding: early exits draft, what is behind them verifies (LayerSkip, arXiv 2404.16710).

A token goes through the first segments alone; the head reads a guess at the next one there, which goes the
same way. Then all of them go through the other segments in one run, which reads the weights once, and the
head says what each should have been followed by: guesses are kept as far as they agree. Nothing is run twice,
and the output is that of the full depth.

How deep to draft, how far, and whether at all follows from what was accepted and what steps took, so far.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

from offramp.runtime.engines.base import Array
from offramp.runtime.engines.ort_decoder import Made
from offramp.runtime.generate import Token
from offramp.runtime.sequence import Lane

MOST = 8  # drafts in a row
# A run on several tokens rounds otherwise than runs on one. Where the two likeliest lie so close together
# (logits), the token is run alone, as the full depth would have.
CLOSE = 1e-3
CLOSE_ROUNDED = 0.1  # of variants that round activations to 8 bits, where a last bit may become a step
MEMORY = 0.998  # of what was accepted, by round of that exit: about the last five hundred count
UNUSED = 0.9995  # by round of another: an exit that was given up is tried again, about once in a hundred
# Of a draft's own probability, which says much by its order and little by its value: early exits of layerskip
# are right twice as often as they think.
BINS = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7)
FRESH, WEIGHT = 0.8, 4.0  # chance of a draft where none was made yet, and how many drafts that is worth
HOPE = 0.2  # what may be hoped for beyond, by the square root of drafts seen: what is little known is tried
SLOPE = 0.1  # of a token more in a run, by the time of one, until it was measured


class Chance:
    """How often drafts of one exit were right, in general and by their own probability."""

    def __init__(self) -> None:
        self._right, self._all = np.zeros(len(BINS) + 1), np.zeros(len(BINS) + 1)

    def note(self, probability: float, right: bool) -> None:
        """A draft proved right or wrong, all before it in its round being right."""
        at = int(np.searchsorted(BINS, probability))
        self._right[at] += right
        self._all[at] += 1

    def forget(self, kept: float) -> None:
        """A round has passed; so much is kept."""
        self._right *= kept
        self._all *= kept

    def overall(self) -> float:
        """Before a draft is made."""
        found = float((self._right.sum() + FRESH * WEIGHT) / (self._all.sum() + WEIGHT))
        return found

    def hoped(self) -> float:
        """The most that it may well be."""
        return min(0.99, self.overall() + HOPE / math.sqrt(self._all.sum() + 1))

    def of(self, probability: float) -> float:
        """Once it was made; where little was seen of its like, as of any."""
        at = int(np.searchsorted(BINS, probability))
        found = float((self._right[at] + self.overall() * WEIGHT) / (self._all[at] + WEIGHT))
        return found


class Drafting:
    """The way of tokens through drafts; made for all sequences of a session, from which it learns.

    exits: segments behind which may be drafted, counted from 1. offered: drafts that were verified, accepted:
    those that were right, rounds: verifying runs, by exit (0: steps without a draft).
    fixed: (exit, drafts) to use always, in place of choosing; for measuring.
    """

    def __init__(self, exits: Sequence[int], fixed: tuple[int, int] | None = None) -> None:
        self.exits, self.fixed = tuple(exits), fixed
        self.offered, self.accepted = dict.fromkeys(exits, 0), dict.fromkeys(exits, 0)
        self.rounds = dict.fromkeys((0, *exits), 0)
        self._chances = {exit: Chance() for exit in exits}
        self._seconds: dict[tuple[str, int, int], float] = {}  # of (what, segment, tokens)

    def __call__(self, lane: Lane, token: int, most: int) -> list[Token]:
        """One round; see generate.Way."""
        before, start = lane.ran, len(lane.ids)
        exit, wished = self._plan(lane, min(most - 1, MOST))
        lane.feed([token])
        drafts = self._draft(lane, exit, wished) if wished else []
        fed = len(lane.ids) - start - 1
        words = self._words(lane, start, drafts, self._verify(lane, exit if wished else 0, fed + 1))
        lane.truncate(start + len(words))
        self._learn(exit if wished else 0, drafts, words, fed)
        blocks, right = lane.engine.manifest.blocks, len(words) - 1
        return [
            Token(word, blocks, 0 if at else lane.ran - before, at < right) for at, word in enumerate(words)
        ]

    def _plan(self, lane: Lane, most: int) -> tuple[int, int]:
        """(exit, drafts) of which the most tokens a second are expected; no drafts where none pay."""
        if self.fixed is not None:
            return self.fixed[0], min(self.fixed[1], most)
        best, chosen = 1 / self.seconds(0, 1, len(lane.filled)), (0, 0)
        for exit in self.exits:
            chance, expected, kept = self._chances[exit].hoped(), 1.0, 1.0
            for drafts in range(1, most + 1):
                kept *= chance
                expected += kept
                takes = (drafts + 1) * self.shallow(exit) + drafts * self.seconds_of("draft", 0, 1)
                rate = expected / (takes + self.seconds(exit, drafts + 1, len(lane.filled)))
                if rate > best:
                    best, chosen = rate, (exit, drafts)
        return chosen

    def _draft(self, lane: Lane, exit: int, most: int) -> list[tuple[int, float]]:
        """Drafts with their probabilities; the lane is fed those that are worth verifying."""
        drafts: list[tuple[int, float]] = []
        end, kept = len(lane.filled), 1.0
        alone = self.seconds(0, 1, end)  # what a token takes that nobody drafted
        while True:
            for segment in range(exit):
                made = self._advance(lane, segment, 1)
            if len(drafts) == most:
                return drafts
            word, probability = _surest(self._logits(lane, made.leaving, draft=True)[0])
            drafts.append((word, probability))
            if self.fixed is None:
                kept *= self._chances[exit].of(probability)
                count = len(drafts)
                more = self.seconds(exit, count + 1, end) - self.seconds(exit, count, end)
                if kept * alone < self.shallow(exit) + more:
                    return drafts
            lane.feed([word])

    def _verify(self, lane: Lane, first: int, tokens: int) -> Array:
        """Logits [tokens, vocabulary] of all who wait, run from segment `first` on."""
        for segment in range(first, len(lane.filled)):
            made = self._advance(lane, segment, tokens)
        return self._logits(lane, made.hidden)

    def _words(self, lane: Lane, start: int, drafts: list[tuple[int, float]], logits: Array) -> list[int]:
        """What the network says behind each token from `start` on, as far as drafts said the same."""
        words: list[int] = []
        close = CLOSE if lane.engine.variant in ("fp32", "fp16") else CLOSE_ROUNDED
        for at, row in enumerate(logits):
            word = int(row.argmax())
            if len(logits) > 1 and _lead(row, word) < close:
                again = lane.ids[start + at]
                lane.truncate(start + at)
                lane.feed([again])
                words.append(int(self._verify(lane, 0, 1)[0].argmax()))
                return words
            words.append(word)
            if at + 1 == len(logits) or word != drafts[at][0]:
                return words
        raise AssertionError("logits have a row at least")

    def _learn(self, exit: int, drafts: list[tuple[int, float]], words: list[int], fed: int) -> None:
        self.rounds[exit] += 1
        for other, chance in self._chances.items():
            chance.forget(MEMORY if other == exit else UNUSED)
        if not exit:
            return
        self.offered[exit] += fed
        self.accepted[exit] += len(words) - 1
        # A draft that was not worth verifying is known all the same, where all before it were right.
        for (draft, probability), word in zip(drafts, words, strict=False):
            self._chances[exit].note(probability, draft == word)

    def _advance(self, lane: Lane, segment: int, tokens: int) -> Made:
        started = time.perf_counter()
        made = lane.advance(segment)
        self._took("segment", segment, tokens, time.perf_counter() - started)
        return made

    def _logits(self, lane: Lane, hidden: Array, draft: bool = False) -> Array:
        started = time.perf_counter()
        logits = lane.cache.logits(hidden, draft)
        self._took("draft" if draft else "head", 0, len(hidden), time.perf_counter() - started)
        return logits

    def _took(self, what: str, segment: int, tokens: int, seconds: float) -> None:
        """The first run on so many tokens binds memory, which the second does not: it does not count."""
        key = what, segment, tokens
        known = self._seconds.get(key)
        if known is None:
            self._seconds[key] = 0.0
        elif known == 0.0:
            self._seconds[key] = seconds
        else:  # a run that something else held up is no news
            self._seconds[key] += 0.1 * (min(seconds, 3 * known) - known)

    def seconds_of(self, what: str, segment: int, tokens: int) -> float:
        """What a run takes, or is believed to while nobody has seen it."""
        if known := self._seconds.get((what, segment, tokens)):
            return known
        alone = self._seconds.get((what, segment, 1), 0.0)
        return alone * (1 + SLOPE * (tokens - 1))

    def shallow(self, exit: int) -> float:
        """Seconds of a token to the exit."""
        return sum(self.seconds_of("segment", segment, 1) for segment in range(exit))

    def seconds(self, first: int, tokens: int, end: int) -> float:
        """Of so many tokens from segment `first` (0-based) to `end`, and of the head."""
        deep = (self.seconds_of("segment", segment, tokens) for segment in range(first, end))
        return max(1e-9, sum(deep) + self.seconds_of("head", 0, tokens))


def _surest(logits: Array) -> tuple[int, float]:
    """The likeliest and its probability."""
    word = int(logits.argmax())
    return word, 1 / float(np.exp(logits - logits[word]).sum())


def _lead(logits: Array, word: int) -> float:
    """Of a word over the next one."""
    top, logits[word] = float(logits[word]), -np.inf
    second, logits[word] = float(logits.max()), top
    return top - second
