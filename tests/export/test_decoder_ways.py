"""Ways of tokens through a decoder's bundle: what each says, and what it leaves in the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny
import torch

from offramp.models.decoder import DecoderNetwork
from offramp.models.depth import hidden_states, leaves_behind
from offramp.runtime import BadSetting, RuleSpec, load
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.engines.ort_decoder import DecoderEngine
from offramp.runtime.engines.threads import claim
from offramp.runtime.generate import Exiting, Token, Way, full, generate
from offramp.runtime.rules.route import skipped
from offramp.runtime.rules.speculative import Drafting
from offramp.runtime.sequence import Lane
from offramp.runtime.ways import way_of

PROMPT = [5, 9, 30, 12, 44]


# Keys that turn with positions (llama) and such that do not (gpt2).
@pytest.fixture(scope="module", params=tiny.with_slow(["llama", "gpt2"], "llama"))
def made(request: pytest.FixtureRequest, decoder_bundle: Callable[[str], Any]) -> tuple[Any, Path]:
    """A model of three blocks and its bundle, a segment a block; drafts come from the first 20 of 60 ids."""
    return decoder_bundle(request.param)  # type: ignore[no-any-return]


@pytest.fixture
def engine(made: tuple[Any, Path]) -> DecoderEngine:
    return DecoderEngine(onnxruntime, open_bundle(made[1]), "fp32", claim(onnxruntime, None, True))


class Chosen:
    """A rule that has every token leave behind the exit that a list names for it; 3: nowhere."""

    width = 0

    def __init__(self, exits: list[int]) -> None:
        self.exits, self.said = exits, 0

    def leaves(self, signals: Any, segment: int) -> bool:
        left = self.exits[self.said] == segment + 1
        self.said += left or segment == 1
        return left


def said(engine: DecoderEngine, way: Way, most: int = 12) -> list[Token]:
    return list(generate(engine, PROMPT, most, way=way))


EXITS = [1, 1, 3, 1, 2, 1, 3, 2, 2, 2, 3]


@torch.no_grad()
@pytest.mark.parametrize("fills", [False, True])
def test_what_leaves_says_what_the_network_says(
    made: tuple[Any, Path], engine: DecoderEngine, fills: bool
) -> None:
    """Deferred: every token has keys and values of the full depth; propagated: those of where it left."""
    network = DecoderNetwork(made[0].eval())
    tokens = said(engine, Exiting(Chosen(EXITS), False, fills, 3), len(EXITS) + 1)
    ids = [*PROMPT, *(token.id for token in tokens)]
    depths = torch.tensor([[3] * len(PROMPT) + EXITS])
    whole = torch.tensor([ids[:-1]])
    states = list(hidden_states(network, whole, leaves_behind(depths) if fills else None))
    for at, exit in enumerate(EXITS, len(PROMPT)):
        logits = network.head(states[exit - 1][0, at])
        assert int(logits.argmax()) == ids[at + 1]
    assert [token.depth for token in tokens] == [3, *EXITS]


@torch.no_grad()
def test_a_deferred_cache_gives_the_logits_of_the_full_depth(
    made: tuple[Any, Path], engine: DecoderEngine
) -> None:
    lane, ids = Lane(engine), torch.randint(3, 60, (25,), generator=torch.Generator().manual_seed(3)).tolist()
    lane.feed(ids[:6])
    lane.through(most=6)
    logits = made[0](torch.tensor([ids])).logits[0].numpy()
    deep = 0
    for at, token in enumerate(ids[6:], 6):
        lane.feed([token])
        for segment in range(1 + at % 3):
            made_ = lane.advance(segment)
        if at % 3 == 2:
            deep += 1
            np.testing.assert_allclose(lane.cache.logits(made_.hidden[-1:])[0], logits[at], atol=1e-4)
    assert deep == 6 and lane.ran < 3 * 25
    assert [lane.waiting(segment) for segment in range(3)] == [0, 1, 0]


def test_more_wait_than_go_in_one_run(made: tuple[Any, Path], engine: DecoderEngine) -> None:
    """Forty tokens leave, then one goes deeper: in runs of 16, and says what the full depth says."""
    ids = torch.randint(3, 60, (45,), generator=torch.Generator().manual_seed(4)).tolist()
    lanes = [Lane(engine), Lane(engine)]
    for lane in lanes:
        lane.feed(ids[:4])
        lane.through(most=4)
    for token in ids[4:]:
        lanes[0].feed([token])
        lanes[0].advance(0)
        lanes[1].feed([token])
        last = lanes[1].through().hidden[-1].copy()
    assert lanes[0].waiting(1) == 41
    np.testing.assert_allclose(lanes[0].through(1).hidden[-1], last, atol=1e-5)
    assert lanes[0].ran == lanes[1].ran


def test_straight_through_is_segment_after_segment(engine: DecoderEngine) -> None:
    """The same hidden states, caches and counts, where nobody waits further on and where somebody does."""
    straight, stepwise = Lane(engine), Lane(engine)
    for tokens in ([5, 9, 11, 2], [7], [8, 3]):
        for lane in (straight, stepwise):
            lane.feed(tokens)
        if tokens == [8, 3]:  # both wait before the last segment
            for lane in (straight, stepwise):
                lane.advance(0)
                lane.advance(1)
        first = 2 if tokens == [8, 3] else 0
        wanted = [stepwise.advance(segment) for segment in range(first, 3)][-1].hidden.copy()
        made = straight.through(first)
        np.testing.assert_array_equal(made.hidden, wanted)
        assert np.shares_memory(made.leaving, made.hidden) and made.gate is None
        assert straight.filled == stepwise.filled and straight.ran == stepwise.ran
    for mine, theirs in zip(straight.cache.stacks, stepwise.cache.stacks, strict=True):
        np.testing.assert_array_equal(mine.by_token, theirs.by_token)


def test_a_lane_forgets_what_was_not_said(engine: DecoderEngine) -> None:
    lane = Lane(engine)
    lane.feed(PROMPT)
    lane.through(most=5)
    lane.feed([7])
    alone = lane.through().hidden[-1].copy()
    for first in (1, 3, 0):  # wrong tokens at several depths
        lane.truncate(len(PROMPT))
        for token in (41, 42, 43):
            lane.feed([token])
            for segment in range(first):
                lane.advance(segment)
        lane.truncate(len(PROMPT))
        assert not any(lane.waiting(segment) for segment in range(3))
        lane.feed([7])
        np.testing.assert_allclose(lane.through().hidden[-1], alone, atol=1e-6)
    lane.truncate(0)
    assert lane.filled == [0, 0, 0]


@pytest.mark.parametrize("fixed", [None, (1, 1), (1, 3), (2, 2), (2, 8)])
def test_drafts_change_nothing(engine: DecoderEngine, fixed: tuple[int, int] | None) -> None:
    for seed in range(4):
        prompt = torch.randint(3, 60, (7,), generator=torch.Generator().manual_seed(seed)).tolist()
        drafting = Drafting((1, 2), fixed)
        plain = [token.id for token in generate(engine, prompt, 40, way=full)]
        drafted = list(generate(engine, prompt, 40, way=drafting))
        assert [token.id for token in drafted] == plain
        assert {token.depth for token in drafted} == {3}
        right = sum(drafting.accepted.values())
        assert right >= sum(token.drafted for token in drafted)  # the last round may have said more
        assert right <= sum(drafting.offered.values())
        if fixed is not None:
            assert set(drafting.offered) == {1, 2} and drafting.offered[3 - fixed[0]] == 0
            assert drafting.offered[fixed[0]] > 0


def test_a_draft_that_agrees_is_accepted(engine: DecoderEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle drafts: every round says all of its drafts and one more."""
    plain = [token.id for token in said(engine, full, 31)]
    drafting, real = Drafting((1, 2), (1, 4)), Drafting._logits

    def knows(self: Drafting, lane: Lane, hidden: Any, draft: bool = False) -> Any:
        if not draft:
            return real(self, lane, hidden)
        return np.eye(1, 60, plain[len(lane.ids) - len(PROMPT)], dtype=np.float32) * 100

    monkeypatch.setattr(Drafting, "_logits", knows)
    tokens = said(engine, drafting, 31)
    assert [token.id for token in tokens] == plain
    assert drafting.accepted[1] == drafting.offered[1] == 24 and drafting.rounds[1] == 6
    assert [token.drafted for token in tokens[1:6]] == [True] * 4 + [False]
    # Drafting tokens go through block 1 alone; all five then go through the other two together.
    assert [token.ran for token in tokens[1:6]] == [15, 0, 0, 0, 0]


