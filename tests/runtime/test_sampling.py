"""Sampling: draws have their probabilities, with and without drafts, and a seed gives one text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fake_decoder
import numpy as np
import pytest
from fake_decoder import MANIFEST, FakeEngine
from tiny_bundles import GENERATOR

from offramp.runtime import BadInput, BadSetting, Sampling, TextGenerator, load_generator
from offramp.runtime.decoding import FULL_DEPTH, decode
from offramp.runtime.rules import RuleSpec, bind
from offramp.runtime.rules.speculative import SpeculativeRule
from offramp.runtime.sampling import LARGEST_MARGIN, Sampler

PROMPT = [5, 9, 11, 2, 7]
TEXT = "the film was good and"
DRAWN = [
    Sampling(1.0, seed=1),
    Sampling(0.7, top_k=10, seed=2),
    Sampling(1.5, top_p=0.8, seed=3),
    Sampling(1.0, min_p=0.05, repetition_penalty=1.3, seed=4),
]


def logits_of(size: int, seed: int = 0, spread: float = 2.0) -> Any:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


def p_value(counts: Any, expected: Any) -> float:
    """P of a chi-square as large as that of some counts; cells that expect less than 5 are one cell.

    The cube root of a chi-square is nearly normal (Wilson and Hilferty).
    """
    counts, expected = np.ravel(counts).astype(float), np.ravel(expected)
    few = expected < 5
    assert counts[expected == 0].sum() == 0, "something was drawn that has no probability"
    if few.any():
        counts = np.append(counts[~few], counts[few].sum())
        expected = np.append(expected[~few], expected[few].sum())
    counts, expected = counts[expected > 1], expected[expected > 1]
    freedom = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)
    normal = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(normal / math.sqrt(2))


@pytest.fixture(scope="module")
def session() -> Iterator[TextGenerator]:
    with load_generator(GENERATOR, rule="never") as session:
        yield session


def ids_of(session: TextGenerator, count: int, sampling: Sampling, prompt: str = TEXT) -> list[int]:
    return [token.id for token in session.tokens(session.encode_prompt(prompt), count, sampling=sampling)]


# distributions


def test_p_value_of_known_statistics() -> None:
    """The 99th percentile of a chi-square of 10 degrees of freedom is 23.209."""
    expected = np.full(11, 100.0)
    counts = expected + np.array([math.sqrt(23.209 * 100 / 2), -math.sqrt(23.209 * 100 / 2), *[0.0] * 9])
    assert p_value(counts, expected) == pytest.approx(0.01, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", DRAWN, ids=["all", "top_k", "top_p", "penalty"])
def test_20_000_draws_have_the_probabilities(sampling: Sampling) -> None:
    sampler, logits, draws = Sampler(sampling, PROMPT[:2]), logits_of(60), 20_000
    if sampling.has_penalties:  # of which the ids so far are a part: a text for each draw
        texts = (Sampler(replace(sampling, seed=seed), PROMPT[:2]) for seed in range(draws))
        chosen = [text.choose(logits, PROMPT).id for text in texts]
    else:
        chosen = [sampler.choose(logits, range(2 + place)).id for place in range(draws)]
    probabilities = sampler.probabilities(logits, PROMPT)
    assert probabilities.sum() == pytest.approx(1)
    assert p_value(np.bincount(chosen, minlength=60), draws * probabilities) > 0.01


def chain(table: Any, sampling: Sampling, count: int, drafts_of: Any) -> list[int]:
    """Ids of a text whose logits depend on the last id alone, generated in rounds with drafts."""
    sampler, ids = Sampler(sampling, [0]), [0]
    while len(ids) <= count:
        drafts = drafts_of(sampler, ids)
        choices = sampler.verify(drafts, table[[ids[-1], *drafts]], ids)
        assert [choice.id for choice in choices[:-1]] == drafts[: len(choices) - 1]
        ids += [choice.id for choice in choices]
    return ids[: count + 1]


def greedy_drafts(table: Any, count: int) -> Any:
    def draft(sampler: Sampler, ids: list[int]) -> list[int]:
        drafts = [ids[-1]]
        for _ in range(count):
            drafts.append(int(table[drafts[-1]].argmax()))
        return drafts[1:]

    return draft


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_two_tokens_in_a_row_have_their_joint_probabilities(drafts: int) -> None:
    """2,000 texts of 10 tokens: a wrong choice after a refused draft would show in what follows an id."""
    table = np.stack([logits_of(6, seed) for seed in range(6)])
    probabilities = np.stack([Sampler(Sampling(1.0), ()).probabilities(row, ()) for row in table])
    counts = np.zeros((6, 6))
    for seed in range(2_000):
        ids = chain(table, Sampling(1.0, seed=seed), 10, greedy_drafts(table, drafts))
        np.add.at(counts, (ids[:-1], ids[1:]), 1)
    assert counts.sum() == 20_000
    assert p_value(counts, counts.sum(1, keepdims=True) * probabilities) > 0.01


@pytest.mark.slow
def test_drafts_change_no_text() -> None:
    table = np.stack([logits_of(30, seed) for seed in range(30)])
    for seed in range(20):
        sampling = Sampling(0.9, top_p=0.9, repetition_penalty=1.2, seed=seed)
        plain = chain(table, sampling, 30, lambda *_: [])
        for count in (1, 4):
            assert chain(table, sampling, 30, greedy_drafts(table, count)) == plain


def test_drafts_that_are_drawn_with_the_same_numbers_are_accepted_more_often() -> None:
    """A draft head much like the full depth: the probability that both choose the same id is large."""
    logits = logits_of(200, spread=1.0)
    draft_logits = (logits + 0.2 * logits_of(200, 1, 1.0))[:150]
    accepted = {"drawn": 0, "greedy": 0}
    sampler = Sampler(Sampling(1.0, seed=0), ())
    for place in range(1_000):
        id = sampler.choose(logits, range(place)).id
        accepted["drawn"] += id == sampler.choose(draft_logits, range(place)).id
        accepted["greedy"] += id == int(draft_logits.argmax())
    assert accepted["drawn"] > 500 > 5 * accepted["greedy"]


# what is chosen


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0), Sampling(1e-5, top_p=0.5), Sampling(seed=3)])
def test_greedy_needs_no_sampler(sampling: Sampling) -> None:
    assert sampling.sampler(PROMPT) is None and not sampling.is_drawn
    logits = logits_of(50)
    assert Sampler(sampling, PROMPT).choose(logits, PROMPT).id == int(logits.argmax())


@pytest.mark.parametrize("sampling", [Sampling(1.0, top_k=1), Sampling(2.0, top_p=0), Sampling(1, min_p=1)])
def test_cuts_to_one_id_are_greedy(sampling: Sampling) -> None:
    for seed in range(20):
        logits = logits_of(50, seed)
        assert Sampler(sampling, ()).choose(logits, ()).id == int(logits.argmax())


def test_top_p_keeps_the_fewest_ids_also_of_a_large_vocabulary() -> None:
    logits = logits_of(30_000, spread=0.3)  # so flat that more ids are kept than are sorted first
    kept = np.flatnonzero(Sampler(Sampling(1.0, top_p=0.9), ()).probabilities(logits, ()))
    probabilities = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum()
    order = np.argsort(-probabilities)
    fewest = int(np.searchsorted(np.cumsum(probabilities[order]), 0.9)) + 1
    assert fewest > 1024 and sorted(order[:fewest]) == kept.tolist()


def test_ids_that_equal_the_last_of_top_k_are_kept() -> None:
    logits = np.array([1, 3, 2, 2, 0], np.float32)
    assert np.flatnonzero(Sampler(Sampling(1.0, top_k=2), ()).probabilities(logits, ())).tolist() == [1, 2, 3]


def test_repetition_penalty_is_for_prompt_and_answer_once() -> None:
    logits = np.array([2, -1, 3, 4, 1], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=2.0), [0, 0, 1, 99])
    scores = sampler._penalized(logits, [0, 0, 1, 99, 3, 3])
    assert scores.tolist() == [1, -2, 3, 2, 1] and logits.tolist() == [2, -1, 3, 4, 1]
    assert sampler.choose(logits, [0, 0, 1, 99, 3]).id == 2


def test_frequency_and_presence_count_the_answer_alone() -> None:
    logits = np.array([2, 2, 2, 2], np.float32)
    sampler = Sampler(Sampling(frequency_penalty=0.5, presence_penalty=0.25), [0, 1])
    assert sampler._penalized(logits, [0, 1, 1, 2, 2]).tolist() == [2, 1.25, 0.75, 2]
    assert sampler._penalized(logits, [0, 1]).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(repetition_penalty=1.1), Sampling(logprobs=2)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(sampling: Sampling, bad: float) -> None:
    logits = logits_of(20)
    logits[7] = bad
    with pytest.raises(BadInput, match="logits are not finite"):
        Sampler(sampling, PROMPT).choose(logits, PROMPT)


def test_ids_without_a_chance_are_never_drawn() -> None:
    logits = logits_of(20)
    logits[5:] = -np.inf
    sampler = Sampler(Sampling(1.0, seed=0, logprobs=8), ())
    choices = [sampler.choose(logits, range(place)) for place in range(300)]
    assert {choice.id for choice in choices} == set(range(5))
    assert [math.isfinite(logprob) for _, logprob in choices[0].top_logprobs] == [True] * 5 + [False] * 3


# margins


@pytest.mark.parametrize("sampling", [Sampling(1.0, seed=5), Sampling(0.4, seed=5), Sampling()])
def test_margin_bounds_the_change_that_chooses_another_id(sampling: Sampling) -> None:
    random = np.random.default_rng(0)
    for place in range(300):
        logits = logits_of(40, place, 1.0)
        sampler = Sampler(sampling, ())
        choice = sampler.choose(logits, range(place))
        noise = random.uniform(-0.5, 0.5, 40) * 0.98 * min(choice.margin, 1.0)
        assert sampler.choose((logits + noise).astype(np.float32), range(place)).id == choice.id


def test_a_change_of_the_margin_chooses_the_second_id() -> None:
    sampler, changed = Sampler(Sampling(1.0, seed=5), ()), 0
    for place in range(400):
        logits = logits_of(40, place, 1.0)
        choice = sampler.choose(logits, range(place))
        logits[choice.id] -= 1.02 * choice.margin
        if choice.margin < LARGEST_MARGIN:
            changed += 1
            assert sampler.choose(logits, range(place)).id != choice.id
    assert changed > 20


def test_verify_ends_before_a_close_choice() -> None:
    logits = np.array([[0, 3, 1], [0, 3, 2.9], [5, 1, 1]], np.float32)
    sampler = Sampler(Sampling(), ())
    assert [choice.id for choice in sampler.verify([1, 1], logits, PROMPT)] == [1, 1, 0]
    assert [choice.id for choice in sampler.verify([1, 1], logits, PROMPT, 0.5)] == [1]
    assert [choice.id for choice in sampler.verify([0, 1], logits, PROMPT, 0.5)] == [1]
    assert sampler.verify([1, 1], logits, PROMPT, 2.5) == []


# log-probabilities


def test_logprobs_are_of_the_models_own_logits() -> None:
    logits = logits_of(30)
    expected = logits - np.log(np.exp(logits.astype(float)).sum())
    sampling = Sampling(0.5, top_k=3, repetition_penalty=1.5, seed=1, logprobs=4)
    choice = Sampler(sampling, PROMPT).choose(logits, PROMPT)
    assert choice.logprob == pytest.approx(expected[choice.id])
    order = np.argsort(-expected)[:4].tolist()
    assert [id for id, _ in choice.top_logprobs] == order
    assert [logprob for _, logprob in choice.top_logprobs] == pytest.approx(expected[order])


def test_logprobs_0_is_that_of_the_token_alone() -> None:
    choice = Sampler(Sampling(logprobs=0), ()).choose(logits_of(30), ())
    assert choice.logprob is not None and choice.top_logprobs == ()


# options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1: expected a number from 0 to 100"),
        ({"temperature": math.nan}, "temperature nan: expected a number from 0 to 100"),
        ({"temperature": "warm"}, "temperature 'warm': expected a number"),
        ({"temperature": True}, "temperature True: expected a number"),
        ({"temperature": 1, "top_k": -1}, "top_k -1: expected a whole number, 0 to "),
        ({"temperature": 1, "top_k": 2.0}, "top_k 2.0: expected a whole number"),
        ({"temperature": 1, "top_p": 1.5}, "top_p 1.5: expected a number from 0 to 1"),
        ({"temperature": 1, "min_p": -1}, "min_p -1: expected a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty 0: expected a number from 0.01 to 100"),
        ({"frequency_penalty": 3}, "frequency_penalty 3: expected a number from -2 to 2"),
        ({"presence_penalty": -3}, "presence_penalty -3: expected a number from -2 to 2"),
        ({"seed": 2**64}, "expected a whole number, 64 bits"),
        ({"seed": 1.5}, "seed 1.5: expected a whole number, 64 bits"),
        ({"logprobs": 21}, "logprobs 21: expected a whole number, 0 to 20"),
        ({"top_p": 0.9}, "top_p 0.9: it limits what is drawn, and without a temperature nothing is"),
        ({"top_k": 5}, "top_k 5: it limits what is drawn"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadSetting) as refused:
        Sampling(**options)
    assert message in str(refused.value)


def test_a_seed_is_taken_from_the_system_if_tokens_are_drawn() -> None:
    first, second = Sampling(1.0).seeded(), Sampling(1.0).seeded()
    assert first.seed is not None and second.seed is not None and first.seed != second.seed < 2**53
    assert Sampling().seeded().seed is None and Sampling(1.0, seed=-3).seeded().seed == -3


# texts


def test_the_same_seed_gives_the_same_text(session: TextGenerator) -> None:
    texts = [ids_of(session, 20, Sampling(1.0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert ids_of(session, 20, Sampling(1.0)) != ids_of(session, 20, Sampling(1.0))


def test_a_text_is_its_own_whatever_is_generated_beside_it(session: TextGenerator) -> None:
    sampling, ids = Sampling(1.0, seed=4), session.encode_prompt(TEXT)
    expected = ids_of(session, 12, sampling)
    beside = session.tokens(ids, 12, sampling=Sampling(1.0, seed=5))
    alternating = [(next(beside), token.id)[1] for token in session.tokens(ids, 12, sampling=sampling)]
    assert alternating == expected


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1.0, top_k=1, seed=3), Sampling(logprobs=1)])
def test_greedy_texts_are_those_without_sampling(session: TextGenerator, sampling: Sampling) -> None:
    plain = [token.id for token in session.tokens(session.encode_prompt(TEXT), 20)]
    assert ids_of(session, 20, sampling) == plain


def test_chunks_have_logprobs_and_their_places(session: TextGenerator) -> None:
    chunks = list(session.generate(TEXT, 8, sampling=Sampling(1.0, seed=1, logprobs=2)))
    texts = ["".join(chunk.text for chunk in chunks[:number]) for number in range(8)]
    assert [chunk.offset for chunk in chunks] == [len(text) for text in texts]
    assert all(chunk.logprob is not None and len(chunk.top_logprobs) == 2 for chunk in chunks)
    assert [chunk.logprob for chunk in session.generate(TEXT, 3)] == [None] * 3


def test_early_exits_are_drawn_from_the_logits_of_the_exit() -> None:
    with load_generator(GENERATOR, rule="fixed", threshold=1) as session:
        tokens = list(session.tokens(session.encode_prompt(TEXT), 20, sampling=Sampling(1.0, seed=1)))
    assert {token.depth for token in tokens[1:]} == {1} and len({token.id for token in tokens}) > 3


SPECULATIVE = [{"exit": 1, "drafts": 3}, {"exit": 2, "drafts": 8}, {}]


@pytest.mark.slow
@pytest.mark.parametrize("parameters", SPECULATIVE, ids=str)
def test_a_seed_gives_the_same_text_with_and_without_drafts(parameters: dict[str, float]) -> None:
    accepted = 0
    for seed in range(10):
        texts = []
        for rule in (FULL_DEPTH, bind(RuleSpec("speculative", parameters), len(fake_decoder.BLOCKS))):
            sampler = Sampling(0.8, top_p=0.95, repetition_penalty=1.1, seed=seed, logprobs=2).sampler(PROMPT)
            tokens = list(decode(FakeEngine(), rule, MANIFEST, 0, PROMPT, 40, (), sampler))
            texts.append([token.id for token in tokens])
            accepted += sum(token.drafted for token in tokens)
            assert all(token.logprob is not None for token in tokens)
        assert texts[0] == texts[1]
    assert accepted or not parameters


def expected_texts(session: TextGenerator, count: int) -> dict[tuple[int, ...], float]:
    """Expected number of each beginning of three tokens among `count` texts, at top_k=4 and temperature 1."""

    def following(ids: list[int]) -> dict[int, float]:
        (token,) = session.tokens(ids, 1, sampling=Sampling(logprobs=4))
        weights = {id: math.exp(logprob) for id, logprob in token.top_logprobs}
        return {id: weight / sum(weights.values()) for id, weight in weights.items()}

    prompt = session.encode_prompt(TEXT)
    expected: dict[tuple[int, ...], float] = {(): float(count)}
    for _ in range(3):
        expected = {
            (*ids, id): number * probability
            for ids, number in expected.items()
            for id, probability in following([*prompt, *ids]).items()
        }
    return expected


# 20,000 draws take half a minute.
@pytest.mark.slow
@pytest.mark.parametrize("rule", ["never", "speculative"])
def test_texts_have_the_joint_probabilities_of_three_tokens(rule: str) -> None:
    count = 6_667  # texts of three tokens: 20,000 draws
    counts = Counter[tuple[int, ...]]()
    with load_generator(GENERATOR, rule=rule) as session:
        if isinstance(session.bound_rule, SpeculativeRule):
            session.bound_rule.fixed = (1, 2)
        expected, prompt = expected_texts(session, count), session.encode_prompt(TEXT)
        tokens = 4 if rule == "speculative" else 3  # of drafts, one more: the third is not the end of a text
        for seed in range(count):
            text = session.tokens(prompt, tokens, sampling=Sampling(1.0, top_k=4, seed=seed))
            counts[tuple(token.id for token in text)[:3]] += 1
        stats = session.draft_stats
    assert stats is None or stats.accepted[1] > 50
    assert set(counts) <= set(expected)
    assert p_value([counts[ids] for ids in expected], [*expected.values()]) > 0.01
