"""A decoder's sequence: its tokens, its cache of keys and values, and the tokens that wait before a segment.

The cache of a segment holds keys and values of the first tokens of the sequence, without a gap. The tokens
after these wait before the segment, with the hidden state of the segment before it. They can run the segment
at any later time, many in one step, and the cache is then the same as if they had run it at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from offramp.runtime.rules.base import Floats

KEPT_TOKENS = 16  # an engine keeps the bindings of steps on at most this many tokens; a prompt is run once


class SegmentOutput(NamedTuple):
    """The outputs of a segment for n tokens; the next step on n tokens overwrites the arrays.

    hidden [n, hidden size]. exit_hidden [n, hidden size]: the head's input for tokens that exit here; hidden
    itself without a translator. gate [n]: P(exit), or None. controller [n, segments ahead - 1]: P(run) of the
    segments ahead, or None.
    """

    hidden: Floats
    exit_hidden: Floats
    gate: Floats | None
    controller: Floats | None = None

    def take(self, rows: list[int] | slice) -> SegmentOutput:
        """The outputs of some of the tokens; copies if the rows are a list."""
        hidden, gate, controller = self.hidden[rows], self.gate, self.controller
        return SegmentOutput(
            hidden,
            hidden if self.exit_hidden is self.hidden else self.exit_hidden[rows],
            None if gate is None else gate[rows],
            None if controller is None else controller[rows],
        )

    @staticmethod
    def join(outputs: Sequence[SegmentOutput]) -> SegmentOutput:
        """The outputs of all tokens of several steps of one segment, copied."""
        gates, controllers = [one.gate for one in outputs], [one.controller for one in outputs]
        return SegmentOutput(
            np.concatenate([one.hidden for one in outputs]),
            np.concatenate([one.exit_hidden for one in outputs]),
            _concatenated(gates),
            _concatenated(controllers),
        )


def _concatenated(parts: Sequence[Floats | None]) -> Floats | None:
    """All parts in one array; None if one of them is."""
    given = [part for part in parts if part is not None]
    return np.concatenate(given) if len(given) == len(parts) else None


class Head(Protocol):
    """The part of an engine that turns hidden states into logits."""

    def logits(self, hidden: Floats, draft: bool = False) -> Floats:
        """Compute logits [n, ids] from hidden [n, hidden size]; for a draft, only those of the first ids.

        The next call overwrites the array.
        """
        ...


class CacheRunner(Head, Protocol):
    """The part of an engine that a sequence uses: its cache, and steps that read and extend the cache."""

    @property
    def longest(self) -> int:
        """Most tokens that the network can read, prompt and answer together."""
        ...

    @property
    def blocks(self) -> Sequence[int]:
        """Number of blocks of each segment."""
        ...

    @property
    def hidden_size(self) -> int:
        """Size of a token's hidden state."""
        ...

    def make_room(self, tokens: int) -> None:
        """Enlarge the cache to hold this many tokens; raises BadInput for more than `longest`."""
        ...

    def reserve(self, tokens: int) -> None:
        """Make room for tokens that may follow, this many in all, if empty places cost little."""
        ...

    def embed(self, ids: Sequence[int], start: int) -> Floats:
        """Run the stem on tokens at positions from `start` on; returns hidden [n, hidden size]."""
        ...

    def run(self, segment: int, ids: Sequence[int], start: int, hidden: Floats | None) -> SegmentOutput:
        """Run a segment on tokens at positions from `start` on, and add them to the cache of its blocks.

        hidden [n, hidden size]; None for the first segment, which reads the stem's output; see draft_runner.
        """
        ...

    def run_next(self, segment: int) -> SegmentOutput:
        """Run a segment on the tokens of the previous step, which ran the segment before it."""
        ...

    def fill(self, segment: int, ids: Sequence[int], start: int, hidden: Floats) -> None:
        """Compute keys and values from hidden states for the cache of a segment that is not run."""
        ...

    def draft_runner(self) -> CacheRunner | None:
        """A runner of the draft block for the same text, with a cache of its own; None if there is no block.

        The block is its first segment. `hidden` of its method run is the hidden state of full depth, or a
        prediction of it, of the token before each token; its exit_hidden predicts that of the token itself.
        """
        ...


