"""Rule route: the segments that an answer skips are chosen by its prompt (after arXiv 2410.20022).

The routes of a bundle are: all segments, some skipped evenly, an exit after the first few, and lists that
ee-calibrate searched (its operating points of rule skip). A router chooses among them: one linear layer that
forecasts how well each route will do from the hidden state of the prompt's last token after the first
segment. ee-calibrate fits it and writes it into the bundle. The paper has an oracle allocation and publishes
no such router. It is a ridge regression, so there is no training loop: its strength is chosen by the smallest
leave-one-out error, which has a closed form.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field, fields

import numpy as np

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import Manifest, RuleSpec
from offramp.runtime.errors import BadBundle, BadSetting
from offramp.runtime.rules.base import ExitTest, Floats, Plan, Signals, full_plan, never_exits
from offramp.runtime.rules.skip import skipped_segments, thinned_plan

ROUTER_FILE = "router.npz"  # file name in a bundle
ROUTES_OF_A_KIND = 4  # at most
ROUTE_SHARES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6)  # mean depths of route points, as shares of all blocks
STRENGTHS = tuple(10.0 ** (power / 2) for power in range(-4, 13))
PRICES: tuple[float, ...] = (0.0, *np.geomspace(1e-6, 1e3, 500).tolist())  # score for one unit of cost


@dataclass(frozen=True)
class Route:
    """A choice of segments (0-based) that an answer skips; blocks: number of blocks that are run."""

    name: str
    skipped: frozenset[int]
    blocks: int


def list_routes(manifest: Manifest) -> tuple[Route, ...]:
    """List the routes of a bundle, the full one first.

    All but the searched lists run at least half of the segments; of the lists there is one for each of
    ROUTE_SHARES.
    """
    sizes = [len(segment.blocks) for segment in manifest.segments]
    count, names = len(sizes), {frozenset[int](): "full"}
    shares = np.linspace(0.5, 1, ROUTES_OF_A_KIND + 1)[:-1]
    for run in sorted({round(share * count) for share in shares} - {0, 1, count}, reverse=True):
        names.setdefault(skipped_segments(count, run), f"skip to {run}")
        names.setdefault(frozenset(range(run, count)), f"exit at {run}")

    def blocks_left(skipped: frozenset[int]) -> int:
        return sum(size for segment, size in enumerate(sizes) if segment not in skipped)

    lists = {frozenset(n - 1 for n in p.rule.skipped): p.name for p in manifest.points if p.rule.skipped}
    for share in ROUTE_SHARES if lists else ():
        nearest = min(lists, key=lambda skipped: abs(blocks_left(skipped) - share * manifest.blocks))
        names.setdefault(nearest, lists[nearest])
    return tuple(Route(name, skipped, blocks_left(skipped)) for skipped, name in names.items())


@dataclass(frozen=True)
class Router:
    """A linear model that forecasts the score of each route relative to the mean of all routes.

    Forecast: (features - shift) / scale @ weights + bias. weights [features, routes]. costs [routes]: cost of
    each route. strength: of the ridge regression. error: mean
    squared leave-one-out error of the forecasts, divided by that of the mean scores (1: no information).
    """

    shift: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    costs: np.ndarray
    strength: float
    error: float

    def forecast(self, features: np.ndarray) -> np.ndarray:
        """Forecast the relative score of each route [texts, routes]; features [texts, features]."""
        scores: np.ndarray = (features - self.shift) / self.scale @ self.weights + self.bias
        return scores

    def choose_routes(self, features: np.ndarray, price: float) -> np.ndarray:
        """Choose the route of each text [texts]: the largest forecast minus price times cost.

        Of equal routes the cheapest is chosen.
        """
        order = np.argsort(self.costs, kind="stable")
        worth = self.forecast(features) - price * self.costs
        routes: np.ndarray = order[np.argmax(worth[:, order], axis=1)]
        return routes

    def price_for_cost(self, features: np.ndarray, cost: float) -> float:
        """Find the lowest of PRICES at which the mean cost of these texts is at most `cost`.

        If there is none, the highest price is returned.
        """
        for price in PRICES:
            if self.costs[self.choose_routes(features, price)].mean() <= cost:
                return price
        return PRICES[-1]

    def to_bytes(self) -> bytes:
        """The router as the bytes of a .npz file."""
        target = io.BytesIO()
        np.savez(target, **{item.name: getattr(self, item.name) for item in fields(self)})
        return target.getvalue()


def read_router(data: bytes, features: int, routes: int) -> Router:
    """Read a router from the bytes of Router.to_bytes.

    Raises ValueError if they are not a router for this number of features and routes.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            values = {item.name: arrays[item.name] for item in fields(Router)}
    except Exception as problem:  # zipfile's and numpy's errors share no base
        raise ValueError(f"not a router: {problem}") from problem
    if values["weights"].shape != (features, routes) or values["costs"].shape != (routes,):
        raise ValueError(f"a router of {values['weights'].shape}, this bundle's has {(features, routes)}")
    strength, error = (float(values.pop(name)) for name in ("strength", "error"))
    return Router(**values, strength=strength, error=error)


