"""A decoder of five blocks in numpy, without graphs: for tests of sequences and of decoding.

Each segment mixes the hidden state of a token with the mean of the keys of all tokens up to it. A key that
was never written is NaN, so a segment that reads what it must not makes everything after it NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from offramp.runtime.errors import BadInput
from offramp.runtime.sequence import SegmentOutput, TokenSequence, TokenSignals

BLOCKS = (1, 2, 1, 1)  # of each segment
HIDDEN, VOCABULARY, DRAFT_IDS, LONGEST = 6, 24, 16, 100
MANIFEST: Any = SimpleNamespace(segments=BLOCKS, blocks=sum(BLOCKS), variants=("fp32",))
_RANDOM = np.random.default_rng(3)
_EMBEDDINGS = _RANDOM.normal(0, 1, (VOCABULARY, HIDDEN)).astype(np.float32)
_HEAD = _RANDOM.normal(0, 1, (HIDDEN, VOCABULARY)).astype(np.float32)
_WEIGHTS = _RANDOM.normal(0, 0.8, (2, len(BLOCKS), HIDDEN, HIDDEN)).astype(np.float32)
_GATES = _RANDOM.normal(0, 2, (len(BLOCKS), HIDDEN)).astype(np.float32)
_TRANSLATORS = _RANDOM.normal(0, 0.3, (len(BLOCKS), HIDDEN)).astype(np.float32)


def block_of(segment: int, hidden: Any, keys: Any) -> Any:
    """Hidden state [hidden size] of a token after a segment; keys [tokens, hidden size] up to the token."""
    weights, context = _WEIGHTS[:, segment], keys.mean(axis=0)
    return np.tanh(weights[0] @ hidden + weights[1] @ context).astype(np.float32)


def exit_hidden_of(segment: int, hidden: Any) -> Any:
    """What the head reads of tokens that exit after a segment; hidden [..., hidden size]."""
    return hidden if segment + 1 == len(BLOCKS) else hidden + _TRANSLATORS[segment]


def gate_of(segment: int, hidden: Any) -> Any:
    """P(exit) after a segment; hidden [..., hidden size]."""
    return 1 / (1 + np.exp(-hidden @ _GATES[segment]))


def logits_of(hidden: Any) -> Any:
    """Logits [..., vocabulary] of what the head reads [..., hidden size]."""
    return hidden @ _HEAD


def reference(ids: Sequence[int], depths: Sequence[int], *, propagate: bool = False) -> Any:
    """Hidden state [tokens, segments, hidden size] of a sequence whose tokens exit after so many segments.

    Each token has the keys of full depth; with propagate, those after its exit are made from the hidden state
    of its exit. Hidden states after the exit are NaN.
    """
    keys = np.full((len(ids), len(BLOCKS), HIDDEN), np.nan, np.float32)
    states = np.full_like(keys, np.nan)
    for position, id in enumerate(ids):
        hidden = exit_state = _EMBEDDINGS[id]
        for segment in range(len(BLOCKS)):
            is_past_exit = segment >= depths[position]
            keys[position, segment] = exit_state if propagate and is_past_exit else hidden
            hidden = block_of(segment, hidden, keys[: position + 1, segment])
            if not is_past_exit:
                states[position, segment] = exit_state = hidden
    return states


class FakeRunner:
    """A CacheRunner; calls: what it was called with, as (name, segment, start, tokens).

    The hidden state between two segments has one array for each number of tokens, as in the real engine: the
    next step on as many tokens overwrites it.
    """

    blocks, hidden_size, longest = BLOCKS, HIDDEN, LONGEST

    def __init__(self) -> None:
        self.keys = np.full((len(BLOCKS), LONGEST, HIDDEN), np.nan, np.float32)
        self.calls: list[tuple[str, int, int, int]] = []
        self._between: dict[int, Any] = {}

    def reserve(self, tokens: int) -> None:
        """Do nothing: this cache has no places."""

    def make_room(self, tokens: int) -> None:
        if tokens > LONGEST:
            raise BadInput(f"{tokens} tokens: this network reads {LONGEST}")

    def embed(self, ids: Sequence[int], start: int) -> Any:
        between = self._between_of(len(ids))
        between[0] = _EMBEDDINGS[list(ids)]
        return between[0]

    def run(self, segment: int, ids: Sequence[int], start: int, hidden: Any) -> SegmentOutput:
        self.calls.append(("run", segment, start, len(ids)))
        self._last = segment, ids, start
        between = self._between_of(len(ids))
        if hidden is not None:
            between[segment] = hidden
        elif segment == 0:
            self.embed(ids, start)
        for number in range(len(ids)):
            position = start + number
            self.keys[segment, position] = between[segment, number]
            keys = self.keys[segment, : position + 1]
            between[segment + 1, number] = block_of(segment, between[segment, number], keys)
        output = between[segment + 1]
        gate = None if segment + 1 == len(BLOCKS) else gate_of(segment, output)
        return SegmentOutput(output, exit_hidden_of(segment, output), gate)

    def run_next(self, segment: int) -> SegmentOutput:
        before, ids, start = self._last
        assert segment == before + 1, "the previous step ran another segment"
        return self.run(segment, ids, start, None)

    def fill(self, segment: int, ids: Sequence[int], start: int, hidden: Any) -> None:
        self.calls.append(("fill", segment, start, len(ids)))
        self.keys[segment, start : start + len(ids)] = hidden

    def logits(self, hidden: Any, draft: bool = False) -> Any:
        self.calls.append(("draft" if draft else "head", -1, -1, len(hidden)))
        return logits_of(hidden)[:, :DRAFT_IDS] if draft else logits_of(hidden)

    def draft_runner(self) -> None:
        return None

    def _between_of(self, tokens: int) -> Any:
        return self._between.setdefault(tokens, np.zeros((len(BLOCKS) + 1, tokens, HIDDEN), np.float32))


class FakeEngine:
    """An Engine of sequences; the last sequence is kept for tests."""

    name = device = "fake"
    facts: Mapping[str, str] = {}
    max_rows = 1

    def __init__(self, *, propagate: bool = False) -> None:
        self.propagate = propagate
        self.sequence: TokenSequence

    def begin(self, inputs: Mapping[str, Any]) -> TokenSequence:
        self.sequence = TokenSequence(FakeRunner(), propagate=self.propagate)
        self.sequence.feed(inputs["input_ids"][0].tolist())
        return self.sequence

    def step(self, segment: int, variant: int, state: TokenSequence) -> TokenSignals:
        return TokenSignals(state.runner, state.advance(segment), state.rows)

    def skip(self, segment: int, state: TokenSequence) -> None:
        state.skip(segment)

    def prepare(self, variant: int, segments: Sequence[int]) -> None: ...

    def take(self, state: TokenSequence, rows: Any) -> TokenSequence:
        raise NotImplementedError

    def join(self, states: Sequence[TokenSequence]) -> TokenSequence:
        raise NotImplementedError

    def drop(self, state: TokenSequence) -> None: ...

    def close(self) -> None: ...
