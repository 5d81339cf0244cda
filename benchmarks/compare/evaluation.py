"""Methods as frontiers: a recipe's exits with a rule, settings chosen on dev and read on test, with controls.

Every method may use two settings that need no tuning, full depth and the first exit for all rows. Of these
and of the settings that are swept on dev, those that are more accurate on dev than all cheaper ones are kept.
A recipe spec with several models has STEPS settings in all, so that it is tuned as often as another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.benchmarks.compare.exit_outputs import CheckpointOutputs, ExitOutputs, VariantPaths
from offramp.benchmarks.compare.frontiers import Frontier, SettingResults, elue_score, sorted_frontier
from offramp.benchmarks.compare.kept_rows import ChosenSetting, MethodRows, method_name
from offramp.runtime.rules import Plan, Rule, RuleSpec, bind, normalised_entropy, simulate, softmax
from offramp.runtime.rules.sweep import STEPS, SWEPT, ExitTable, Setting, settings_to_try
from offramp.runtime.tuning.calibration import binned_error, calibration_figures
from offramp.training.forecasters import Forecaster, network_forecaster
from offramp.training.recipes.quee import fit_by_halves
from offramp.training.replay import PRICES, replay_walks, walk_limits

Exits = NDArray[np.int64]
HALF = 50.0  # least share of multiply-accumulates, in percent, that the point in the table saves on dev
FREE = (RuleSpec("never", {}), RuleSpec("fixed", {"exit": 1.0}))
PUBLISHED = "published"


@dataclass(frozen=True)
class Candidate:
    """A setting that was tried on dev, with its exits there."""

    setting: ChosenSetting
    spec: RuleSpec


def evaluate_exits(name: str, models: Sequence[CheckpointOutputs], rule: str, seed: int) -> MethodRows:
    """Evaluate an exit rule on the fp32 outputs of every exit, with settings swept on dev.

    models: those of a recipe spec; the STEPS settings are divided among them.
    """
    candidates = []
    for number, model in enumerate(models):
        dev = model.exit_outputs("dev")
        values = thin_settings(settings_to_try(rule, dev.table), STEPS // len(models))
        specs = [RuleSpec(rule, dict(v) if isinstance(v, Mapping) else {SWEPT[rule]: v}) for v in values]
        exits = simulate_settings(rule, values, specs, dev.table)
        candidates += [_candidate(spec, row, dev, number) for spec, row in zip(specs, exits, strict=True)]
    return _method(name, models, rule, "rule", seed, candidates)


def evaluate_published(name: str, models: Sequence[CheckpointOutputs], seed: int) -> MethodRows:
    """Evaluate the operating points that training set, one model a point or more, as one curve.

    They are the points that training.json names in "published_points", else the point "trained".
    """
    candidates, published = [], []
    for number, model in enumerate(models):
        training = model.checkpoint.training
        points = {point["name"]: point for point in training["operating_points"]}
        for label in training.get("published_points", ["trained"]):
            if label not in points:
                raise ValueError(f"{model.folder}: training.json has no operating point {label!r}")
            spec = RuleSpec(points[label]["rule"]["name"], points[label]["rule"]["parameters"])
            dev, test = model.exit_outputs("dev"), model.exit_outputs("test")
            candidates.append(_candidate(spec, _exits(spec, dev.table), dev, number, label))
            results = _results_at(test, _exits(spec, test.table)[None])
            saved = _percent_saved(results, 0)
            accuracy = 100 * float(results.right[0].mean())
            full = 100 * float(test.table.right[:, -1].mean())
            published.append(
                {"model": model.folder.name, "point": label, "accuracy": accuracy, "full_depth": full} | saved
            )
    return _method(name, models, PUBLISHED, "published", seed, candidates, published)


def evaluate_quee(name: str, outputs: CheckpointOutputs, seed: int) -> MethodRows:
    """Evaluate rule quee, whose steps cost bit operations.

    Prices and starting variants are chosen on dev, with forecasts by networks that were fitted on other rows
    (as in the recipe). Errors on test are forecast by the networks of the checkpoint.
    """
    dev, test = outputs.variant_paths("dev"), outputs.variant_paths("test")
    trained_with = outputs.checkpoint.training["seed"]
    fit = outputs.quee_settings.fit(trained_with)
    forecaster = fit_by_halves(dev.outcomes, fit, trained_with, ("mlp",))["mlp"]
    exit_outputs = outputs.exit_outputs("dev")
    evaluated = []
    limits = walk_limits(dev.outcomes.tree)
    specs = [*FREE, *(RuleSpec("quee", {"price": price, **limits}) for price in PRICES)]
    for spec in specs:
        rule = bind(spec, dev.outcomes.exits, {dev.costs.unit: dev.costs.stated})
        for start, variant in enumerate(dev.outcomes.variants):
            plans = replay_walks(rule, dev.outcomes, forecaster, start)
            wrong = dev.outcomes.wrong[np.arange(len(plans)), dev.outcomes.tree.end_nodes(plans)]
            saved = 100 * float(1 - _macs_of(plans, exit_outputs).sum() / exit_outputs.full["macs"].sum())
            accuracy = 100 * float(1 - wrong.mean())
            setting = ChosenSetting(spec.name, dict(spec.parameters), variant, 0, saved, accuracy)
            cost = float(dev.costs.walk_costs(plans).mean())
            evaluated.append((cost, accuracy, Candidate(setting, spec)))
    chosen = undominated(evaluated)
    network = network_forecaster(outputs.checkpoint.network.forecasts)
    trials = len(PRICES) * len(dev.outcomes.variants)
    return _quee_on_test(name, outputs, test, chosen, network, seed, trials)


def evaluate_one_variant(name: str, outputs: CheckpointOutputs, variant: str, seed: int) -> MethodRows:
    """Evaluate exiting by max-probability in one variant, the control of rule quee.

    outputs: those of recipe quee.
    """
    number = outputs.variant_paths("dev").outcomes.variants.index(variant)
    macs, top, wrong = {}, {}, {}  # by split; top and wrong [rows, exits]
    for split in ("dev", "test"):
        macs[split], paths = outputs.exit_outputs(split), outputs.variant_paths(split)
        nodes = paths.outcomes.tree.straight[number]  # [exits]
        top[split] = _top_probability(paths.statistics[:, nodes])
        wrong[split] = paths.outcomes.wrong[:, nodes]
    evaluated = []
    thresholds = np.unique(np.quantile(top["dev"], np.linspace(0, 1, STEPS)))
    rows = np.arange(len(top["dev"]))
    for threshold in [2.0, *thresholds.tolist()]:
        exits = _first_above(top["dev"], threshold)
        accuracy = 100 * float(1 - wrong["dev"][rows, exits].mean())
        saved = 100 * float(1 - macs["dev"].spent["macs"][rows, exits].sum() / macs["dev"].full["macs"].sum())
        spec = RuleSpec("max_probability", {"threshold": threshold})
        setting = ChosenSetting(spec.name, dict(spec.parameters), variant, 0, saved, accuracy)
        evaluated.append((100 - saved, accuracy, Candidate(setting, spec)))
    chosen = undominated(evaluated)
    exits = np.stack([_first_above(top["test"], c.spec.parameters["threshold"]) for c in chosen])
    rows = np.arange(exits.shape[1])
    costs = outputs.variant_paths("test").costs
    to_exit = costs.stem[:, None] + costs.steps[:, number].cumsum(1)
    spent = {axis: macs["test"].spent[axis][rows, exits] for axis in ("layers", "macs")}
    results = SettingResults(
        ~wrong["test"][rows, exits], spent | {"bops": to_exit[rows, exits]}, macs["test"].full
    )
    best = _best_at_half(chosen)
    share = np.bincount(exits[best], minlength=top["test"].shape[1]) / exits.shape[1]
    random_accuracy = 100 * float(share @ (1 - wrong["test"].mean(0)))
    figures = _figures(results, chosen, best, static_frontier(macs["test"]), random_accuracy)
    full_right = macs["test"].table.right[:, -1]  # the recipe's own full depth is in fp32, as for rule quee
    settings = [candidate.setting for candidate in chosen]
    rule = f"max_probability in {variant}"
    full_name = method_name(name, rule)
    return MethodRows(
        full_name, name, rule, "variant", seed, results, full_right, settings, len(thresholds), figures
    )


def thin_settings(values: Sequence[Setting], count: int) -> list[Setting]:
    """At most `count` of the settings, evenly spaced, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    return [values[round(at)] for at in np.linspace(0, len(values) - 1, max(count, 1))]


