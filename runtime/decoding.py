"""Generate tokens of a sequence: one walk for each, or drafts and one walk that verifies them.

The prompt and the first token of an answer run every segment with every rule.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from offramp.runtime.bundle.manifest import Manifest, RuleSpec
from offramp.runtime.engines.base import Engine
from offramp.runtime.errors import BadInput
from offramp.runtime.rules.base import Floats, Rule
from offramp.runtime.rules.exits import ExitRule, never
from offramp.runtime.rules.speculative import MAX_DRAFTS, SpeculativeRule
from offramp.runtime.sequence import TokenSequence, TokenSignals
from offramp.runtime.walker import Step, walk_one

# A step on several tokens rounds differently from steps on one. If the two largest logits are this close, the
# token is run again alone, as at full depth. The first limit is for float variants, the second for variants
# that round activations to 8 bits, in which a difference in the last bit may become a whole rounding step.
CLOSE_LOGITS, CLOSE_LOGITS_ROUNDED = 1e-3, 0.1
FULL_DEPTH = ExitRule(RuleSpec("never", {}), never, 0)
# Why an answer ended: at a token or text that ends it, after max_new_tokens, at the longest sequence of the
# network.
STOP, LENGTH, CONTEXT = "stop", "length", "context"


@dataclass(frozen=True)
class Token:
    """A generated token: its id, and the blocks that were run for it.

    depth: number of blocks after which it was predicted. blocks_run: blocks that were run since the previous
    token, including those for drafts and for tokens that had waited. drafted: whether it was a draft that the
    full depth confirmed. ended: why no token follows, STOP, LENGTH or CONTEXT; None if one may follow.
    """

    id: int
    depth: int
    blocks_run: int
    drafted: bool = False
    ended: str | None = None


def decode(
    engine: Engine[TokenSequence],
    rule: Rule,
    manifest: Manifest,
    variant: int,
    ids: Sequence[int],
    max_new_tokens: int,
    stop_ids: Collection[int],
) -> Iterator[Token]:
    """Generate the most probable token at each position after a prompt.

    Ends after one of stop_ids (which is returned too), after max_new_tokens, or at the longest sequence of
    the network. Raises BadInput for a prompt without tokens or one that is too long.
    """
    if not len(ids):
        raise BadInput("the prompt has no token")
    sequence = engine.begin({"input_ids": np.array([ids], np.int64)})
    try:
        yield from _decode(engine, rule, manifest, variant, sequence, max_new_tokens, stop_ids)
    finally:
        engine.drop(sequence)


def _decode(
    engine: Engine[TokenSequence],
    rule: Rule,
    manifest: Manifest,
    variant: int,
    sequence: TokenSequence,
    max_new_tokens: int,
    stop_ids: Collection[int],
) -> Iterator[Token]:
    """Generate tokens for a sequence that has been fed its prompt; see decode."""
    segments = len(manifest.segments)
    steps = walk_one(engine, FULL_DEPTH, sequence, (variant,) * segments)
    prompt_hidden = steps[0].signals.hidden
    last_hidden = None if prompt_hidden is None else prompt_hidden[-1]
    plan: list[int] = rule.first_plan(segments, variant, last_hidden)[0].tolist()
    tokens = [Token(_best_id(steps[-1].signals.logits[-1]), manifest.blocks, manifest.blocks)]
    count, longest = 0, sequence.runner.longest
    while True:
        for number, token in enumerate(tokens, 1):
            count += 1
            ended = STOP if token.id in stop_ids else LENGTH if count == max_new_tokens else None
            if ended is None and number == len(tokens) and sequence.length >= longest:
                ended = CONTEXT
            yield token if ended is None else replace(token, ended=ended)
            if ended is not None:
                return
        room = min(max_new_tokens - count, longest - sequence.length)
        if isinstance(rule, SpeculativeRule):
            tokens = _Round(engine, rule, sequence, variant, manifest).run(tokens[-1].id, room)
        else:
            tokens = [_next_token(engine, rule, sequence, plan, tokens[-1].id)]


def _next_token(
    engine: Engine[TokenSequence], rule: Rule, sequence: TokenSequence, plan: Sequence[int], token: int
) -> Token:
    """Generate the token after `token`, which has not been fed to the sequence yet."""
    blocks_before, blocks = sequence.blocks_run, sequence.runner.blocks
    sequence.feed([token])
    steps = walk_one(engine, rule, sequence, plan)
    next_id = _best_id(steps[-1].signals.logits[-1])
    depth = sum(blocks[step.segment] for step in steps)
    return Token(next_id, depth, sequence.blocks_run - blocks_before)


class _Round:
    """One round of self-speculative decoding: drafts after an early exit, and one walk that verifies them."""

    def __init__(
        self,
        engine: Engine[TokenSequence],
        rule: SpeculativeRule,
        sequence: TokenSequence,
        variant: int,
        manifest: Manifest,
    ) -> None:
        self._engine, self._rule, self._sequence = engine, rule, sequence
        self._variant, self._segments = variant, len(manifest.segments)
        self._full_depth = manifest.blocks
        exact = manifest.variants[variant] in ("fp32", "fp16")
        self._close = CLOSE_LOGITS if exact else CLOSE_LOGITS_ROUNDED

    def run(self, token: int, room: int) -> list[Token]:
        """Generate the tokens after `token`: the accepted drafts and one more; at most `room` tokens."""
        sequence, rule = self._sequence, self._rule
        blocks_before, start = sequence.blocks_run, sequence.length
        exit, max_drafts = rule.choose_drafts(min(room - 1, MAX_DRAFTS))
        exit = exit if max_drafts else 0
        sequence.feed([token])
        drafts = self._draft(exit, max_drafts) if exit else []
        verified = sequence.length - start - 1
        ids = self._accept(start, drafts, self._verify(exit, verified + 1))
        sequence.truncate(start + len(ids))
        rule.record_round(exit, drafts, ids, verified)
        blocks_run, last = sequence.blocks_run - blocks_before, len(ids) - 1
        return [
            Token(id, self._full_depth, 0 if number else blocks_run, number < last)
            for number, id in enumerate(ids)
        ]

    def _draft(self, exit: int, max_drafts: int) -> list[tuple[int, float]]:
        """Draft ids with their probabilities; those that are worth verifying are fed to the sequence."""
        drafts: list[tuple[int, float]] = []
        plan = (self._variant,) * exit + (-1,) * (self._segments - exit)
        while True:
            signals = self._walk(plan, 1)
            if len(drafts) == max_drafts:
                return drafts
            started = time.perf_counter()
            logits = signals.draft_logits()[-1]
            self._rule.times.record("draft", 0, 1, time.perf_counter() - started)
            drafts.append(_most_probable(logits))
            if not self._rule.worth_verifying(exit, [probability for _, probability in drafts]):
                return drafts
            self._sequence.feed([drafts[-1][0]])

    def _verify(self, exit: int, tokens: int) -> Floats:
        """Run the newest tokens from an exit to full depth; returns their logits [tokens, vocabulary]."""
        self._sequence.rows = tokens
        signals = self._walk((-1,) * exit + (self._variant,) * (self._segments - exit), tokens)
        started = time.perf_counter()
        logits = signals.logits
        self._rule.times.record("head", 0, tokens, time.perf_counter() - started)
        self._sequence.rows = 1
        return logits

    def _accept(self, start: int, drafts: list[tuple[int, float]], logits: Floats) -> list[int]:
        """Ids that the full depth predicts after each token from position `start` on, while drafts agree."""
        ids: list[int] = []
        for number, row in enumerate(logits):
            id = _best_id(row)
            if len(logits) > 1 and _margin(row, id) < self._close:
                token = self._sequence.ids[start + number]
                self._sequence.truncate(start + number)
                self._sequence.feed([token])
                return [*ids, _best_id(self._verify(0, 1)[0])]
            ids.append(id)
            if number + 1 == len(logits) or id != drafts[number][0]:
                break
        return ids

    def _walk(self, plan: Sequence[int], tokens: int) -> TokenSignals:
        """Walk the waiting tokens along a plan, record step times, and return the last step's signals."""
        started = time.perf_counter()
        steps: list[Step] = walk_one(self._engine, FULL_DEPTH, self._sequence, plan)
        for segment, _, _, ended in steps:
            self._rule.times.record("segment", segment, tokens, ended - started)
            started = ended
        signals = steps[-1].signals
        assert isinstance(signals, TokenSignals)
        return signals


def _best_id(logits: Floats) -> int:
    """The most probable id; logits [ids]. Raises BadInput if there is none, as argmax finds a NaN first."""
    id = int(logits.argmax())
    if not math.isfinite(logits[id]):
        raise BadInput("the network's logits are not finite (NaN or infinite), so they name no token")
    return id


def _most_probable(logits: Floats) -> tuple[int, float]:
    """The most probable id and its probability; logits [ids]."""
    id = _best_id(logits)
    return id, 1 / float(np.exp(logits - logits[id]).sum())


def _margin(logits: Floats, id: int) -> float:
    """The logit of an id minus the largest of the others."""
    top, logits[id] = float(logits[id]), -np.inf
    second, logits[id] = float(logits.max()), top
    return top - second