def fit_router(features: np.ndarray, scores: np.ndarray, costs: np.ndarray) -> Router:
    """Fit a router to texts whose score is known for every route.

    features [texts, features]; scores [texts, routes], higher is better; costs [routes].
    """
    features, scores = np.asarray(features, np.float64), np.asarray(scores, np.float64)
    shift, scale = features.mean(0), features.std(0) + 1e-6
    inputs = (features - shift) / scale
    # The mean score of a text does not matter for the choice among routes.
    relative = scores - scores.mean(1, keepdims=True)
    bias = relative.mean(0)
    relative = relative - bias
    left, values, right = np.linalg.svd(inputs, full_matrices=False)
    # The features are centred, so at most rows - 1 directions hold anything; what rounding leaves of the
    # others would count as a fit. As many features as rows fit every score: then the residual of a row and
    # the share of it that the row itself does not decide are both tiny, and their quotient alone is the error
    # of the row left out. So both are computed as sums of positive terms; 1 minus a sum near 1 is rounding.
    rank = int((values > values[0] * max(inputs.shape) * np.finfo(np.float64).eps).sum())
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    projected = left.T @ relative
    if rank == len(inputs) - 1:
        beyond, unexplained = np.zeros(len(inputs)), np.zeros_like(relative)
    else:
        beyond = np.maximum(1 - 1 / len(inputs) - (left**2).sum(1), 0)  # the bias is fitted too
        unexplained = relative - left @ projected
    errors = []
    for strength in STRENGTHS:
        shrunk = strength / (values**2 + strength)
        residuals = unexplained + left @ (shrunk[:, None] * projected)
        own = np.maximum(beyond + left**2 @ shrunk, np.finfo(np.float64).tiny)
        errors.append(float(((residuals / own[:, None]) ** 2).mean()))
    strength = STRENGTHS[int(np.argmin(errors))]
    weights = right.T @ ((values / (values**2 + strength))[:, None] * projected)
    error_of_means = float(((relative / (1 - 1 / len(inputs))) ** 2).mean())
    error = min(errors) / error_of_means if error_of_means > 0 else 1.0
    return Router(shift, scale, weights, bias, np.asarray(costs, np.float64), strength, error)


@dataclass(frozen=True)
class Routing:
    """A bundle's router and the routes that it chooses among."""

    router: Router
    routes: tuple[Route, ...]


def read_routing(bundle: Bundle) -> Routing:
    """Read the router that ee-calibrate wrote into a bundle.

    Raises BadSetting if there is none, BadBundle if it is damaged.
    """
    if ROUTER_FILE not in bundle.manifest.files:
        raise BadSetting(f"rule route: {bundle.folder} has no router; fit one with: ee-calibrate pairs.jsonl")
    routes = list_routes(bundle.manifest)
    try:
        router = read_router(bundle.read(ROUTER_FILE), bundle.manifest.hidden_size, len(routes))
    except ValueError as problem:
        path = bundle.folder / ROUTER_FILE
        raise BadBundle(f"{path}: {problem}; calibrate the bundle again") from problem
    return Routing(router, routes)


@dataclass(frozen=True)
class RouteRule:
    """Rule route: chooses a route for each text; price: score (nats a token) that one block must gain."""

    spec: RuleSpec
    routing: Routing
    price: float
    width: int = field(default=0, init=False)

    def route(self, hidden: Floats) -> int:
        """Index of the route for a prompt; hidden [hidden size]: see Rule.first_plan."""
        return int(self.routing.router.choose_routes(hidden[None].astype(np.float64), self.price)[0])

    @property
    def exit_test(self) -> ExitTest:
        """A test that is always False, as the plan is fixed before the walk; see Rule.exit_test."""
        return never_exits

    def first_plan(self, segments: int, variant: int, hidden: Floats | None = None) -> Plan:
        """The plan of the chosen route; every segment if there is no prompt. See Rule.first_plan."""
        if hidden is None:
            return full_plan(segments, variant)
        return thinned_plan(segments, variant, self.routing.routes[self.route(hidden)].skipped)

    def __call__(self, signals: Signals, memory: Floats, plan: Plan, segment: int) -> tuple[Plan, Floats]:
        return plan, memory