def simulate_settings(
    rule: str, values: Sequence[Setting], specs: Sequence[RuleSpec], table: ExitTable
) -> NDArray[np.int64]:
    """The exit of every row at every setting of a rule [settings, rows], as simulate() gives it.

    The signals of rules without memory are computed once for all settings.
    """
    signal: NDArray[Any] | None = None
    if rule == "max_probability":
        signal = softmax(table.logits).max(-1)
    elif rule == "margin":
        ordered = np.partition(softmax(table.logits), -2, axis=-1)
        signal = ordered[..., -1] - ordered[..., -2]
    elif rule == "entropy":
        signal = -normalised_entropy(table.logits)
    elif rule == "gate":
        signal = table.gates
    if signal is None:
        return np.stack([_exits(spec, table) for spec in specs])
    exits = np.zeros((len(values), len(signal)), np.int64)
    for at, value in enumerate(values):
        assert not isinstance(value, Mapping)
        limit = -value if rule == "entropy" else value
        open_ = signal > limit if rule == "gate" else signal >= limit
        open_[:, -1] = True
        exits[at] = open_.argmax(1)
    return exits


def static_frontier(outputs: ExitOutputs) -> Frontier:
    """The frontier of truncated networks, each with one exit and without the cost of the others."""
    saved = 100 * (1 - outputs.truncated.sum(0) / outputs.full["macs"].sum())
    return sorted_frontier(saved, 100 * outputs.table.right.mean(0))


