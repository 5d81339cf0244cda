"""A decoder's sequence, on a decoder in numpy: what waits, what runs together, what the cache holds."""

from __future__ import annotations

import fake_decoder
import numpy as np
import pytest
from fake_decoder import BLOCKS, LONGEST, FakeRunner, reference

from offramp.runtime.errors import BadInput
from offramp.runtime.sequence import KEPT_TOKENS, TokenSequence, TokenSignals

SEGMENTS = len(BLOCKS)
PROMPT = [5, 9, 11, 2, 7]
CLOSE = 1e-5


def random_ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, fake_decoder.VOCABULARY, count).tolist()


def started(prompt: list[int], *, propagate: bool = False) -> tuple[TokenSequence, FakeRunner]:
    """A sequence whose prompt has run every segment."""
    runner = FakeRunner()
    sequence = TokenSequence(runner, propagate=propagate)
    sequence.feed(prompt)
    run_to(sequence, SEGMENTS)
    return sequence, runner


def run_to(sequence: TokenSequence, depth: int, first: int = 0) -> np.ndarray:
    """Run segments from `first` on; hidden state [tokens of the last run, hidden size], copied."""
    output = None
    for segment in range(first, depth):
        output = sequence.advance(segment)
    return np.array([]) if output is None else output.hidden.copy()


@pytest.mark.parametrize("propagate", [False, True])
def test_tokens_with_random_exits_have_the_hidden_states_of_the_reference(propagate: bool) -> None:
    for seed in range(6):
        depths = np.random.default_rng(seed).integers(1, SEGMENTS + 1, 40).tolist()
        ids, depths = [*PROMPT, *random_ids(40, seed)], [SEGMENTS] * len(PROMPT) + depths
        states = reference(ids, depths, propagate=propagate)
        sequence, _ = started(PROMPT, propagate=propagate)
        for position in range(len(PROMPT), len(ids)):
            sequence.feed(ids[position : position + 1])
            for segment in range(depths[position]):
                hidden = sequence.advance(segment).hidden[-1]
                np.testing.assert_allclose(hidden, states[position, segment], atol=CLOSE)


def test_waiting_tokens_join_the_next_run() -> None:
    sequence, runner = started(PROMPT)
    for id in (3, 4):
        sequence.feed([id])
        run_to(sequence, 1)
    assert [sequence.waiting(segment) for segment in range(SEGMENTS)] == [0, 2, 0, 0]
    sequence.feed([8])
    runner.calls.clear()
    run_to(sequence, SEGMENTS)
    assert runner.calls == [("run", 0, 7, 1), ("run", 1, 5, 3), ("run", 2, 5, 3), ("run", 3, 5, 3)]
    assert not any(sequence.waiting(segment) for segment in range(SEGMENTS))
    assert sequence.blocks_run == sum(BLOCKS) * 8


def test_prompt_runs_in_one_step_whatever_its_length() -> None:
    prompt = random_ids(3 * KEPT_TOKENS)
    _, runner = started(prompt)
    assert runner.calls == [("run", segment, 0, len(prompt)) for segment in range(SEGMENTS)]


def test_many_waiting_tokens_run_in_small_groups() -> None:
    ids = random_ids(2 * KEPT_TOKENS + 8, 4)
    waiting, runner = started(PROMPT)
    for id in ids:
        waiting.feed([id])
        run_to(waiting, 1)
    runner.calls.clear()
    last = run_to(waiting, SEGMENTS, first=1)[-1]
    groups = [(5, KEPT_TOKENS), (5 + KEPT_TOKENS, KEPT_TOKENS), (5 + 2 * KEPT_TOKENS, 8)]
    assert runner.calls == [("run", segment, *group) for segment in (1, 2, 3) for group in groups]
    all_ids = [*PROMPT, *ids]
    states = reference(all_ids, [SEGMENTS] * len(all_ids))
    np.testing.assert_allclose(last, states[-1, -1], atol=CLOSE)


class NeverInPlace(TokenSequence):
    """Puts every hidden state through the queue, as if another step had come between."""

    def advance(self, segment: int):
        self.put_aside()
        return super().advance(segment)


def test_hand_over_in_place_equals_the_queue() -> None:
    in_place, queued = TokenSequence(FakeRunner()), NeverInPlace(FakeRunner())
    for ids, depth in ((PROMPT, SEGMENTS), ([7], SEGMENTS), ([8, 3], 2), ([1], SEGMENTS), ([4], 1), ([6], 3)):
        for sequence in (in_place, queued):
            sequence.feed(ids)
        np.testing.assert_array_equal(run_to(in_place, depth), run_to(queued, depth))
        assert in_place.filled == queued.filled and in_place.blocks_run == queued.blocks_run
    np.testing.assert_array_equal(in_place.runner.keys, queued.runner.keys)  # type: ignore[attr-defined]


def test_tokens_that_run_straight_through_are_not_copied() -> None:
    sequence, runner = started(PROMPT)
    sequence.feed([7])
    passed = []
    run = runner.run
    runner.run = lambda *args: (passed.append(args[3]), run(*args))[1]  # type: ignore[method-assign]
    run_to(sequence, SEGMENTS)
    assert passed == [None] * SEGMENTS


