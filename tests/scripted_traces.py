"""Traces whose answers are given, for tests of what a session makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from offramp.runtime.walker import Trace

SEGMENTS = 3  # of the bundles in tests/data/tiny_tasks


def trace_of(*answers: Sequence[object], exits: Sequence[int] | None = None) -> Trace:
    """A trace of rows that gave these answers at the exits (0-based; None: the last) that they took.

    At the exits before it a row has an answer of zeros of the same shape.
    """
    rows = len(answers)
    exits = [SEGMENTS - 1] * rows if exits is None else exits
    variants = np.where(np.arange(SEGMENTS) <= np.array(exits)[:, None], 0, -1).astype(np.int8)
    kept = np.full((rows, SEGMENTS), None, object)
    for row, (answer, exit) in enumerate(zip(answers, exits, strict=True)):
        for segment in range(exit):
            kept[row, segment] = np.zeros_like(answer, np.float32)
        kept[row, exit] = np.array(answer, np.float32)
    seconds = np.arange(1.0, rows + 1)
    logits, gates = np.zeros((rows, SEGMENTS, 0), np.float32), np.full((rows, SEGMENTS), np.nan, np.float32)
    return Trace(variants, logits, gates, seconds, kept)