def undominated(evaluated: Sequence[tuple[float, float, Candidate]]) -> list[Candidate]:
    """The settings that are more accurate than all cheaper ones, cheapest first.

    evaluated: (cost, accuracy, candidate), both on dev.
    """
    edge: list[tuple[float, Candidate]] = []
    for _, accuracy, candidate in sorted(evaluated, key=lambda entry: (entry[0], -entry[1])):
        if not edge or accuracy > edge[-1][0]:
            edge.append((accuracy, candidate))
    return [candidate for _, candidate in edge]


def _method(
    name: str,
    models: Sequence[CheckpointOutputs],
    rule: str,
    kind: str,
    seed: int,
    tried: Sequence[Candidate],
    published: Sequence[Mapping[str, Any]] = (),
) -> MethodRows:
    """Choose among the settings that were tried and the free ones on dev, and evaluate the chosen on test."""
    dev = [model.exit_outputs("dev") for model in models]
    test = [model.exit_outputs("test") for model in models]
    free = [
        _candidate(spec, _exits(spec, d.table), d, at) for at, d in enumerate(dev) for spec in reversed(FREE)
    ]
    # Of equal settings the first is kept, one of the method's own.
    evaluated = [(100 - c.setting.macs_saved, c.setting.accuracy, c) for c in [*tried, *free]]
    chosen = undominated(evaluated)
    exits = np.stack([_exits(c.spec, test[c.setting.model].table) for c in chosen])  # [settings, rows]
    parts = [
        _results_at(test[candidate.setting.model], row[None])
        for candidate, row in zip(chosen, exits, strict=True)
    ]
    spent = {axis: np.concatenate([part.spent[axis] for part in parts]) for axis in parts[0].spent}
    results = SettingResults(np.concatenate([part.right for part in parts]), spent, parts[0].full)
    best = _best_at_half(chosen)
    number = chosen[best].setting.model
    tables = dev[number].table, test[number].table
    share = np.bincount(exits[best], minlength=tables[1].logits.shape[1]) / exits.shape[1]
    random_accuracy = 100 * float(share @ tables[1].right.mean(0))
    figures = _figures(results, chosen, best, static_frontier(test[number]), random_accuracy)
    dev_exits = _exits(chosen[best].spec, tables[0])
    figures |= calibration_figures(
        *(tables[0].logits, dev_exits, tables[0].labels), *(tables[1].logits, exits[best], tables[1].labels)
    )
    deepest = int(np.argmax([outputs.table.right[:, -1].mean() for outputs in dev]))
    return MethodRows(
        *(method_name(name, rule), name, rule, kind, seed, results),
        test[deepest].table.right[:, -1],
        [candidate.setting for candidate in chosen],
        len(tried),
        figures,
        published,
    )


def _candidate(spec: RuleSpec, exits: Exits, dev: ExitOutputs, model: int, point: str = "") -> Candidate:
    rows = np.arange(len(exits))
    accuracy = 100 * float(dev.table.right[rows, exits].mean())
    saved = 100 * float(1 - dev.spent["macs"][rows, exits].sum() / dev.full["macs"].sum())
    parameters = {name: float(value) for name, value in spec.parameters.items()}
    return Candidate(ChosenSetting(spec.name, parameters, "fp32", model, saved, accuracy, point), spec)


