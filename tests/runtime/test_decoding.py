"""Decoding, on a decoder in numpy: tokens, depths and blocks that were run, by every kind of rule."""

from __future__ import annotations

from typing import Any

import fake_decoder
import numpy as np
import pytest
from fake_decoder import BLOCKS, LONGEST, MANIFEST, FakeEngine, reference

from offramp.runtime import decoding
from offramp.runtime.decoding import FULL_DEPTH, Token, decode
from offramp.runtime.errors import BadInput
from offramp.runtime.rules import RuleSpec, bind
from offramp.runtime.rules.base import full_plan, never_exits
from offramp.runtime.rules.speculative import LOOKUP
from offramp.runtime.sequence import TokenSignals

SEGMENTS, FULL = len(BLOCKS), sum(BLOCKS)
PROMPT = [5, 9, 11, 2, 7]
# With exits and with lookups that are used in every round in which they can be, and as the rule chooses.
SPECULATIVE: list[Any] = [
    ("speculative", {"exit": 2, "drafts": 4}),
    ("speculative", {"drafts": 4}),
    ("speculative", {}),
]


def tokens_of(
    rule: Any, count: int = 30, prompt: list[int] = PROMPT, stop_ids: Any = (), *, propagate: bool = False
) -> list[Token]:
    """Tokens after a prompt; rule: a rule or its name with parameters."""
    bound = bind(RuleSpec(rule[0], rule[1]), SEGMENTS) if isinstance(rule, tuple) else rule
    return list(decode(FakeEngine(propagate=propagate), bound, MANIFEST, 0, prompt, count, stop_ids))


def full_depth(count: int = 30, prompt: list[int] = PROMPT) -> list[int]:
    """Ids of full depth by the reference, one after another."""
    ids = list(prompt)
    for _ in range(count):
        hidden = reference(ids, [SEGMENTS] * len(ids))[-1, -1]
        ids.append(int(fake_decoder.logits_of(hidden).argmax()))
    return ids[len(prompt) :]


def segments_of(depth: int) -> int:
    """Number of the exit (1-based) after so many blocks."""
    return np.cumsum(BLOCKS).tolist().index(depth) + 1


def test_full_depth_equals_the_reference() -> None:
    tokens = tokens_of(FULL_DEPTH)
    assert [token.id for token in tokens] == full_depth()
    assert {(token.depth, token.blocks_run, token.drafted) for token in tokens} == {(FULL, FULL, False)}
    assert tokens == tokens_of(("never", {}))


def test_prompt_and_first_token_run_every_segment() -> None:
    for rule in (("fixed", {"exit": 1}), ("skip", {"segments": 2}), ("speculative", {})):
        assert tokens_of(rule, 1) == tokens_of(FULL_DEPTH, 1)


@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.parametrize(
    "rule", [("fixed", {"exit": 2}), ("gate", {"threshold": 0.6}), ("patience", {"patience": 1})]
)
def test_early_exits_equal_the_reference(rule: Any, propagate: bool) -> None:
    tokens = tokens_of(rule, propagate=propagate)
    depths = [segments_of(token.depth) for token in tokens]
    ids = [*PROMPT, *(token.id for token in tokens)]
    # A token's exit is the depth of the token that it predicts.
    states = reference(ids[:-1], [SEGMENTS] * (len(PROMPT) - 1) + depths, propagate=propagate)
    for position, exit in enumerate(depths, len(PROMPT) - 1):
        hidden = fake_decoder.exit_hidden_of(exit - 1, states[position, exit - 1])
        assert int(fake_decoder.logits_of(hidden).argmax()) == ids[position + 1]
    if rule[0] == "gate":
        for position, exit in enumerate(depths[1:], len(PROMPT)):
            gates = [float(fake_decoder.gate_of(n, states[position, n])) for n in range(exit)]
            assert all(gate <= 0.6 for gate in gates[:-1])
            assert exit == SEGMENTS or gates[-1] > 0.6
        assert len(set(depths[1:])) > 1, "the fake decoder should use more than one exit"


