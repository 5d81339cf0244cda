"""Contenders that decode, taking turns: what clocks them and compares them, for decoders.py.

What is opened first in a process gets worse memory than what comes later, and what is opened once others were
closed gets their scattered pages: as much as a tenth, for as long as it is open. So every round is a fresh
process, and rounds come in pairs, the second of which opens back to front.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

BURST = 9  # tokens
PAUSE = 0.15  # seconds: threads that look for work after a run would be in the next one's way


class Answer(NamedTuple):
    """Ids, seconds to the first of them and from each to the next."""

    ids: list[int]
    first: float
    steps: list[float]


Says = Callable[[list[int], int], Answer]
Writes = Callable[[list[int], int], Iterator[int]]  # ids, one after another
Round = dict[str, list[Answer]]  # by contender, an answer a prompt


def clocked(ids: Iterator[int]) -> Answer:
    """What an iterator gives, and when."""
    said, seen = list[int](), [time.perf_counter()]
    for token in ids:
        said.append(token)
        seen.append(time.perf_counter())
    first, *steps = np.diff(seen).tolist()
    return Answer(said, first, steps)


def turns(contenders: dict[str, Says], prompts: list[list[int]], most: int, draw: random.Random) -> Round:
    """Answers prompt by prompt. Who comes behind whom is drawn: what one leaves in the processor's caches, or
    still runs, is in the next one's way.
    """
    found: Round = {name: [] for name in contenders}
    for says in contenders.values():
        says(prompts[0], 8)
    for prompt in prompts:
        for name in draw.sample(list(contenders), len(contenders)):
            time.sleep(PAUSE)
            found[name].append(contenders[name](prompt, most))
    return found


def woven(contenders: dict[str, Writes], prompts: list[list[int]], most: int, draw: random.Random) -> Round:
    """As turns, but the turn changes every BURST tokens: the machine is faster and slower from one second to
    the next, by more than contenders of one process are apart. The first token of each burst is left out of
    the steps, since its contender's memory has been out of use.
    """
    found: Round = {name: [] for name in contenders}
    for prompt in prompts:
        tokens = {name: writes(prompt, most) for name, writes in contenders.items()}
        answers = {name: clocked(islice(one, 1)) for name, one in tokens.items()}
        for _ in range(1, most, BURST):
            for name in draw.sample(list(tokens), len(tokens)):
                ids, _, steps = clocked(islice(tokens[name], BURST))
                answers[name].ids.extend(ids)
                answers[name].steps.extend(steps)
        for name, answer in answers.items():
            found[name].append(answer)
    return found


def fresh(module: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What a worker of that name answers, in a process of its own; it reads a line of JSON and writes one."""
    worker = [sys.executable, "-m", f"offramp.benchmarks.{module}"]
    done = subprocess.run(worker, input=json.dumps(asked), check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rounds(
    ask: Callable[[list[str], list[list[int]], int], Round],
    names: Sequence[str],
    prompts: list[list[int]],
    count: int,
) -> list[Round]:
    """Rounds of ask(names in the order in which to open them, prompts of the round, seed), with progress."""
    size, found = -(-len(prompts) // count), []
    starts = range(0, len(prompts), size)
    for number, at in enumerate(track(starts, "rounds", console=Console(stderr=True))):
        order = random.Random(number // 2).sample(list(names), len(names))
        said = ask(order[:: 1 - 2 * (number % 2)], prompts[at : at + size], number)
        found.append({name: said[name] for name in names})
    return found


def compared(found: list[Round], against: str, right: list[list[int]]) -> dict[str, dict[str, Any]]:
    """Tokens/s of all prompts, hiccups of the machine included; and by those of one contender the speed of a
    prompt's median token: geometric mean over pairs of rounds and its standard error; the median of prompts.

    same: how many answers are those of `right`.
    """
    told = {}
    base = [np.log([np.median(answer.steps) for answer in one[against]]) for one in found]
    for name in found[0]:
        logs = [
            b - np.log([np.median(a.steps) for a in one[name]]) for b, one in zip(base, found, strict=True)
        ]
        pairs = np.array([np.concatenate(logs[at : at + 2]).mean() for at in range(0, len(logs), 2)])
        error = pairs.std(ddof=1) / len(pairs) ** 0.5 if len(pairs) > 1 else float("nan")
        mine = [answer for one in found for answer in one[name]]
        steps = [step for answer in mine for step in answer.steps]
        told[name] = {
            "tokens_per_s": round(len(steps) / sum(steps), 2),
            "ratio": round(float(np.exp(pairs.mean())), 4),
            "error": None if np.isnan(error) else round(float(error), 4),
            "ratio_median": round(float(np.exp(np.median(np.concatenate(logs)))), 4),
            "first_ms": round(1e3 * float(np.median([answer.first for answer in mine])), 2),
            "same": sum(answer.ids == ids for answer, ids in zip(mine, right, strict=False)),
        }
    return told
