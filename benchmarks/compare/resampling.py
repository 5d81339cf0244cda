"""Intervals and p-values over rows and seeds, and Holm's correction for several methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from offramp.benchmarks.compare.frontiers import Floats

RESAMPLES = 2000
LEVEL = 0.05  # 1 - the coverage of intervals
_NORMAL_FROM = 1e4  # degrees of freedom from which Student's distribution is the normal one


def bootstrap_weights(rows: int, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Bootstrap weights [rows, resamples]: how often each row was drawn with replacement.

    They depend on the arguments only, so that methods and seeds are compared on the same resamples.
    """
    draw = np.random.default_rng(seed)
    counts = [np.bincount(draw.integers(0, rows, rows), minlength=rows) for _ in range(resamples)]
    return np.stack(counts, axis=1).astype(float)


def interval(differences: Floats) -> dict[str, float]:
    """Mean difference over seeds, its 95 % interval over rows and seeds, and its two-sided p-value.

    differences [seeds, 1 + resamples]: first over all rows, then for every resample of rows, the same for all
    seeds. With one seed the interval is over rows only.

    A draw is the mean over seeds on one resample of rows, plus a deviation for the choice of seeds: s /
    sqrt(seeds), where s is the standard deviation over seeds, times a number from Student's t distribution
    with seeds - 1 degrees of freedom. Where seeds alone vary, the interval is the t-interval, which has its
    coverage at any number of seeds. A bootstrap of three seeds has not: its mean never leaves their range,
    and even with the factor sqrt(n / (n - 1)) its 95 % interval covers about 80 %. Where rows alone vary, it
    is the percentile bootstrap. s is measured on finite rows, so that the interval is slightly too wide
    rather than too narrow. p is twice the smaller share of draws on one side of zero.
    """
    seeds, mean = len(differences), differences.mean(0)
    draws, seed_error = mean[1:], 0.0
    if seeds > 1:
        seed_error = float(differences[:, 0].std(ddof=1)) / math.sqrt(seeds)
        draws = draws + seed_error * student_draws(seeds - 1, len(draws))
    low, high = np.percentile(draws, [50 * LEVEL, 100 - 50 * LEVEL])
    sides = (np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0))
    return {
        "difference": float(mean[0]),
        "low": float(low),
        "high": float(high),
        "p": min(1.0, 2 * (1 + min(sides)) / (1 + len(draws))),
        "row_error": float(mean[1:].std(ddof=1)),
        "seed_error": seed_error,
    }


@cache
def student_draws(freedom: int, count: int, finer: int = 500) -> Floats:
    """Quantiles of Student's t distribution at `count` even steps, in random order [count].

    They are a sample without the noise of one in the tails, which are heavy for few degrees of freedom.
    """
    draw = np.random.default_rng(1)
    half = np.sort(np.abs(draw.standard_t(freedom, finer * (count // 2)))).reshape(count // 2, finer)
    quantiles = half[:, finer // 2]
    middle = [0.0] * (count % 2)
    values: Floats = draw.permutation(np.concatenate([-quantiles, middle, quantiles]))
    return values


def mean_interval(parts: Sequence[Mapping[str, float]], seeds: Sequence[int]) -> dict[str, float]:
    """The mean difference of several data sets, its 95 % interval and two-sided p-value.

    parts: results of interval(), one a data set; seeds: their numbers of seeds. Data sets have the same
    weight and no rows or seeds in common, so the squares of their errors add. The mean is compared with
    Student's t distribution; its degrees of freedom follow from the errors over seeds (Welch-Satterthwaite).
    """
    count = len(parts)
    mean = float(np.mean([part["difference"] for part in parts]))
    by_seed = np.array([part["seed_error"] ** 2 for part in parts]) / count**2
    variance = float(by_seed.sum() + sum(part["row_error"] ** 2 for part in parts) / count**2)
    if variance == 0:
        return {"difference": mean, "low": mean, "high": mean, "p": 1.0 if mean == 0 else 0.0}
    spread = sum(v**2 / (n - 1) for v, n in zip(by_seed, seeds, strict=True) if n > 1)
    freedom = min(variance**2 / spread, 2 * _NORMAL_FROM) if spread > 0 else 2 * _NORMAL_FROM
    half = t_quantile(freedom) * math.sqrt(variance)
    p = two_sided(mean / math.sqrt(variance), freedom)
    return {"difference": mean, "low": mean - half, "high": mean + half, "p": p}


def two_sided(t: float, freedom: float) -> float:
    """P(|T| > |t|) for Student's t distribution; freedom: degrees of freedom, 1 or more."""
    if freedom > _NORMAL_FROM:
        return math.erfc(abs(t) / math.sqrt(2))
    # With T = sqrt(freedom) tan(x) the density of x is proportional to cos(x) ** (freedom - 1).
    from_t, to = math.atan(abs(t) / math.sqrt(freedom)), math.pi / 2
    tail, half = (_integrate_cosine(start, to, freedom - 1) for start in (from_t, 0.0))
    return min(1.0, tail / half)


def t_quantile(freedom: float, level: float = LEVEL) -> float:
    """The t for which P(|T| > t) is `level`, by bisection."""
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, freedom) > level else (low, middle)
    return (low + high) / 2


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's corrected p-values: each is at most the level only if all smaller ones are (step-down).

    The chance that any of the hypotheses is rejected wrongly is then at most the level (Holm, 1979).
    """
    corrected: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p}


def _integrate_cosine(start: float, end: float, power: float, steps: int = 20_000) -> float:
    """The integral of cos(x) ** power, by Simpson's rule."""
    x = np.linspace(start, end, steps + 1)
    values = np.maximum(np.cos(x), 0.0) ** power
    weights = np.where(np.arange(steps + 1) % 2 == 1, 4.0, 2.0)
    weights[[0, -1]] = 1.0
    return float(weights @ values) * (end - start) / steps / 3
