"""Measure seconds a token of decoder bundles, in a separate process that auto.py starts.

    python -m offramp.export.time_tokens VARIANT BUNDLE BUNDLE...

It opens the bundles in this order and generates one token with each in turn. It prints the median seconds a
token of each bundle, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from offramp.runtime.loading import load_generator

PROMPT, STEPS = 32, 60  # tokens of the prompt; tokens that are timed
UNTIMED = 5  # first steps that are not timed, because they bind memory


def median_token_seconds(bundles: list[Path], variant: str) -> list[float]:
    """Median seconds a token of each bundle at full depth, head included."""
    with ExitStack() as sessions:
        opened = [
            sessions.enter_context(
                load_generator(bundle, variant=variant, rule="never", share=False, global_pool=True)
            )
            for bundle in bundles
        ]
        prompt = min(PROMPT, opened[0].longest // 2)
        steps = min(STEPS, opened[0].longest - prompt)
        answers = [session.tokens([0] * prompt, steps + 1, ()) for session in opened]
        for answer in answers:
            next(answer)  # the prompt
        seconds: list[list[float]] = [[] for _ in answers]
        for step in range(steps):
            for number in range(len(answers))[:: 1 if step % 2 else -1]:
                started = time.perf_counter()
                next(answers[number])
                if step >= UNTIMED:
                    seconds[number].append(time.perf_counter() - started)
    return [float(np.median(times)) for times in seconds]


if __name__ == "__main__":
    print(json.dumps(median_token_seconds([Path(word) for word in sys.argv[2:]], sys.argv[1])))
