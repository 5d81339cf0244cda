"""Many texts at once: their tokens share the steps of one walk, and texts join and leave at any token.

A loop does one piece of work after the other: a part of a prompt, which is walked alone, or one segment for
the tokens that wait there. Between two parts of prompts every text under way gets its next token, so that a
long prompt does not stop the others. Where sequences share no cache, whole tokens of the texts take turns
instead, as a step on several would read the weights once for each.

The token of a text is the one that it gets alone. A step on several tokens sums numbers in another order,
which changes logits in their last bits; where two are so close that this might matter, the token is run again
alone (see decoding.CLOSE_LOGITS).

A prompt that begins as a text did that is in the cache, or was, reads the cache of these tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from offramp.runtime.bundle.manifest import Manifest
from offramp.runtime.decoding import (
    FULL_DEPTH,
    Token,
    close_logits,
    end_of,
    is_float,
    next_token,
    tokens_of_round,
)
from offramp.runtime.draft_rounds import DraftRounds
from offramp.runtime.engines.base import Engine
from offramp.runtime.errors import BadInput
from offramp.runtime.rules.base import Floats, Plan, Rule
from offramp.runtime.rules.speculative import SpeculativeRule
from offramp.runtime.sampling import Choice, Sampler, Sampling
from offramp.runtime.sequence import TokenSequence, TokenSignals
from offramp.runtime.sequence_group import GroupEngine, SequenceGroup, shared_cache
from offramp.runtime.walker import Step, Walk, empty_trace, walk_one

TEXTS, MOST_TEXTS = 8, 1024  # texts at once: by default, and at most
CHUNK = 128  # tokens of prompts that may run between two tokens of the texts under way
LEAST_PREFIX = 32  # tokens that must be in the cache already for a prompt to begin with them

Event = tuple[int, Token | Exception]  # number of a text, and its next token or the error that ends it


@dataclass(eq=False)
class _Text:
    """A text: what was asked for, and where it is.

    rule: number of its rule. plan [1, segments]: of each of its tokens. row: its row in the trace of the
    walk. newest: id of its newest token, which has not been fed yet. count: tokens of the answer.
    blocks_before: blocks that were run before the token that is walked. is_whole: whether the prompt was run
    in one step.
    """

    number: int
    prompt: list[int]
    max_new_tokens: int
    stop_ids: Collection[int]
    sampler: Sampler
    rule: int
    sequence: TokenSequence | None = None
    rounds: DraftRounds | None = None
    plan: Plan = field(default_factory=lambda: np.zeros((1, 0), np.int8))
    row: int = -1
    newest: int = -1
    count: int = 0
    blocks_before: int = 0
    is_whole: bool = True


class DecodingLoop:
    """Generates many texts at once; see the module.

    rules: those that texts can have; a text's is given by its number in them. variant: number of the variant
    in which all run. limit: most texts under way; further ones wait in the order in which they came.
    prefix_cache: whether prompts read the cache of earlier texts that begin alike.

    Rule speculative drafts while a text is alone; texts walked together get no drafts, which would share no
    step with the tokens of others. Not safe for several threads.
    """

    def __init__(
        self,
        engine: Engine[TokenSequence],
        rules: Sequence[Rule],
        manifest: Manifest,
        variant: int,
        *,
        limit: int = TEXTS,
        prefix_cache: bool = True,
    ) -> None:
        self._engine, self._rules, self._manifest, self._variant = engine, list(rules), manifest, variant
        self._limit, self._prefix_cache = limit, prefix_cache
        self._segments = len(manifest.segments)
        # Variants with rounded activations round each row by itself: a step on several tokens gave the very
        # numbers of steps on one (measured), and what is run again alone would often be close again.
        self._close = close_logits(manifest, variant) if is_float(manifest, variant) else 0.0
        self._greedy = Sampler(Sampling(), ())
        self._texts: dict[int, _Text] = {}  # that have not ended
        self._numbers = 0
        self._waiting: deque[_Text] = deque()
        self._prompting: _Text | None = None  # its prompt is being run
        self._ready: deque[_Text] = deque()  # their newest token waits to be fed
        self._walking: dict[int, _Text] = {}  # by row
        self._idle: list[TokenSequence] = []  # of texts that ended, the oldest first
        self._trace = empty_trace(limit, self._segments, 0)
        self._free_rows = list(range(limit))
        self._groups: GroupEngine | None = None  # if sequences share a cache
        self._walk: Walk[SequenceGroup] | None = None
        self._room, self._given = CHUNK, 0  # tokens that prompts may run now; tokens given since they could
        self._events: list[Event] = []

    @property
    def unfinished(self) -> int:
        """Texts that have not ended."""
        return len(self._texts)

    @property
    def under_way(self) -> int:
        """Texts whose prompt has begun."""
        return len(self._texts) - len(self._waiting)

    def add(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        stop_ids: Collection[int],
        *,
        sampler: Sampler | None = None,
        rule: int = 0,
    ) -> int:
        """Add a prompt; returns the number of its text, by which advance() names it.

        The text ends as that of decoding.decode. A prompt that cannot be run is an error of advance().
        """
        number = self._numbers = self._numbers + 1
        text = _Text(number, list(ids), max_new_tokens, stop_ids, sampler or self._greedy, rule)
        self._texts[number] = text
        self._waiting.append(text)
        return number

    def advance(self) -> list[Event]:
        """Do one piece of work; returns the tokens that came out, often none.

        An error of a step, of whatever type, takes the place of a token and ends the texts of that step; the
        others go on. Raises an error that belongs to no single text; the loop is unusable then.
        """
        events: list[Event] = []
        self._events = events
        if self._prompt_may_run():
            assert self._prompting is not None
            self._guard(self._prompting, self._run_prompt)
        elif self._ready and (self._groups is None or len(self._ready) + len(self._walking) == 1):
            self._guard(self._ready.popleft(), self._run_alone)
        elif self._ready or self._walking:
            self._run_segment()
        return events

    def drop(self, number: int) -> None:
        """End a text before its time; numbers of texts that have ended are ignored."""
        text = self._texts.get(number)
        if text is None:
            return
        if text in self._waiting:
            self._waiting.remove(text)
        elif text in self._ready:
            self._ready.remove(text)
        elif text.row in self._walking:
            assert self._walk is not None
            self._walk.drop(np.array([text.row]))
            del self._walking[text.row]
        self._end(text)

    def close(self) -> None:
        """Drop all texts and free their caches."""
        for number in list(self._texts):
            self.drop(number)
        for sequence in self._idle:
            self._engine.drop(sequence)
        self._idle.clear()

    # Prompts

    def _prompt_may_run(self) -> bool:
        """Whether a part of a prompt is the next piece of work; chooses the prompt."""
        active = len(self._ready) + len(self._walking)
        if self._prompting is None:
            if not self._waiting or active >= self._limit:
                return False
            self._prompting = self._waiting.popleft()
        if not active or (self._room <= 0 and self._given >= active):
            self._room, self._given = CHUNK, 0
        return self._room > 0

    def _run_prompt(self, text: _Text) -> None:
        """Run the next part of a prompt, all of it if no text waits; after the last part, choose a token."""
        if not text.prompt:
            raise BadInput("the prompt has no token")
        if text.sequence is None:
            text.sequence = self._with_prefix(text.prompt)
        sequence, start = text.sequence, 0 if text.sequence is None else text.sequence.length
        end = len(text.prompt)
        if self._ready or self._walking:
            end = min(end, start + CHUNK)
        if sequence is None:
            sequence = text.sequence = self._begin(text.prompt[:end])
            sequence.runner.make_room(len(text.prompt))  # at once, as each time it is copied
        else:
            sequence.feed(text.prompt[start:end])
        text.is_whole = start == 0 and end == len(text.prompt)
        steps = self._walk_prompt(sequence)
        self._room -= end - start
        if end < len(text.prompt):
            return
        choice = self._choose(text, steps[-1].signals.logits[-1])
        if not text.is_whole and choice.margin < self._close:
            sequence.truncate(0)
            sequence.feed(text.prompt)
            steps = self._walk_prompt(sequence)
            choice = self._choose(text, steps[-1].signals.logits[-1])
        hidden = steps[0].signals.hidden
        rule = self._rules[text.rule]
        text.plan = rule.first_plan(self._segments, self._variant, None if hidden is None else hidden[-1])
        if self._groups is None or not (self._ready or self._walking):
            signals = steps[-1].signals  # read at once: a step of another text may overwrite them
            text.rounds = self._new_rounds(
                text, signals.all_hidden if isinstance(signals, TokenSignals) else None
            )
        self._prompting, text.row = None, self._free_rows.pop()
        self._go_on(text, [_token(choice, self._manifest.blocks, self._manifest.blocks)])

    def _walk_prompt(self, sequence: TokenSequence) -> list[Step]:
        return walk_one(self._engine, FULL_DEPTH, sequence, (self._variant,) * self._segments)

    def _begin(self, ids: Sequence[int]) -> TokenSequence:
        """Begin a sequence with tokens that have not run."""
        while self._idle and len(self._idle) + self.under_way > self._limit:
            self._engine.drop(self._idle.pop(0))
        sequence = self._engine.begin({"input_ids": np.array([ids], np.int64)})
        cache = shared_cache(sequence)
        if self._groups is None and cache is not None:
            self._groups = GroupEngine(self._engine, cache)
            self._walk = Walk(self._groups, self._rules, self._trace, self._limit)
        return sequence

    def _with_prefix(self, prompt: list[int]) -> TokenSequence | None:
        """A sequence that holds first tokens of a prompt, if a text had them; at least one is left out."""
        if not self._prefix_cache:
            return None
        sources = list(self._idle)
        if self._groups is not None:
            sources += [text.sequence for text in self._texts.values() if text.sequence is not None]
        best, source = LEAST_PREFIX - 1, None
        for sequence in sources:
            count = _common(sequence.ids, prompt, min(sequence.exact, len(prompt) - 1))
            if count > best:
                best, source = count, sequence
        if source is None:
            return None
        if source in self._idle:
            self._idle.remove(source)
            source.truncate(best)
            return source
        assert self._groups is not None
        sequence = self._begin(prompt[:best])
        try:
            self._groups.copy_prefix(source, sequence)
        except BaseException:
            self._engine.drop(sequence)
            raise
        return sequence

    # Tokens after the prompt

    def _run_alone(self, text: _Text) -> None:
        """Generate the next token of a text, or a round of drafts, in steps of its own."""
        sequence = _sequence_of(text)
        if text.rounds is None:
            text.rounds = self._new_rounds(text)
        room = min(text.max_new_tokens - text.count, sequence.runner.longest - sequence.length)
        if text.rounds is not None and (drafted := text.rounds.run(text.newest, room)) is not None:
            tokens = tokens_of_round(drafted, self._manifest.blocks)
        else:
            tokens = [self._next_token(text)]
        sequence.put_aside()  # steps of other texts may overwrite its hidden state
        self._go_on(text, tokens)

    def _new_rounds(self, text: _Text, prompt_hidden: Floats | None = None) -> DraftRounds | None:
        """The rounds of a text from here on; None unless its rule drafts."""
        rule, sequence = self._rules[text.rule], _sequence_of(text)
        if not isinstance(rule, SpeculativeRule):
            return None
        close = close_logits(self._manifest, self._variant)
        return DraftRounds(
            self._engine,
            rule,
            self._manifest,
            self._variant,
            sequence,
            close,
            text.sampler,
            prompt_hidden,
        )

    def _run_segment(self) -> None:
        """Let texts whose token is ready join the walk, and run one segment of it."""
        assert self._walk is not None and self._groups is not None
        try:
            self._enter()
            key = self._walk.largest_queue()
            assert key is not None
            done = self._walk.run(key).tolist()
            if not done:
                return
            texts = [self._walking[row] for row in done]
            logits = self._groups.logits_of([_sequence_of(text) for text in texts])
        except Exception as problem:
            self._end_step(problem)
            return
        choices: list[Choice | Exception] = []
        for text, row in zip(texts, logits, strict=True):  # before a step overwrites the logits
            del self._walking[text.row]
            try:
                choices.append(self._choose(text, row))
            except Exception as problem:
                choices.append(problem)
        for text, choice in zip(texts, choices, strict=True):
            if isinstance(choice, Exception):
                self._end(text, choice)
            else:
                self._guard(text, self._take_choice, choice)

    def _end_step(self, problem: Exception) -> None:
        """End the texts of a step that failed: those that wait for no segment any more.

        If all still wait, the walk itself failed, and would fail again; then all of them end.
        """
        assert self._walk is not None
        waiting = set(self._walk.waiting().tolist())
        lost = [row for row in self._walking if row not in waiting] or list(self._walking)
        self._walk.drop(np.array(lost))
        for row in lost:
            self._end(self._walking.pop(row), problem)

    def _enter(self) -> None:
        """Let the newest tokens of texts that are ready wait for their first segment, as one group."""
        if not self._ready:
            return
        assert self._walk is not None
        texts = list(self._ready)
        self._ready.clear()
        self._walking |= {text.row: text for text in texts}
        for text in texts:
            sequence = _sequence_of(text)
            text.blocks_before, text.rounds = sequence.blocks_run, None
            sequence.feed([text.newest])
        group = SequenceGroup([_sequence_of(text) for text in texts])
        rules = None if len(self._rules) == 1 else np.array([text.rule for text in texts])
        plans = np.concatenate([text.plan for text in texts])
        self._walk.enter(np.array([text.row for text in texts]), group, plans, rules)

    def _take_choice(self, text: _Text, choice: Choice) -> None:
        """Give the token that was chosen after a walk with others, or run it again alone if it is close."""
        sequence, row = _sequence_of(text), slice(text.row, text.row + 1)
        has_run = (self._trace.variants[text.row] >= 0).tolist()
        self._trace.clear(row)
        depth = sum(count for count, is_run in zip(sequence.runner.blocks, has_run, strict=True) if is_run)
        token = _token(choice, depth, sequence.blocks_run - text.blocks_before)
        if choice.margin < self._close:
            sequence.truncate(sequence.length - 1)
            token = self._next_token(text)
            token = replace(token, blocks_run=sequence.blocks_run - text.blocks_before)
            sequence.put_aside()
        self._go_on(text, [token])

    def _next_token(self, text: _Text) -> Token:
        plan: list[int] = text.plan[0].tolist()
        sequence, sampler = _sequence_of(text), None if text.sampler is self._greedy else text.sampler
        return next_token(self._engine, self._rules[text.rule], sequence, plan, text.newest, sampler)

    def _choose(self, text: _Text, logits: Floats) -> Choice:
        """Choose the token after those of the sequence; logits [vocabulary]."""
        return text.sampler.choose(logits, _sequence_of(text).ids)

    # What came out

    def _go_on(self, text: _Text, tokens: Sequence[Token]) -> None:
        """Give tokens of a text, as far as it does not end, and let it wait for its next ones."""
        sequence = _sequence_of(text)
        is_full = sequence.length >= sequence.runner.longest
        for number, token in enumerate(tokens, 1):
            text.count += 1
            ended = end_of(
                token.id,
                text.count,
                text.max_new_tokens,
                text.stop_ids,
                is_full=is_full and number == len(tokens),
            )
            self._events.append((text.number, token if ended is None else replace(token, ended=ended)))
            self._given += 1
            if ended is not None:
                self._end(text)
                return
        text.newest = tokens[-1].id
        self._ready.append(text)

    def _guard(self, text: _Text, work: Callable[..., None], *values: object) -> None:
        """Do something for a text, which an error ends; raises an error that comes after its end."""
        try:
            work(text, *values)
        except Exception as problem:
            if text.number not in self._texts:
                raise
            self._end(text, problem)

    def _end(self, text: _Text, problem: Exception | None = None) -> None:
        """End a text that waits nowhere any more; keep its cache unless there was a problem."""
        del self._texts[text.number]
        if text is self._prompting:
            self._prompting = None
        if text.row >= 0:
            self._trace.clear(slice(text.row, text.row + 1))
            self._free_rows.append(text.row)
        sequence, text.sequence, text.rounds = text.sequence, None, None
        if problem is not None:
            self._events.append((text.number, problem))
        if sequence is None:
            return
        exact = sequence.exact
        if problem is None and self._prefix_cache and exact >= LEAST_PREFIX:
            sequence.truncate(exact)
            self._idle.append(sequence)
        else:
            self._engine.drop(sequence)


def _sequence_of(text: _Text) -> TokenSequence:
    assert text.sequence is not None
    return text.sequence


def _token(choice: Choice, depth: int, blocks_run: int) -> Token:
    """The token of a choice, without drafts."""
    return Token(choice.id, depth, blocks_run, logprob=choice.logprob, top_logprobs=choice.top_logprobs)


def _common(ids: Sequence[int], others: Sequence[int], count: int) -> int:
    """Number of first ids that are equal in both, of the first `count`."""
    for number in range(count):
        if ids[number] != others[number]:
            return number
    return count
