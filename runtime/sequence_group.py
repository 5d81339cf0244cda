"""Groups of sequences, each with its newest token, which the walker runs, takes apart and joins as rows.

A group is to the walker what a batch of rows is: its tokens wait before the same segment. Tokens that wait
alone run in one step on the cache that all sequences share, which reads the weights once. A sequence with
further tokens before the segment, which exited earlier, runs them in a step of its own. Sequences hold all
that lasts: ids, cache, and what waits. So groups are taken apart and joined without copying a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import numpy as np

from offramp.runtime.engines.base import Array, Engine, Rows
from offramp.runtime.rules.base import Floats
from offramp.runtime.sequence import SegmentOutput, TokenSequence, TokenSignals


class SharedCache(Protocol):
    """The cache of all sequences of an engine, which runs a new token of each of several in one step.

    A sequence has a slot in it. Slots are given in ascending order.
    """

    def embed_together(self, ids: Sequence[int], starts: Sequence[int]) -> Floats:
        """Run the stem on tokens at these positions; returns hidden [n, hidden size]."""
        ...

    def run_together(
        self, segment: int, slots: Sequence[int], starts: Sequence[int], hidden: Floats
    ) -> SegmentOutput:
        """Run a segment on a token of each slot; starts: tokens that its cache holds there."""
        ...

    def logits(self, hidden: Floats, draft: bool = False) -> Floats:
        """Compute logits [n, ids] of hidden [n, hidden size]; the next call overwrites them."""
        ...

    def copy_prefix(self, source: int, target: int, tokens: int) -> None:
        """Copy the cache of the first tokens of a slot to another slot."""
        ...


def shared_cache(sequence: TokenSequence) -> SharedCache | None:
    """The cache that a sequence shares with all others of its engine; None if it has one of its own."""
    return cast("SharedCache | None", getattr(sequence.runner, "slots", None))


def slot_of(sequence: TokenSequence) -> int:
    """The slot of a sequence in its shared cache."""
    return cast(int, getattr(sequence.runner, "slot"))  # noqa: B009  # no member of CacheRunner


class SequenceGroup:
    """Sequences of one shared cache whose newest tokens are walked together; implements engines.base.State.

    length: 0 for all groups, since sequences of any lengths join.
    """

    __slots__ = ("sequences", "slots")
    length = 0

    def __init__(self, sequences: Sequence[TokenSequence], slots: Sequence[int] | None = None) -> None:
        self.sequences = list(sequences)
        self.slots = [slot_of(sequence) for sequence in sequences] if slots is None else list(slots)

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return len(self.sequences)


class GroupEngine:
    """Runs groups of sequences on the engine of the sequences; implements engines.base.Engine.

    cache: that of the sequences.
    """

    max_rows = 1 << 20  # no limit but memory

    def __init__(self, engine: Engine[TokenSequence], cache: SharedCache) -> None:
        self._engine, self._cache = engine, cache
        self._variants = set[int]()  # in which the engine runs
        self._sequences: list[TokenSequence] = []  # of the last step
        self._signals: TokenSignals | None = None

    @property
    def name(self) -> str:
        """Name of the engine of the sequences."""
        return self._engine.name

    @property
    def device(self) -> str:
        """Device of the engine of the sequences."""
        return self._engine.device

    @property
    def facts(self) -> Mapping[str, str]:
        """Facts of the engine of the sequences."""
        return self._engine.facts

    def prepare(self, variant: int, segments: Sequence[int]) -> None:
        """Open the stem and segments in a variant; see Engine.prepare."""
        self._engine.prepare(variant, segments)

    def begin(self, inputs: Mapping[str, Array]) -> SequenceGroup:
        """Begin a sequence, a group of its own; see Engine.begin."""
        return SequenceGroup([self._engine.begin(inputs)])

    def step(self, segment: int, variant: int, state: SequenceGroup) -> TokenSignals:
        """Run a segment on the newest token of each sequence, and on tokens before it that wait there, too.

        The signals have a row for each sequence, in the order of the group.
        """
        if variant not in self._variants:
            self._engine.prepare(variant, ())  # raises BadSetting for variants that the engine does not run
            self._variants.add(variant)
        self._sequences = state.sequences
        self._signals = TokenSignals(self._cache, self._run(segment, state), state.rows)
        return self._signals

    def skip(self, segment: int, state: SequenceGroup) -> None:
        """Move the tokens of each sequence that wait for a segment past it; see Engine.skip."""
        for sequence in state.sequences:
            self._engine.skip(segment, sequence)

    def take(self, state: SequenceGroup, rows: Rows) -> SequenceGroup:
        """Make a group of some of the sequences; see Engine.take."""
        numbers = rows.tolist()
        return SequenceGroup([state.sequences[row] for row in numbers], [state.slots[row] for row in numbers])

    def join(self, states: Sequence[SequenceGroup]) -> SequenceGroup:
        """Make one group of several; see Engine.join."""
        return SequenceGroup(
            [sequence for state in states for sequence in state.sequences],
            [slot for state in states for slot in state.slots],
        )

    def drop(self, state: SequenceGroup) -> None:
        """Do nothing: the sequences go on after the walk of a token, and their owner drops them."""

    def close(self) -> None:
        """Do nothing: the owner of the engine closes it."""

    def after_fork(self) -> None:
        """Do nothing: the owner of the engine does it."""

    def logits_of(self, sequences: list[TokenSequence]) -> Floats:
        """Logits [n, vocabulary] of sequences of the last step; the next call or step overwrites them."""
        assert self._signals is not None
        if sequences == self._sequences:
            return self._signals.logits
        return self._signals.logits_at([self._sequences.index(sequence) for sequence in sequences])

    def copy_prefix(self, source: TokenSequence, target: TokenSequence) -> None:
        """Copy the cache of all tokens of `target`, none of which has run, from a sequence that begins so."""
        count = target.length
        assert target.ids == source.ids[:count] and count <= source.exact
        self._cache.copy_prefix(slot_of(source), slot_of(target), count)
        target.hold_prefix()

    def _run(self, segment: int, group: SequenceGroup) -> SegmentOutput:
        """Outputs of the newest tokens, in the order of the group, in arrays that no step overwrites."""
        sequences = group.sequences
        rows = [row for row, sequence in enumerate(sequences) if sequence.one_waits(segment)]
        if len(rows) < 2:
            rows = []
        rows.sort(key=group.slots.__getitem__)
        if len(rows) == len(sequences):
            return self._run_together(segment, group, rows)
        outputs: list[SegmentOutput | None] = [None] * len(sequences)
        if rows:
            together = self._run_together(segment, group, rows)
            for place, row in enumerate(sorted(rows)):
                outputs[row] = together.take(slice(place, place + 1))
        for row, sequence in enumerate(sequences):
            if outputs[row] is None:
                output = sequence.advance(segment)
                outputs[row] = output.take([len(output.hidden) - 1])
                sequence.put_aside()  # the next step of any sequence may overwrite the output
        return SegmentOutput.join([output for output in outputs if output is not None])

    def _run_together(self, segment: int, group: SequenceGroup, rows: list[int]) -> SegmentOutput:
        """Run one token of each of some sequences in a step; rows: of the group, by ascending slots.

        Returns their outputs in the order of the group.
        """
        chosen = [group.sequences[row] for row in rows]
        slots = [group.slots[row] for row in rows]
        starts = [sequence.filled[segment] for sequence in chosen]
        if segment:
            hidden = np.concatenate([sequence.hand_over(segment) for sequence in chosen])
        else:
            hidden = self._cache.embed_together([sequence.ids[-1] for sequence in chosen], starts)
        output = self._cache.run_together(segment, slots, starts, hidden)
        order = sorted(range(len(rows)), key=rows.__getitem__)  # places in `rows`, by row
        output = output.take(order)
        after = output.hidden
        for place, number in enumerate(order):
            chosen[number].passed(segment, after[place : place + 1])
        return output
