"""Statistics of a run of ee-run: exits, depth and times of any number of answers, in bounded memory."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

_STEP = math.log(1.02)  # times are counted in bins 2 % wide, so percentiles are right to 1 %


@dataclass
class RunStats:
    """Statistics of the answers of one run: exits, depth and times, in bounded memory.

    exits: answers by exit (1-based). time_bins: answers by bin of the logarithm of their seconds. depth:
    blocks run for all answers. failed: lines that had an error. started: perf_counter at the start of the
    run.
    """

    exits: Counter[int] = field(default_factory=Counter)
    time_bins: Counter[int] = field(default_factory=Counter)
    depth: int = 0
    failed: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, exit: int, depth: int, seconds: float) -> None:
        """Count one answer: its exit (1-based), blocks run, and seconds."""
        self.exits[exit] += 1
        self.depth += depth
        self.time_bins[math.floor(math.log(max(seconds, 1e-9)) / _STEP)] += 1

    def percentile(self, share: float) -> float:
        """Percentile of the answers' seconds, accurate to 1 %; share: 0..1. NaN without answers."""
        rank, counted = share * self.answers, 0
        for number in sorted(self.time_bins):
            counted += self.time_bins[number]
            if counted >= rank:
                return math.exp((number + 0.5) * _STEP)
        return math.nan

    @property
    def answers(self) -> int:
        """Number of answers counted so far."""
        return sum(self.exits.values())

    def report(self, exits: int, blocks: int, facts: Mapping[str, str]) -> str:
        """Format the statistics as lines of text.

        exits, blocks: their numbers in the network. facts: further lines by name.
        """
        answers, lines = self.answers, []
        for number in range(1, exits + 1):
            share = self.exits[number] / max(answers, 1)
            lines.append(
                f"exit {number:3d} {self.exits[number]:9d} {share:7.1%} {'#' * round(40 * share)}".rstrip()
            )
        rate = answers / max(time.perf_counter() - self.started, 1e-9)
        lines.append(f"answers    {answers} ({rate:.1f}/s), {self.failed} with errors")
        if answers:
            lines.append(f"mean depth {self.depth / answers:.2f} of {blocks} blocks")
            lines.append(
                f"ms         p50 {1e3 * self.percentile(0.5):.2f}, p95 {1e3 * self.percentile(0.95):.2f}"
            )
        lines += [f"{name:10s} {value}" for name, value in facts.items()]
        return "\n".join(lines)