def _quee_on_test(
    name: str,
    outputs: CheckpointOutputs,
    test: VariantPaths,
    chosen: Sequence[Candidate],
    forecaster: Forecaster,
    seed: int,
    trials: int,
) -> MethodRows:
    outcomes, costs, exit_outputs = test.outcomes, test.costs, outputs.exit_outputs("test")
    rights, confidences, random_accuracy = [], [], []
    spent: dict[str, list[NDArray[np.float64]]] = {"layers": [], "macs": [], "bops": []}
    for candidate in chosen:
        rule: Rule = bind(candidate.spec, outcomes.exits, {costs.unit: costs.stated})
        start = outcomes.variants.index(candidate.setting.variant)
        plans = replay_walks(rule, outcomes, forecaster, start)
        nodes = outcomes.tree.end_nodes(plans)
        exits, numbers = outcomes.tree.segment[nodes], np.arange(len(plans))
        rights.append(~outcomes.wrong[numbers, nodes])
        confidences.append(_top_probability(test.statistics[numbers, nodes]))
        spent["layers"].append(exit_outputs.costs.blocks[exits].astype(float))
        spent["macs"].append(_macs_of(plans, exit_outputs))
        spent["bops"].append(costs.walk_costs(plans))
        # Expected accuracy of the same plans assigned to rows at random.
        counts = np.bincount(nodes, minlength=len(outcomes.tree))
        random_accuracy.append(100 * float(np.average(1 - outcomes.wrong.mean(0), weights=counts)))
    stacked = {axis: np.stack(values) for axis, values in spent.items()}
    results = SettingResults(np.stack(rights), stacked, exit_outputs.full)
    best = _best_at_half(chosen)
    figures = _figures(results, chosen, best, static_frontier(exit_outputs), random_accuracy[best])
    # Without a temperature: only statistics of a path's outputs are stored, not the logits.
    figures["ece_raw"] = 100 * binned_error(confidences[best], rights[best])
    return MethodRows(
        *(method_name(name, "quee"), name, "quee", "variant", seed, results),
        exit_outputs.table.right[:, -1],
        [candidate.setting for candidate in chosen],
        trials,
        figures,
    )


def _results_at(outputs: ExitOutputs, exits: Exits) -> SettingResults:
    """Results of settings with these exits [settings, rows]."""
    rows = np.arange(exits.shape[1])
    spent = {axis: cost[rows, exits] for axis, cost in outputs.spent.items()}
    return SettingResults(outputs.table.right[rows, exits], spent, outputs.full)


def _percent_saved(results: SettingResults, at: int) -> dict[str, float]:
    """Percent saved by setting number `at` on every cost axis, as AXIS_saved."""
    spent = results.spent.items()
    return {f"{axis}_saved": 100 * (1 - float(s[at].sum() / results.full[axis].sum())) for axis, s in spent}


def _figures(
    results: SettingResults, chosen: Sequence[Candidate], best: int, static: Frontier, random_accuracy: float
) -> dict[str, Any]:
    """Figures of setting number `best`, and the ELUE score of the whole frontier."""
    saved = _percent_saved(results, best)
    return {
        "accuracy_at_half": 100 * float(results.right[best].mean()),
        **saved,
        "random": random_accuracy,
        "static": float(np.interp(saved["macs_saved"], *static)),
        "elue": elue_score(results.frontier(), static),
        "setting": {"rule": chosen[best].spec.name, **chosen[best].spec.parameters},
    }


def _best_at_half(chosen: Sequence[Candidate]) -> int:
    """Index of the most accurate setting on dev among those that save half there; else the cheapest."""
    settings = [candidate.setting for candidate in chosen]
    enough = [at for at, setting in enumerate(settings) if setting.macs_saved >= HALF]
    return max(enough, key=lambda at: settings[at].accuracy, default=0)


def _macs_of(plans: Plan, outputs: ExitOutputs) -> NDArray[np.float64]:
    """Multiply-accumulates of each plan [rows], in whatever precision; plans [rows, segments]."""
    exits = (plans >= 0).sum(1) - 1
    macs: NDArray[np.float64] = outputs.spent["macs"][np.arange(len(plans)), exits]
    return macs


def _first_above(top: NDArray[np.float64], threshold: float) -> NDArray[np.int64]:
    """The first exit whose top probability reaches the threshold, else the last [rows]; top [rows, exits]."""
    leaves = top >= threshold
    leaves[:, -1] = True
    exits: NDArray[np.int64] = leaves.argmax(1)
    return exits


def _top_probability(statistics: NDArray[np.float32]) -> NDArray[np.float64]:
    """The top probability p [...] computed from statistics [..., 3].

    They hold log(p / q) and p - q, where q is the second highest probability.
    """
    log_ratio, margin = statistics[..., 0].astype(float), statistics[..., 2].astype(float)
    gap = -np.expm1(-np.maximum(log_ratio, 1e-12))  # 1 - q / p
    top: NDArray[np.float64] = np.clip(margin / gap, 0.0, 1.0)
    return top


def _exits(spec: RuleSpec, table: ExitTable) -> Exits:
    return simulate(bind(spec, table.logits.shape[1]), table.logits, table.gates)