class TokenSignals:
    """Signals of the newest tokens of a sequence after a segment; implements rules.base.Signals.

    The head costs as much as several blocks, so logits are computed when they are first read: before the next
    step of the sequence.
    """

    __slots__ = ("_logits", "_output", "_rows", "_runner")
    forecast = answer = None

    def __init__(self, runner: Head, output: SegmentOutput, rows: int) -> None:
        self._runner, self._output, self._rows = runner, output, rows
        self._logits: Floats | None = None

    @property
    def hidden(self) -> Floats:
        """Hidden state after the segment [rows, hidden size]."""
        return self._newest(self._output.hidden)

    @property
    def all_hidden(self) -> Floats:
        """Hidden state after the segment of all tokens of its last step [tokens, hidden size]."""
        return self._output.hidden

    @property
    def gate(self) -> Floats | None:
        """P(exit) of the policy [rows]; None without a policy."""
        return None if self._output.gate is None else self._newest(self._output.gate)

    @property
    def controller(self) -> Floats | None:
        """P(run) of the segments ahead [rows, segments ahead - 1]; None without controllers."""
        probabilities = self._output.controller
        return None if probabilities is None else self._newest(probabilities)

    @property
    def logits(self) -> Floats:
        """Logits of the exit after this segment [rows, vocabulary]."""
        if self._logits is None:
            self._logits = self._runner.logits(self._newest(self._output.exit_hidden))
        return self._logits

    def logits_at(self, rows: list[int]) -> Floats:
        """Logits of some rows [n, vocabulary]: of those of all rows if they were read, else computed."""
        if self._logits is not None:
            return self._logits[rows]
        return self._runner.logits(self._newest(self._output.exit_hidden)[rows])

    def draft_logits(self) -> Floats:
        """Compute logits of the draft head [rows, ids]; of all ids if the bundle has no draft head."""
        return self._runner.logits(self._newest(self._output.exit_hidden), draft=True)

    def _newest(self, rows: Floats) -> Floats:
        """The newest rows; all rows as the same array, which the head can read in place."""
        return rows if len(rows) == self._rows else rows[-self._rows :]


