"""From kept rows to the result of a comparison: scores, intervals over rows and seeds, corrected p-values.

Scores of a method, all on test: the mean accuracy in three bands of multiply-accumulates saved, and the mean
saving at which it is 0 to 5 points below full depth, its recipe's own and that of ordinary fine-tuning. Their
differences from the reference method have an interval and a p-value, which Holm's correction makes larger for
the number of methods.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offramp.benchmarks.compare.frontiers import (
    BANDS,
    Curves,
    Floats,
    Frontier,
    largest_saving,
    read_curves,
)
from offramp.benchmarks.compare.kept_rows import FORMAT, MethodRows, load_rows
from offramp.benchmarks.compare.resampling import RESAMPLES, bootstrap_weights, holm, interval

LISTING = "comparison.json"  # in --out: what was compared, from which the judge works
ROWS = "rows"  # in --out: the folder of kept rows
TIMES = "milliseconds.json"
OWN, FINE_TUNED = "saved_below_own", "saved_below_fine_tuned"
SCORES = (*BANDS, OWN, FINE_TUNED)
LOSSES = (0.5, 1.0, 2.0)  # points below full depth at which saved layers are given
CORNERS = 41  # of a frontier as it is written to the result
DECIMALS = 4


def judge(out: Path, resamples: int = RESAMPLES) -> dict[str, Any]:
    """The content of compare.json, from the files that a comparison left in `out`.

    Reads what was compared (comparison.json), the rows of every method and seed, and times if they were
    measured. Raises ValueError if a file of rows is of another format, KeyError if the reference is missing.
    """
    listing = json.loads((out / LISTING).read_text(encoding="utf-8"))
    seeds, names, folder = listing["seeds"], listing["methods"], out / ROWS
    if listing["reference"] not in names:
        raise KeyError(f"the reference {listing['reference']!r} is none of the methods {', '.join(names)}")
    first = load_rows(folder, names[0], seeds[0])
    rows = first.results.right.shape[1]
    weights = np.concatenate([np.ones((rows, 1)), bootstrap_weights(rows, resamples)], axis=1)
    full_depth = _full_depths(listing, folder, weights)
    fine_tuned = full_depth.get(listing["fine_tuned"] or "")
    methods: dict[str, dict[str, Any]] = {}
    scores: dict[str, dict[str, Floats]] = {}  # by method and score [seeds, 1 + resamples]
    for name in names:
        of_seeds = [load_rows(folder, name, seed) for seed in seeds]
        methods[name] = _method_entry(of_seeds, fine_tuned)
        each = [
            _scores(read_curves(one.results, weights), _accuracy(one, weights), fine_tuned, at)
            for at, one in enumerate(of_seeds)
        ]
        scores[name] = {score: np.stack([values[score] for values in each]) for score in each[0]}
    result = {name: value for name, value in listing.items() if name not in ("methods", "recipes", "times")}
    result |= {
        "judge": FORMAT,
        "recipes": _recipe_entries(listing, full_depth, fine_tuned),
        "methods": methods,
        "scores": compare_scores(scores, listing["reference"]),
    }
    if listing["times"]:
        result["milliseconds"] = json.loads((out / TIMES).read_text(encoding="utf-8"))
    rounded: dict[str, Any] = _round(result)
    return rounded


def compare_scores(
    scores: Mapping[str, Mapping[str, Floats]], reference: str
) -> dict[str, dict[str, dict[str, float]]]:
    """By method and score: its value, and its difference from the reference method with interval and p.

    scores: by method and score [seeds, 1 + resamples]. p_holm is corrected over methods, for each score.
    """
    compared: dict[str, dict[str, dict[str, float]]] = {name: {} for name in scores}
    for score, base in scores[reference].items():
        for name, values in scores.items():
            entry = interval(values[score] - base)
            compared[name][score] = {"value": float(values[score][:, 0].mean())} | entry
        others = {name: compared[name][score]["p"] for name in scores if name != reference}
        for name, p in holm(others).items():
            compared[name][score]["p_holm"] = p
    return compared


def _scores(curves: Curves, own: Floats, fine_tuned: Sequence[Floats] | None, seed: int) -> dict[str, Floats]:
    """All scores of one method and seed [1 + resamples]; own, fine_tuned: accuracies at full depth."""
    scores = {name: curves.band_mean(*band) for name, band in BANDS.items()}
    scores[OWN] = curves.mean_saving(own)
    if fine_tuned is not None:
        scores[FINE_TUNED] = curves.mean_saving(fine_tuned[seed])
    return scores


def _accuracy(rows: MethodRows, weights: Floats) -> Floats:
    """Accuracy at full depth in percent, for each column of weights."""
    accuracy: Floats = 100 * (rows.full_right.astype(float) @ weights) / weights.sum(0)
    return accuracy


def _full_depths(listing: Mapping[str, Any], folder: Path, weights: Floats) -> dict[str, list[Floats]]:
    """By recipe the accuracy at full depth of each seed [1 + resamples], from the rows of one of its methods.

    A recipe without methods of its own has the exits of another one.
    """
    by_recipe: dict[str, list[Floats]] = {}
    for name in listing["methods"]:
        recipe = load_rows(folder, name, listing["seeds"][0]).recipe
        if recipe not in by_recipe:
            each = [load_rows(folder, name, seed) for seed in listing["seeds"]]
            by_recipe[recipe] = [_accuracy(rows, weights) for rows in each]
    for recipe, entry in listing["recipes"].items():
        if recipe not in by_recipe:
            by_recipe[recipe] = by_recipe[entry["same_exits_as"]]
    return by_recipe


def _recipe_entries(
    listing: Mapping[str, Any],
    full_depth: Mapping[str, Sequence[Floats]],
    fine_tuned: Sequence[Floats] | None,
) -> dict[str, Any]:
    entries = {}
    for recipe, facts in listing["recipes"].items():
        entry = dict(facts) | {"full_depth": [float(values[0]) for values in full_depth[recipe]]}
        if fine_tuned is not None:
            entry["against_fine_tuned"] = interval(np.stack(full_depth[recipe]) - np.stack(fine_tuned))
        entries[recipe] = entry
    return entries


def _method_entry(of_seeds: Sequence[MethodRows], fine_tuned: Sequence[Floats] | None) -> dict[str, Any]:
    """What the result holds of a method besides its scores."""
    first = of_seeds[0]
    own = [100 * float(rows.full_right.mean()) for rows in of_seeds]
    references = {"own": own}
    if fine_tuned is not None:
        references["fine_tuned"] = [float(values[0]) for values in fine_tuned]
    layers = [rows.results.frontier("layers") for rows in of_seeds]
    entry = {
        "recipe": first.recipe,
        "rule": first.rule,
        "kind": first.kind,
        "trials": max(rows.trials for rows in of_seeds),
        "reach": float(np.mean([rows.reach for rows in of_seeds])),
        "seeds": [dict(rows.figures) | {"seed": rows.seed} for rows in of_seeds],
        "lines": {
            axis: mean_line([r.results.frontier(axis) for r in of_seeds]) for axis in first.results.full
        },
        "layers_saved": {
            name: [
                float(np.mean([largest_saving(line, a - loss) for line, a in zip(layers, full, strict=True)]))
                for loss in LOSSES
            ]
            for name, full in references.items()
        },
    }
    if first.published:
        entry["published"] = [list(rows.published) for rows in of_seeds]
    return entry


def mean_line(lines: Sequence[Frontier]) -> list[list[float]]:
    """Savings at even spacing where all frontiers exist, and the mean of their accuracies there."""
    low, high = max(saved[0] for saved, _ in lines), min(saved[-1] for saved, _ in lines)
    grid = np.linspace(low, max(low, high), CORNERS)
    accuracy = np.mean([np.interp(grid, *line) for line in lines], axis=0)
    return [grid.round(2).tolist(), accuracy.round(2).tolist()]


def _round(value: Any) -> Any:
    """A JSON value with all numbers rounded."""
    if isinstance(value, Mapping):
        return {str(key): _round(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_round(entry) for entry in value]
    return round(value, DECIMALS) if isinstance(value, float) else value
