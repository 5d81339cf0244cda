"""Sources of drafts: the index of lookups against a search of the text, and rounds on a decoder in numpy."""

from __future__ import annotations

import itertools
import time
from typing import Any

import fake_decoder
import numpy as np
import pytest
from fake_decoder import BLOCKS, MANIFEST, VOCABULARY, FakeEngine, reference
from tiny_bundles import GENERATOR

from offramp.runtime import drafts, load_generator
from offramp.runtime.decoding import FULL_DEPTH, Token, decode
from offramp.runtime.draft_rounds import DraftRounds
from offramp.runtime.drafts import LONGEST_GRAM, LookupDrafts, LookupIndex
from offramp.runtime.rules import RuleSpec, bind
from offramp.runtime.rules.draft_stats import MatchRates
from offramp.runtime.rules.speculative import LOOKUP, Draft, DraftChoice, SpeculativeRule
from offramp.runtime.sampling import Sampling
from offramp.runtime.sequence import TokenSequence, TokenSignals

SEGMENTS, FULL = len(BLOCKS), sum(BLOCKS)
PROMPT, REPEATED = [5, 9, 11, 2, 7], [5, 9, 11, 2, 7, 3] * 4


def index_of(ids: list[int]) -> LookupIndex:
    index = LookupIndex()
    for id in ids:
        index.add(id)
    return index


def longest_matches(ids: list[int]) -> tuple[int, list[int]]:
    """Length, up to LONGEST_GRAM, of the longest match with the end of a text, and the places after it."""
    for size in range(min(LONGEST_GRAM, len(ids) - 1), 1, -1):
        places = [at for at in range(size, len(ids)) if ids[at - size : at] == ids[-size:]]
        if places:
            return size, places
    return 0, []


@pytest.mark.parametrize("vocabulary", [2, 3, 6, 12])
def test_match_is_the_longest_of_the_text(vocabulary: int) -> None:
    ids = np.random.default_rng(vocabulary).integers(0, vocabulary, 300).tolist()
    index, matches = LookupIndex(), 0
    for count, id in enumerate(ids, 1):
        index.add(id)
        length, places = longest_matches(ids[:count])
        assert min(index.match_length, LONGEST_GRAM) == length
        if length:
            matches += 1
            assert index.continuation(1)[0] in [ids[place] for place in places]
    assert matches > 20


def test_of_equally_long_matches_the_latest_is_taken() -> None:
    index = index_of([1, 2, 7, 9, 1, 2, 8, 9, 6, 1, 2])
    assert index.match_length == 2 and index.continuation(3) == [8, 9, 6]


def test_a_longer_match_is_preferred_to_a_later_one() -> None:
    index = index_of([4, 1, 2, 7, 9, 5, 1, 2, 8, 9, 4, 1, 2])
    assert index.match_length == 3 and index.continuation(2) == [7, 9]


def test_a_match_is_followed_as_long_as_it_predicts() -> None:
    text = list(range(20))
    index = index_of([*text, 30, 3, 4])
    for length, id in enumerate(range(5, 15), 2):
        assert index.match_length == length and index.add(id)
    assert not index.add(30) and index.match_length == 0


def test_a_match_that_reaches_the_end_of_the_text_is_repeated() -> None:
    assert index_of([9, 1, 2, 3, 1, 2, 3]).continuation(8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert index_of([5, 5, 5]).continuation(3) == [5, 5, 5]


def test_text_without_repetition_has_no_match() -> None:
    index = LookupIndex()
    assert not any(index.add(id) for id in range(500)) and index.match_length == 0


def test_oldest_grams_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "INDEX_PART", 70)  # the n-grams of ten tokens
    index = index_of([1, 2, 3, *range(10, 15), 1, 2])
    assert index.match_length == 2 and index.continuation(1) == [3]
    index = index_of([1, 2, 3, *range(10, 60), 1, 2])
    assert index.match_length == 0
    assert len(index._places) + len(index._older_places) < 160


def test_lookups_learn_from_tokens_that_were_not_drafted() -> None:
    sequence, session = FakeEngine().begin({"input_ids": np.array([[1, 2, 3, 4, 5, 6, 1]])}), MatchRates()
    lookup = LookupDrafts(sequence, session)
    assert lookup.read(2) == 2 and lookup.rates.rate(2) == MatchRates().rate(2), "no rate of the prompt"
    for length, id in enumerate([3, 4, 5], 3):
        sequence.feed([id - 1])
        assert lookup.read(id) == length
    assert lookup.rates.rate(2) > MatchRates().rate(2) and session.rate(2) > MatchRates().rate(2)
    sequence.feed([5])
    assert lookup.read(20) == 0, "the match did not predict 20"
    assert lookup.rates.rate(5) < MatchRates().rate(5)


def decode_ids(rule: Any, prompt: list[int], count: int = 40, **options: Any) -> list[int]:
    return [token.id for token in decode_tokens(rule, prompt, count, **options)]


