"""Methods as lines of settings: chosen on dev, read on test, with the controls that a method has to beat.

Whoever chooses may also choose never to leave, so every line begins at full depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.benchmarks.frontiers import Line, Settings, ordered, score
from offramp.benchmarks.heard import Ears, Heard, Paths
from offramp.runtime.rules import Plan, Rule, RuleSpec, bind, simulate
from offramp.runtime.rules.sweep import STEPS, Point, full_depth, settings_to_try, sweep, undominated
from offramp.training.calibration import binned_error, trust
from offramp.training.forecasters import Forecaster, by_network
from offramp.training.recipes.quee import Quee, cross_fitted
from offramp.training.replanning import PRICES, measured, replay
from offramp.training.settings import settings_from

HALF = 50.0  # per cent of the multiply-accumulates that the point in the table saves on dev at least


@dataclass(frozen=True)
class Choice:
    """A setting that was chosen on dev: the rule, the variant that a walk starts in, what it saves there."""

    rule: RuleSpec
    variant: str
    macs_saved: float


@dataclass(frozen=True)
class Entry:
    """One method on one seed: its settings on test, their choices, figures at the point that saves half, and
    the checkpoint that is to be exported for it.
    """

    settings: Settings
    choices: list[Choice]
    figures: dict[str, Any]
    checkpoint: Path


def exit_entry(ears: Ears, rule: str) -> Entry:
    """A rule that leaves, on what the exits said in fp32."""
    dev, test = ears.heard("dev"), ears.heard("test")
    whole = full_depth(dev.table, dev.costs)
    points = undominated([*sweep(rule, settings_to_try(rule, dev.table), dev.table, dev.costs), whole])
    points += [] if whole in points else [whole]
    exits = np.stack([_exits(point, test) for point in points])  # [settings, rows]
    settings = _settings(test, exits)
    best = _half([(point.macs_saved, point.accuracy) for point in points])
    share = np.bincount(exits[best], minlength=test.table.logits.shape[1]) / exits.shape[1]
    figures = _figures(settings, best, static_line(test), 100 * float(share @ test.table.right.mean(0)))
    figures |= {"setting": dict(points[best].rule.parameters)}
    figures |= trust(
        dev.table.logits,
        _exits(points[best], dev),
        dev.table.labels,
        test.table.logits,
        exits[best],
        test.table.labels,
    )
    choices = [Choice(point.rule, "fp32", point.macs_saved) for point in points]
    return Entry(settings, choices, figures, ears.folder)


def quee_entry(ears: Ears) -> Entry:
    """Rule quee in bit operations: prices and starting variants are chosen on dev, which is forecast by
    networks that did not see it (as in the recipe), test by those of the checkpoint.
    """
    dev, test = ears.paths("dev"), ears.paths("test")
    words = tuple(f"{name}={value}" for name, value in ears.loaded.training["settings"].items())
    fit = settings_from(Quee, words).fit(ears.loaded.training["seed"])
    unseen = cross_fitted(dev.outcomes, fit, ears.loaded.training["seed"])["mlp"]
    heard = ears.heard("dev")
    tried = []
    for spec in [RuleSpec("never", {}), *(RuleSpec("quee", {"price": price}) for price in PRICES)]:
        rule = bind(spec, dev.outcomes.exits, {dev.ledger.unit: dev.ledger.stated})
        for start, variant in enumerate(dev.outcomes.variants):
            plans = replay(rule, dev.outcomes, unseen, start)
            point = measured(spec, start, plans, dev.outcomes, dev.ledger)
            saved = 100 * float(1 - _spent(plans, heard).sum() / heard.full["macs"].sum())
            tried.append((point.cost, point.accuracy, Choice(spec, variant, saved)))
    return _quee_on_test(ears, test, _undominated(tried), by_network(ears.loaded.network.forecasts))


def sure_entry(ears: Ears, variant: str, checkpoint: Path) -> Entry:
    """Leaving alone in one variant, by max-probability: what rule quee has to beat.

    ears: of recipe quee, whose exits are those of `checkpoint`, the one that is exported for this.
    """
    dev, test = ears.paths("dev"), ears.paths("test")
    number = dev.outcomes.variants.index(variant)
    said = {split: paths.outcomes.straight() for split, paths in (("dev", dev), ("test", test))}
    count = dev.outcomes.exits
    macs = {split: ears.heard(split) for split in ("dev", "test")}
    tried = []
    top = {split: _top(seen[:, number]) for split, (seen, _) in said.items()}  # [rows, exits]
    cuts = np.unique(np.quantile(top["dev"], np.linspace(0, 1, STEPS)))
    for cut in [2.0, *cuts.tolist()]:
        exits = _first_above(top["dev"], cut)
        rows = np.arange(len(exits))
        accuracy = 100 * float(1 - said["dev"][1][rows, number, exits].mean())
        saved = 100 * float(1 - macs["dev"].spent["macs"][rows, exits].sum() / macs["dev"].full["macs"].sum())
        spec = RuleSpec("max_probability", {"threshold": cut})
        tried.append((float(exits.mean()), accuracy, Choice(spec, variant, saved)))
    chosen = _undominated(tried)
    exits = np.stack([_first_above(top["test"], c.rule.parameters["threshold"]) for _, c in chosen])
    rows = np.arange(exits.shape[1])
    right = ~said["test"][1][rows, number, exits]
    to_exit = test.ledger.stem[:, None] + test.ledger.steps[:, number].cumsum(1)
    spent = {axis: macs["test"].spent[axis][rows, exits] for axis in ("layers", "macs")}
    settings = Settings(right, spent | {"bops": to_exit[rows, exits]}, macs["test"].full)
    best = _half([(c.macs_saved, accuracy) for accuracy, c in chosen])
    share = np.bincount(exits[best], minlength=count) / exits.shape[1]
    by_chance = 100 * float(share @ (1 - said["test"][1][:, number].mean(0)))
    figures = _figures(settings, best, static_line(macs["test"]), by_chance)
    figures["setting"] = dict(chosen[best][1].rule.parameters)
    return Entry(settings, [c for _, c in chosen], figures, checkpoint)


def static_line(heard: Heard) -> Line:
    """Truncated networks, one exit each and charged for no other: saved and accuracy."""
    saved = 100 * (1 - heard.alone.sum(0) / heard.full["macs"].sum())
    return ordered(saved, 100 * heard.table.right.mean(0))


def _quee_on_test(
    ears: Ears, test: Paths, chosen: list[tuple[float, Choice]], forecaster: Forecaster
) -> Entry:
    outcomes, ledger, heard = test.outcomes, test.ledger, ears.heard("test")
    rights, certain, chances = [], [], []
    spent: dict[str, list[NDArray[np.float64]]] = {"layers": [], "macs": [], "bops": []}
    for _, choice in chosen:
        rule: Rule = bind(choice.rule, outcomes.exits, {ledger.unit: ledger.stated})
        start = outcomes.variants.index(choice.variant)
        plans = replay(rule, outcomes, forecaster, start)
        exits, ended, change = _ends(plans, start)
        at = (np.arange(len(plans)), start, ended, change, exits)
        rights.append(~outcomes.wrong[at])
        certain.append(_top(outcomes.seen[at]))
        spent["layers"].append(heard.costs.blocks[exits].astype(float))
        spent["macs"].append(_spent(plans, heard))
        spent["bops"].append(ledger.of(plans))
        # The same plans dealt out to other rows: what they come to on average.
        kinds, counts = np.unique(np.stack([ended, change, exits], 1), axis=0, return_counts=True)
        mean = [1 - outcomes.wrong[:, start, e, c, x].mean() for e, c, x in kinds]
        chances.append(100 * float(np.average(mean, weights=counts)))
    stacked = {axis: np.stack(costs) for axis, costs in spent.items()}
    settings = Settings(np.stack(rights), stacked, heard.full)
    best = _half([(choice.macs_saved, accuracy) for accuracy, choice in chosen])
    figures = _figures(settings, best, static_line(heard), chances[best])
    figures |= {"setting": dict(chosen[best][1].rule.parameters)}
    # No temperature: of a path's answer its statistics are kept, and not its logits.
    figures["ece_raw"] = 100 * binned_error(certain[best], rights[best])
    return Entry(settings, [choice for _, choice in chosen], figures, ears.folder)


def _settings(heard: Heard, exits: NDArray[np.int64]) -> Settings:
    rows = np.arange(exits.shape[1])
    spent = {axis: cost[rows, exits] for axis, cost in heard.spent.items()}
    return Settings(heard.table.right[rows, exits], spent, heard.full)


def _figures(settings: Settings, best: int, static: Line, by_chance: float) -> dict[str, Any]:
    """What is said of the point that saves half, and of the whole line."""
    saved = {
        axis: 100 * (1 - float(spent[best].sum() / settings.full[axis].sum()))
        for axis, spent in settings.spent.items()
    }
    return {
        "accuracy_at_half": 100 * float(settings.right[best].mean()),
        **{f"{axis}_saved": value for axis, value in saved.items()},
        "random": by_chance,
        "static": float(np.interp(saved["macs"], *static)),
        "elue": score(settings.line(), static),
    }


def _half(points: list[tuple[float, float]]) -> int:
    """Number of the most accurate of those that save half on dev; points hold saved and accuracy."""
    enough = [at for at, (saved, _) in enumerate(points) if saved >= HALF]
    return max(enough, key=lambda at: points[at][1], default=0)


def _undominated(tried: list[tuple[float, float, Choice]]) -> list[tuple[float, Choice]]:
    """Accuracy and choice of those that are more accurate than all cheaper ones, cheapest first."""
    edge: list[tuple[float, Choice]] = []
    for _, accuracy, choice in sorted(tried, key=lambda one: (one[0], -one[1])):
        if not edge or accuracy > edge[-1][0]:
            edge.append((accuracy, choice))
    dearest = max(tried, key=lambda one: one[0])
    return edge if dearest[2] is edge[-1][1] else [*edge, (dearest[1], dearest[2])]


def _spent(plans: Plan, heard: Heard) -> NDArray[np.float64]:
    """Multiply-accumulates of plans [rows, segments], whatever the precision."""
    exits = (plans >= 0).sum(1) - 1
    spent: NDArray[np.float64] = heard.spent["macs"][np.arange(len(plans)), exits]
    return spent


def _ends(plans: Plan, start: int) -> tuple[NDArray[np.int64], ...]:
    """Exit, variant there, and last segment before the change of each plan; see replanning.measured."""
    exits = (plans >= 0).sum(1) - 1
    ended = plans[np.arange(len(plans)), exits].astype(np.int64)
    return exits, ended, np.maximum((plans == start).sum(1) - 1, 0)


def _first_above(top: NDArray[np.float64], cut: float) -> NDArray[np.int64]:
    """The first exit whose top probability reaches the cut, else the last: top [rows, exits] -> [rows]."""
    leaves = top >= cut
    leaves[:, -1] = True
    found: NDArray[np.int64] = leaves.argmax(1)
    return found


def _top(seen: NDArray[np.float32]) -> NDArray[np.float64]:
    """The top probability p, since log(p / q) and p - q are kept: seen [..., 3] -> [...]."""
    certainty, margin = seen[..., 0].astype(float), seen[..., 2].astype(float)
    apart = -np.expm1(-np.maximum(certainty, 1e-12))  # 1 - q / p
    found: NDArray[np.float64] = np.clip(margin / apart, 0.0, 1.0)
    return found


def _exits(point: Point, heard: Heard) -> NDArray[np.int64]:
    table = heard.table
    return simulate(bind(point.rule, table.logits.shape[1]), table.logits, table.gates)


def of_methods(said: Mapping[str, Ears], plain: tuple[str, ...]) -> dict[str, Entry]:
    """All lines of one seed by the name that they have in the table; said["joint"] is there."""
    entries = {f"{rule} (joint)": exit_entry(said["joint"], rule) for rule in plain}
    for name, ears in said.items():
        if ears.loaded.network.spec.forecast:
            entries[f"{name} (bops)"] = quee_entry(ears)
            for variant in ears.loaded.network.spec.forecast[1:]:
                entries[f"max_probability (joint, {variant})"] = sure_entry(
                    ears, variant, said["joint"].folder
                )
        elif name != "joint":
            entries[f"{name} ({ears.rule})"] = exit_entry(ears, ears.rule)
    return entries
