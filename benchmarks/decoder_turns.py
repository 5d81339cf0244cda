"""Contenders that decode, taking turns: what clocks them and compares them, for decoders.py."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from offramp.runtime.engines.graphs import give_back

BURST = 9  # tokens
PAUSE = 0.15  # seconds: threads that look for work after a run would be in the next one's way

T = TypeVar("T")


class Answer(NamedTuple):
    """Ids, seconds to the first of them and from each to the next."""

    ids: list[int]
    first: float
    steps: list[float]


Order = Callable[[str], float]
Says = Callable[[list[int], int], Answer]
Writes = Callable[[list[int], int], Iterator[int]]  # ids, one after another
# Opens contenders, sorted by a key of their names; gives them in the order in which they are shown.
Opened = Callable[[Order], AbstractContextManager[dict[str, T]]]


def clocked(ids: Iterator[int]) -> Answer:
    """What an iterator gives, and when."""
    said, seen = list[int](), [time.perf_counter()]
    for token in ids:
        said.append(token)
        seen.append(time.perf_counter())
    first, *steps = np.diff(seen).tolist()
    return Answer(said, first, steps)


def turns(opened: Opened[Says], prompts: list[list[int]], most: int, rounds: int) -> dict[str, list[Answer]]:
    """Answers by contender, a prompt each. Who comes behind whom is drawn: what one leaves in the processor's
    caches, or still runs, is in the next one's way.

    All are opened anew every round, in a drawn order and then in its reverse: what is opened first gets the
    worse memory and is up to a tenth slower for as long as it is open.
    """
    found, draw = defaultdict[str, list[Answer]](list), random.Random(0)
    for order, share in shares(prompts, rounds):
        with opened(order) as contenders:
            for name, says in contenders.items():
                found[name] += []  # in the order in which they are shown
                says(share[0], 8)
            for prompt in share:
                for name in draw.sample(list(contenders), len(contenders)):
                    time.sleep(PAUSE)
                    found[name].append(contenders[name](prompt, most))
            contenders.clear()
        give_back()
    return dict(found)


def woven(
    opened: Opened[Writes], prompts: list[list[int]], most: int, rounds: int
) -> dict[str, list[Answer]]:
    """Answers by contender, as of turns, but the turn changes every BURST tokens: the machine is faster and
    slower from one second to the next, by more than contenders of one process are apart. The first token of
    each burst is left out of the steps, since its contender's memory has been out of use.
    """
    found, draw = defaultdict[str, list[Answer]](list), random.Random(0)
    for order, share in shares(prompts, rounds):
        with opened(order) as contenders:
            for prompt in share:
                tokens = {name: writes(prompt, most) for name, writes in contenders.items()}
                answers = {name: clocked(islice(one, 1)) for name, one in tokens.items()}
                for _ in range(1, most, BURST):
                    for name in draw.sample(list(tokens), len(tokens)):
                        ids, _, steps = clocked(islice(tokens[name], BURST))
                        answers[name].ids.extend(ids)
                        answers[name].steps.extend(steps)
                for name, answer in answers.items():
                    found[name].append(answer)
                tokens.clear()  # each holds its contender open
            contenders.clear()
        give_back()
    return dict(found)


def shares(prompts: list[list[int]], rounds: int) -> Iterator[tuple[Order, list[list[int]]]]:
    """Prompts of each round and an order for it, with progress."""
    size = -(-len(prompts) // rounds)
    for number in track(range(0, len(prompts), size), "rounds", console=Console(stderr=True)):
        at = number // size
        yield partial(_drawn, at // 2, 1 - 2 * (at % 2)), prompts[number : number + size]


def _drawn(seed: int, sign: int, name: str) -> float:
    """A number for a name; sign -1 turns the order of names round."""
    return sign * random.Random(f"{seed} {name}").random()


def compared(
    answers: dict[str, list[Answer]], against: str, right: list[list[int]]
) -> dict[str, dict[str, Any]]:
    """Tokens/s of all prompts, hiccups of the machine included, and by those of one contender the speed of
    the median token: median, 5th and 95th percentile of prompts.

    same: how many answers are those of `right`.
    """
    base, found = np.array([np.median(one.steps) for one in answers[against]]), {}
    for name, mine in answers.items():
        taken = np.array([np.median(one.steps) for one in mine])
        steps = [step for one in mine for step in one.steps]
        low, high = np.percentile(base / taken, [5, 95])
        found[name] = {
            "tokens_per_s": round(len(steps) / sum(steps), 2),
            "ratio": round(float(np.median(base / taken)), 4),
            "ratio_5_95": [round(float(low), 4), round(float(high), 4)],
            "first_ms": round(1e3 * float(np.median([one.first for one in mine])), 2),
            "same": sum(one.ids == theirs for one, theirs in zip(mine, right, strict=False)),
        }
    return found