def decode_tokens(rule: Any, prompt: list[int], count: int = 40, **options: Any) -> list[Token]:
    sampling = options.pop("sampling", None)
    sampler = None if sampling is None else sampling.sampler(prompt)
    return list(decode(FakeEngine(), rule, MANIFEST, 0, prompt, count, options.get("stop", ()), sampler))


def lookups(drafts: int | None = None) -> Any:
    """Rule speculative with lookups alone; drafts: in every round with a match."""
    parameters = {"exits": 0.0} if drafts is None else {"drafts": float(drafts)}
    return bind(RuleSpec("speculative", parameters), SEGMENTS)


@pytest.mark.parametrize("drafts", [None, 1, 3, 8, 15])
def test_lookups_change_no_token(drafts: int | None) -> None:
    random = np.random.default_rng(5)
    prompts = [REPEATED, [3] * 20, random.integers(0, VOCABULARY, 30).tolist(), [*range(20), *range(12)]]
    for prompt in prompts:
        rule = lookups(drafts)
        tokens = decode_tokens(rule, prompt)
        assert [token.id for token in tokens] == decode_ids(FULL_DEPTH, prompt)
        assert sum(token.drafted for token in tokens) == rule.accepted[LOOKUP] <= rule.offered[LOOKUP]
        assert {token.depth for token in tokens} == {FULL}


def test_accepted_lookups_run_all_segments_once_for_several_tokens() -> None:
    """Prompt and answer are a text that the decoder is made to repeat."""
    engine, rule = RepeatingEngine(REPEATED), lookups(5)
    tokens = list(decode(engine, rule, MANIFEST, 0, REPEATED[:12], 13, ()))
    assert [token.id for token in tokens] == (REPEATED * 2)[12:25]
    assert [token.drafted for token in tokens] == [False, *[True] * 5, False, *[True] * 5, False]
    assert [token.blocks_run for token in tokens[1:7]] == [6 * FULL, 0, 0, 0, 0, 0]
    assert rule.accepted[LOOKUP] == rule.offered[LOOKUP] == 10 and rule.rounds[LOOKUP] == 2
    runs = [(segment, count) for _, segment, _, count in engine.runner_calls() if segment >= 0]
    assert runs[SEGMENTS : 2 * SEGMENTS] == [(segment, 6) for segment in range(SEGMENTS)]


@pytest.mark.parametrize("place", [1, 3, 6, 7])
def test_an_answer_ends_at_a_stop_token_within_accepted_lookups(place: int) -> None:
    stop = (REPEATED * 2)[12 + place]
    engine, rule = RepeatingEngine(REPEATED), lookups(5)
    tokens = list(decode(engine, rule, MANIFEST, 0, REPEATED[:12], 30, {stop}))
    expected = (REPEATED * 2)[12:42]
    assert [token.id for token in tokens] == expected[: expected.index(stop) + 1]
    assert tokens[-1].ended == "stop"


@pytest.mark.parametrize("count", [1, 2, 4, 7, 8])
def test_an_answer_ends_at_its_limit_within_accepted_lookups(count: int) -> None:
    tokens = list(decode(RepeatingEngine(REPEATED), lookups(5), MANIFEST, 0, REPEATED[:12], count, ()))
    assert [token.id for token in tokens] == (REPEATED * 2)[12 : 12 + count] and tokens[-1].ended == "length"


@pytest.fixture
def even_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes the same time, on however many tokens it is."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))


def test_lookups_are_used_where_they_are_right(even_steps: None) -> None:
    rule = lookups()
    tokens = list(decode(RepeatingEngine(REPEATED), rule, MANIFEST, 0, REPEATED[:12], 60, ()))
    assert [token.id for token in tokens] == (REPEATED * 4)[12:72]
    assert rule.accepted[LOOKUP] > 20 and rule.match_rates.rate(12) > 0.9


def test_text_that_repeats_nothing_runs_what_rule_never_runs() -> None:
    calls, rule = [], lookups()
    for bound in (rule, FULL_DEPTH):
        engine = RepeatingEngine(list(range(24)))
        tokens = list(decode(engine, bound, MANIFEST, 0, [0, 1, 2], 18, ()))
        assert [token.id for token in tokens] == list(range(3, 21))
        calls.append(engine.runner_calls())
    assert calls[0] == calls[1] and rule.rounds == {0: 17, LOOKUP: 0}


def test_lookups_that_are_wrong_are_verified_and_forgotten() -> None:
    engine, rule = RepeatingEngine(list(range(20))), lookups(4)
    prompt = [7, 8, 9, 15, 3, 7, 8]  # with 9 after it, it predicts 15, and the decoder goes on with 10
    tokens = list(decode(engine, rule, MANIFEST, 0, prompt, 6, ()))
    assert [token.id for token in tokens] == [9, 10, 11, 12, 13, 14]
    assert rule.accepted[LOOKUP] == 0 < rule.offered[LOOKUP]


