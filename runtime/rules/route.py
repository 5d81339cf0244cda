"""A route a text: some segments for all tokens of an answer, chosen by the prompt (after arXiv 2410.20022).

The menu is the same for every bundle of so many segments: all of them, every few left out evenly, and an exit
after the first few. What chooses is a linear forecast of how well each will do, from the hidden state of the
prompt's last token behind the first segment; ee-calibrate learns it and writes it into the bundle.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import Manifest
from offramp.runtime.engines.base import Array
from offramp.runtime.errors import BadBundle, BadSetting
from offramp.runtime.generate import Skipping, Way
from offramp.runtime.rules.router import Router, read_router

FILE = "router.npz"  # in a bundle
KINDS = 4  # routes of each kind, at most


@dataclass(frozen=True)
class Route:
    """skipped: segments (0-based) that answers go past. blocks: those that are run."""

    name: str
    skipped: frozenset[int]
    blocks: int


def menu(manifest: Manifest) -> tuple[Route, ...]:
    """Routes of a bundle, the full one first; from half of the segments on."""
    sizes = [len(segment.blocks) for segment in manifest.segments]
    count, found = len(sizes), {frozenset[int](): "full"}
    counts = sorted({round(share * count) for share in np.linspace(0.5, 1, KINDS + 1)[:-1]} - {0, 1, count})
    for run in reversed(counts):
        found.setdefault(skipped(count, run), f"skip to {run}")
        found.setdefault(frozenset(range(run, count)), f"exit at {run}")
    return tuple(
        Route(name, past, sum(size for at, size in enumerate(sizes) if at not in past))
        for past, name in found.items()
    )


def skipped(count: int, run: int) -> frozenset[int]:
    """Segments (0-based) to go past where `run` of them are run: the middles of equal parts of what stands
    between the first and the last.
    """
    past = count - run
    return frozenset(1 + int((part + 0.5) * (count - 2) / past) for part in range(past))


class Routing:
    """Chooses the way of a text; price: what a block has to bring, in nats a token."""

    def __init__(self, router: Router, routes: tuple[Route, ...], price: float) -> None:
        self._router, self._routes, self._price = router, routes, price

    def chosen(self, hidden: Array) -> Way:
        """See generate.Chooser."""
        return Skipping(self._routes[self.number(hidden)].skipped)

    def number(self, hidden: Array) -> int:
        """Of the route in the menu."""
        return int(self._router.choose(hidden[None].astype(np.float64), self._price)[0])


def open_routing(bundle: Bundle, price: float) -> Routing:
    """What ee-calibrate left in a bundle; BadSetting where there is none, BadBundle where it is no router."""
    if FILE not in bundle.manifest.files:
        raise BadSetting(
            f"rule route: {bundle.folder} has no router; learn one with: ee-calibrate pairs.jsonl"
        )
    routes = menu(bundle.manifest)
    try:
        router = read_router(bundle.read(FILE), bundle.manifest.hidden_size, len(routes))
    except ValueError as problem:
        raise BadBundle(f"{bundle.folder / FILE}: {problem}; calibrate the bundle again") from problem
    return Routing(router, routes, price)
