"""Fair timing: contenders take turns in one process, medians are quoted, ratios are formed turn by turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timings:
    """Seconds of every turn by contender [turns]."""

    seconds: Mapping[str, np.ndarray]

    def median(self, name: str) -> float:
        """Median seconds of a turn."""
        return float(np.median(self.seconds[name]))

    def ratio(self, name: str, against: str) -> float:
        """Median over turns of this contender's time over the other's in the same turn: slow moments of
        the machine cancel.
        """
        return float(np.median(self.seconds[name] / self.seconds[against]))

    def spread(self, name: str, against: str) -> tuple[float, float]:
        """5th and 95th percentile of that ratio."""
        low, high = np.percentile(self.seconds[name] / self.seconds[against], [5, 95])
        return float(low), float(high)


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    turns: int,
    warmup: int = 3,
    between: Callable[[], object] | None = None,
) -> Timings:
    """Run every contender once a turn; the order within a turn rotates, so that nobody always runs first.

    between: run before every contender and not timed, for contenders that would leave each other's weights in
    the cache.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + turns):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            if between is not None:
                between()
            start = time.perf_counter()
            contenders[name]()
            taken = time.perf_counter() - start
            if turn >= warmup:
                seconds[name].append(taken)
    return Timings({name: np.array(values) for name, values in seconds.items()})