def test_truncate_forgets_tokens_at_every_depth() -> None:
    sequence, _ = started(PROMPT)
    sequence.feed([7])
    expected = run_to(sequence, SEGMENTS)[-1]
    for depth in range(SEGMENTS + 1):
        sequence.truncate(len(PROMPT))
        for id in (1, 2, 3):
            sequence.feed([id])
            run_to(sequence, depth)
        sequence.truncate(len(PROMPT))
        assert sequence.ids == PROMPT and sequence.length == len(PROMPT)
        assert not any(sequence.waiting(segment) for segment in range(SEGMENTS))
        sequence.feed([7])
        np.testing.assert_allclose(run_to(sequence, SEGMENTS)[-1], expected, atol=CLOSE)
    sequence.truncate(0)
    assert sequence.filled == [0] * SEGMENTS


def test_truncate_keeps_tokens_that_wait() -> None:
    sequence, _ = started(PROMPT)
    for id in (1, 2, 3):
        sequence.feed([id])
        run_to(sequence, 2)
    sequence.truncate(len(PROMPT) + 2)
    assert [sequence.waiting(segment) for segment in range(SEGMENTS)] == [0, 0, 2, 0]
    sequence.feed([9])
    ids = [*PROMPT, 1, 2, 9]
    states = reference(ids, [SEGMENTS] * len(ids))
    np.testing.assert_allclose(run_to(sequence, SEGMENTS)[-1], states[-1, -1], atol=CLOSE)


def test_skip_passes_tokens_by_and_leaves_their_hidden_state() -> None:
    sequence, runner = started(PROMPT)
    runner.keys[1] = np.nan  # nothing may read the cache of the segment that is skipped
    sequence.feed([7])
    before = sequence.advance(0).hidden.copy()
    sequence.skip(1)
    assert sequence.filled == [6, 6, 5, 5] and sequence.blocks_run == 5 * sum(BLOCKS) + 1
    keys = np.concatenate([runner.keys[2, :5], before])
    expected = fake_decoder.block_of(2, before[0], keys)
    np.testing.assert_allclose(sequence.advance(2).hidden[-1], expected, atol=CLOSE)
    assert np.isfinite(run_to(sequence, SEGMENTS, first=3)).all()
    sequence.skip(1)  # nothing waits
    assert runner.calls[-1] == ("run", 3, 5, 1)


def test_skip_of_the_first_segment_embeds() -> None:
    sequence, _ = started(PROMPT)
    sequence.feed([7])
    sequence.skip(0)
    embedded = FakeRunner().embed([7], 0)
    keys = np.concatenate([sequence.runner.keys[1, :5], embedded])  # type: ignore[attr-defined]
    np.testing.assert_allclose(sequence.advance(1).hidden, fake_decoder.block_of(1, embedded[0], keys)[None])


def test_propagate_fills_the_cache_of_earlier_tokens_and_runs_the_newest() -> None:
    sequence, runner = started(PROMPT, propagate=True)
    for id in (3, 4):
        sequence.feed([id])
        run_to(sequence, 1)
    sequence.feed([8])
    runner.calls.clear()
    run_to(sequence, 3)
    assert runner.calls == [
        ("run", 0, 7, 1),
        ("fill", 1, 5, 2),
        ("run", 1, 7, 1),
        ("fill", 2, 5, 2),
        ("run", 2, 7, 1),
    ]
    assert sequence.blocks_run == 5 * sum(BLOCKS) + 2 + sum(BLOCKS[:3])


def test_fill_passes_all_but_the_newest() -> None:
    sequence, runner = started(PROMPT)
    for id in random_ids(KEPT_TOKENS + 3):
        sequence.feed([id])
        run_to(sequence, 1)
    runner.calls.clear()
    sequence.fill(1, keep=1)
    assert runner.calls == [("fill", 1, 5, KEPT_TOKENS), ("fill", 1, 5 + KEPT_TOKENS, 2)]
    assert [sequence.waiting(segment) for segment in range(SEGMENTS)] == [0, 1, KEPT_TOKENS + 2, 0]
    sequence.fill(1)
    assert sequence.waiting(1) == 0


def test_feed_beyond_the_longest_input_is_refused() -> None:
    sequence, _ = started(PROMPT)
    with pytest.raises(BadInput, match=f"{LONGEST + 5} tokens"):
        sequence.feed([1] * LONGEST)
    assert sequence.ids == PROMPT


def test_signals_are_those_of_the_newest_tokens() -> None:
    sequence, runner = started(PROMPT)
    sequence.feed([3, 4, 8])
    output = sequence.advance(0)
    for rows in (1, 2, 3):
        signals = TokenSignals(runner, output, rows)
        np.testing.assert_array_equal(signals.hidden, output.hidden[-rows:])
        np.testing.assert_array_equal(signals.gate, fake_decoder.gate_of(0, output.hidden[-rows:]))
        expected = fake_decoder.logits_of(fake_decoder.exit_hidden_of(0, output.hidden[-rows:]))
        np.testing.assert_allclose(signals.logits, expected, atol=CLOSE)
        np.testing.assert_allclose(signals.draft_logits(), expected[:, : fake_decoder.DRAFT_IDS], atol=CLOSE)
        assert signals.forecast is None
    assert TokenSignals(runner, run_last(sequence), 1).gate is None


def run_last(sequence: TokenSequence):
    """The output of the last segment."""
    run_to(sequence, SEGMENTS - 1, first=1)
    return sequence.advance(SEGMENTS - 1)


def test_head_runs_when_logits_are_read_and_once() -> None:
    sequence, runner = started(PROMPT)
    sequence.feed([3])
    signals = TokenSignals(runner, sequence.advance(0), 1)
    assert signals.gate is not None and runner.calls[-1][0] == "run"
    first, second = signals.logits, signals.logits
    assert first is second and [name for name, *_ in runner.calls].count("head") == 1
