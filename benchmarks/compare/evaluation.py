"""Methods as frontiers: settings chosen on dev and read on test, the controls that a method has to beat, and
the time of its bundle.

Each method may also never exit early, so every frontier begins at full depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.benchmarks.compare.exit_outputs import (
    CheckpointOutputs,
    ExitOutputs,
    VariantPaths,
    baselines_folder,
    ensure_bundle,
)
from offramp.benchmarks.compare.frontiers import Frontier, SettingResults, elue_score, sorted_frontier
from offramp.runtime import Classifier, load_classifier
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.rules import Plan, Rule, RuleSpec, bind, simulate
from offramp.runtime.rules.sweep import (
    STEPS,
    MeasuredPoint,
    full_depth_point,
    settings_to_try,
    sweep,
    undominated_points,
)
from offramp.runtime.tuning.baselines import MONOLITH, open_baseline, read_baselines
from offramp.runtime.tuning.timing import Batches, Candidate, time_rows, walk_candidate
from offramp.training.batches import Encoded
from offramp.training.calibration import binned_error, calibration_figures
from offramp.training.forecasters import Forecaster, network_forecaster
from offramp.training.options import parse_settings
from offramp.training.recipes.quee import QueeSettings, fit_by_halves
from offramp.training.replay import PRICES, replay_walks, walk_point

HALF = 50.0  # least share of multiply-accumulates, in percent, that the point in the table saves on dev
TARGETS = (
    0.0,
    30.0,
    40.0,
    50.0,
    60.0,
    70.0,
)  # percent of multiply-accumulates that timed points save on dev
ROUNDS = 3
BOTH = ("fp32", "int8")


@dataclass(frozen=True)
class ChosenSetting:
    """A setting chosen on dev: rule, starting variant, and percent of multiply-accumulates saved on dev."""

    rule: RuleSpec
    variant: str
    macs_saved: float


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of one method for one seed.

    settings: results of its settings on test. chosen: the settings, in the same order. figures: at the point
    that saves half. checkpoint: the folder whose bundle walks this method.
    """

    settings: SettingResults
    chosen: list[ChosenSetting]
    figures: dict[str, Any]
    checkpoint: Path


def evaluate_methods(outputs: Mapping[str, CheckpointOutputs], rules: Sequence[str]) -> dict[str, Evaluation]:
    """Evaluate all methods of one seed; gives evaluations by the method's name in the table.

    outputs: by recipe, "joint" among them. rules: exit rules that are tried on the joint checkpoint.
    """
    joint = outputs["joint"]
    evaluations = {f"{rule} (joint)": evaluate_exits(joint, rule) for rule in rules}
    for name, checkpoint in outputs.items():
        forecast = checkpoint.checkpoint.network.spec.forecast
        if forecast:
            evaluations[f"{name} (bops)"] = evaluate_quee(checkpoint)
            for variant in forecast[1:]:
                evaluation = evaluate_one_variant(checkpoint, variant, joint.folder)
                evaluations[f"max_probability (joint, {variant})"] = evaluation
        elif name != "joint":
            evaluations[f"{name} ({checkpoint.rule})"] = evaluate_exits(checkpoint, checkpoint.rule)
    return evaluations


def evaluate_exits(outputs: CheckpointOutputs, rule: str) -> Evaluation:
    """Evaluate an exit rule on the fp32 outputs of every exit, with settings swept on dev."""
    dev, test = outputs.exit_outputs("dev"), outputs.exit_outputs("test")
    full = full_depth_point(dev.table, dev.costs)
    points = undominated_points([*sweep(rule, settings_to_try(rule, dev.table), dev.table, dev.costs), full])
    points += [] if full in points else [full]
    exits = np.stack([_exits_at(point, test) for point in points])  # [settings, rows]
    settings = _settings_at(test, exits)
    best = _best_at_half([(point.macs_saved, point.accuracy) for point in points])
    share = np.bincount(exits[best], minlength=test.table.logits.shape[1]) / exits.shape[1]
    figures = _figures(settings, best, static_frontier(test), 100 * float(share @ test.table.right.mean(0)))
    figures |= {"setting": dict(points[best].rule.parameters)}
    figures |= calibration_figures(
        dev.table.logits,
        _exits_at(points[best], dev),
        dev.table.labels,
        test.table.logits,
        exits[best],
        test.table.labels,
    )
    chosen = [ChosenSetting(point.rule, "fp32", point.macs_saved) for point in points]
    return Evaluation(settings, chosen, figures, outputs.folder)