def test_a_close_call_is_asked_again_alone(engine: DecoderEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [token.id for token in said(engine, full, 20)]
    monkeypatch.setattr("offramp.runtime.drafting.CLOSE", 1e9)
    drafting = Drafting((1, 2), (2, 3))
    assert [token.id for token in said(engine, drafting, 20)] == plain
    assert drafting.offered[2] > 0 and drafting.accepted[2] == 0


def test_drafts_come_from_the_first_ids(made: tuple[Any, Path], engine: DecoderEngine) -> None:
    cache = engine.cache()
    hidden = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    whole = cache.logits(hidden).copy()
    np.testing.assert_allclose(cache.logits(hidden, draft=True), whole[:, :20], atol=1e-5)
    assert whole.shape == (2, 60)
    with load(made[1], rule="never") as session:
        plain = [piece.token for piece in session.generate("the film was good", 30)]
    with load(made[1], rule="speculative") as session:
        assert [piece.token for piece in session.generate("the film was good", 30)] == plain


def test_drafting_learns_what_pays() -> None:
    """From costs that are told, drafts of exit 1 that are wrong, and drafts of exit 2 that are right."""
    drafting = Drafting((1, 2))
    lane: Any = type("Lane", (), {"filled": [0, 0, 0]})()
    for tokens in range(1, 10):
        for segment, seconds in enumerate((1.0, 1.0, 10.0)):
            drafting._seconds["segment", segment, tokens] = seconds
        drafting._seconds["head", 0, tokens] = 2.0
    drafting._seconds["draft", 0, 1] = 0.5
    assert drafting._plan(lane, 8)[0] == 1  # nothing is known: the cheapest is tried
    for _ in range(30):
        drafting._learn(1, [(7, 0.6)], [8], 1)
    assert drafting._plan(lane, 8)[0] == 2
    for _ in range(30):
        drafting._learn(2, [(7, 0.6)], [7, 9], 1)
    exit, drafts = drafting._plan(lane, 8)
    assert exit == 2 and drafts > 2 and drafting._plan(lane, 1) == (2, 1)
    while (chosen := drafting._plan(lane, 8)) != (0, 0):  # from here on all are wrong: it gives up
        drafting._learn(chosen[0], [(7, 0.6)], [8], 1)
        assert sum(drafting.rounds.values()) < 300
    assert drafting.rounds[0] == 0 and drafting.accepted == {1: 0, 2: 30}
    while drafting._plan(lane, 8) == (0, 0):  # and after a while without, tries again
        drafting._learn(0, [], [8], 0)
        assert drafting.rounds[0] < 3000


def test_a_route_past_segments(made: tuple[Any, Path], engine: DecoderEngine) -> None:
    from offramp.models.depth import goes_past

    assert skipped(10, 10) == frozenset() and skipped(10, 2) == frozenset(range(1, 9))
    assert skipped(3, 2) == {1} and len(skipped(10, 7)) == 3
    way = way_of(open_bundle(made[1]), RuleSpec("skip", {"segments": 2}))
    tokens = said(engine, way)
    network = DecoderNetwork(made[0].eval())
    ids = torch.tensor([[*PROMPT, *(token.id for token in tokens)]])
    with torch.no_grad():
        *_, last = hidden_states(network, ids[:, :-1], goes_past(frozenset({1}), len(PROMPT)))
        right = network.head(last)[0].argmax(-1).tolist()
    assert right[len(PROMPT) - 1 :] == ids[0, len(PROMPT) :].tolist()
    assert [token.depth for token in tokens] == [3] + [2] * 11


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("quee", {"price": 0.1}, "is not for bundles that generate text"),
        ("gate", {"threshold": 0.5}, "the bundle has no policies"),
        ("skip", {}, "rule skip needs segments"),
        ("skip", {"segments": 4}, "segments 4 is not a whole number from 2 to 3"),
        ("speculative", {"exit": 1}, "no parameters, or exit and drafts"),
        ("speculative", {"exit": 3, "drafts": 2}, "exit 3 is not a whole number from 1 to 2"),
        ("fixed", {"exit": 4}, "exit 4 does not exist"),
        ("max_probability", {}, "needs threshold"),
    ],
)
def test_rules_that_cannot_be(
    made: tuple[Any, Path], name: str, parameters: dict[str, float], message: str
) -> None:
    with pytest.raises(BadSetting, match=message):
        load(made[1], rule=RuleSpec(name, parameters))


