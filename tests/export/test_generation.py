"""A decoder's bundle generates what transformers generates, token for token, whatever is run or cached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from offramp.models.decoder import DecoderNetwork, exit_after, hidden_states, skip_blocks
from offramp.runtime import BadInput, BadSetting, RuleSpec, load, load_generator
from offramp.runtime.decoding import Token, decode
from offramp.runtime.engines.ort_decoder import PLACES, KVCache, OrtDecoderEngine
from offramp.runtime.generator import TextGenerator
from offramp.runtime.rules.exits import ExitRule, never
from offramp.runtime.rules.speculative import Speculative
from offramp.runtime.sequence import TokenSequence
from offramp.runtime.walker import walk_one

PROMPT = [5, 9, 30, 12, 44]
EXITS = [1, 1, 3, 1, 2, 1, 3, 2, 2, 2, 3]


# Graphs of every family are tested in test_decoder. Keys that rotate with positions, and keys that do not.
@pytest.fixture(scope="module", params=tiny.with_slow(["llama", "gpt2", "qwen3"], "llama"))
def exported(request: pytest.FixtureRequest, decoder_bundle: Callable[[str], Any]) -> tuple[Any, Path]:
    return decoder_bundle(request.param)  # type: ignore[no-any-return]


@pytest.fixture
def session(exported: tuple[Any, Path]) -> TextGenerator:
    return load_generator(exported[1], rule="never")


@torch.no_grad()
def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    answer = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
    return [int(token) for token in answer[0, len(ids) :]]


def new_sequence(session: TextGenerator, ids: list[int] | None = None) -> TokenSequence:
    return session.engine.begin({"input_ids": np.array([ids or []], np.int64)})


def run(session: TextGenerator, sequence: TokenSequence, plan: tuple[int, ...]) -> Any:
    """The signals of the last segment that a plan runs."""
    rule = ExitRule(RuleSpec("never", {}), never, 0)
    return walk_one(session.engine, rule, sequence, plan)[-1].signals


def tokens_of(session: TextGenerator, rule: Any, count: int = 12, ids: list[int] = PROMPT) -> list[Token]:
    return list(decode(session.engine, rule, session.manifest, 0, ids, count, ()))


class ScriptedExits(ExitRule):
    """Every token after the first exits where a list says; 3: nowhere."""

    def __init__(self, exits: list[int]) -> None:
        super().__init__(RuleSpec("never", {}), never, 0)
        self._exits, self._number = exits, 0

    @property
    def exit_test(self) -> Any:
        return self._exit

    def _exit(self, signals: Any, segment: int) -> bool:
        exits = self._exits[self._number] == segment + 1
        self._number += exits or segment == 1
        return exits


@pytest.mark.parametrize("length", [1, 2, 7, 23])
def test_full_depth_is_transformers(exported: tuple[Any, Path], session: TextGenerator, length: int) -> None:
    for seed in range(5):
        ids = torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        tokens = list(session.tokens(ids, 17))
        assert [token.id for token in tokens] == greedy(exported[0], ids, 17)
        assert {token.depth for token in tokens} == {3}


def test_the_cache_grows_and_forgets_nothing(
    exported: tuple[Any, Path], session: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offramp.runtime.engines.ort_decoder.PLACES", 4)
    ids = [5, 9, 30]
    runner = new_sequence(session, ids).runner
    assert isinstance(runner, KVCache) and runner.places == 4 < PLACES
    count = session.longest - 5
    assert [token.id for token in session.tokens(ids, count)] == greedy(exported[0], ids, count)


def test_an_answer_ends_at_a_stop_token_or_where_the_network_ends(session: TextGenerator) -> None:
    ids = [5, 9, 30]
    whole = [token.id for token in session.tokens(ids, 12)]
    end = whole.index(whole[6])
    assert [token.id for token in session.tokens(ids, 12, [whole[6]])] == whole[: end + 1]
    longest = session.longest
    assert len(list(session.tokens(ids, 1000))) == longest - len(ids) + 1
    with pytest.raises(BadInput, match="the prompt has no token"):
        list(session.tokens([], 3))
    with pytest.raises(BadInput, match=rf"{longest + 1} tokens: this network reads {longest}"):
        list(session.tokens([5] * (longest + 1), 3))


def test_int8_generates(exported: tuple[Any, Path]) -> None:
    with load_generator(exported[1], variant="int8") as session:
        assert len(list(session.tokens([5, 9, 30], 9))) == 9


@torch.no_grad()
@pytest.mark.parametrize("exit_kv", ["deferred", "propagate"])
def test_an_exit_predicts_what_the_network_does_there(exported: tuple[Any, Path], exit_kv: str) -> None:
    """Deferred: every token has keys and values of full depth; propagated: those of its exit."""
    network = DecoderNetwork(exported[0].eval())
    with load_generator(exported[1], rule="fixed", threshold=1, exit_kv=exit_kv) as session:
        tokens = tokens_of(session, ScriptedExits(EXITS), len(EXITS) + 1)
    ids = [*PROMPT, *(token.id for token in tokens)]
    depths = torch.tensor([[3] * len(PROMPT) + EXITS])
    mask = exit_after(depths) if exit_kv == "propagate" else None
    states = list(hidden_states(network, torch.tensor([ids[:-1]]), mask))
    for place, exit in enumerate(EXITS, len(PROMPT)):
        logits = network.head(states[exit - 1][0, place])
        assert int(logits.argmax()) == ids[place + 1]
    assert [token.depth for token in tokens] == [3, *EXITS]


@torch.no_grad()
def test_a_deferred_cache_gives_the_logits_of_full_depth(
    exported: tuple[Any, Path], session: TextGenerator
) -> None:
    ids = torch.randint(3, 60, (25,), generator=torch.Generator().manual_seed(3)).tolist()
    sequence = new_sequence(session, ids[:6])
    run(session, sequence, (0, 0, 0))
    logits = exported[0](torch.tensor([ids])).logits[0].numpy()
    for place, token in enumerate(ids[6:], 6):
        sequence.feed([token])
        depth = 1 + place % 3
        signals = run(session, sequence, (0,) * depth + (-1,) * (3 - depth))
        if depth == 3:
            np.testing.assert_allclose(signals.logits[-1], logits[place], atol=1e-4)
    assert sequence.blocks_run < 3 * 25
    assert [sequence.waiting(segment) for segment in range(3)] == [0, 1, 0]


def test_many_waiting_tokens_run_in_several_steps(session: TextGenerator) -> None:
    """Forty tokens exit, then one goes deeper: runs of 16, with the result of full depth."""
    ids = torch.randint(3, 60, (45,), generator=torch.Generator().manual_seed(4)).tolist()
    early, deep = new_sequence(session, ids[:4]), new_sequence(session, ids[:4])
    for sequence in (early, deep):
        run(session, sequence, (0, 0, 0))
    for token in ids[4:]:
        early.feed([token])
        run(session, early, (0, -1, -1))
        deep.feed([token])
        last = run(session, deep, (0, 0, 0)).hidden[-1].copy()
    assert early.waiting(1) == 41
    np.testing.assert_allclose(run(session, early, (-1, 0, 0)).hidden[-1], last, atol=1e-5)
    assert early.blocks_run == deep.blocks_run


def test_a_truncated_sequence_forgets_wrong_tokens(session: TextGenerator) -> None:
    sequence = new_sequence(session, PROMPT)
    run(session, sequence, (0, 0, 0))
    sequence.feed([7])
    alone = run(session, sequence, (0, 0, 0)).hidden[-1].copy()
    for depth in (1, 3):  # wrong tokens at several depths
        sequence.truncate(len(PROMPT))
        for token in (41, 42, 43):
            sequence.feed([token])
            run(session, sequence, (0,) * depth + (-1,) * (3 - depth))
        sequence.truncate(len(PROMPT))
        assert not any(sequence.waiting(segment) for segment in range(3))
        sequence.feed([7])
        np.testing.assert_allclose(run(session, sequence, (0, 0, 0)).hidden[-1], alone, atol=1e-6)
    sequence.truncate(0)
    assert sequence.filled == [0, 0, 0]


def speculative(*fixed: int) -> Speculative:
    return Speculative(RuleSpec("speculative", {}), 3, fixed or None)  # type: ignore[arg-type]


@pytest.mark.parametrize("fixed", [(), (1, 1), (1, 3), (2, 2), (2, 8)])
def test_drafts_change_nothing(session: TextGenerator, fixed: tuple[int, ...]) -> None:
    for seed in range(4):
        ids = torch.randint(3, 60, (7,), generator=torch.Generator().manual_seed(seed)).tolist()
        rule = speculative(*fixed)
        drafted = tokens_of(session, rule, 40, ids)
        assert [token.id for token in drafted] == [token.id for token in session.tokens(ids, 40)]
        assert {token.depth for token in drafted} == {3}
        accepted, offered = sum(rule.accepted.values()), sum(rule.offered.values())
        # The last round may have accepted more than was asked for.
        assert sum(token.drafted for token in drafted) <= accepted <= offered
        if fixed:
            assert rule.offered[3 - fixed[0]] == 0 < rule.offered[fixed[0]]


def test_drafts_that_agree_are_accepted(session: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle drafts: every round yields all of its drafts and one more token."""
    full_depth = [token.id for token in session.tokens(PROMPT, 31)]
    rule, logits = speculative(1, 4), KVCache.logits
    lengths: list[int] = []

    def oracle(self: KVCache, hidden: Any, draft: bool = False) -> Any:
        if not draft:
            return logits(self, hidden)
        return np.eye(1, 60, full_depth[lengths[-1] - len(PROMPT)], dtype=np.float32) * 100

    feed = TokenSequence.feed

    def counted(self: TokenSequence, ids: list[int]) -> None:
        feed(self, ids)
        lengths.append(self.length)

    monkeypatch.setattr(KVCache, "logits", oracle)
    monkeypatch.setattr(TokenSequence, "feed", counted)
    tokens = tokens_of(session, rule, 31)
    assert [token.id for token in tokens] == full_depth
    assert rule.accepted[1] == rule.offered[1] == 24 and rule.rounds[1] == 6
    assert [token.drafted for token in tokens[1:6]] == [True] * 4 + [False]
    # Drafting tokens run block 1 alone; all five then run the other two together.
    assert [token.blocks_run for token in tokens[1:6]] == [15, 0, 0, 0, 0]


