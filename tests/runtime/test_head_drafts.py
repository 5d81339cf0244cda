"""Drafts of a draft head: what its block reads, on a decoder in numpy, and how the rule chooses it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fake_decoder
import numpy as np
import pytest
from fake_decoder import BLOCKS, DRAFT_IDS, HIDDEN, MANIFEST, FakeEngine, logits_of, reference
from tiny_bundles import GENERATOR, GENERATOR_NATIVE

from offramp.runtime.bundle.checks import read_manifest
from offramp.runtime.bundle.manifest import EXIT_HIDDEN, FILE_NAME, PREVIOUS_HIDDEN
from offramp.runtime.decoding import FULL_DEPTH, Token, decode
from offramp.runtime.drafts import HeadDrafts, TimedSteps
from offramp.runtime.errors import BadManifest, BadSetting
from offramp.runtime.rules import RuleSpec, bind
from offramp.runtime.rules.base import Rule
from offramp.runtime.rules.speculative import (
    HEAD,
    LOOKUP,
    WITHOUT_DRAFTS,
    Draft,
    SpeculativeRule,
    chosen_sources,
    read_sources,
)
from offramp.runtime.sampling import Sampler, Sampling
from offramp.runtime.sequence import SegmentOutput, TokenSequence

SEGMENTS = len(BLOCKS)
PROMPT = [5, 9, 11, 2, 7]
CLOSE = 1e-5
Draw = Callable[[int], int]  # a place -> the id that is drafted for it


class FakeBlock:
    """A draft block as a runner: what it predicts says which place it is for, and logits name the draft.

    entries: what its cache holds by place, (id, state that was read for it, whether it was a prediction).
    """

    blocks, hidden_size, longest = (1,), HIDDEN, fake_decoder.LONGEST

    def __init__(self, draw: Draw) -> None:
        self.draw, self.entries = draw, dict[int, tuple[int, Any, bool]]()
        self.runs: list[tuple[int, int]] = []  # start and number of tokens
        self._predicted: Any = None

    def reserve(self, tokens: int) -> None:
        """Do nothing: this cache has no places."""

    def make_room(self, tokens: int) -> None:
        assert tokens <= self.longest

    def run(self, segment: int, ids: Sequence[int], start: int, hidden: Any) -> SegmentOutput:
        assert segment == 0 and hidden.shape == (len(ids), HIDDEN)
        assert set(range(start)) <= self.entries.keys()  # there is no gap
        is_prediction = self._predicted is not None and np.shares_memory(hidden, self._predicted)
        for number, (id, before) in enumerate(zip(ids, hidden, strict=True)):
            self.entries[start + number] = (id, before.copy(), is_prediction)
        self.runs.append((start, len(ids)))
        predicted = np.zeros((len(ids), HIDDEN), np.float32)
        predicted[:, 0] = np.arange(start, start + len(ids))
        self._predicted = predicted
        return SegmentOutput(predicted, predicted, None)

    def logits(self, hidden: Any, draft: bool = False) -> Any:
        assert draft and hidden.shape == (1, HIDDEN)
        logits = np.zeros((1, DRAFT_IDS), np.float32)
        logits[0, self.draw(int(hidden[0, 0]) + 1)] = 5
        return logits


class HeadEngine(FakeEngine):
    """A fake decoder with a draft block, whose drafts are given by place."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.block = FakeBlock(draw)

    def begin(self, inputs: Mapping[str, Any]) -> TokenSequence:
        sequence = super().begin(inputs)
        sequence.runner.draft_runner = lambda: self.block  # type: ignore[method-assign, assignment, return-value]
        return sequence


def fixed_rule(drafts: int = 3) -> SpeculativeRule:
    return SpeculativeRule(RuleSpec("speculative", {}), SEGMENTS, (HEAD, drafts), [HEAD])


def answer(engine: FakeEngine, rule: Rule, count: int, sampler: Sampler | None = None) -> list[Token]:
    return list(decode(engine, rule, MANIFEST, 0, PROMPT, count, (), sampler))


def right_ids(count: int) -> list[int]:
    """The prompt and its answer at full depth."""
    return [*PROMPT, *(token.id for token in answer(FakeEngine(), FULL_DEPTH, count))]


def drawing(text: list[int], wrong: Callable[[int], bool]) -> Draw:
    """Drafts that are those of a text, but for some places; ids that no draft head has are wrong, too."""

    def draw(place: int) -> int:
        right = text[place] if place < len(text) else 0
        return (right + 1) % DRAFT_IDS if wrong(place) else min(right, DRAFT_IDS - 1)

    return draw


