"""Log-likelihoods of completions: all tokens in one step, and one after another under a rule."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tiny_bundles import GENERATOR

from offramp.runtime import RuleSpec, load_generator
from offramp.runtime.rules import bind
from offramp.runtime.rules.skip import spec_of_list, thinned_plan
from offramp.runtime.tuning.completions import score_plans, score_walk
from offramp.runtime.walker import walk_one

PROMPT, COMPLETION = [5, 9, 30, 12], [8, 41, 3, 27, 15, 8, 50]
LISTS = [frozenset[int](), frozenset({1}), frozenset({2}), frozenset({0, 1})]


def test_scores_are_those_of_one_token_after_another() -> None:
    never = bind(RuleSpec("never", {}), 3)
    with load_generator(GENERATOR, rule="never") as session:
        hidden, scores = score_plans(session, LISTS, PROMPT, COMPLETION)
        for skipped, score in zip(LISTS, scores, strict=True):
            plan = thinned_plan(3, 0, skipped)[0].tolist()
            sequence = session.engine.begin({"input_ids": np.array([PROMPT])})
            steps = walk_one(session.engine, never, sequence, [0, 0, 0])
            assert steps[0].signals.hidden is not None
            assert hidden == pytest.approx(steps[0].signals.hidden[-1])
            nats = []
            for token, following in itertools.pairwise(COMPLETION):
                sequence.feed([token])
                logits = walk_one(session.engine, never, sequence, plan)[-1].signals.logits[0]
                nats.append(float(np.log(np.exp(logits).sum()) - logits[following]))
            assert score == pytest.approx(-float(np.mean(nats)), abs=1e-4)
            session.engine.drop(sequence)
    assert len(set(scores)) == len(LISTS)


@pytest.mark.parametrize("skipped", LISTS, ids=lambda skipped: "-".join(map(str, sorted(skipped))) or "none")
def test_a_walk_by_a_list_has_the_score_of_the_list(skipped: frozenset[int]) -> None:
    rule = spec_of_list(skipped) if skipped else RuleSpec("never", {})
    with load_generator(GENERATOR, rule="never") as session:
        _, (score,) = score_plans(session, [skipped], PROMPT, COMPLETION)
    with load_generator(GENERATOR, rule=rule) as session:
        walked = score_walk(session, PROMPT, COMPLETION)
    assert walked.nats == pytest.approx(-score, abs=1e-4)
    assert walked.depth == 3 - len(skipped) and walked.seconds > 0


def test_a_walk_by_a_gate_exits_as_answers_do() -> None:
    with load_generator(GENERATOR, rule="gate", threshold=0.5) as session:
        answer = list(session.tokens(PROMPT, 12, ()))
        walked = score_walk(session, PROMPT, [token.id for token in answer])
    assert walked.depth == pytest.approx(np.mean([token.depth for token in answer[1:]]))
    assert 1 < walked.depth < 3, "some tokens should exit, and not all at once"
