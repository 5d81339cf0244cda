"""Sampling: how the next token is chosen from the logits, by probability or greedily.

The order of operations is that of transformers' generate: penalties, temperature, top-k, top-p, min-p.

A token is drawn by a race (Gumbel-max): each id gets an exponential random number, divided by its
probability, and the smallest wins. The random numbers depend on the seed, the position in the answer and the
id alone. So a text depends on its seed, and neither on texts beside it nor on drafts; where logits differ in
their last bits, as between steps on one token and on several, the same token wins unless two are close.

Drafts are verified by the same race (Sampler.verify). A draft is accepted if it is the token that wins,
which has its probability p; given that it does not win, the winner has the probabilities of the others,
divided by 1 - p. This is the rule of speculative sampling (arXiv 2211.17192, 2302.01318) for drafts that are
not drawn, and it gives the very text that is drawn without drafts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.errors import BadInput, BadSetting
from offramp.runtime.rules.base import Floats

Doubles = NDArray[np.float64]
Ids = NDArray[np.int64]

SMALLEST_TEMPERATURE = 1e-4  # a lower one is greedy: only logits that differ by rounding would still compete
MOST_LOGPROBS = 20
LOWEST_LOGPROB = -9999.0  # in JSON, which has no infinity; OpenAI's API writes this
# Margins of drawn tokens are not computed beyond this, in logits; see Choice. It must be more than any limit
# for close logits (decoding.CLOSE_LOGITS_ROUNDED).
LARGEST_MARGIN = 0.25
NOT_FINITE = "the network's logits are not finite (NaN or infinite), so they name no token"
_TOP_P_FIRST = 1024  # ids that are sorted first in search of those that top_p keeps
# Random numbers from one position to the next: more than a vocabulary has, and odd, as the low bits of PCG64
# repeat after a power of two.
_STRIDE = 0x9E3779B97F4A7C15
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
}
_WHOLE_RANGES = {"top_k": (0, 2**31 - 1), "seed": (-(2**63), 2**64 - 1), "logprobs": (0, MOST_LOGPROBS)}
_CUTS = {
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
}  # fields that cut what is drawn, with the values that cut nothing


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a text are chosen; without arguments greedily, the most probable token each time.

    temperature: divides the logits; 0, or None for no choice of it, is greedy. top_k: only the most probable
    ids, and those equal to the last of them (0: all). top_p: only the most probable ids that together have
    this probability. min_p: only ids with this share of the probability of the most probable one.
    repetition_penalty: divides positive logits, and multiplies negative ones, of ids that the prompt or the
    answer has. frequency_penalty, presence_penalty: are subtracted from the logit of an id for each time that
    the answer has it, and once if it has it, as OpenAI's API defines them. Penalties also change what is
    chosen greedily.

    seed: a whole number of 64 bits; the same one gives the same text, None takes one from the system.
    logprobs: None, or the number of most probable ids whose log-probabilities are returned with each token.

    Raises BadSetting for values out of range, and for top_k, top_p or min_p without a temperature, as nothing
    is drawn then.
    """

    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name == "temperature":
                continue
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not low <= value <= high:
                raise BadSetting(f"{name} {value!r:.40}: expected a number from {low:g} to {high:g}")
        for name, (first, last) in _WHOLE_RANGES.items():
            value = getattr(self, name)
            if value is None and name != "top_k":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not first <= value <= last:
                expected = "64 bits" if name == "seed" else f"{first} to {last}"
                raise BadSetting(f"{name} {value!r:.40}: expected a whole number, {expected}")
        for name, uncut in _CUTS.items():
            if self.temperature is None and getattr(self, name) != uncut:
                raise BadSetting(
                    f"{name} {getattr(self, name):g}: it limits what is drawn, and without a temperature "
                    "nothing is; give temperature as well, 1 for the model's own probabilities"
                )

    @property
    def is_drawn(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.temperature is not None and self.temperature >= SMALLEST_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the ids so far."""
        penalties = (self.repetition_penalty - 1, self.frequency_penalty, self.presence_penalty)
        return any(penalty != 0 for penalty in penalties)

    def seeded(self) -> Sampling:
        """The same with a seed, which is taken from the system if tokens are drawn and none is given."""
        if self.seed is not None or not self.is_drawn:
            return self
        return replace(self, seed=int.from_bytes(os.urandom(8), "little") >> 11)  # exact in every JSON reader

    def sampler(self, prompt_ids: Sequence[int]) -> Sampler | None:
        """The sampler of one text; None if each token is the most probable one and nothing else is asked."""
        is_plain = not self.is_drawn and not self.has_penalties and self.logprobs is None
        return None if is_plain else Sampler(self, prompt_ids)


class Choice(NamedTuple):
    """The id that follows, and how certain it is against rounding.

    margin: the least change of the difference of two logits with which another id would follow; up to
    LARGEST_MARGIN if it was drawn. logprob, top_logprobs: log-probabilities of the id and, as (id,
    logprob), of the most probable ids, the most probable first; from the model's own logits, at temperature 1
    and before penalties. None and () unless they were asked for.
    """

    id: int
    margin: float
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one text; see Sampling, whose options it has.

    Its methods get all ids so far, those of the prompt and of the answer. They depend on nothing else, so
    that a position can be asked for again, and a draft can be asked for as well: choose(draft_logits, ids
    and drafts so far) uses the random numbers of that position, with which a draft that is distributed much
    like the full depth is mostly the token that it chooses.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int]) -> None:
        self.sampling = sampling.seeded()
        self._prompt: Ids = np.array(prompt_ids, np.int64)
        self._temperature = sampling.temperature or 0.0
        if self.sampling.seed is not None:
            self._random = np.random.Generator(np.random.PCG64(self.sampling.seed % 2**64))
            self._drawn = 0  # random numbers so far
            self._chances: Doubles = np.empty(0)
            # Ratio of two speeds that are LARGEST_MARGIN apart; above 0, which leaves out ids of no weight.
            self._share_behind = math.exp(-min(LARGEST_MARGIN / max(self._temperature, 1e-9), 600.0))

    def choose(self, logits: Floats, ids: Sequence[int]) -> Choice:
        """Choose the id that follows `ids`; logits [vocabulary], which are not changed.

        Raises BadInput if the logits are not finite.
        """
        scores = self._penalized(logits, ids)
        if not self.sampling.is_drawn:
            id, margin = _most_probable(scores)
        else:
            kept, weights = self._weights(scores)
            chances = self._chances_at(len(ids) - len(self._prompt), len(logits))
            id, margin = self._race(weights, chances if kept is None else chances[kept])
            id = id if kept is None else int(kept[id])
        if self.sampling.logprobs is None:
            return Choice(id, margin)
        return Choice(id, margin, *_logprobs(logits, id, self.sampling.logprobs))

    def verify(
        self, drafts: Sequence[int], logits: Floats, ids: Sequence[int], close: float = 0.0
    ) -> list[Choice]:
        """Choose the tokens that follow `ids`, as far as drafts agree, and one more.

        drafts: ids of the drafts that were run after `ids`. logits [drafts + 1, vocabulary]: after the last
        of `ids`, and after each draft. All but the last of the choices are accepted drafts.

        close: if the margin of a choice is less, the result ends before it, and may be empty; its token is to
        be run again alone, and choose() to be asked. Such a result is not longer than the drafts, and all of
        its choices are accepted drafts.
        """
        choices, so_far = list[Choice](), list(ids)
        for number, row in enumerate(logits):
            choice = self.choose(row, so_far)
            if choice.margin < close:
                break
            choices.append(choice)
            if number == len(drafts) or choice.id != drafts[number]:
                break
            so_far.append(choice.id)
        return choices

    def probabilities(self, logits: Floats, ids: Sequence[int]) -> Doubles:
        """Probabilities [vocabulary] with which choose() draws the id that follows `ids`."""
        scores, probabilities = self._penalized(logits, ids), np.zeros(len(logits))
        if not self.sampling.is_drawn:
            probabilities[_most_probable(scores)[0]] = 1.0
            return probabilities
        kept, weights = self._weights(scores)
        probabilities[slice(None) if kept is None else kept] = weights / weights.sum()
        return probabilities

    def _penalized(self, logits: Floats, ids: Sequence[int]) -> Floats:
        """The logits after penalties, which touch the ids so far alone; the same array without penalties."""
        sampling = self.sampling
        if not sampling.has_penalties:
            return logits
        answer: Ids = np.array(ids[len(self._prompt) :], np.int64)
        # Embeddings can have more ids than the head has logits.
        prompt, answer = (given[given < len(logits)] for given in (self._prompt, answer))
        scores: Floats = logits.copy()
        if sampling.repetition_penalty != 1:
            penalty = np.float32(sampling.repetition_penalty)
            for given in (prompt, answer):
                values = logits[given]
                scores[given] = np.where(values < 0, values * penalty, values / penalty)
        if len(answer) and (sampling.frequency_penalty or sampling.presence_penalty):
            distinct, counts = np.unique(answer, return_counts=True)
            scores[distinct] -= (sampling.frequency_penalty * counts + sampling.presence_penalty).astype(
                np.float32
            )
        return scores

    def _weights(self, scores: Floats) -> tuple[Ids | None, Doubles]:
        """The ids that can be drawn, in order (None: all), and their probabilities divided by the largest."""
        sampling = self.sampling
        scores = scores / np.float32(self._temperature)
        best = float(scores.max())
        if not math.isfinite(best):
            raise BadInput(NOT_FINITE)
        kept: Ids | None = None
        if 0 < sampling.top_k < len(scores):
            least = np.partition(scores, -sampling.top_k)[-sampling.top_k]
            kept = np.flatnonzero(scores >= least)
            scores = scores[kept]
        weights: Doubles = np.subtract(scores, best, dtype=np.float64)
        np.exp(weights, out=weights)
        if sampling.top_p < 1:
            rows = _most_probable_rows(weights, sampling.top_p)
            kept, weights = rows if kept is None else kept[rows], weights[rows]
        if sampling.min_p > 0:
            rows = np.flatnonzero(weights >= sampling.min_p)
            kept, weights = rows if kept is None else kept[rows], weights[rows]
        return kept, weights

    def _chances_at(self, position: int, count: int) -> Doubles:
        """Random numbers, above 0 to 1, of the first ids at a position of the answer [count]."""
        if len(self._chances) < count:
            self._chances = np.empty(count)
        chances, place = self._chances[:count], position * _STRIDE
        bits = self._random.bit_generator
        assert isinstance(bits, np.random.PCG64)
        bits.advance((place - self._drawn) % 2**128)
        self._random.random(out=chances)  # each takes one step of PCG64
        self._drawn = place + count
        return np.subtract(1.0, chances, out=chances)

    def _race(self, weights: Doubles, chances: Doubles) -> tuple[int, float]:
        """The row that wins, with the probabilities of the weights [rows], and the margin of its logit.

        The exponential random number of a row is -log(1 - chance), which is not less than the chance. So
        weight / chance bounds what a row can reach, and logarithms of few rows are needed.
        """
        bounds = weights / chances
        first = int(bounds.argmax())
        with np.errstate(divide="ignore"):  # a chance of 1 is an infinite number, and loses
            reached = weights[first] / -np.log1p(-chances[first])
            rows = np.flatnonzero(bounds >= reached * self._share_behind)
            speeds = weights[rows] / -np.log1p(-chances[rows])
        winner = int(speeds.argmax())
        fastest, speeds[winner] = float(speeds[winner]), 0.0
        second, margin = float(speeds.max()), LARGEST_MARGIN
        if second > 0:
            margin = min(margin, self._temperature * math.log(fastest / second))
        return int(rows[winner]), margin


def _most_probable(scores: Floats) -> tuple[int, float]:
    """The id with the largest score, and how much larger it is than the others; scores [ids]."""
    id = int(scores.argmax())  # argmax finds a NaN first
    largest = float(scores[id])
    if not math.isfinite(largest):
        raise BadInput(NOT_FINITE)
    others = (part.max() for part in (scores[:id], scores[id + 1 :]) if len(part))
    return id, largest - float(max(others, default=-math.inf))


def _most_probable_rows(weights: Doubles, share: float) -> Ids:
    """The fewest rows, in order, whose weights are together this share of all or more; at least one."""
    wanted, count = share * float(weights.sum()), _TOP_P_FIRST
    while True:
        if count < len(weights):
            rows = np.sort(np.argpartition(weights, -count)[-count:])
        else:
            rows = np.arange(len(weights))
        rows = rows[np.argsort(-weights[rows], kind="stable")]
        sums = np.cumsum(weights[rows])
        if sums[-1] >= wanted or len(rows) == len(weights):
            return np.sort(rows[: int(np.searchsorted(sums, wanted)) + 1])
        count *= 8


def _logprobs(logits: Floats, id: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Log-probabilities of an id and of the `count` most probable ids; logits [ids]."""
    values: Doubles = np.subtract(logits, logits.max(), dtype=np.float64)
    values -= math.log(float(np.exp(values).sum()))
    count = min(count, len(values))
    if not count:
        return float(values[id]), ()
    top = np.sort(np.argpartition(values, -count)[-count:])
    top = top[np.argsort(-values[top], kind="stable")]
    return float(values[id]), tuple((int(other), float(values[other])) for other in top)
