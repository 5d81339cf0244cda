"""Rounds of speculative decoding: a source drafts tokens, and one walk of the other segments verifies."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from offramp.runtime.bundle.manifest import Manifest
from offramp.runtime.drafts import DraftSource, ExitDrafts, HeadDrafts, LookupDrafts, TimedSteps
from offramp.runtime.engines.base import Engine
from offramp.runtime.rules.base import Floats
from offramp.runtime.rules.speculative import (
    HEAD,
    LOOKUP,
    WITHOUT_DRAFTS,
    Draft,
    SourceKey,
    SpeculativeRule,
)
from offramp.runtime.sampling import Choice, Sampler, Sampling
from offramp.runtime.sequence import KEPT_TOKENS, TokenSequence


class Round(NamedTuple):
    """The tokens of one round: the accepted drafts and one more, and the blocks that were run for them."""

    choices: list[Choice]
    blocks_run: int


class DraftRounds:
    """The rounds of one text under rule speculative.

    close: where two logits are closer than this after a step on several tokens, the token is run again alone.
    sampler: chooses the tokens; None: the most probable ones. prompt_hidden [tokens, hidden size]: hidden
    states of full depth of the last tokens of the prompt, which the sequence holds.
    """

    def __init__(
        self,
        engine: Engine[TokenSequence],
        rule: SpeculativeRule,
        manifest: Manifest,
        variant: int,
        sequence: TokenSequence,
        close: float,
        sampler: Sampler | None = None,
        prompt_hidden: Floats | None = None,
    ) -> None:
        self._rule, self._sequence, self._close = rule, sequence, close
        self._sampler = sampler or Sampler(Sampling(), ())
        self._steps = TimedSteps(engine, rule, sequence, variant, len(manifest.segments))
        self._sources: dict[SourceKey, DraftSource] = {}
        self._readers: list[DraftSource] = []  # sources that read the hidden state of every token
        self._lookup: LookupDrafts | None = None
        for key in rule.sources:
            if isinstance(key, int):
                self.add_source(key, ExitDrafts(self._steps, key, self._sampler))
        if LOOKUP in rule.sources:
            self._lookup = LookupDrafts(sequence, rule.match_rates)
            self.add_source(LOOKUP, self._lookup)
        runner = sequence.runner.draft_runner() if HEAD in rule.sources else None
        if runner is not None:
            self.add_source(HEAD, HeadDrafts(self._steps, runner, self._sampler))
        if prompt_hidden is not None:
            for reader in self._readers:
                reader.confirm(sequence.length - len(prompt_hidden), prompt_hidden)

    def add_source(self, key: SourceKey, source: DraftSource) -> None:
        """Add a source, which drafts when the rule chooses its key."""
        self._sources[key] = source
        if source.reads_hidden:
            self._readers.append(source)

    def run(self, token: int, room: int) -> Round | None:
        """Generate the tokens after `token`, which has not been fed yet: at most `room` tokens.

        None: nothing is drafted and nothing was run; the caller generates one token, as without this rule.
        """
        length, rates = 0, None
        if self._lookup is not None:
            length, rates = self._lookup.read(token), self._lookup.rates
        choice = self._rule.choose(min(room, KEPT_TOKENS) - 1, length, rates)
        if choice is None:
            if not self._readers:
                self._rule.record_plain()
                return None
            choice = WITHOUT_DRAFTS
        started, sequence = time.perf_counter(), self._sequence
        blocks_before, start = sequence.blocks_run, sequence.length
        source = self._sources.get(choice.source)
        if source is None:
            sequence.feed([token])
        drafts = [] if source is None else source.propose(token, choice)
        verified = sequence.length - start - 1
        choices, hidden = self._verify(start, 0 if source is None else source.exit, drafts[:verified])
        sequence.truncate(start + len(choices))
        for reader in self._readers:
            reader.confirm(start, np.concatenate(hidden))
        seconds, ids = time.perf_counter() - started, [chosen.id for chosen in choices]
        self._rule.record_round(choice, drafts, ids, verified, seconds, repeated=len(hidden) > 1)
        return Round(choices, sequence.blocks_run - blocks_before)

    def _verify(self, start: int, exit: int, drafts: list[Draft]) -> tuple[list[Choice], list[Floats]]:
        """Choose the tokens after the sequence's token at `start` and after each draft that agrees.

        Returns the hidden states of these tokens, too, [tokens, hidden size] of each step that was run.
        """
        steps, sequence, tokens = self._steps, self._sequence, len(drafts) + 1
        signals = steps.run_from_exit(exit, tokens)
        logits, ids = steps.logits(signals, tokens), [draft.id for draft in drafts]
        close = self._close if drafts else 0.0
        choices = self._sampler.verify(ids, logits, sequence.ids[: start + 1], close)
        hidden = [signals.hidden[: len(choices)].copy()]
        agreed = len(choices)
        if agreed == tokens or [chosen.id for chosen in choices] != ids[:agreed]:
            return choices, hidden
        # The next token is one of two that are close: it is chosen as if its step had been on it alone.
        token = sequence.ids[start + agreed]
        sequence.truncate(start + agreed)
        sequence.feed([token])
        signals = steps.run_from_exit(0, 1)
        choices.append(self._sampler.choose(steps.logits(signals, 1)[0], sequence.ids))
        return choices, [*hidden, signals.hidden.copy()]