class TokenSequence:
    """The tokens of a prompt and its answer, with their cache and the tokens that wait.

    It implements engines.base.State. ids: its tokens. filled: for each segment, how many of the first tokens
    have run or passed it. rows: number of newest tokens whose signals are needed. blocks_run: total number of
    blocks that were run for tokens.

    propagate: when a later token runs a segment, a token that exited before gets keys and values computed
    from the hidden state of its exit, and a token that skips a segment gets them there at once. Otherwise a
    token that exited runs the segment then ("deferred"), so that the cache is that of full depth.
    """

    def __init__(self, runner: CacheRunner, *, propagate: bool = False) -> None:
        self.runner = runner
        self.ids: list[int] = []
        self.filled = [0] * len(runner.blocks)
        self._blocks, self._last = runner.blocks, len(runner.blocks) - 1
        self.rows, self.blocks_run = 1, 0
        self._propagate, self._newest = propagate, 0  # number of tokens that were fed last
        self._waiting_hidden = [_HiddenQueue(runner.hidden_size) for _ in runner.blocks]
        # The newest tokens before a segment, (segment, start, count), whose hidden state still is in the
        # output of the previous step: most tokens run all segments in turn, and nothing is copied for them.
        self._in_place: tuple[int, int, int] | None = None
        self._in_place_hidden: Floats | None = None
        self._exact_end: int | None = None  # first token that skipped a segment or got its cache by a fill

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        return len(self.ids)

    @property
    def exact(self) -> int:
        """Number of first tokens whose cache is that of the full depth in every segment."""
        filled = min(self.filled)
        return filled if self._exact_end is None else min(filled, self._exact_end)

    def feed(self, ids: Sequence[int]) -> None:
        """Add tokens, which wait before the first segment; raises BadInput if the sequence gets too long."""
        self.put_aside()
        self.runner.make_room(len(self.ids) + len(ids))
        self.ids += ids
        self._newest = len(ids)

    def waiting(self, segment: int) -> int:
        """Number of tokens that wait before a segment."""
        arrived = self.filled[segment - 1] if segment else len(self.ids)
        return arrived - self.filled[segment]

    def advance(self, segment: int) -> SegmentOutput:
        """Run a segment on all tokens that wait before it; returns the output of the last run.

        Each run is on a few tokens, for which memory is bound already; tokens that were fed together, such as
        a prompt, run together.
        """
        place = self._in_place
        if place is not None and place[0] == segment:
            _, start, count = place
            # Most tokens run straight through, so this path does no more than it must: a line between two
            # segments takes several times what it takes in a tight loop.
            if self.filled[segment] == start and self.filled[segment - 1] == start + count:
                output = self.runner.run_next(segment)
                self.blocks_run += count * self._blocks[segment]
                self.filled[segment] = start + count
                self._in_place = (segment + 1, start, count) if segment < self._last else None
                self._in_place_hidden = output.hidden
                return output
        if self._propagate and self.waiting(segment) > self._newest:
            self.fill(segment, keep=self._newest)
        output = self._run(segment)
        while self.waiting(segment):
            output = self._run(segment)
        return output

    def fill(self, segment: int, keep: int = 0) -> None:
        """Move waiting tokens, all but the newest `keep`, past a segment without running it.

        Its cache gets keys and values that are computed from their hidden state.
        """
        self.put_aside()
        while (count := min(KEPT_TOKENS, self.waiting(segment) - keep)) > 0:
            start = self.filled[segment]
            hidden = self._take(segment, count)
            self.runner.fill(segment, self.ids[start : start + count], start, hidden)
            self._pass_on(segment, count, hidden)

    def skip(self, segment: int) -> None:
        """Move all waiting tokens past a segment without running it.

        With propagate its cache is filled, so that later tokens can run it. Otherwise it gets nothing, and no
        later token may run it. The first segment has no cache fill: no rule lets single tokens skip it.
        """
        if self._propagate and segment:
            self.fill(segment)
        elif count := self.waiting(segment):
            self.put_aside()
            self._pass_on(segment, count, self._take(segment, count))

    def truncate(self, length: int) -> None:
        """Remove all tokens after the first `length` from the sequence."""
        self.put_aside()
        del self.ids[length:]
        if self._exact_end is not None and length <= self._exact_end:
            self._exact_end = None
        for segment, filled in enumerate(self.filled):
            self.filled[segment] = min(filled, length)
        for segment, queue in enumerate(self._waiting_hidden[1:], 1):
            queue.keep(self.waiting(segment))

    def one_waits(self, segment: int) -> bool:
        """Whether the newest token waits alone before a segment; with propagate, earlier ones are filled."""
        waiting = self.waiting(segment)
        if waiting > 1 and self._propagate:
            self.fill(segment, keep=1)
            waiting = self.waiting(segment)
        return waiting == 1

    def hand_over(self, segment: int) -> Floats:
        """Hidden state [1, hidden size] of the one token that waits before a segment, which is not the first.

        The token runs the segment in a step with tokens of other sequences; see passed.
        """
        if self._in_place is not None and self._in_place[0] == segment:
            assert self._in_place_hidden is not None
            self._in_place = None
            return self._in_place_hidden
        return self._waiting_hidden[segment].take(1)

    def passed(self, segment: int, hidden: Floats) -> None:
        """Note that the newest token, which waited alone, has run a segment in a step with other sequences.

        hidden [1, hidden size]: after the segment, in an array that no step overwrites.
        """
        self.blocks_run += self._blocks[segment]
        self.filled[segment] += 1
        # No token starts at -1, so that advance() does not take it for the output of the runner's last step.
        self._in_place = (segment + 1, -1, 1) if segment < self._last else None
        self._in_place_hidden = hidden

    def hold_prefix(self) -> None:
        """Note that the cache holds all tokens, none of which has run: it was copied from elsewhere."""
        assert not any(self.filled)
        self.filled = [len(self.ids)] * len(self.filled)

    def _run(self, segment: int) -> SegmentOutput:
        self.put_aside()
        start = self.filled[segment]
        count = min(max(KEPT_TOKENS, self._newest), self.waiting(segment))
        hidden = self._take(segment, count) if segment else None
        output = self.runner.run(segment, self.ids[start : start + count], start, hidden)
        self.blocks_run += count * self._blocks[segment]
        self.filled[segment] = start + count
        self._in_place = (segment + 1, start, count) if segment < self._last else None
        self._in_place_hidden = output.hidden
        return output

    def put_aside(self) -> None:
        """Copy the hidden state that is in place into its queue, before another step overwrites it."""
        if self._in_place is not None:
            assert self._in_place_hidden is not None
            self._waiting_hidden[self._in_place[0]].put(self._in_place_hidden)
            self._in_place = None

    def _take(self, segment: int, count: int) -> Floats:
        """Hidden state of the first tokens that wait before a segment [count, hidden size]."""
        if segment:
            return self._waiting_hidden[segment].take(count)
        start = self.filled[0]
        return self.runner.embed(self.ids[start : start + count], start)

    def _pass_on(self, segment: int, count: int, hidden: Floats) -> None:
        start = self.filled[segment]
        if self._exact_end is None or start < self._exact_end:
            self._exact_end = start
        self.filled[segment] += count
        if segment + 1 < len(self._waiting_hidden):
            self._waiting_hidden[segment + 1].put(hidden)


class _HiddenQueue:
    """A queue of hidden states of waiting tokens [tokens, hidden size]."""

    def __init__(self, hidden_size: int) -> None:
        self._array = np.empty((KEPT_TOKENS, hidden_size), np.float32)
        self._begin = self._end = 0

    def put(self, rows: Floats) -> None:
        """Copy rows to the end of the queue."""
        end = self._end + len(rows)
        if end > len(self._array):
            held = self._end - self._begin
            array = np.empty((max(2 * (held + len(rows)), KEPT_TOKENS), self._array.shape[1]), np.float32)
            array[:held] = self._array[self._begin : self._end]
            self._array, self._begin, self._end = array, 0, held
            end = held + len(rows)
        self._array[self._end : end] = rows
        self._end = end

    def take(self, count: int) -> Floats:
        """Take the first rows out of the queue, as a view that is valid until the next put."""
        rows: Floats = self._array[self._begin : self._begin + count]
        self._begin += count
        if self._begin == self._end:
            self._begin = self._end = 0
        return rows

    def keep(self, count: int) -> None:
        """Drop all but the first `count` rows."""
        self._end = self._begin + count