def evaluate_quee(outputs: CheckpointOutputs) -> Evaluation:
    """Evaluate rule quee in bit operations.

    Prices and starting variants are chosen on dev, with forecasts by networks that were fitted on other rows
    (as in the recipe). Errors on test are forecast by the networks of the checkpoint.
    """
    dev, test = outputs.variant_paths("dev"), outputs.variant_paths("test")
    training = outputs.checkpoint.training
    words = tuple(f"{name}={value}" for name, value in training["settings"].items())
    fit = parse_settings(QueeSettings, words).fit(training["seed"])
    forecaster = fit_by_halves(dev.outcomes, fit, training["seed"])["mlp"]
    exit_outputs = outputs.exit_outputs("dev")
    evaluated = []
    for spec in [RuleSpec("never", {}), *(RuleSpec("quee", {"price": price}) for price in PRICES)]:
        rule = bind(spec, dev.outcomes.exits, {dev.costs.unit: dev.costs.stated})
        for start, variant in enumerate(dev.outcomes.variants):
            plans = replay_walks(rule, dev.outcomes, forecaster, start)
            point = walk_point(spec, start, plans, dev.outcomes, dev.costs)
            saved = 100 * float(1 - _macs_of(plans, exit_outputs).sum() / exit_outputs.full["macs"].sum())
            evaluated.append((point.cost, point.accuracy, ChosenSetting(spec, variant, saved)))
    network = outputs.checkpoint.network
    return _quee_on_test(outputs, test, _undominated(evaluated), network_forecaster(network.forecasts))


def evaluate_one_variant(outputs: CheckpointOutputs, variant: str, checkpoint: Path) -> Evaluation:
    """Evaluate exiting by max-probability in one variant, which is the control of rule quee.

    outputs: those of recipe quee, which has the exits of `checkpoint`; the bundle of `checkpoint` walks this
    method.
    """
    number = outputs.variant_paths("dev").outcomes.variants.index(variant)
    macs, top, wrong = {}, {}, {}  # by split; top and wrong [rows, exits]
    for split in ("dev", "test"):
        macs[split] = outputs.exit_outputs(split)
        statistics, errors = outputs.variant_paths(split).outcomes.without_change()
        top[split], wrong[split] = _top_probability(statistics[:, number]), errors[:, number]
    evaluated = []
    thresholds = np.unique(np.quantile(top["dev"], np.linspace(0, 1, STEPS)))
    rows = np.arange(len(top["dev"]))
    for threshold in [2.0, *thresholds.tolist()]:
        exits = _first_above(top["dev"], threshold)
        accuracy = 100 * float(1 - wrong["dev"][rows, exits].mean())
        saved = 100 * float(1 - macs["dev"].spent["macs"][rows, exits].sum() / macs["dev"].full["macs"].sum())
        spec = RuleSpec("max_probability", {"threshold": threshold})
        evaluated.append((float(exits.mean()), accuracy, ChosenSetting(spec, variant, saved)))
    chosen = _undominated(evaluated)
    exits = np.stack([_first_above(top["test"], c.rule.parameters["threshold"]) for _, c in chosen])
    rows = np.arange(exits.shape[1])
    costs = outputs.variant_paths("test").costs
    to_exit = costs.stem[:, None] + costs.steps[:, number].cumsum(1)
    spent = {axis: macs["test"].spent[axis][rows, exits] for axis in ("layers", "macs")}
    settings = SettingResults(
        ~wrong["test"][rows, exits], spent | {"bops": to_exit[rows, exits]}, macs["test"].full
    )
    best = _best_at_half([(c.macs_saved, accuracy) for accuracy, c in chosen])
    share = np.bincount(exits[best], minlength=top["test"].shape[1]) / exits.shape[1]
    random_accuracy = 100 * float(share @ (1 - wrong["test"].mean(0)))
    figures = _figures(settings, best, static_frontier(macs["test"]), random_accuracy)
    figures["setting"] = dict(chosen[best][1].rule.parameters)
    return Evaluation(settings, [c for _, c in chosen], figures, checkpoint)


def static_frontier(outputs: ExitOutputs) -> Frontier:
    """The frontier of truncated networks, each with one exit and without the cost of the others."""
    saved = 100 * (1 - outputs.truncated.sum(0) / outputs.full["macs"].sum())
    return sorted_frontier(saved, 100 * outputs.table.right.mean(0))


