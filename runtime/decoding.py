"""Generate tokens of a sequence: one walk for each, or drafts and one walk that verifies them.

The prompt and the first token of an answer run every segment with every rule.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from offramp.runtime.bundle.manifest import Manifest, RuleSpec
from offramp.runtime.draft_rounds import DraftRounds, Round
from offramp.runtime.engines.base import Engine
from offramp.runtime.errors import BadInput
from offramp.runtime.rules.base import Floats, Rule
from offramp.runtime.rules.exits import ExitRule, never
from offramp.runtime.rules.speculative import SpeculativeRule
from offramp.runtime.sampling import NOT_FINITE, Sampler
from offramp.runtime.sequence import TokenSequence, TokenSignals
from offramp.runtime.walker import walk_one

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
    logprob, top_logprobs: see sampling.Choice; None and () unless they were asked for.
    """

    id: int
    depth: int
    blocks_run: int
    drafted: bool = False
    ended: str | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def decode(
    engine: Engine[TokenSequence],
    rule: Rule,
    manifest: Manifest,
    variant: int,
    ids: Sequence[int],
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampler: Sampler | None = None,
) -> Iterator[Token]:
    """Generate tokens after a prompt: the most probable one at each position, or as a sampler chooses.

    Ends after one of stop_ids (which is returned too), after max_new_tokens, or at the longest sequence of
    the network. Raises BadInput for a prompt without tokens or one that is too long.
    """
    if not len(ids):
        raise BadInput("the prompt has no token")
    sequence = engine.begin({"input_ids": np.array([ids], np.int64)})
    try:
        sequence.runner.reserve(len(ids) + max_new_tokens)
        yield from _decode(engine, rule, manifest, variant, sequence, max_new_tokens, stop_ids, sampler)
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
    sampler: Sampler | None,
) -> Iterator[Token]:
    """Generate tokens for a sequence that has been fed its prompt; see decode."""
    token, plan, rounds = _run_prompt(engine, rule, manifest, variant, sequence, sampler)
    tokens, count, longest = [token], 0, sequence.runner.longest
    while True:
        for number, token in enumerate(tokens, 1):
            count += 1
            is_full = number == len(tokens) and sequence.length >= longest
            ended = end_of(token.id, count, max_new_tokens, stop_ids, is_full=is_full)
            yield token if ended is None else replace(token, ended=ended)
            if ended is not None:
                return
        room = min(max_new_tokens - count, longest - sequence.length)
        if rounds is not None and (drafted := rounds.run(tokens[-1].id, room)) is not None:
            tokens = tokens_of_round(drafted, manifest.blocks)
        else:
            tokens = [next_token(engine, rule, sequence, plan, tokens[-1].id, sampler)]


def _run_prompt(
    engine: Engine[TokenSequence],
    rule: Rule,
    manifest: Manifest,
    variant: int,
    sequence: TokenSequence,
    sampler: Sampler | None,
) -> tuple[Token, list[int], DraftRounds | None]:
    """Run a prompt: the first token, the plan of further ones, and rounds of drafts if the rule has them.

    The hidden states of the prompt, a megabyte a segment for 500 tokens, are freed with this function.
    """
    segments = len(manifest.segments)
    steps = walk_one(engine, FULL_DEPTH, sequence, (variant,) * segments)
    prompt_hidden = steps[0].signals.hidden
    last_hidden = None if prompt_hidden is None else prompt_hidden[-1]
    plan: list[int] = rule.first_plan(segments, variant, last_hidden)[0].tolist()
    token = _token(sampler, steps[-1].signals.logits[-1], sequence.ids, manifest.blocks, manifest.blocks)
    rounds = None
    if isinstance(rule, SpeculativeRule):
        close = close_logits(manifest, variant)
        signals = steps[-1].signals
        hidden = signals.all_hidden if isinstance(signals, TokenSignals) else None
        rounds = DraftRounds(engine, rule, manifest, variant, sequence, close, sampler, hidden)
    return token, plan, rounds


def end_of(
    id: int, count: int, max_new_tokens: int, stop_ids: Collection[int], *, is_full: bool
) -> str | None:
    """Why an answer ends with its token number `count`: STOP, LENGTH or CONTEXT; None if it goes on.

    is_full: whether the network reads no further token.
    """
    if id in stop_ids:
        return STOP
    if count == max_new_tokens:
        return LENGTH
    return CONTEXT if is_full else None


def next_token(
    engine: Engine[TokenSequence],
    rule: Rule,
    sequence: TokenSequence,
    plan: Sequence[int],
    token: int,
    sampler: Sampler | None = None,
) -> Token:
    """Generate the token after `token`, which has not been fed to the sequence yet."""
    blocks_before, blocks = sequence.blocks_run, sequence.runner.blocks
    sequence.feed([token])
    steps = walk_one(engine, rule, sequence, plan)
    depth = sum(blocks[step.segment] for step in steps)
    blocks_run = sequence.blocks_run - blocks_before
    return _token(sampler, steps[-1].signals.logits[-1], sequence.ids, depth, blocks_run)


def _token(sampler: Sampler | None, logits: Floats, ids: Sequence[int], depth: int, blocks_run: int) -> Token:
    """The token that follows `ids`: the most probable one, or as a sampler chooses; logits [vocabulary]."""
    if sampler is None:
        return Token(_best_id(logits), depth, blocks_run)
    choice = sampler.choose(logits, ids)
    return Token(choice.id, depth, blocks_run, logprob=choice.logprob, top_logprobs=choice.top_logprobs)


def tokens_of_round(drafted: Round, depth: int) -> list[Token]:
    """The tokens of a round, of which all but the last were drafts; depth: number of all blocks."""
    last = len(drafted.choices) - 1
    return [
        Token(
            choice.id,
            depth,
            0 if number else drafted.blocks_run,
            number < last,
            logprob=choice.logprob,
            top_logprobs=choice.top_logprobs,
        )
        for number, choice in enumerate(drafted.choices)
    ]


def close_logits(manifest: Manifest, variant: int) -> float:
    """How close two logits of a variant may be without a step on one token alone; see CLOSE_LOGITS."""
    return CLOSE_LOGITS if is_float(manifest, variant) else CLOSE_LOGITS_ROUNDED


def is_float(manifest: Manifest, variant: int) -> bool:
    """Whether a variant computes with floats alone: it rounds no activations to 8 bits."""
    return manifest.variants[variant] in ("fp32", "fp16")


def _best_id(logits: Floats) -> int:
    """The most probable id; logits [ids]. Raises BadInput if there is none, as argmax finds a NaN first."""
    id = int(logits.argmax())
    if not math.isfinite(logits[id]):
        raise BadInput(NOT_FINITE)
    return id
