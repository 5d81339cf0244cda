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
from offramp.runtime import RuleSpec, Sampling, load_generator
from offramp.runtime.decoding import Token, decode
from offramp.runtime.generator import TextGenerator
from offramp.runtime.rules.exits import ExitRule, never
from offramp.runtime.rules.speculative import SpeculativeRule
from offramp.runtime.sequence import TokenSequence
from offramp.runtime.walker import walk_one

pytestmark = pytest.mark.slow  # exports decoders

PROMPT = [5, 9, 30, 12, 44]
EXITS = [1, 1, 3, 1, 2, 1, 3, 2, 2, 2, 3]


# Graphs of every family are tested in test_decoder and test_cached_attention. Keys that rotate by position,
# and keys that do not; appended caches (llama), and caches that grow in place (the others).
@pytest.fixture(scope="module", params=tiny.with_slow(["llama", "wide llama", "gpt2"], "llama", "wide llama"))
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
    for module in ("ort_decoder", "ort_slots"):
        monkeypatch.setattr(f"offramp.runtime.engines.{module}.PLACES", 4)
    ids = [5, 9, 30]
    runner: Any = new_sequence(session, ids).runner
    assert runner.places == 4
    count = session.longest - 5
    assert [token.id for token in session.tokens(ids, count)] == greedy(exported[0], ids, count)


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


def speculative(*fixed: int) -> SpeculativeRule:
    return SpeculativeRule(RuleSpec("speculative", {}), 3, fixed or None)  # type: ignore[arg-type]


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


@torch.no_grad()
def test_greedy_text_with_a_penalty_and_its_logprobs_are_those_of_transformers(
    decoder_bundle: Callable[[str], tuple[Any, Path]],
) -> None:
    model, bundle = decoder_bundle("llama")
    asked = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.4}
    with load_generator(bundle, rule="never") as session:
        for ids in ([5, 9, 30, 12, 44], [7, 7, 7]):
            answer = model.generate(
                torch.tensor([ids]), **asked, output_logits=True, return_dict_in_generate=True
            )
            expected = answer.sequences[0, len(ids) :].tolist()
            tokens = list(session.tokens(ids, 12, sampling=Sampling(repetition_penalty=1.4, logprobs=3)))
            assert [token.id for token in tokens] == expected
            for token, logits in zip(tokens, answer.logits, strict=True):
                top = logits[0].log_softmax(-1).topk(3)
                assert token.logprob == pytest.approx(float(logits[0].log_softmax(-1)[token.id]), abs=1e-4)
                assert [logprob for _, logprob in token.top_logprobs] == pytest.approx(
                    top.values.tolist(), abs=1e-4
                )
