"""Sources of drafts: early exits, a draft head, and lookups of what followed the same tokens in a text.

A source drafts for one text. When it has drafted, the newest token and the drafts to verify have been fed
to the sequence, and have run the first segments up to the exit of the source; offramp.runtime.draft_rounds
runs the others and the head.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from offramp.runtime.engines.base import Engine
from offramp.runtime.rules.base import Floats
from offramp.runtime.rules.draft_stats import MatchRates
from offramp.runtime.rules.speculative import Draft, DraftChoice, SpeculativeRule
from offramp.runtime.sampling import Sampler
from offramp.runtime.sequence import CacheRunner, TokenSequence, TokenSignals
from offramp.runtime.walker import walk_one

SHORTEST_MATCH, LONGEST_GRAM = 2, 8  # tokens of a match where it begins
# N-grams in one part of an index; the part before it is kept as well. A token has seven.
INDEX_PART = 65_536
_ID_BITS = 32


class DraftSource(Protocol):
    """A source of drafts for one text."""

    @property
    def exit(self) -> int:
        """The exit (1-based) up to which it runs the tokens that it feeds; 0 if it runs no segment."""
        ...

    @property
    def reads_hidden(self) -> bool:
        """Whether it needs the hidden state of every token; see confirm."""
        ...

    def propose(self, token: int, choice: DraftChoice) -> list[Draft]:
        """Draft the tokens after `token`, as many as the choice allows at most.

        Feeds `token` and the drafts that are to be verified to the sequence, and runs them up to the exit. A
        draft that is not worth verifying is the last one and is not fed. For a probe, one draft is returned
        and `token` alone is fed.
        """
        ...

    def confirm(self, start: int, hidden: Floats) -> None:
        """Read the hidden states of full depth [tokens, hidden size] of tokens from place `start` on.

        It is called in order, once for each token, if reads_hidden is true; of a prompt perhaps not for all.
        """
        ...


class TimedSteps:
    """Steps of one sequence along parts of the segments; the rule gets their times."""

    def __init__(
        self,
        engine: Engine[TokenSequence],
        rule: SpeculativeRule,
        sequence: TokenSequence,
        variant: int,
        segments: int,
    ) -> None:
        self.sequence, self.rule = sequence, rule
        self._engine, self._variant, self._segments = engine, variant, segments

    def run_to_exit(self, exit: int) -> TokenSignals:
        """Run the newest token to an exit (1-based)."""
        return self._run(0, exit, 1)

    def run_from_exit(self, exit: int, tokens: int) -> TokenSignals:
        """Run the newest tokens from an exit (0: from the start) to full depth.

        The signals have a row for each of them, and are valid until the next step.
        """
        self.sequence.rows = tokens
        signals = self._run(exit, self._segments, tokens)
        self.sequence.rows = 1
        return signals

    def logits(self, signals: TokenSignals, tokens: int) -> Floats:
        """Logits [tokens, vocabulary] of the full head."""
        started = time.perf_counter()
        logits = signals.logits
        self.rule.times.record("head", 0, tokens, time.perf_counter() - started)
        return logits

    def draft_logits(self, signals: TokenSignals) -> Floats:
        """Logits [ids] of the head that drafts."""
        started = time.perf_counter()
        logits: Floats = signals.draft_logits()[-1]
        self.rule.times.record("draft", 0, 1, time.perf_counter() - started)
        return logits

    def _run(self, first: int, end: int, tokens: int) -> TokenSignals:
        plan = (-1,) * first + (self._variant,) * (end - first) + (-1,) * (self._segments - end)
        started = time.perf_counter()
        steps = walk_one(self._engine, self.rule, self.sequence, plan)
        for segment, _, _, ended in steps:
            self.rule.times.record("segment", segment, tokens, ended - started)
            started = ended
        signals = steps[-1].signals
        assert isinstance(signals, TokenSignals)
        return signals


class ExitDrafts:
    """Drafts of an early exit: each token runs the first segments, and the head predicts the next one."""

    reads_hidden = False

    def __init__(self, steps: TimedSteps, exit: int, sampler: Sampler) -> None:
        self.exit = exit
        self._steps, self._sampler = steps, sampler

    def propose(self, token: int, choice: DraftChoice) -> list[Draft]:
        """Draft as long as the next draft is worth verifying; see DraftSource.propose."""
        sequence, rule, drafts = self._steps.sequence, self._steps.rule, list[Draft]()
        sequence.feed([token])
        while True:
            signals = self._steps.run_to_exit(self.exit)
            if len(drafts) == choice.drafts:
                return drafts
            logits = self._steps.draft_logits(signals)
            # Of drawn tokens it has the random numbers of the place, with which the full depth draws too.
            id = self._sampler.choose(logits, sequence.ids).id
            drafts.append(Draft(id, _probability(logits, id)))
            if choice.probe or not rule.worth_verifying(choice.source, [draft[1] for draft in drafts]):
                return drafts
            sequence.feed([id])

    def confirm(self, start: int, hidden: Floats) -> None:
        """Do nothing; see DraftSource.confirm."""


class HeadDrafts:
    """Drafts of a draft head: its block predicts hidden states of full depth, from which tokens follow.

    Of each token the block reads the hidden state of full depth of the token before it; of a draft, what it
    predicted itself. Once the full depth has run a token, its hidden state replaces the prediction in the
    block's cache. runner: of the block. Hidden states that nobody gave count as zeros.
    """

    exit, reads_hidden = 0, True

    def __init__(self, steps: TimedSteps, runner: CacheRunner, sampler: Sampler) -> None:
        self._steps, self._runner, self._sampler = steps, runner, sampler
        self._filled = 0  # first tokens of the text that ran the block with hidden states of full depth
        # Hidden states that the block has not read, of `_known` tokens from the one before place `_filled`
        # on.
        self._states, self._known = [self._zeros(1)], 1

    def confirm(self, start: int, hidden: Floats) -> None:
        """Keep the hidden states until the block reads them; see DraftSource.confirm."""
        self._fill_up_to(start)
        self._states.append(hidden.copy())
        self._known += len(hidden)

    def propose(self, token: int, choice: DraftChoice) -> list[Draft]:
        """Draft as long as a draft is worth verifying; see DraftSource.propose."""
        sequence, rule, drafts = self._steps.sequence, self._steps.rule, list[Draft]()
        place = sequence.length  # of the token
        sequence.feed([token])
        self._runner.make_room(place + choice.drafts)
        self._fill_up_to(place)
        ids, before = sequence.ids[self._filled :], np.concatenate(self._states)
        predicted = self._run(ids, self._filled, before)
        self._filled, self._states, self._known = place + 1, [], 0
        while True:
            logits = self._draft_logits(predicted)
            # Of drawn tokens it has the random numbers of the place, with which the full depth draws too.
            id = self._sampler.choose(logits, sequence.ids).id
            drafts.append(Draft(id, _probability(logits, id)))
            probabilities = [draft.probability for draft in drafts]
            if choice.probe or not rule.worth_verifying(choice.source, probabilities):
                return drafts
            sequence.feed([id])
            if len(drafts) == choice.drafts:
                return drafts
            predicted = self._run([id], place + len(drafts), predicted)

    def _fill_up_to(self, place: int) -> None:
        """Add zeros for tokens before a place whose hidden states are not known."""
        missing = place - (self._filled - 1 + self._known)
        if missing > 0:
            self._states.append(self._zeros(missing))
            self._known += missing

    def _zeros(self, tokens: int) -> Floats:
        return np.zeros((tokens, self._runner.hidden_size), np.float32)

    def _run(self, ids: Sequence[int], start: int, before: Floats) -> Floats:
        """Run the block on tokens; returns the prediction for the last one [1, hidden size]."""
        started = time.perf_counter()
        predicted = self._runner.run(0, ids, start, before).exit_hidden
        self._steps.rule.times.record("block", 0, len(ids), time.perf_counter() - started)
        return predicted if len(ids) == 1 else predicted[-1:]

    def _draft_logits(self, predicted: Floats) -> Floats:
        started = time.perf_counter()
        logits: Floats = self._runner.logits(predicted, draft=True)[-1]
        self._steps.rule.times.record("draft", 0, 1, time.perf_counter() - started)
        return logits


class LookupDrafts:
    """Drafts of lookups: what followed the last tokens where they occurred before in the text.

    rates: acceptance rates of lookups in this text. session_rates: those of the session.
    """

    exit, reads_hidden = 0, False

    def __init__(self, sequence: TokenSequence, session_rates: MatchRates) -> None:
        self.rates = MatchRates(session_rates)
        self._sequence, self._index = sequence, LookupIndex()

    def read(self, token: int) -> int:
        """Read the tokens of the sequence that are new, and the token after them.

        Returns the length of the match at the end of the text, 0 for none. Each token of an answer shows
        whether a lookup before it would have been right, which is counted in the rates.
        """
        index, ids = self._index, self._sequence.ids
        if not index.ids:  # of a prompt no rate is learned
            for id in ids:
                index.add(id)
        for id in (*ids[len(index.ids) :], token):
            length = index.match_length
            is_predicted = index.add(id)
            if length:
                self.rates.record(length, is_predicted)
        return index.match_length

    def propose(self, token: int, choice: DraftChoice) -> list[Draft]:
        """Draft what followed the match; see DraftSource.propose."""
        ids, length = self._index.continuation(choice.drafts), self._index.match_length
        self._sequence.feed([token, *ids])
        return [Draft(id, self.rates.rate(length + number)) for number, id in enumerate(ids)]

    def confirm(self, start: int, hidden: Floats) -> None:
        """Do nothing; see DraftSource.confirm."""


class LookupIndex:
    """Where the tokens at the end of a text occurred before in it.

    ids: the text so far. match_length: number of tokens at its end that also occurred before, 0 for fewer
    than SHORTEST_MATCH. Of several places the one with the longest match is taken, and of equally long ones
    the latest; matches are told apart up to LONGEST_GRAM tokens, and a place is kept as long as its tokens
    follow. The time for a token does not depend on the length of the text; of a long one, the oldest n-grams
    are forgotten (INDEX_PART).
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.match_length = 0
        self._next = 0  # the place after the match; 0 for no match
        self._grams = [0] * (LONGEST_GRAM + 1)  # the last n ids as one number, by n
        self._places: dict[int, int] = {}  # n-gram -> the place after it, where it occurred last
        self._older_places: dict[int, int] = {}

    def add(self, id: int) -> bool:
        """Add a token; returns whether it is the one that followed the match."""
        is_predicted = self.match_length > 0 and self.ids[self._next] == id
        self.ids.append(id)
        if is_predicted:
            self._next += 1
            self.match_length += 1
        else:
            self._next = self.match_length = 0
        count, grams, places, last = len(self.ids), self._grams, self._places, id + 1
        for size in range(min(LONGEST_GRAM, count), SHORTEST_MATCH - 1, -1):
            # No id is 0 here, so n-grams of different sizes are different numbers.
            gram = grams[size] = grams[size - 1] << _ID_BITS | last
            if not self._next:
                self._next = places.get(gram) or self._older_places.get(gram, 0)
                self.match_length = size if self._next else 0
            places[gram] = count
        grams[1] = last
        if len(places) > INDEX_PART:
            self._older_places, self._places = places, {}
        return is_predicted

    def continuation(self, count: int) -> list[int]:
        """The `count` ids that followed the match; where they reach the end of the text, they repeat."""
        ids = self.ids[self._next : self._next + count]
        known = len(self.ids) - self._next
        while len(ids) < count:
            ids.append(ids[len(ids) - known])
        return ids


def _probability(logits: Floats, id: int) -> float:
    """The probability of an id; logits [ids]."""
    return 1 / float(np.exp(logits - logits[id]).sum())