@pytest.mark.parametrize("parameters", [{}, {"drafts": 4}, {"exit": 1, "drafts": 3}])
def test_drawn_tokens_are_those_without_drafts(parameters: dict[str, float]) -> None:
    for seed in range(3):
        sampling = Sampling(temperature=0.7, seed=seed)
        bound = bind(RuleSpec("speculative", parameters), SEGMENTS)
        expected = decode_ids(FULL_DEPTH, REPEATED, sampling=sampling)
        assert decode_ids(bound, REPEATED, sampling=sampling) == expected
        assert len(set(expected)) > 3


def test_a_penalty_sees_the_drafts_before_it() -> None:
    sampling = Sampling(repetition_penalty=1.3, logprobs=2)
    tokens, expected = (decode_tokens(rule, REPEATED, sampling=sampling) for rule in (lookups(4), FULL_DEPTH))
    assert [token.id for token in tokens] == [token.id for token in expected]
    np.testing.assert_allclose(
        [token.logprob for token in tokens], [token.logprob for token in expected], atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "parameters"),
    [
        ("fp32", {}),
        ("fp32", {"exits": 0.0}),
        ("fp32", {"drafts": 1.0}),
        ("fp32", {"drafts": 7.0}),
        ("int8", {"drafts": 4.0}),
    ],
)
def test_lookups_change_no_token_of_a_bundle(variant: str, parameters: dict[str, float]) -> None:
    random = np.random.default_rng(1)
    prompts = [[7, 8, 9, 10] * 5, [5] * 12, *(random.integers(3, 60, 9).tolist() for _ in range(4))]
    with (
        load_generator(GENERATOR, rule=RuleSpec("speculative", parameters), variant=variant) as session,
        load_generator(GENERATOR, rule="never", variant=variant) as full,
    ):
        for prompt in prompts:
            expected = [token.id for token in full.tokens(prompt, 100, ())]
            assert [token.id for token in session.tokens(prompt, 100, ())] == expected
            stop = expected[len(expected) // 2]
            answer = [token.id for token in session.tokens(prompt, 100, {stop})]
            assert answer == expected[: expected.index(stop) + 1]
        stats = session.draft_stats
        assert stats is not None and ("drafts" not in parameters or stats.rounds[LOOKUP] > 0)


class RecordingSource:
    """A source without drafts of its own that reads hidden states."""

    exit, reads_hidden = 0, True

    def __init__(self, sequence: TokenSequence) -> None:
        self.sequence, self.hidden = sequence, list[Any]()

    def propose(self, token: int, choice: DraftChoice) -> list[Draft]:
        self.sequence.feed([token, 1, 2])
        return [Draft(1, 0.5), Draft(2, 0.5)]

    def confirm(self, start: int, hidden: Any) -> None:
        assert start == len(PROMPT) + len(self.hidden)
        self.hidden += list(hidden)


@pytest.mark.parametrize("close", [0.0, 1e9])
@pytest.mark.parametrize("fixed", [None, ("recording", 2)])
def test_a_source_reads_the_hidden_state_of_every_token(close: float, fixed: Any) -> None:
    engine = FakeEngine()
    sequence = engine.begin({"input_ids": np.array([PROMPT])})
    for segment in range(SEGMENTS):
        engine.step(segment, 0, sequence)
    rule = SpeculativeRule(RuleSpec("speculative", {}), SEGMENTS, fixed, sources=[])
    for counts in (rule.offered, rule.accepted, rule.rounds):
        counts["recording"] = 0
    rounds = DraftRounds(engine, rule, MANIFEST, 0, sequence, close)  # type: ignore[arg-type]
    source = RecordingSource(sequence)
    rounds.add_source("recording", source)
    ids = [*PROMPT, 4]
    for _ in range(12):
        drafted = rounds.run(ids[-1], 20)
        assert drafted is not None
        ids += [choice.id for choice in drafted.choices]
    states = reference(ids[:-1], [SEGMENTS] * (len(ids) - 1))[len(PROMPT) :, -1]
    np.testing.assert_allclose(np.array(source.hidden), states, atol=1e-5)
    assert rule.rounds["recording"] == (12 if fixed else 0)


class RepeatingEngine(FakeEngine):
    """A fake decoder that goes on with the text that it is given, over and over: by the last token's place.

    The text's ids must differ within a period.
    """

    def __init__(self, text: list[int]) -> None:
        super().__init__()
        period = next(n for n in range(1, len(text) + 1) if text[:n] * 30 == (text * 30)[: 30 * n])
        self._after = {text[at]: text[(at + 1) % period] for at in range(period)}

    def step(self, segment: int, variant: int, state: TokenSequence) -> TokenSignals:
        signals = super().step(segment, variant, state)
        if segment + 1 < SEGMENTS:
            return signals
        rows = state.ids[state.length - state.rows :]
        logits = np.zeros((len(rows), VOCABULARY), np.float32)
        for row, id in enumerate(rows):
            logits[row, self._after.get(id, 0)] = 10
        signals._logits = logits
        return signals

    def runner_calls(self) -> list[tuple[str, int, int, int]]:
        runner = self.sequence.runner
        assert isinstance(runner, fake_decoder.FakeRunner)
        return runner.calls
