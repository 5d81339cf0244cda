"""A lane: one sequence on its way through a decoder's segments, every token as deep as it has gone.

A segment holds keys and values of the first tokens of the sequence, without a gap. The tokens behind these
wait in front of it, with the hidden state in which they came; nothing of them is lost, so they can go on at
any later time, many in one run, and the cache is then what it would be had they gone on at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from offramp.runtime.engines.base import Array
from offramp.runtime.engines.ort_decoder import KEPT, DecoderEngine, Made


class Lane:
    """One sequence; ids: its tokens. filled: by segment, how many of them, the first ones, it has dealt with.

    ran: blocks that were run for tokens, all in all.
    """

    def __init__(self, engine: DecoderEngine) -> None:
        manifest = engine.manifest
        self.engine, self.cache = engine, engine.cache()
        self.ids: list[int] = []
        self.filled = [0] * len(manifest.segments)
        self.ran = 0
        self._blocks = [len(segment.blocks) for segment in manifest.segments]
        self._rows = [_Rows(manifest.hidden_size) for _ in manifest.segments]

    def feed(self, ids: Sequence[int]) -> None:
        """Tokens that follow; BadInput where the network does not reach so far."""
        self.cache.make_room(len(self.ids) + len(ids))
        self.ids += ids

    def waiting(self, segment: int) -> int:
        """Tokens that stand in front of a segment."""
        reached = self.filled[segment - 1] if segment else len(self.ids)
        return reached - self.filled[segment]

    def advance(self, segment: int, most: int = KEPT) -> Made:
        """Run a segment on all who wait for it, at most so many at a time; gives what the last run made.

        `most` is small so that runs find their memory bound already; a prompt, which comes once, goes at
        once.
        """
        made = self._run(segment, most)
        while self.waiting(segment):
            made = self._run(segment, most)
        return made

    def through(self, first: int = 0, most: int = KEPT, head: bool = False) -> Made:
        """Run all segments from `first` on, as advance does; gives what the last one made, whose hidden is
        its leaving, too. head: with the logits of the last token [1, vocabulary].
        """
        start, count = self.filled[first], self.waiting(first)
        behind = len(self.filled) - first
        if count > most or self.filled[first:].count(start) < behind:
            for segment in range(first, len(self.filled)):
                made = self.advance(segment, most)
        else:  # nobody waits further on: straight through, nothing is put down between
            hidden = self._rows[first].take(count) if first else None
            ids = self.ids[start : start + count]
            made = self.cache.through(first, ids, start, hidden, head and count == 1)
            self.ran += count * sum(self._blocks[first:])
            self.filled[first:] = [start + count] * behind
        if head and made.logits is None:
            made = made._replace(logits=self.cache.logits(made.hidden[-1:]))
        return made

    def fill(self, segment: int, keep: int = 0) -> None:
        """All who wait but the last `keep` go past a segment, which is left keys and values made of the
        hidden state that passes by.
        """
        while (count := min(KEPT, self.waiting(segment) - keep)) > 0:
            start = self.filled[segment]
            hidden = self._hidden(segment, count)
            self.cache.fill(segment, self.ids[start : start + count], start, hidden)
            self._passed(segment, count, hidden)

    def skip(self, segment: int) -> None:
        """All who wait go past a segment and leave nothing there: right where no later token runs it."""
        if count := self.waiting(segment):
            self._passed(segment, count, self._hidden(segment, count))

    def truncate(self, length: int) -> None:
        """Forget the tokens from there on."""
        del self.ids[length:]
        for segment, filled in enumerate(self.filled):
            self.filled[segment] = min(filled, length)
        for segment, rows in enumerate(self._rows[1:], 1):
            rows.keep(self.waiting(segment))

    def _run(self, segment: int, most: int) -> Made:
        start, count = self.filled[segment], min(most, self.waiting(segment))
        made = self.cache.segment(
            segment, self.ids[start : start + count], start, self._hidden(segment, count)
        )
        self.ran += count * self._blocks[segment]
        self._passed(segment, count, made.hidden)
        return made

    def _hidden(self, segment: int, count: int) -> Array:
        """Of the first who wait [count, hidden], taken from where they stood."""
        if segment:
            return self._rows[segment].take(count)
        start = self.filled[0]
        return self.cache.embed(self.ids[start : start + count], start)

    def _passed(self, segment: int, count: int, hidden: Array) -> None:
        self.filled[segment] += count
        if segment + 1 < len(self._rows):
            self._rows[segment + 1].put(hidden)


class _Rows:
    """Hidden states [tokens, hidden] that come in behind and go out in front."""

    def __init__(self, width: int) -> None:
        self._array = np.empty((KEPT, width), np.float32)
        self._begin = self._end = 0

    def put(self, rows: Array) -> None:
        end = self._end + len(rows)
        if end > len(self._array):
            held = self._end - self._begin
            room = 2 * (held + len(rows))
            array = np.empty((max(room, KEPT), self._array.shape[1]), np.float32)
            array[:held] = self._array[self._begin : self._end]
            self._array, self._begin, self._end = array, 0, held
            end = held + len(rows)
        self._array[self._end : end] = rows
        self._end = end

    def take(self, count: int) -> Array:
        """A view, until the next put."""
        found: Array = self._array[self._begin : self._begin + count]
        self._begin += count
        if self._begin == self._end:
            self._begin = self._end = 0
        return found

    def keep(self, count: int) -> None:
        self._end = self._begin + count
