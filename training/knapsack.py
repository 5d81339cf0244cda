"""The oracle of a text: which way each should have gone, for the best mean score at a mean depth.

One way a text, total layers within a budget: a multiple-choice knapsack, solved exactly over whole layers
(Glavas et al., arXiv 2410.20022, who solve it in shards of the data). It has seen the scores, so it takes the
luckiest of several draws: `shuffled` says how much of its gain needs no knowledge of the text, `held_out` how
much of it is left on scores that it has not seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NEVER = -np.inf


def choose(scores: np.ndarray, layers: Sequence[int], budget: int) -> np.ndarray:
    """A way for each text [texts], of scores [texts, ways], with the greatest total at no more than `budget`
    layers in total; layers [ways] is what each costs. Raises ValueError where no choice is that cheap.
    """
    if budget < len(scores) * min(layers):
        raise ValueError(
            f"{len(scores)} texts take {len(scores) * min(layers)} layers at least, not {budget}"
        )
    _, taken = _table(scores, layers, budget)
    chosen = np.zeros(len(scores), np.int64)
    for text in range(len(scores) - 1, -1, -1):
        chosen[text] = taken[text, budget]
        budget -= layers[chosen[text]]
    return chosen


def best(scores: np.ndarray, layers: Sequence[int]) -> np.ndarray:
    """The greatest mean score within each total of layers, from 0 to that of the deepest way for all."""
    return _table(scores, layers, len(scores) * max(layers))[0] / len(scores)


def smallest_depth(scores: np.ndarray, layers: Sequence[int]) -> float:
    """The least mean depth at which the mean score is no less than the deepest way's."""
    full = scores[:, int(np.argmax(layers))].mean()
    reached = best(scores, layers) >= full - 1e-9  # sums in another order
    return float(np.argmax(reached)) / len(scores)


def shuffled(scores: np.ndarray, seed: int, *, centred: bool = False) -> np.ndarray:
    """Scores [texts, ways] drawn anew across the texts within each way: means and spreads of ways are kept,
    what a score has to do with its text is lost.

    centred: only what differs from the text's own mean is drawn anew, so that easy texts stay easy: else the
    choice also gains by what merely makes some texts easier than others.
    """
    random = np.random.default_rng(seed)
    own = scores.mean(1, keepdims=True) if centred else np.zeros((len(scores), 1))
    drawn: np.ndarray = random.permuted(scores - own, axis=0) + own
    return drawn


def held_out(seen: np.ndarray, judged: np.ndarray, layers: Sequence[int], budget: int) -> float:
    """Mean of `judged` [texts, ways] where the choice was made by `seen`: two noisy halves of the scores."""
    return float(judged[np.arange(len(seen)), choose(seen, layers, budget)].mean())


def _table(scores: np.ndarray, layers: Sequence[int], budget: int) -> tuple[np.ndarray, np.ndarray]:
    """The greatest total within each budget [budget + 1], and each text's way there [texts, budget + 1]."""
    total = np.zeros(budget + 1)
    taken = np.zeros((len(scores), budget + 1), np.int16)
    for text, row in enumerate(scores):
        after = np.full(budget + 1, NEVER)
        for way, (score, cost) in enumerate(zip(row, layers, strict=True)):
            if cost > budget:
                continue
            tried = total[: budget + 1 - cost] + score
            better = tried > after[cost:]
            after[cost:][better] = tried[better]
            taken[text, cost:][better] = way
        total = after
    return total, taken
