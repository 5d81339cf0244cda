"""The decoder of fake_decoder with one cache for all sequences, which runs tokens of several in one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fake_decoder import BLOCKS, DRAFT_IDS, HIDDEN, FakeEngine, FakeRunner, block_of, exit_hidden_of, gate_of
from fake_decoder import logits_of as head

from offramp.runtime.errors import BadInput
from offramp.runtime.sequence import SegmentOutput, TokenSequence

_EMBEDDER = FakeRunner()


class FakeSlots:
    """A sequence_group.SharedCache; steps: (segment, slots) of each step on tokens of several sequences.

    noise: added to the hidden state in those steps, as sums in another order do. As in the real engine, the
    outputs of a step are arrays that the next step on as many tokens overwrites.
    """

    def __init__(self, noise: float = 0.0) -> None:
        self.runners: dict[int, SlotRunner] = {}
        self.steps: list[tuple[int, tuple[int, ...]]] = []
        self.copies: list[tuple[int, int, int]] = []
        self.noise, self._random = noise, np.random.default_rng(0)
        self._outputs: dict[int, Any] = {}

    def embed_together(self, ids: Sequence[int], starts: Sequence[int]) -> Any:
        return _EMBEDDER.embed(ids, 0)

    def run_together(
        self, segment: int, slots: Sequence[int], starts: Sequence[int], hidden: Any
    ) -> SegmentOutput:
        assert list(slots) == sorted(set(slots)) and hidden.shape == (len(slots), HIDDEN)
        self.steps.append((segment, tuple(slots)))
        after = np.empty_like(hidden)
        for row, (slot, start) in enumerate(zip(slots, starts, strict=True)):
            keys = self.runners[slot].keys[segment]
            keys[start] = hidden[row]
            after[row] = block_of(segment, hidden[row], keys[: start + 1])
        after += self.noise * self._random.normal(0, 1, after.shape).astype(np.float32)
        output = self._outputs.setdefault(len(slots), np.empty_like(after))
        output[...] = after
        gate = None if segment + 1 == len(BLOCKS) else gate_of(segment, output)
        return SegmentOutput(output, exit_hidden_of(segment, output), gate)

    def logits(self, hidden: Any, draft: bool = False) -> Any:
        return head(hidden)[:, :DRAFT_IDS] if draft else head(hidden)

    def copy_prefix(self, source: int, target: int, tokens: int) -> None:
        self.copies.append((source, target, tokens))
        self.runners[target].keys[:, :tokens] = self.runners[source].keys[:, :tokens]


class SlotRunner(FakeRunner):
    """A FakeRunner with a slot of FakeSlots."""

    def __init__(self, slots: FakeSlots) -> None:
        super().__init__()
        self.slots = slots
        self.slot = next(number for number in range(len(slots.runners) + 1) if number not in slots.runners)
        slots.runners[self.slot] = self


class SlotEngine(FakeEngine):
    """An engine whose sequences share a cache; runners: all that were made, also of sequences that ended."""

    def __init__(self, *, propagate: bool = False, noise: float = 0.0) -> None:
        super().__init__(propagate=propagate)
        self.slots = FakeSlots(noise)
        self.runners: list[SlotRunner] = []

    def begin(self, inputs: Mapping[str, Any]) -> TokenSequence:
        runner = SlotRunner(self.slots)
        self.runners.append(runner)
        sequence = self.sequence = TokenSequence(runner, propagate=self.propagate)
        try:
            sequence.feed(inputs["input_ids"][0].tolist())
        except BadInput:
            self.drop(sequence)
            raise
        return sequence

    def drop(self, state: TokenSequence) -> None:
        assert isinstance(state.runner, SlotRunner)
        del self.slots.runners[state.runner.slot]
