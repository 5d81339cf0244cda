"""The time of a method's bundle at batch 1, beside the network as one graph in fp32 and in int8.

Two tables: the settings of every method at a few savings, and for each recipe and precision the setting that
saves most on dev at an accuracy close to ordinary fine-tuning's full depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.benchmarks.compare.evaluation import FREE, simulate_settings
from offramp.benchmarks.compare.exit_outputs import (
    CheckpointOutputs,
    baselines_folder,
    ensure_bundle,
    load_or_compute,
)
from offramp.benchmarks.compare.frontiers import Floats
from offramp.benchmarks.compare.kept_rows import ChosenSetting, MethodRows
from offramp.benchmarks.compare.resampling import bootstrap_weights
from offramp.runtime import Classifier, load_classifier
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.rules import RuleSpec, bind, simulate
from offramp.runtime.rules.sweep import SWEPT, ExitTable, settings_to_try
from offramp.runtime.tuning.baselines import MONOLITH, open_baseline, read_baselines
from offramp.runtime.tuning.timing import Batches, Candidate, RowTimings, time_rows, walk_candidate
from offramp.runtime.walker import walk
from offramp.training.batches import Encoded

TARGETS = (0.0, 40.0, 60.0, 80.0)  # percent of multiply-accumulates that timed settings save on dev
ROUNDS = 3
BOTH = ("fp32", "int8")


@dataclass(frozen=True)
class NearFullDepth:
    """The setting of a recipe in one precision that saves most on dev within --max-drop.

    dev_accuracy, accuracy: in percent, of the bundle's own outputs. right [rows]: on all of test.
    """

    recipe: str
    variant: str
    spec: RuleSpec
    dev_accuracy: float
    right: NDArray[np.bool_]


@dataclass
class _Timed:
    """Sessions by bundle and variant, and the candidates that walk in them."""

    sessions: dict[tuple[Path, str], Classifier] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)

    def session(self, bundle: Path, variant: str) -> Classifier:
        """The session of a bundle in one variant, opened once."""
        if (bundle, variant) not in self.sessions:
            self.sessions[bundle, variant] = load_classifier(
                bundle, rule="never", variant=variant, global_pool=True
            )
        return self.sessions[bundle, variant]

    def add_walk(self, label: str, bundle: Path, variant: str, spec: RuleSpec) -> None:
        """Add the walk of a bundle under a rule."""
        session = self.session(bundle, variant)
        rule = bind(spec, len(session.manifest.segments), session.manifest.costs)
        self.candidates.append(walk_candidate(session, label, "walk", rule))


def timed_settings(chosen: Sequence[ChosenSetting]) -> list[int]:
    """Sorted indices, without repeats, of the settings whose savings on dev are nearest to TARGETS."""
    saved = np.array([setting.macs_saved for setting in chosen])
    return sorted({int(np.abs(saved - target).argmin()) for target in TARGETS})


def time_methods(
    methods: Sequence[MethodRows],
    outputs: Mapping[str, CheckpointOutputs],
    fine_tuned: str,
    rules: Sequence[str],
    sample: int,
    max_drop: float,
) -> dict[str, Any]:
    """Time bundles of one seed and the monoliths in turns on the same rows at batch 1, in milliseconds.

    methods: those of recipes with one model. outputs: by recipe; `fine_tuned` is the one whose full depth is
    the reference, and whose monoliths are timed. sample: number of rows of test, drawn at random. Walks of
    one bundle share its weights: each answers a row untimed before its turn (see time_rows).
    """
    reference = outputs[fine_tuned]
    dev_full = 100 * float(reference.exit_outputs("dev").table.right[:, -1].mean())
    full_right = reference.exit_outputs("test").table.right[:, -1]
    rows = reference.rows["test"]
    sampled = np.sort(np.random.default_rng(0).permutation(len(rows))[:sample])
    # The forecasts of rule quee are for its variants, in their order.
    variants = {name: one.checkpoint.network.spec.forecast or BOTH for name, one in outputs.items()}
    bundles = {
        name: ensure_bundle(one.folder, variants[name], baselines=name == fine_tuned)
        for name, one in outputs.items()
    }
    manifest = open_bundle(bundles[fine_tuned]).manifest
    inputs = [tensor.name for tensor in next(iter(manifest.stem.variants.values())).inputs]
    singles = _singles(rows, sampled, inputs)
    timed = _Timed()
    places = {}
    for method in (method for method in methods if method.recipe in outputs):
        for at in timed_settings(method.settings):
            setting = method.settings[at]
            label = f"{method.name} {at}"
            spec = RuleSpec(setting.rule, dict(setting.parameters))
            timed.add_walk(label, bundles[method.recipe], setting.variant, spec)
            places[label] = (method, at)
    near = {}
    for name, one in outputs.items():
        if not one.checkpoint.network.spec.forecast:  # rule quee changes the variant: no table of exits
            for variant in BOTH:
                session = timed.session(bundles[name], variant)
                chosen = near_full_depth(name, one, session, rules, dev_full - max_drop)
                if chosen is not None:
                    label = f"{name} {variant}"
                    timed.add_walk(label, bundles[name], variant, chosen.spec)
                    near[label] = chosen
    folder = baselines_folder(reference.folder)
    graphs = {g.variant: g for g in read_baselines(folder, manifest).graphs if g.kind == MONOLITH}
    for graph in graphs.values():
        timed.candidates.append(open_baseline(folder, graph, manifest, threads=None, threshold=None))
    for candidate in timed.candidates:
        candidate.run(singles[0], 1, 1)
    timings = time_rows(timed.candidates, singles, ROUNDS)
    for session in timed.sessions.values():
        session.close()
    seconds = {name: np.median(timing.seconds, axis=0) for name, timing in timings.items()}  # [rows]
    monoliths = {variant: seconds[graph.name] for variant, graph in graphs.items()}
    points: dict[str, list[dict[str, float]]] = {}
    for label, (method, at) in places.items():
        figures = _point(method, at, seconds[label], monoliths["fp32"], timings[label], rows.label[sampled])
        points.setdefault(method.name, []).append(figures)
    within = [_near_figures(near[label], full_right, seconds[label], monoliths) for label in near]
    return {
        "rows": len(sampled),
        "monolith_ms": {variant: round(1e3 * float(s.mean()), 4) for variant, s in monoliths.items()},
        "points": points,
        "max_drop": max_drop,
        "full_depth_of": fine_tuned,
        "full_depth": round(100 * float(full_right.mean()), 3),
        "within": within,
    }


def near_full_depth(
    name: str, outputs: CheckpointOutputs, session: Classifier, rules: Sequence[str], target: float
) -> NearFullDepth | None:
    """The rule and setting of a bundle that save most on dev at `target` percent accuracy or more; or None.

    Rules and settings are tried on the outputs of the bundle's exits, each row alone as it is deployed.
    """
    dev, test = (bundle_table(outputs, session, split) for split in ("dev", "test"))
    macs = outputs.exit_outputs("dev").costs
    recipe_rules = (outputs.rule,) if outputs.rule in SWEPT else ()
    best: tuple[float, float, RuleSpec] | None = None
    for rule in dict.fromkeys((*recipe_rules, *rules)):
        values = settings_to_try(rule, dev)
        specs = [RuleSpec(rule, dict(v) if not isinstance(v, float) else {SWEPT[rule]: v}) for v in values]
        exits = [*simulate_settings(rule, values, specs, dev), *(_exits(spec, dev) for spec in FREE)]
        for spec, row in zip((*specs, *FREE), exits, strict=True):
            point = macs.point(spec, row, dev)
            if point.accuracy >= target and (best is None or point.macs_saved > best[0]):
                best = (point.macs_saved, point.accuracy, spec)
    if best is None:
        return None
    right = test.right[np.arange(len(test.labels)), _exits(best[2], test)]
    return NearFullDepth(name, session.variant, best[2], best[1], right)


def bundle_table(outputs: CheckpointOutputs, session: Classifier, split: str) -> ExitTable:
    """The outputs of every exit of a bundle on a split, each row alone, at full depth; kept in a file."""
    rows = outputs.rows[split]

    def compute() -> dict[str, Any]:
        manifest = session.manifest
        names = [tensor.name for tensor in manifest.stem.first_graph.inputs]
        trace = walk(
            session.engine,
            bind(RuleSpec("never", {}), len(manifest.segments)),
            (
                (np.full(1, row), _arrays(rows, row, names))  # one row a batch
                for row in range(len(rows))
            ),
            rows=len(rows),
            segments=len(manifest.segments),
            classes=len(manifest.labels),
            variant=manifest.variants.index(session.variant),
            limit=1,
        )
        return {"logits": trace.logits, "gates": trace.gates}

    file = outputs.folder.with_name(f"{outputs.folder.name}.{split}.bundle.{session.variant}.npz")
    arrays = load_or_compute(file, outputs.digests[split], compute)
    gates = arrays["gates"]
    return ExitTable(arrays["logits"], None if np.isnan(gates[:, :-1]).any() else gates, rows.label)


def _near_figures(
    chosen: NearFullDepth, full_right: NDArray[np.bool_], seconds: Floats, monoliths: Mapping[str, Floats]
) -> dict[str, Any]:
    """Figures of one row of the table near full depth, with 95 % intervals over rows of test."""
    difference = 100 * (chosen.right.astype(float) - full_right.astype(float))
    low, high = np.percentile(difference @ bootstrap_weights(len(difference)) / len(difference), [2.5, 97.5])
    figures: dict[str, Any] = {
        "recipe": chosen.recipe,
        "variant": chosen.variant,
        "rule": chosen.spec.name,
        "parameters": {name: float(value) for name, value in chosen.spec.parameters.items()},
        "dev_accuracy": round(chosen.dev_accuracy, 3),
        "accuracy": round(100 * float(chosen.right.mean()), 3),
        "difference": [round(float(value), 3) for value in (difference.mean(), low, high)],
        "ms": round(1e3 * float(seconds.mean()), 4),
    }
    weights = bootstrap_weights(len(seconds))
    for variant, monolith in monoliths.items():
        ratios = monolith @ weights / (seconds @ weights)
        low, high = np.percentile(ratios, [2.5, 97.5])
        figures[f"times_{variant}"] = [
            round(float(value), 3) for value in (monolith.mean() / seconds.mean(), low, high)
        ]
    return figures


def _point(
    method: MethodRows,
    at: int,
    seconds: Floats,
    monolith: Floats,
    timing: RowTimings,
    labels: NDArray[np.int64],
) -> dict[str, float]:
    """Figures of a timed setting: its accuracy is that on all of test."""
    spent, full = method.results.spent["macs"][at].sum(), method.results.full["macs"].sum()
    figures = {
        "ms": 1e3 * float(seconds.mean()),
        "share": 100 * float(seconds.mean() / monolith.mean()),
        "accuracy": 100 * float(method.results.right[at].mean()),
        "accuracy_of_walked": 100 * float((timing.answers[0] == labels).mean()),
        "macs_saved": 100 * float(1 - spent / full),
    }
    return {key: round(value, 3) for key, value in figures.items()}


def _singles(rows: Encoded, numbers: NDArray[np.int64], names: list[str]) -> list[Batches]:
    return [[(np.zeros(1, np.int64), _arrays(rows, int(row), names))] for row in numbers]


def _arrays(rows: Encoded, row: int, names: list[str]) -> dict[str, NDArray[Any]]:
    """The stem's inputs by name for one row, as a batch of 1."""
    inputs, _ = rows.batch([row])
    return {name: inputs[name].numpy() for name in names}


def _exits(spec: RuleSpec, table: ExitTable) -> NDArray[np.int64]:
    return simulate(bind(spec, table.logits.shape[1]), table.logits, table.gates)
