"""Rule select: which segments a token skips by its controllers, and what it leaves in their caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import fake_decoder
import numpy as np
import pytest
from fake_decoder import BLOCKS, HIDDEN, MANIFEST, FakeEngine, FakeRunner
from tiny_bundles import GENERATOR

from offramp.runtime import load_generator
from offramp.runtime.decoding import Token, decode
from offramp.runtime.errors import BadSetting
from offramp.runtime.rules import RowSignals, RuleSpec, bind
from offramp.runtime.sequence import SegmentOutput, TokenSequence

SEGMENTS, FULL = len(BLOCKS), sum(BLOCKS)
PROMPT = [5, 9, 11, 2, 7]
_CONTROLLERS = np.random.default_rng(8).normal(0, 3, (HIDDEN, SEGMENTS)).astype(np.float32)


def run_probabilities(hidden: Any) -> Any:
    """P(run) of every segment [..., segments]; hidden [..., hidden size] before it."""
    return 1 / (1 + np.exp(-hidden @ _CONTROLLERS))


class ControlledRunner(FakeRunner):
    """A fake decoder with controllers."""

    def run(self, segment: int, ids: Sequence[int], start: int, hidden: Any) -> SegmentOutput:
        output = super().run(segment, ids, start, hidden)
        ahead = run_probabilities(output.hidden)[:, segment + 1 : -1]
        return output._replace(controller=ahead if ahead.shape[1] else None)


class ControlledEngine(FakeEngine):
    """An engine whose sequences leave keys in the segments that their tokens skip."""

    def begin(self, inputs: Mapping[str, Any]) -> TokenSequence:
        self.sequence = TokenSequence(ControlledRunner(), propagate=True)
        self.sequence.feed(inputs["input_ids"][0].tolist())
        return self.sequence


def select(threshold: float) -> Any:
    return bind(RuleSpec("select", {"threshold": threshold}), SEGMENTS)


def last_states(ids: Sequence[int], threshold: float) -> tuple[Any, list[int]]:
    """Hidden states [tokens, hidden size] after the last segment, and blocks run, token by token.

    Tokens of the prompt run all segments; a token that skips a segment leaves its hidden state there as key.
    """
    keys = np.full((len(ids), SEGMENTS, HIDDEN), np.nan, np.float32)
    states, depths = np.zeros((len(ids), HIDDEN), np.float32), list[int]()
    for position, id in enumerate(ids):
        hidden, depth = fake_decoder._EMBEDDINGS[id], 0
        for segment in range(SEGMENTS):
            keys[position, segment] = hidden
            always = position < len(PROMPT) or segment in (0, SEGMENTS - 1)
            if always or run_probabilities(hidden)[segment] > threshold:
                hidden = fake_decoder.block_of(segment, hidden, keys[: position + 1, segment])
                depth += BLOCKS[segment]
        states[position] = hidden
        depths.append(depth)
    return states, depths


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_tokens_are_those_of_the_reference(threshold: float) -> None:
    tokens: list[Token] = list(decode(ControlledEngine(), select(threshold), MANIFEST, 0, PROMPT, 40, ()))
    ids = [*PROMPT, *(token.id for token in tokens)]
    states, depths = last_states(ids[:-1], threshold)
    predicted = fake_decoder.logits_of(states).argmax(-1).tolist()
    assert predicted[len(PROMPT) - 1 :] == [token.id for token in tokens]
    assert [token.depth for token in tokens] == [FULL, *depths[len(PROMPT) :]]
    assert all(token.blocks_run == token.depth for token in tokens)
    assert len({token.depth for token in tokens}) > 1, "some tokens should skip a segment and others not"


@pytest.mark.parametrize(("threshold", "depths"), [(-1.0, {FULL}), (1.0, {BLOCKS[0] + BLOCKS[-1]})])
def test_first_and_last_segment_always_run(threshold: float, depths: set[int]) -> None:
    _, *later = decode(ControlledEngine(), select(threshold), MANIFEST, 0, PROMPT, 10, ())
    assert {token.depth for token in later} == depths


def test_a_skipped_segment_is_filled_and_not_run() -> None:
    engine = ControlledEngine()
    tokens = decode(engine, select(1.0), MANIFEST, 0, PROMPT, 2, ())
    next(tokens)
    runner = engine.sequence.runner
    assert isinstance(runner, ControlledRunner)
    runner.calls.clear()
    next(tokens)
    assert [call for call in runner.calls if call[0] != "head"] == [
        ("run", 0, 5, 1),
        ("fill", 1, 5, 1),
        ("fill", 2, 5, 1),
        ("run", 3, 5, 1),
    ]


def test_each_row_skips_up_to_its_first_likely_segment() -> None:
    controller = np.array([[0.9, 0.1, 0.1], [0.1, 0.6, 0.1], [0.2, 0.3, 0.4], [0.1, 0.5, 0.9]], np.float32)
    signals = RowSignals(np.zeros((4, 2), np.float32), controller=controller)
    plan, memory = np.ones((4, 6), np.int8), np.zeros((4, 0), np.float32)
    rule = bind(RuleSpec("select", {"threshold": 0.5}), 6)
    new_plan, _ = rule(signals, memory, plan, 1)
    assert new_plan.tolist() == [
        [1, 1, 1, 1, 1, 1],
        [1, 1, -1, 1, 1, 1],
        [1, 1, -1, -1, -1, 1],
        [1, 1, -1, -1, 1, 1],  # one half is not above the threshold
    ]
    assert plan.min() == 1, "the plan that was given must not change"


def test_nothing_is_decided_before_the_last_segment() -> None:
    signals = RowSignals(np.zeros((2, 2), np.float32))
    plan, memory = np.zeros((2, SEGMENTS), np.int8), np.zeros((2, 0), np.float32)
    assert select(0.5)(signals, memory, plan, SEGMENTS - 2)[0] is plan
    with pytest.raises(BadSetting, match="rule select: segment 1 has no controllers in this bundle"):
        select(0.5)(signals, memory, plan, 0)


def test_bundle_without_controllers_is_refused() -> None:
    with pytest.raises(BadSetting, match="rule select: segment_00 has no controllers in this"):
        load_generator(GENERATOR, rule="select")
