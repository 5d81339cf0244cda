"""Rule speculative: tokens are drafted cheaply, and the full depth verifies several of them in one step.

Drafts come from sources. An early exit drafts with the first segments and a head (LayerSkip, arXiv
2404.16710); no segment is run twice for a token. A draft head, which a bundle may have, predicts the hidden
state of full depth with a block of its own (EAGLE, arXiv 2401.15077). A lookup drafts what followed the same
tokens earlier in the prompt or the answer, and runs nothing for it. The step that verifies reads the weights
once for all its tokens. Drafts are accepted as far as the full depth predicts the same, so the text is that
of full depth.

Which source drafts in a round and how many tokens, or that nothing is drafted, follows from acceptance rates
and step times so far, which this rule keeps for all sequences of a session. To learn the rates costs little:
every token tells whether a lookup would have been right, and probes compare the prediction of an exit with a
token that the full depth gives anyway. Budgets limit what drafts may cost before it is known that they pay.
offramp.runtime.draft_rounds does the steps.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.errors import BadSetting
from offramp.runtime.rules.base import ExitTest, Floats, Plan, Signals, full_plan, never_exits
from offramp.runtime.rules.draft_stats import AcceptanceRate, Budget, MatchRates, StepTimes

SourceKey = int | str  # of a source of drafts: the number of an exit (1-based), or a name
NO_SOURCE: Final = 0
LOOKUP: Final = "lookup"
HEAD: Final = "head"
# The name of the rule, and its parameters that allow (1) or forbid (0) sources.
NAME, EXITS = "speculative", "exits"
SOURCES = (EXITS, LOOKUP, HEAD)

MAX_DRAFTS = 8  # in a row, by an exit or the draft head
# Numbers of drafts of a lookup. Steps on each number of tokens have memory of their own, so they are few.
LOOKUP_SIZES = (1, 2, 3, 4, 6, 8, 11, 15)
# Factors of the weights of earlier drafts of an exit: in each of its rounds, which keeps about the last five
# hundred, and for each token of the session, so that an exit is probed again after some thousand tokens.
KEPT_OF_USED, KEPT_OF_UNUSED = 0.998, 0.9995
LEAST_GAIN = 0.02  # share by which drafts must be faster than no drafts
LEAST_LIKELY = 0.01  # probability of a draft and all before it, below which no further ones are considered
TIMED_EVERY = 8  # of the rounds without drafts, one in so many is timed
# After so many tokens exits are compared again: without a draft of one, and with.
EXITS_EVERY, EXITS_SOON = 64, 8
# Budgets of drafts of exits and of the draft head, of lookups, and of probes: the share of a session's tokens
# that may be lost, and the tokens that may be lost at once.
EXIT_BUDGET, LOOKUP_BUDGET, PROBE_BUDGET = (0.003, 1.0), (0.004, 0.5), (0.003, 0.5)
# Acceptance rate of the draft head before any draft was compared: it was trained for this model.
HEAD_PRIOR_RATE = 0.6


class Draft(NamedTuple):
    """A drafted token: its id, and the probability that its source gives it."""

    id: int
    probability: float


class DraftChoice(NamedTuple):
    """What a round does: the source of its drafts, and how many it drafts at most.

    probe: the source drafts one token, which is compared with the token of the full depth and not verified.
    """

    source: SourceKey
    drafts: int
    probe: bool = False


WITHOUT_DRAFTS = DraftChoice(NO_SOURCE, 0)


class SpeculativeRule:
    """Rule speculative: chooses when to draft tokens, by which source and how many; each session has one.

    It keeps statistics of all sequences of the session. sources: those that may draft, exits (1-based), HEAD
    and LOOKUP; None: all exits and LOOKUP. fixed: (source, drafts) to use in every round instead of choosing,
    for measurements. By source (NO_SOURCE: rounds without drafts): offered, the drafts that were verified;
    accepted, those that were right; rounds. probes: by source, how often its prediction was compared in a
    round without drafts. match_rates: acceptance rates of lookups.
    """

    width: int = 0

    def __init__(
        self,
        spec: RuleSpec,
        segments: int,
        fixed: tuple[SourceKey, int] | None = None,
        sources: Collection[SourceKey] | None = None,
    ) -> None:
        self.spec, self.fixed = spec, fixed
        exits: tuple[SourceKey, ...] = tuple(range(1, segments))
        allowed = (*exits, LOOKUP) if sources is None else sources
        self.sources = tuple(key for key in (*exits, HEAD, LOOKUP) if key in allowed)
        self.offered, self.accepted = dict.fromkeys(self.sources, 0), dict.fromkeys(self.sources, 0)
        self.rounds = dict.fromkeys((NO_SOURCE, *self.sources), 0)
        self._rates = {
            key: AcceptanceRate(HEAD_PRIOR_RATE) if key == HEAD else AcceptanceRate()
            for key in self.sources
            if key != LOOKUP
        }
        self.probes = dict.fromkeys(self._rates, 0)
        self.match_rates, self.times = MatchRates(), StepTimes()
        self._segments = segments
        self._exit_budget, self._lookup_budget = Budget(*EXIT_BUDGET), Budget(*LOOKUP_BUDGET)
        self._probe_budget = Budget(*PROBE_BUDGET)
        # The exit that drafts best, its tokens a second, and the exit to probe; old after that many tokens.
        self._exit_choice: DraftChoice | None = None
        self._exit_speed = 0.0
        self._probe: DraftChoice | None = None
        self._tokens, self._exits_old_at = 0, 0
        self._tokens_at_decay = 0  # tokens for which the rates of exits have been decayed
        self._since_timed = 0  # rounds without drafts since the last one that was timed
        self._is_timed = False  # whether the steps of one token have been measured
        self._verified = self._repeated = 0.0  # tokens that were verified, and those that were run again
        self._seconds: dict[int, float] = {}  # of verifying so many tokens from the start, after
        self._seconds_records = -1  # so many records of times

    @property
    def exit_test(self) -> ExitTest:
        """A test that is always False, as plans are fixed before each walk; see Rule.exit_test."""
        return never_exits

    def first_plan(self, segments: int, variant: int, hidden: Floats | None = None) -> Plan:
        """The plan that runs every segment; exits draft along the first part of it."""
        return full_plan(segments, variant)

    def __call__(self, signals: Signals, memory: Floats, plan: Plan, segment: int) -> tuple[Plan, Floats]:
        return plan, memory

    def choose(
        self, max_drafts: int, match_length: int = 0, rates: MatchRates | None = None
    ) -> DraftChoice | None:
        """Choose what the next round does by the expected tokens a second; None: one token, and nothing else.

        WITHOUT_DRAFTS is a round of one token that has to record its step times. match_length: tokens of the
        match of a lookup, 0 for none; rates: the acceptance rates of lookups in its text.
        """
        if self.fixed is not None:
            source, drafts = self.fixed
            is_possible = max_drafts > 0 and (source != LOOKUP or match_length > 0)
            return DraftChoice(source, min(drafts, max_drafts)) if is_possible else None
        if not self._is_timed:
            return WITHOUT_DRAFTS
        if max_drafts > 0:
            if self._tokens >= self._exits_old_at:
                self._find_exits()
            exit_choice = self._exit_choice if self._exit_budget.is_left else None
            if match_length and rates is not None and self._lookup_budget.is_left:
                speed = self._least_speed() if exit_choice is None else self._exit_speed
                if drafts := self._best_lookup(max_drafts, match_length, rates, speed):
                    return DraftChoice(LOOKUP, drafts)
            if self._probe is not None and self._probe_budget.is_left:
                return self._probe
            if exit_choice is not None:
                return exit_choice._replace(drafts=min(exit_choice.drafts, max_drafts))
        return WITHOUT_DRAFTS if self._since_timed + 1 >= TIMED_EVERY else None

    def worth_verifying(self, source: SourceKey, probabilities: Sequence[float]) -> bool:
        """Whether the last of these drafts is worth one more token in the verifying step.

        probabilities: those of the drafts of this round so far, as the source gives them.
        """
        if self.fixed is not None:
            return True
        rates = (self._rates[source].at_probability(probability) for probability in probabilities)
        exit, count, times = _exit_of(source), len(probabilities), self.times
        without, with_it = (
            times.expected_from_exit(exit, self._segments, tokens) for tokens in (count, count + 1)
        )
        more = times.expected_to_exit(exit) + with_it - without
        return math.prod(rates) * self._verify_seconds(1) >= more

    def record_plain(self) -> None:
        """Count a round of one token, without drafts, that was not timed."""
        self.rounds[NO_SOURCE] += 1
        self._since_timed += 1
        self._add_tokens(1)

    def record_round(
        self,
        choice: DraftChoice,
        drafts: Sequence[Draft],
        tokens: Sequence[int],
        verified: int,
        seconds: float,
        *,
        repeated: bool = False,
    ) -> None:
        """Update rates, counts and budgets after a round.

        tokens: ids that the full depth predicted, as far as drafts agreed, and one more. verified: how many
        of the drafts were verified. seconds: of the whole round. repeated: whether a token was run again
        alone because two ids were close.
        """
        source = choice.source
        self._add_tokens(len(tokens))
        self._is_timed = self._is_timed or self.times.knows_one_token(self._segments)
        if source == NO_SOURCE or choice.probe:
            self.rounds[NO_SOURCE] += 1
            self._since_timed = 0
        else:
            self.rounds[source] += 1
            self.offered[source] += verified
            self.accepted[source] += len(tokens) - 1
            self._verified = KEPT_OF_USED * self._verified + len(tokens)
            self._repeated = KEPT_OF_USED * self._repeated + repeated
            budget = self._lookup_budget if source == LOOKUP else self._exit_budget
            budget.settle(len(tokens) - seconds / self._verify_seconds(1))
        if (rate := self._rates.get(source)) is None:
            return
        soon = 0 if choice.probe else self._tokens + EXITS_SOON
        self._exits_old_at = min(self._exits_old_at, soon)
        if choice.probe:
            self.probes[source] += 1
            self._probe_budget.settle(-self._draft_seconds(source) / self._verify_seconds(1))
        rate.decay(KEPT_OF_USED)
        # A draft that was not verified is still known to be right or wrong if all drafts before it were
        # right.
        for (draft, probability), token in zip(drafts, tokens, strict=False):
            rate.record(probability, draft == token)

    def _add_tokens(self, tokens: int) -> None:
        self._tokens += tokens
        for budget in (self._exit_budget, self._lookup_budget, self._probe_budget):
            budget.add_tokens(tokens)

    def _least_speed(self) -> float:
        """Tokens a second that drafts must give to be worth it."""
        return (1 + LEAST_GAIN) / self._verify_seconds(1)

    def _verify_seconds(self, tokens: int) -> float:
        """Expected seconds of all segments and the head on so many tokens."""
        if self._seconds_records != self.times.records:
            self._seconds.clear()
            self._seconds_records = self.times.records
        seconds = self._seconds.get(tokens)
        if seconds is None:
            seconds = self._seconds[tokens] = self.times.expected_from_exit(0, self._segments, tokens)
        return seconds

    def _repeat_seconds(self, tokens: float) -> float:
        """Expected seconds for a token, of so many, that is run again because two ids are close."""
        rate = self._repeated / (self._verified + TIMED_EVERY)
        return min(1.0, rate * tokens) * self._verify_seconds(1)

    def _best_lookup(self, max_drafts: int, length: int, rates: MatchRates, least_speed: float) -> int:
        """Number of drafts of a lookup with the most expected tokens a second; 0: no more than the least."""
        best, best_speed, expected_tokens, all_right = 0, least_speed, 1.0, 1.0
        count = min(max_drafts, LOOKUP_SIZES[-1])
        # After right drafts the match is longer by as many tokens.
        for drafts, rate in enumerate(rates.rates_from(length, count), 1):
            all_right *= rate
            expected_tokens += all_right
            if drafts in LOOKUP_SIZES:
                seconds = self._verify_seconds(drafts + 1) + self._repeat_seconds(expected_tokens)
                if expected_tokens / seconds > best_speed:
                    best, best_speed = drafts, expected_tokens / seconds
            if all_right < LEAST_LIKELY:
                break
        return best

    def _find_exits(self) -> None:
        """Find the exit that drafts best, if one pays, and the one to probe, which would pay at best."""
        kept = KEPT_OF_UNUSED ** (self._tokens - self._tokens_at_decay)
        self._tokens_at_decay, self._exits_old_at = self._tokens, self._tokens + EXITS_EVERY
        self._exit_choice, self._probe, self._exit_speed = None, None, self._least_speed()
        hopes: list[tuple[float, SourceKey]] = []
        from_exits = [
            self.times.expected_from_exits(self._segments, drafts + 1) for drafts in range(1, MAX_DRAFTS + 1)
        ]
        for source, rate in self._rates.items():
            rate.decay(kept)
            to_exit = self.times.expected_to_exit(_exit_of(source))
            more = to_exit + self._draft_seconds(source)  # of a further draft, before it is verified
            seconds = [
                to_exit + drafts * more + verifying[_exit_of(source)]
                for drafts, verifying in enumerate(from_exits, 1)
            ]
            drafts, speed = self._best_drafts(seconds, rate.overall())
            if speed > self._exit_speed:
                self._exit_choice, self._exit_speed = DraftChoice(source, drafts), speed
            hopes.append((self._best_drafts(seconds, rate.optimistic())[1], source))
        hopes = [hope for hope in hopes if self._exit_choice is None or hope[1] != self._exit_choice.source]
        if hopes and (hope := max(hopes, key=lambda hope: hope[0]))[0] > self._exit_speed:
            self._probe = DraftChoice(hope[1], 1, probe=True)

    def _draft_seconds(self, source: SourceKey) -> float:
        """Expected seconds of a draft, beside the first segments that an exit runs for it anyway."""
        block = self.times.expected_block() if source == HEAD else 0.0
        return block + self.times.expected_draft()

    def _best_drafts(self, seconds_by_drafts: Sequence[float], rate: float) -> tuple[int, float]:
        """Number of drafts with the most expected tokens a second at an acceptance rate, and this speed."""
        best, best_speed, expected_tokens, all_right = 0, 0.0, 1.0, 1.0
        for drafts, seconds in enumerate(seconds_by_drafts, 1):
            all_right *= rate
            expected_tokens += all_right
            speed = expected_tokens / (seconds + self._repeat_seconds(expected_tokens))
            if speed > best_speed:
                best, best_speed = drafts, speed
            if all_right < LEAST_LIKELY:
                break
        return best, best_speed


def source_name(source: SourceKey) -> str:
    """The name of a source of drafts in reports: "exit 2" for 2, and for "2", as JSON files have it."""
    return f"exit {source}" if str(source).isdecimal() else str(source)


def read_sources(text: str) -> RuleSpec:
    """The spec of this rule with its sources of drafts: "speculative:lookup", "speculative:exits+lookup".

    Raises BadSetting for sources that do not exist.
    """
    names = text.removeprefix(f"{NAME}:").split("+")
    if unknown := [name for name in names if name not in SOURCES]:
        raise BadSetting(f"rule {NAME}: source {unknown[0]!r:.40} is not known; join with +: {_names()}")
    return RuleSpec(NAME, {name: float(name in names) for name in SOURCES})


def chosen_sources(spec: RuleSpec, segments: int, *, has_head: bool = False) -> list[SourceKey]:
    """The sources that the parameters of a spec allow, of a bundle with so many segments: 1 or left out.

    has_head: whether the bundle has a draft head. Raises BadSetting for other parameters, for a source that
    is named and that the bundle does not have, and if no source is left.
    """
    if unknown := sorted(set(spec.parameters) - set(SOURCES)):
        raise BadSetting(
            f"rule {NAME}: parameter {unknown[0]!r:.40} does not go with the others; give {_names()} as 0 or "
            "1, or exit and drafts, or drafts alone, which are those of lookups"
        )
    for name, value in spec.parameters.items():
        if value not in (0, 1):
            raise BadSetting(f"rule {NAME}: {name} {value:g} is neither 0 nor 1")
    missing = {
        EXITS: "" if segments > 1 else "the bundle has one segment, so no exits",
        HEAD: "" if has_head else "the bundle has no draft head (recipe draft_head trains one)",
        LOOKUP: "",
    }
    for name, why in missing.items():
        if why and spec.parameters.get(name) == 1:
            raise BadSetting(f"rule {NAME}: {why}: leave {name} out, allow lookup, or take rule never")
    is_allowed = {name: spec.parameters.get(name, 1) == 1 and not missing[name] for name in SOURCES}
    sources: list[SourceKey] = [*range(1, segments)] if is_allowed[EXITS] else []
    sources += [name for name in (HEAD, LOOKUP) if is_allowed[name]]
    if not sources:
        reasons = [f"{why}: " for name, why in missing.items() if why and name not in spec.parameters]
        where = reasons[0] if reasons else ""
        raise BadSetting(f"rule {NAME}: {where}no source of drafts is left; allow lookup, or take rule never")
    return sources


def _names() -> str:
    return " and ".join(SOURCES)


def _exit_of(source: SourceKey) -> int:
    """The exit (1-based) to which a source runs drafts; 0 for sources that run no segment."""
    return source if isinstance(source, int) else 0
