"""Log-likelihoods of completions under plans of a bundle that generates text, computed by the walk itself.

The prompt runs every segment, and so does the first token of the completion, which the prompt predicts and
which is not scored.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from offramp.runtime.errors import BadInput
from offramp.runtime.generator import TextGenerator
from offramp.runtime.rules import Floats, RuleSpec, bind
from offramp.runtime.rules.skip import thinned_plan
from offramp.runtime.sequence import TokenSequence
from offramp.runtime.walker import Step, walk_one


@dataclass(frozen=True)
class WalkedScore:
    """The score of a completion whose tokens walked one after another; each number is a mean over tokens.

    nats: minus the log-likelihood of the tokens after the first. depth: blocks run. seconds: time of a token
    with its head.
    """

    nats: float
    depth: float
    seconds: float


def score_plans(
    session: TextGenerator, lists: Sequence[frozenset[int]], prompt: list[int], completion: list[int]
) -> tuple[Floats, list[float]]:
    """Score a completion under plans that skip these segments (0-based), all of its tokens in one step.

    Gives the hidden state [hidden] of the prompt's last token after the first segment, and for each list the
    mean log-likelihood in nats of the tokens after the first. The session's rule must let no token propagate
    (load with rule="never"). completion: two tokens at least.
    """
    engine, segments = session.engine, len(session.manifest.segments)
    variant, never = session.manifest.variants.index(session.variant), bind(RuleSpec("never", {}), segments)
    sequence, steps = _begin(session, prompt)
    try:
        prompt_hidden = steps[0].signals.hidden
        assert prompt_hidden is not None  # decoders always give it
        hidden = prompt_hidden[-1].copy()
        sequence.rows = len(completion) - 1
        scores = []
        for skipped in lists:
            sequence.truncate(len(prompt))
            sequence.feed(completion[:-1])
            plan = thinned_plan(segments, variant, skipped)[0].tolist()
            logits = walk_one(engine, never, sequence, plan)[-1].signals.logits  # [tokens, vocabulary]
            scores.append(float(_log_likelihoods(logits, completion[1:]).mean()))
            if not math.isfinite(scores[-1]):
                raise BadInput(
                    "the network's logits are not finite (NaN or infinite): nothing can be measured"
                )
    finally:
        engine.drop(sequence)
    return hidden, scores


def score_walk(session: TextGenerator, prompt: list[int], completion: list[int]) -> WalkedScore:
    """Score a completion under the session's rule, its tokens one after another, as an answer is generated.

    completion: two tokens at least.
    """
    engine, rule, blocks = session.engine, session.bound_rule, session.manifest.segments
    variant = session.manifest.variants.index(session.variant)
    sequence, steps = _begin(session, prompt)
    try:
        prompt_hidden = steps[0].signals.hidden
        last_hidden = None if prompt_hidden is None else prompt_hidden[-1]
        plan = rule.first_plan(len(blocks), variant, last_hidden)[0].tolist()
        nats, depth, seconds = 0.0, 0, 0.0
        for token, following in itertools.pairwise(completion):
            started = time.perf_counter()
            sequence.feed([token])
            steps = walk_one(engine, rule, sequence, plan)
            logits = steps[-1].signals.logits[-1:]
            seconds += time.perf_counter() - started
            nats -= float(_log_likelihoods(logits, [following])[0])
            depth += sum(len(blocks[step.segment].blocks) for step in steps)
    finally:
        engine.drop(sequence)
    count = len(completion) - 1
    return WalkedScore(nats / count, depth / count, seconds / count)


def _begin(session: TextGenerator, prompt: list[int]) -> tuple[TokenSequence, list[Step]]:
    """A sequence whose prompt has run every segment, and the steps of that walk."""
    segments, variant = len(session.manifest.segments), session.manifest.variants.index(session.variant)
    sequence = session.engine.begin({"input_ids": np.array([prompt], np.int64)})
    never = bind(RuleSpec("never", {}), segments)
    return sequence, walk_one(session.engine, never, sequence, [variant] * segments)


def _log_likelihoods(logits: Floats, ids: Sequence[int]) -> Floats:
    """Log-likelihood in nats of each id by the logits of its place [ids]; logits [ids, vocabulary]."""
    top = logits.max(1)
    predicted = logits[np.arange(len(logits)), ids]
    values: Floats = predicted - top - np.log(np.exp(logits - top[:, None]).sum(1))
    return values