def test_blocks_run_count_tokens_that_waited() -> None:
    deferred, propagated = (tokens_of(("gate", {"threshold": 0.6}), propagate=p) for p in (False, True))
    assert all(token.blocks_run == token.depth for token in propagated)
    depths = [segments_of(token.depth) for token in deferred]
    waiting = [0] * SEGMENTS  # tokens in front of each segment
    for token, exit in zip(deferred[1:], depths[1:], strict=True):
        blocks = 0
        for segment in range(exit):
            blocks += BLOCKS[segment] * (waiting[segment] + 1)
            if segment + 1 < SEGMENTS:
                waiting[segment + 1] += waiting[segment]
            waiting[segment] = 0
        if exit < SEGMENTS:
            waiting[exit] += 1
        assert token.blocks_run == blocks
    assert any(token.blocks_run > token.depth for token in deferred)


def test_skipped_segments_are_not_counted() -> None:
    tokens = tokens_of(("skip", {"segments": 3}))
    skipped = bind(RuleSpec("skip", {"segments": 3}), SEGMENTS).first_plan(SEGMENTS, 0)[0] < 0
    depth = sum(blocks for blocks, is_skipped in zip(BLOCKS, skipped, strict=True) if not is_skipped)
    assert [(token.depth, token.blocks_run) for token in tokens[1:]] == [(depth, depth)] * 29
    assert depth < FULL and [token.id for token in tokens] != full_depth()


FIXED: list[Any] = [(1, 1), (1, 3), (2, 2), (3, 1), (3, 8), (2, 15), (LOOKUP, 1), (LOOKUP, 4), (LOOKUP, 15)]


def parameters_of(pair: Any) -> dict[str, float]:
    """Parameters of rule speculative that fix the source of drafts and their number; none for no pair."""
    if pair is None:
        return {}
    source, drafts = pair
    return {"drafts": drafts} if source == LOOKUP else {"exit": source, "drafts": drafts}


@pytest.mark.parametrize("pair", [None, *FIXED])
def test_speculative_gives_the_tokens_of_full_depth(pair: Any) -> None:
    offered_to = []
    for seed in range(2):
        prompt = np.random.default_rng(seed).integers(0, fake_decoder.VOCABULARY, 7).tolist()
        rule: Any = bind(RuleSpec("speculative", parameters_of(pair)), SEGMENTS)
        tokens = tokens_of(rule, 40, prompt)
        assert [token.id for token in tokens] == [token.id for token in tokens_of(FULL_DEPTH, 40, prompt)]
        assert {token.depth for token in tokens} == {FULL}
        accepted, offered = sum(rule.accepted.values()), sum(rule.offered.values())
        assert sum(token.drafted for token in tokens) == accepted <= offered
        if pair is not None:
            assert offered == rule.offered[pair[0]]
            offered_to.append(offered)
    assert pair is None or any(offered_to)


def test_accepted_drafts_and_blocks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [*PROMPT, *full_depth(31)]

    def right_logits(self: TokenSignals) -> Any:
        sequence_length = len(engine.sequence.ids)
        return np.eye(1, fake_decoder.VOCABULARY, ids[sequence_length], dtype=np.float32) * 100

    monkeypatch.setattr(TokenSignals, "draft_logits", right_logits)
    engine, rule = FakeEngine(), bind(RuleSpec("speculative", {"exit": 1, "drafts": 4}), SEGMENTS)
    tokens = list(decode(engine, rule, MANIFEST, 0, PROMPT, 31, ()))
    assert [token.id for token in tokens] == ids[len(PROMPT) :]
    assert rule.accepted[1] == rule.offered[1] == 24 and rule.rounds[1] == 6  # type: ignore[attr-defined]
    assert [token.drafted for token in tokens[1:6]] == [True] * 4 + [False]
    # The five tokens of a round run the first segment one by one, and the others together.
    assert [token.blocks_run for token in tokens[1:6]] == [5 * FULL, 0, 0, 0, 0]
    runs = [call for call in engine.sequence.runner.calls if call[0] == "run"]  # type: ignore[attr-defined]
    assert [(segment, tokens) for _, segment, _, tokens in runs[SEGMENTS : SEGMENTS + 8]] == [
        *[(0, 1)] * 5,
        *((segment, 5) for segment in range(1, SEGMENTS)),
    ]