@pytest.mark.parametrize("period", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("drafts", [1, 3, 8])
def test_text_is_that_of_full_depth(period: int, drafts: int) -> None:
    text = right_ids(60)
    engine = HeadEngine(drawing(text, lambda place: place % period == 0))
    tokens = answer(engine, rule := fixed_rule(drafts), 60)
    assert [token.id for token in tokens] == text[len(PROMPT) :]
    drafted = sum(token.drafted for token in tokens)
    assert drafted == rule.accepted[HEAD] <= rule.offered[HEAD]
    assert (drafted == 0) == (period == 1)


def test_block_reads_states_of_full_depth_and_its_own_predictions() -> None:
    """Accepted drafts get the states of full depth; of wrong ones nothing is read later."""
    text = right_ids(40)
    engine = HeadEngine(drawing(text, lambda place: place % 4 == 0))
    answer(engine, fixed_rule(), 40)
    ids, entries = engine.sequence.ids, engine.block.entries
    states = reference(ids, [SEGMENTS] * len(ids))[:, -1]
    filled = max(place for place, (_, _, is_prediction) in entries.items() if not is_prediction)
    assert filled > len(PROMPT) + 30
    for place in range(filled + 1):
        id, before, is_prediction = entries[place]
        assert id == ids[place] and not is_prediction
        np.testing.assert_allclose(before, states[place - 1] if place else np.zeros(HIDDEN), atol=CLOSE)
    starts = [start for start, _ in engine.block.runs]
    assert starts[0] == 0 and engine.block.runs[0] == (0, len(PROMPT) + 1)  # the prompt and the first token
    assert len(set(starts)) < len(starts)  # places of drafts are written anew


def test_states_that_nobody_gave_are_zeros() -> None:
    engine = HeadEngine(lambda place: 0)
    sequence = engine.begin({"input_ids": np.array([PROMPT])})
    for segment in range(SEGMENTS):
        engine.step(segment, 0, sequence)
    rule = fixed_rule(1)
    steps = TimedSteps(engine, rule, sequence, 0, SEGMENTS)  # type: ignore[arg-type]
    source = HeadDrafts(steps, engine.block, Sampler(Sampling(), ()))  # type: ignore[arg-type]
    source.confirm(3, np.ones((2, HIDDEN), np.float32))
    choice = rule.choose(5)
    assert choice is not None and len(source.propose(4, choice)) == 1
    read = [engine.block.entries[place][1][0] for place in range(6)]
    assert read == [0, 0, 0, 0, 1, 1]


def test_drafts_end_where_they_are_not_worth_verifying() -> None:
    text = right_ids(30)

    class Doubting(SpeculativeRule):
        def worth_verifying(self, source: Any, probabilities: Sequence[float]) -> bool:
            return len(probabilities) < 3

    rule = Doubting(RuleSpec("speculative", {}), SEGMENTS, (HEAD, 8), [HEAD])
    tokens = answer(HeadEngine(drawing(text, lambda place: False)), rule, 30)
    assert [token.id for token in tokens] == text[len(PROMPT) :]
    assert rule.offered[HEAD] <= 2 * rule.rounds[HEAD]


def test_drawn_tokens_are_those_without_drafts() -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    expected = [token.id for token in answer(FakeEngine(), FULL_DEPTH, 40, sampling.sampler(PROMPT))]
    engine = HeadEngine(drawing([*PROMPT, *expected], lambda place: place % 3 == 0))
    tokens = answer(engine, fixed_rule(), 40, sampling.sampler(PROMPT))
    assert [token.id for token in tokens] == expected


def test_rule_drafts_with_the_head_as_long_as_it_pays() -> None:
    rule = SpeculativeRule(RuleSpec("speculative", {}), 1, sources=[HEAD])
    for _ in range(2):
        for tokens in range(1, 17):
            rule.times.record("segment", 0, tokens, 10.0)
            rule.times.record("head", 0, tokens, 2.0)
        rule.times.record("draft", 0, 1, 0.5)
        rule.times.record("block", 0, 1, 0.5)
    rule.record_round(WITHOUT_DRAFTS, [], [7], 0, 12.0)
    choice = rule.choose(8)  # a trained head is expected to draft well
    assert choice is not None and choice.source == HEAD and choice.drafts >= 2 and not choice.probe
    for _ in range(40):
        choice = rule.choose(8)
        if choice is None or choice.source != HEAD:
            rule.record_round(WITHOUT_DRAFTS, [], [7], 0, 12.0)
        else:
            drafts = [Draft(5, 0.5)] * choice.drafts
            rule.record_round(choice, drafts, [7], 0 if choice.probe else len(drafts), 12.0 + len(drafts))
    assert rule.rounds[0] > 15


def test_time_of_the_block_counts() -> None:
    counts = []
    for block in (0.1, 2.0, 50.0):
        rule = SpeculativeRule(RuleSpec("speculative", {}), 1, sources=[HEAD])
        for _ in range(2):
            for tokens in range(1, 17):
                rule.times.record("segment", 0, tokens, 10.0)
                rule.times.record("head", 0, tokens, 2.0)
            rule.times.record("draft", 0, 1, 0.5)
            rule.times.record("block", 0, 1, block)
        rule.record_round(WITHOUT_DRAFTS, [], [7], 0, 12.0)
        choice = rule.choose(8)
        counts.append(0 if choice is None else choice.drafts)
    assert counts[0] > counts[1] > counts[2] == 0


def test_bundles_with_a_draft_head_draft_with_it() -> None:
    spec = RuleSpec("speculative", {})
    rules = [bind(spec, 1, has_head=has_head) for has_head in (True, False)]
    assert [rule.sources for rule in rules] == [(HEAD, LOOKUP), (LOOKUP,)]  # type: ignore[attr-defined]
    assert chosen_sources(read_sources("speculative:head"), 3, has_head=True) == [HEAD]
    for named in ("speculative:head", "speculative:head+lookup"):
        with pytest.raises(BadSetting, match="the bundle has no draft head"):
            chosen_sources(read_sources(named), 3)
    fixed = bind(RuleSpec("speculative", {"head": 1.0, "drafts": 4.0}), 2, has_head=True)
    assert isinstance(fixed, SpeculativeRule) and fixed.fixed == (HEAD, 4) and fixed.sources == (HEAD,)
    with pytest.raises(BadSetting, match="'drafts' does not go with the others"):
        bind(RuleSpec("speculative", {"head": 1.0, "drafts": 4.0}), 2)


def test_fake_logits_have_more_ids_than_drafts() -> None:
    """Some right ids are beyond the draft head's, so the tests above meet drafts that cannot be right."""
    assert logits_of(np.zeros((1, HIDDEN))).shape[1] > DRAFT_IDS
    assert max(right_ids(60)) >= DRAFT_IDS


def with_draft_block(bundle: Path) -> Any:
    """The manifest of a bundle, in JSON, with a draft block in place of its last segment, one block later."""
    facts = json.loads((bundle / FILE_NAME).read_text(encoding="utf-8"))
    last = facts["segments"][-1]
    text = json.dumps(last).replace(f'_{facts["blocks"]}"', f'_{facts["blocks"] + 1}"')
    block = json.loads(text.replace('"next_hidden"', f'"{EXIT_HIDDEN}"').replace(last["name"], "draft_block"))
    block["blocks"] = [facts["blocks"] + 1]
    states = {"name": PREVIOUS_HIDDEN, "dtype": "float32", "shape": ["batch", "seq", facts["hidden_size"]]}
    some_file = next(iter(facts["files"].values()))
    for variant in block["variants"].values():
        variant["inputs"].insert(1, states)
        facts["files"][variant["file"]] = some_file
    facts["decoder"]["draft_block"] = block
    return facts


@pytest.mark.parametrize("bundle", [GENERATOR, GENERATOR_NATIVE])
def test_manifest_with_a_draft_block_is_read_and_written(bundle: Path) -> None:
    text = json.dumps(with_draft_block(bundle))
    manifest = read_manifest(text, source="here")
    assert manifest.decoder is not None and manifest.decoder.draft_block is not None
    assert "draft_block.onnx" in manifest.graph_files
    assert json.loads(manifest.to_json()) == json.loads(text)


@pytest.mark.parametrize("bundle", [GENERATOR, GENERATOR_NATIVE])
@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        ("blocks", [1], r"draft_block.blocks: expected \[\d\], found \[1\]"),
        ("inputs 1 name", "hidden_before", "draft_block: it reads no previous_hidden float32"),
        ("inputs 1 shape 2", 7, "draft_block: it reads no previous_hidden float32"),
        ("outputs 0 name", "next_hidden", "draft_block: it puts out no exit_hidden float32"),
        ("outputs 1 name", "new_k_9", "draft_block: new_k_. is missing"),
        ("inputs 0 name", "state", "draft_block: its input state"),
    ],
)
def test_draft_blocks_that_do_not_fit_are_refused(bundle: Path, path: str, new: Any, message: str) -> None:
    facts = with_draft_block(bundle)
    block = facts["decoder"]["draft_block"]
    keys = [int(key) if key.isdigit() else key for key in path.split()]
    for place in [block] if path == "blocks" else list(block["variants"].values()):
        inner = place
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = new
    with pytest.raises(BadManifest, match=message):
        read_manifest(json.dumps(facts), source="here")