def timed_settings(chosen: Sequence[ChosenSetting]) -> list[int]:
    """Sorted indices, without repeats, of the settings whose savings are nearest to TARGETS."""
    saved = np.array([setting.macs_saved for setting in chosen])
    return sorted({int(np.abs(saved - target).argmin()) for target in TARGETS})


def time_bundles(
    evaluations: Mapping[str, Evaluation], checkpoint: Path, rows: Encoded, sample: int
) -> dict[str, Any]:
    """Time the bundles of all methods and the monolith, in turns on the same rows at batch 1, in
    milliseconds.

    For each method there is one point a timed setting; its accuracy is that on all of test, its "share" is
    the time in percent of the monolith's. checkpoint: the one whose monolith is the reference. sample: number
    of rows of test, drawn at random. Walks of one bundle share its weights: each answers a row untimed before
    its turn (see time_rows).
    """
    sampled = np.sort(np.random.default_rng(0).permutation(len(rows))[:sample])
    manifest = open_bundle(ensure_bundle(checkpoint, BOTH, baselines=True)).manifest
    names = [tensor.name for tensor in next(iter(manifest.stem.variants.values())).inputs]
    singles: list[Batches] = [[(np.zeros(1, np.int64), _arrays(rows, int(row), names))] for row in sampled]
    sessions: dict[tuple[Path, str], Classifier] = {}
    candidates: list[Candidate] = []
    places = {}
    for name, evaluation in evaluations.items():
        variants = BOTH if {setting.variant for setting in evaluation.chosen} - {"fp32"} else BOTH[:1]
        same = evaluation.checkpoint == checkpoint
        bundle = ensure_bundle(evaluation.checkpoint, BOTH if same else variants, baselines=same)
        for at in timed_settings(evaluation.chosen):
            setting = evaluation.chosen[at]
            if (bundle, setting.variant) not in sessions:
                sessions[bundle, setting.variant] = load_classifier(
                    bundle, rule="never", variant=setting.variant
                )
            session = sessions[bundle, setting.variant]
            rule = bind(setting.rule, len(session.manifest.segments), session.manifest.costs)
            label = f"{name} {at}"
            candidates.append(walk_candidate(session, label, "walk", rule))
            places[label] = (name, at)
    folder = baselines_folder(checkpoint)
    graph = next(graph for graph in read_baselines(folder, manifest).graphs if graph.kind == MONOLITH)
    candidates.append(open_baseline(folder, graph, manifest, threads=None, threshold=None))
    for candidate in candidates:
        candidate.run(singles[0], 1, 1)
    timings = time_rows(candidates, singles, ROUNDS)
    for session in sessions.values():
        session.close()
    ms = {name: 1e3 * float(np.median(timing.seconds, axis=0).mean()) for name, timing in timings.items()}
    points: dict[str, list[dict[str, float]]] = {name: [] for name in evaluations}
    for label, (name, at) in places.items():
        settings = evaluations[name].settings
        saved = 1 - float(settings.spent["macs"][at].sum() / settings.full["macs"].sum())
        right = float((timings[label].labels[0] == rows.label[sampled]).mean())
        figures = {
            "ms": ms[label],
            "share": 100 * ms[label] / ms[graph.name],
            "accuracy": 100 * float(settings.right[at].mean()),
            "accuracy_of_walked": 100 * right,
            "macs_saved": 100 * saved,
        }
        points[name].append({key: round(value, 3) for key, value in figures.items()})
    return {"rows": len(sampled), "monolith_ms": round(ms[graph.name], 4), "points": points}