def test_a_close_call_is_run_again_alone(session: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offramp.runtime.decoding.CLOSE_LOGITS", 1e9)
    rule = speculative(2, 3)
    drafted = tokens_of(session, rule, 20)
    assert [token.id for token in drafted] == [token.id for token in session.tokens(PROMPT, 20)]
    assert rule.offered[2] > 0 and rule.accepted[2] == 0


def test_the_draft_head_has_the_first_ids(session: TextGenerator) -> None:
    runner = new_sequence(session, PROMPT).runner
    hidden = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    whole = runner.logits(hidden).copy()
    np.testing.assert_allclose(runner.logits(hidden, draft=True), whole[:, :20], atol=1e-5)
    assert whole.shape == (2, 60)


def test_skipped_segments_are_those_of_the_network(exported: tuple[Any, Path]) -> None:
    network = DecoderNetwork(exported[0].eval())
    with load_generator(exported[1], rule="skip", threshold=2) as session:
        tokens = list(session.tokens(PROMPT, 12))
    ids = torch.tensor([[*PROMPT, *(token.id for token in tokens)]])
    with torch.no_grad():
        *_, last = hidden_states(network, ids[:, :-1], skip_blocks(frozenset({1}), len(PROMPT)))
        right = network.head(last)[0].argmax(-1).tolist()
    assert right[len(PROMPT) - 1 :] == ids[0, len(PROMPT) :].tolist()
    assert [token.depth for token in tokens] == [3] + [2] * 11


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("quee", {"price": 0.1}, "is not for bundles that generate text"),
        ("gate", {"threshold": 0.5}, "no policy in this bundle"),
        ("skip", {}, "rule skip needs segments"),
        ("skip", {"segments": 4}, "segments 4 is not a whole number from 2 to 3"),
        ("speculative", {"exit": 1}, "no parameters, or both exit and drafts"),
        ("speculative", {"exit": 3, "drafts": 2}, "exit 3 is not a whole number from 1 to 2"),
        ("fixed", {"exit": 4}, "exit 4 does not exist"),
        ("max_probability", {}, "needs threshold"),
    ],
)
def test_rules_that_are_refused(
    exported: tuple[Any, Path], name: str, parameters: dict[str, float], message: str
) -> None:
    with pytest.raises(BadSetting, match=message):
        load(exported[1], rule=RuleSpec(name, parameters))


def test_rules_of_a_session(exported: tuple[Any, Path]) -> None:
    def depths(rule: str, threshold: float) -> list[tuple[int, int]]:
        with load_generator(exported[1], rule=rule, threshold=threshold) as session:
            return [(c.depth, c.blocks_run) for c in session.generate("the film was good", 12)]

    assert depths("fixed", 1) == [(3, 3)] + [(1, 1)] * 11
    # The prompt's own token, and exits that are sure of something.
    assert {depth for depth, _ in depths("max_probability", 0.02)} == {1, 3}
    assert {depth for depth, _ in depths("patience", 1)} <= {2, 3}


def test_the_engine_of_a_decoder_opens_graphs_when_they_are_used(session: TextGenerator) -> None:
    assert isinstance(session.engine, OrtDecoderEngine)
    assert not any(name.startswith(("fill", "draft")) for name in session.engine._open)
    tokens_of(session, speculative(1, 2), 6)
    assert "draft" in session.engine._open