def test_wrong_drafts_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [*PROMPT, *full_depth(20)]

    def wrong_logits(self: TokenSignals) -> Any:
        right = ids[len(engine.sequence.ids)] if len(engine.sequence.ids) < len(ids) else 0
        return np.eye(1, fake_decoder.VOCABULARY, (right + 1) % 24, dtype=np.float32) * 100

    monkeypatch.setattr(TokenSignals, "draft_logits", wrong_logits)
    engine, rule = FakeEngine(), bind(RuleSpec("speculative", {"exit": 2, "drafts": 3}), SEGMENTS)
    tokens = list(decode(engine, rule, MANIFEST, 0, PROMPT, 20, ()))
    assert [token.id for token in tokens] == ids[len(PROMPT) :]
    assert not any(token.drafted for token in tokens)
    assert tokens[1].blocks_run == 4 * FULL, "all four tokens are counted"


def test_close_logits_are_verified_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "CLOSE_LOGITS", 1e9)
    engine, rule = FakeEngine(), bind(RuleSpec("speculative", {"exit": 2, "drafts": 3}), SEGMENTS)
    tokens = list(decode(engine, rule, MANIFEST, 0, PROMPT, 20, ()))
    assert [token.id for token in tokens] == full_depth(20)
    assert rule.offered[2] > 0 and rule.accepted[2] == 0  # type: ignore[attr-defined]


def test_plan_of_an_answer_is_chosen_by_the_prompts_last_hidden_state() -> None:
    class Recording:
        spec, width, exit_test = RuleSpec("recording", {}), 0, staticmethod(never_exits)
        hidden: Any = None
        plans = 0

        def first_plan(self, segments: int, variant: int, hidden: Any = None) -> Any:
            self.hidden, self.plans = hidden.copy(), self.plans + 1
            plan = full_plan(segments, variant)
            plan[0, 1] = -1
            return plan

        def __call__(self, signals: Any, memory: Any, plan: Any, segment: int) -> Any:
            raise AssertionError("a rule with an exit test is not called")

    rule = Recording()
    tokens = tokens_of(rule, 5)
    np.testing.assert_allclose(rule.hidden, reference(PROMPT, [SEGMENTS] * 5)[-1, 0], atol=1e-5)
    assert rule.plans == 1 and [token.depth for token in tokens] == [FULL] + [FULL - BLOCKS[1]] * 4


@pytest.mark.parametrize("rule", [("never", {}), *SPECULATIVE])
def test_decode_ends_after_a_stop_id(rule: Any) -> None:
    ids = full_depth()
    stop = ids[7]
    tokens = tokens_of(rule, 30, stop_ids=(stop,))
    assert [token.id for token in tokens] == ids[: ids.index(stop) + 1]


@pytest.mark.parametrize("rule", [("never", {}), *SPECULATIVE])
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_decode_ends_after_max_new_tokens(rule: Any, count: int) -> None:
    assert [token.id for token in tokens_of(rule, count)] == full_depth(count)


@pytest.mark.parametrize("rule", [("never", {}), *SPECULATIVE])
def test_decode_ends_where_the_network_reads_no_further(rule: Any) -> None:
    prompt = (PROMPT * LONGEST)[: LONGEST - 3]
    tokens = tokens_of(rule, 50, prompt)
    assert [token.id for token in tokens] == full_depth(4, prompt)
    assert len(tokens_of(rule, 50, [*prompt, 1, 2, 3])) == 1


def test_prompt_that_is_empty_or_too_long_is_refused() -> None:
    with pytest.raises(BadInput, match="the prompt has no token"):
        tokens_of(FULL_DEPTH, prompt=[])
    with pytest.raises(BadInput, match="this network reads 100"):
        tokens_of(FULL_DEPTH, prompt=[1] * (LONGEST + 1))