def _quee_on_test(
    outputs: CheckpointOutputs,
    test: VariantPaths,
    chosen: list[tuple[float, ChosenSetting]],
    forecaster: Forecaster,
) -> Evaluation:
    outcomes, costs, exit_outputs = test.outcomes, test.costs, outputs.exit_outputs("test")
    rights, confidences, random_accuracy = [], [], []
    spent: dict[str, list[NDArray[np.float64]]] = {"layers": [], "macs": [], "bops": []}
    for _, setting in chosen:
        rule: Rule = bind(setting.rule, outcomes.exits, {costs.unit: costs.stated})
        start = outcomes.variants.index(setting.variant)
        plans = replay_walks(rule, outcomes, forecaster, start)
        exits, last_variant, change = _ends(plans, start)
        at = (np.arange(len(plans)), start, last_variant, change, exits)
        rights.append(~outcomes.wrong[at])
        confidences.append(_top_probability(outcomes.statistics[at]))
        spent["layers"].append(exit_outputs.costs.blocks[exits].astype(float))
        spent["macs"].append(_macs_of(plans, exit_outputs))
        spent["bops"].append(costs.walk_costs(plans))
        # Expected accuracy of the same plans assigned to rows at random.
        kinds, counts = np.unique(np.stack([last_variant, change, exits], 1), axis=0, return_counts=True)
        mean = [1 - outcomes.wrong[:, start, e, c, x].mean() for e, c, x in kinds]
        random_accuracy.append(100 * float(np.average(mean, weights=counts)))
    stacked = {axis: np.stack(values) for axis, values in spent.items()}
    settings = SettingResults(np.stack(rights), stacked, exit_outputs.full)
    best = _best_at_half([(setting.macs_saved, accuracy) for accuracy, setting in chosen])
    figures = _figures(settings, best, static_frontier(exit_outputs), random_accuracy[best])
    figures |= {"setting": dict(chosen[best][1].rule.parameters)}
    # Without a temperature: only statistics of a path's outputs are stored, not the logits.
    figures["ece_raw"] = 100 * binned_error(confidences[best], rights[best])
    return Evaluation(settings, [setting for _, setting in chosen], figures, outputs.folder)


def _settings_at(outputs: ExitOutputs, exits: NDArray[np.int64]) -> SettingResults:
    rows = np.arange(exits.shape[1])
    spent = {axis: cost[rows, exits] for axis, cost in outputs.spent.items()}
    return SettingResults(outputs.table.right[rows, exits], spent, outputs.full)


def _figures(settings: SettingResults, best: int, static: Frontier, random_accuracy: float) -> dict[str, Any]:
    """Figures of setting number `best`, and the ELUE score of the whole frontier."""
    saved = {
        axis: 100 * (1 - float(spent[best].sum() / settings.full[axis].sum()))
        for axis, spent in settings.spent.items()
    }
    return {
        "accuracy_at_half": 100 * float(settings.right[best].mean()),
        **{f"{axis}_saved": value for axis, value in saved.items()},
        "random": random_accuracy,
        "static": float(np.interp(saved["macs"], *static)),
        "elue": elue_score(settings.frontier(), static),
    }


def _best_at_half(points: list[tuple[float, float]]) -> int:
    """Index of the most accurate point among those that save half on dev; points: (saved, accuracy)."""
    enough = [at for at, (saved, _) in enumerate(points) if saved >= HALF]
    return max(enough, key=lambda at: points[at][1], default=0)


def _undominated(evaluated: list[tuple[float, float, ChosenSetting]]) -> list[tuple[float, ChosenSetting]]:
    """The settings that are more accurate than all cheaper ones, and the most expensive one; cheapest first.

    evaluated: (cost, accuracy, setting). Gives (accuracy, setting).
    """
    edge: list[tuple[float, ChosenSetting]] = []
    for _, accuracy, setting in sorted(evaluated, key=lambda entry: (entry[0], -entry[1])):
        if not edge or accuracy > edge[-1][0]:
            edge.append((accuracy, setting))
    most_expensive = max(evaluated, key=lambda entry: entry[0])
    return edge if most_expensive[2] is edge[-1][1] else [*edge, (most_expensive[1], most_expensive[2])]


def _macs_of(plans: Plan, outputs: ExitOutputs) -> NDArray[np.float64]:
    """Multiply-accumulates of each plan [rows], in whatever precision; plans [rows, segments]."""
    exits = (plans >= 0).sum(1) - 1
    macs: NDArray[np.float64] = outputs.spent["macs"][np.arange(len(plans)), exits]
    return macs


def _ends(plans: Plan, start: int) -> tuple[NDArray[np.int64], ...]:
    """Each plan's exit, its variant there, and the last segment in the starting variant, each [rows]."""
    exits = (plans >= 0).sum(1) - 1
    last_variant = plans[np.arange(len(plans)), exits].astype(np.int64)
    return exits, last_variant, np.maximum((plans == start).sum(1) - 1, 0)


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


def _exits_at(point: MeasuredPoint, outputs: ExitOutputs) -> NDArray[np.int64]:
    table = outputs.table
    return simulate(bind(point.rule, table.logits.shape[1]), table.logits, table.gates)


def _arrays(rows: Encoded, row: int, names: list[str]) -> dict[str, NDArray[Any]]:
    """The stem's inputs by name for one row, as a batch of 1."""
    inputs, _ = rows.batch([row])
    return {name: inputs[name].numpy() for name in names}