def test_wishes_of_a_session(made: tuple[Any, Path]) -> None:
    for wishes, message in (
        ({"cache": "lost"}, "choose one of deferred, propagate"),
        ({"cache": "propagate"}, "no token leaves early"),
        ({"threshold": 0.5}, "rule never has no threshold"),
    ):
        with pytest.raises(BadSetting, match=message):
            load(made[1], **wishes)  # type: ignore[arg-type]
    with load(made[1]) as session:
        whole = [piece.token for piece in session.generate("the film was good", 12)]
    with load(made[1], rule="speculative") as session:
        pieces = list(session.generate("the film was good", 12))
        assert [piece.token for piece in pieces] == whole
        assert session.rule.name == "speculative" and sum(session.drafting.rounds.values()) > 0  # type: ignore[attr-defined]
    with load(made[1], rule="fixed", threshold=1) as session:
        pieces = list(session.generate("the film was good", 12))
        assert [piece.depth for piece in pieces] == [3] + [1] * 11 == [piece.ran for piece in pieces]
    with load(made[1], rule="max_probability", threshold=0.02) as session:
        depths = {piece.depth for piece in session.generate("the film was good", 12)}
    assert depths == {1, 3}  # the prompt's own token, and exits that are sure of something
    with load(made[1], rule="patience", threshold=1) as session:
        assert {piece.depth for piece in session.generate("the film was good", 12)} <= {2, 3}
