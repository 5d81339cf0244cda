"""Generation: one token after another, each with the depth at which it was said.

Prompts and first tokens go through every block, whatever the way of those that follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from offramp.runtime.engines.base import Array
from offramp.runtime.engines.ort_decoder import DecoderEngine, Made
from offramp.runtime.errors import BadInput
from offramp.runtime.rules import Plan, Rule, Signals
from offramp.runtime.sequence import Lane

SILENT = ("gate", "fixed")  # rules that ask no head: a head costs several blocks


@dataclass(frozen=True)
class Token:
    """A token that was said.

    depth: blocks behind which it was. ran: blocks that were run since the token before, for whatever token:
    drafts and tokens that had waited count here. drafted: a draft said it, and proved right.
    """

    id: int
    depth: int
    ran: int
    drafted: bool = False


class Way(Protocol):
    """How tokens behind the first come about."""

    def __call__(self, lane: Lane, token: int, most: int) -> list[Token]:
        """What follows `token`, which the lane has not been fed yet: `most` tokens or fewer, one at least.
        The lane is fed all of them but the last; the network reads as far as that.
        """
        ...


@runtime_checkable
class Chooser(Protocol):
    """What chooses the way of a sequence by its prompt."""

    def chosen(self, hidden: Array) -> Way:
        """The way, by the hidden state of the prompt's last token behind the first segment [hidden]."""
        ...


def full(lane: Lane, token: int, most: int) -> list[Token]:
    """The way through all blocks."""
    before = lane.ran
    lane.feed([token])
    logits = lane.through(head=True).logits
    assert logits is not None
    return [Token(int(logits[-1].argmax()), lane.engine.manifest.blocks, lane.ran - before)]


class Exiting:
    """The way of tokens that leave where a rule says so, and of what the cache is then given of them.

    fills: False has them wait and run later, in one go, when a token goes deeper: the cache is that of the
    full depth ("deferred"). True leaves keys and values made of the hidden state with which they left
    ("propagate").
    """

    def __init__(self, rule: Rule, asks_head: bool, fills: bool, segments: int) -> None:
        self._rule, self._asks, self._fills = rule, asks_head, fills
        self._leaves = getattr(rule, "leaves", None)
        self._whole: Plan = np.zeros((1, segments), np.int8)

    def __call__(self, lane: Lane, token: int, most: int) -> list[Token]:
        before = lane.ran
        logits, depth = self.step(lane, token)
        return [Token(int(logits.argmax()), depth, lane.ran - before)]

    def step(self, lane: Lane, token: int) -> tuple[Array, int]:
        """Feed a token; gives logits [vocabulary] where it left, until the next run, and that depth in
        blocks.
        """
        plan, memory, depth = self._whole, np.zeros((1, self._rule.width), np.float32), 0
        lane.feed([token])
        for segment, stage in enumerate(lane.engine.manifest.segments):
            if self._fills:
                lane.fill(segment, keep=1)
            made = lane.advance(segment)
            depth += len(stage.blocks)
            if segment + 1 == len(lane.filled):
                break
            logits = lane.cache.logits(made.leaving[-1:]) if self._asks else None
            gate = None if made.gate is None else made.gate[-1:]
            signals = Signals(logits, gate)  # type: ignore[arg-type]  # a rule that reads logits has them
            if self._leaves is not None:
                left = self._leaves(signals, segment)
            else:
                plan, memory = self._rule(signals, memory, plan, segment)
                left = bool(plan[0, segment + 1] < 0)
            if left:
                found: Array = (lane.cache.logits(made.leaving[-1:]) if logits is None else logits)[0]
                return found, depth
        last: Array = lane.cache.logits(made.hidden[-1:])[0]
        return last, depth


class Skipping:
    """The way past some segments, the same ones for every token of a sequence: their caches are not read."""

    def __init__(self, skipped: frozenset[int]) -> None:
        self._skipped = skipped

    def __call__(self, lane: Lane, token: int, most: int) -> list[Token]:
        before = lane.ran
        lane.feed([token])
        said = _likeliest(lane, past(lane, self._skipped).leaving)
        return [Token(said, lane.ran - before, lane.ran - before)]


def past(lane: Lane, skipped: frozenset[int], most: int | None = None) -> Made:
    """Run all segments but these on who waits for them; gives what the last one made."""
    for segment in range(len(lane.filled)):
        if segment in skipped:
            lane.skip(segment)
        else:
            made = lane.advance(segment) if most is None else lane.advance(segment, most)
    return made


def generate(
    engine: DecoderEngine,
    ids: Sequence[int],
    most: int,
    stop: Sequence[int] | None = None,
    way: Way | Chooser = full,
) -> Iterator[Token]:
    """The likeliest token each time, until one of `stop` (None: the bundle's own; the token is given too),
    `most` tokens, or the end of what the network reads.

    Raises BadInput for a prompt without tokens or one that is too long.
    """
    facts = engine.manifest.decoder
    assert facts is not None
    if not len(ids):
        raise BadInput("the prompt has no token")
    ends = set(facts.stop if stop is None else stop)
    lane = Lane(engine)
    lane.feed(list(ids))
    made = lane.advance(0, len(ids))
    if isinstance(way, Chooser):
        way = way.chosen(made.hidden[-1])
    made = lane.through(1, len(ids)) if len(lane.filled) > 1 else made
    said = _likeliest(lane, made.hidden)
    told = [Token(said, engine.manifest.blocks, engine.manifest.blocks)]
    given = 0
    while True:
        for token in told:
            yield token
            given += 1
            if given == most or token.id in ends:
                return
        room = min(most - given, lane.cache.longest - len(lane.ids))
        if room < 1:
            return
        told = way(lane, told[-1].id, room)


def _likeliest(lane: Lane, hidden: Array) -> int:
    return int(lane.cache.logits(hidden[-1:]).argmax())
