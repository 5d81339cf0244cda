"""A way a text, told by its prompt: one linear layer forecasts how well each way of a small menu does.

The oracle that it runs after is training.knapsack's (arXiv 2410.20022), which publishes no such router. Ridge
regression, so that there is nothing to train: its strength is the one whose forecasts err least on rows left
out one at a time, which has a closed form.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, fields

import numpy as np

STRENGTHS = tuple(10.0 ** (power / 2) for power in range(-4, 13))
PRICES: tuple[float, ...] = (0.0, *np.geomspace(1e-6, 1e3, 500).tolist())  # score for a unit of cost


@dataclass(frozen=True)
class Router:
    """Forecasts of scores against a text's mean over the ways: (features - shift) / scale @ weights + bias.

    weights: [features, ways]. costs: what each way costs [ways]. strength: that of the ridge; error: mean
    square of forecasts of rows left out, against that of the ways' means alone (1: it knows nothing).
    """

    shift: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    costs: np.ndarray
    strength: float
    error: float

    def forecast(self, features: np.ndarray) -> np.ndarray:
        """How much better than the others each way will do [texts, ways], of features [texts, features]."""
        told: np.ndarray = (features - self.shift) / self.scale @ self.weights + self.bias
        return told

    def choose(self, features: np.ndarray, price: float) -> np.ndarray:
        """The way of each text [texts]: greatest forecast less price times cost, the cheaper of equals."""
        order = np.argsort(self.costs, kind="stable")
        worth = self.forecast(features) - price * self.costs
        chosen: np.ndarray = order[np.argmax(worth[:, order], axis=1)]
        return chosen

    def price_for(self, features: np.ndarray, cost: float) -> float:
        """The least of PRICES at which these texts cost no more than `cost` on average, or the greatest."""
        for price in PRICES:
            if self.costs[self.choose(features, price)].mean() <= cost:
                return price
        return PRICES[-1]

    def to_bytes(self) -> bytes:
        """As a file of arrays, which numpy reads."""
        target = io.BytesIO()
        np.savez(target, **{field.name: getattr(self, field.name) for field in fields(self)})
        return target.getvalue()


def read_router(data: bytes, features: int, ways: int) -> Router:
    """What to_bytes wrote; ValueError where it is no router of so many features and ways."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            found = {field.name: arrays[field.name] for field in fields(Router)}
    except Exception as problem:  # zipfile's and numpy's errors share no base
        raise ValueError(f"not a router: {problem}") from problem
    if found["weights"].shape != (features, ways) or found["costs"].shape != (ways,):
        raise ValueError(f"a router of {found['weights'].shape}, this bundle's has {(features, ways)}")
    strength, error = (float(found.pop(name)) for name in ("strength", "error"))
    return Router(**found, strength=strength, error=error)


def fit(features: np.ndarray, scores: np.ndarray, costs: np.ndarray) -> Router:
    """A router of texts whose scores by every way are known: features [texts, features], scores [texts, ways]
    of which more is better, costs [ways].
    """
    features, scores = np.asarray(features, np.float64), np.asarray(scores, np.float64)
    shift, scale = features.mean(0), features.std(0) + 1e-6
    inputs = (features - shift) / scale
    # What makes a text hard by every way says nothing about which to take.
    wanted = scores - scores.mean(1, keepdims=True)
    bias = wanted.mean(0)
    wanted = wanted - bias
    left, values, right = np.linalg.svd(inputs, full_matrices=False)
    errors = []
    for strength in STRENGTHS:
        kept = values**2 / (values**2 + strength)
        forecast = left @ (kept[:, None] * (left.T @ wanted))
        leverage = (left**2) @ kept + 1 / len(inputs)  # the bias is learned too
        errors.append(float((((wanted - forecast) / np.maximum(1 - leverage, 1e-3)[:, None]) ** 2).mean()))
    strength = STRENGTHS[int(np.argmin(errors))]
    weights = right.T @ ((values / (values**2 + strength))[:, None] * (left.T @ wanted))
    alone = float(((wanted / (1 - 1 / len(inputs))) ** 2).mean())
    error = min(errors) / alone if alone > 0 else 1.0
    return Router(shift, scale, weights, bias, np.asarray(costs, np.float64), strength, error)
