"""Times tokens of decoder bundles in a process of its own; decoder_auto starts it.

    python -m offramp.export.decoder_steps VARIANT BUNDLE BUNDLE...

It opens the bundles in this order, takes turns token by token, and writes seconds of a token of each as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.engines.ort_decoder import DecoderEngine
from offramp.runtime.engines.threads import claim
from offramp.runtime.sequence import Lane

PROMPT, STEPS = 32, 60  # tokens; timed steps behind them
UNTIMED = 5  # of these, which bind memory


def seconds_of(bundles: list[Path], variant: str) -> list[float]:
    """Median seconds of a one-token step, head included, of each bundle."""
    pool = claim(onnxruntime, None, True)
    engines = [DecoderEngine(onnxruntime, open_bundle(b), variant, pool, share=False) for b in bundles]
    lanes = [Lane(engine) for engine in engines]
    prompt = min(PROMPT, lanes[0].cache.longest // 2)
    for lane in lanes:
        lane.feed([0] * prompt)
        lane.through(most=prompt)
    seconds: list[list[float]] = [[] for _ in lanes]
    for step in range(min(STEPS, lanes[0].cache.longest - prompt)):
        for at in range(len(lanes))[:: 1 if step % 2 else -1]:
            started = time.perf_counter()
            lanes[at].feed([0])
            lanes[at].through(head=True)
            if step >= UNTIMED:
                seconds[at].append(time.perf_counter() - started)
    return [float(np.median(times)) for times in seconds]


if __name__ == "__main__":
    print(json.dumps(seconds_of([Path(word) for word in sys.argv[2:]], sys.argv[1])))
