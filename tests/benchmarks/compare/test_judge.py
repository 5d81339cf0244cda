"""Tests of benchmarks.compare.judge and kept_rows on methods whose scores are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offramp.benchmarks.compare.frontiers import SettingResults
from offramp.benchmarks.compare.joining import join
from offramp.benchmarks.compare.judge import FINE_TUNED, LISTING, OWN, ROWS, judge
from offramp.benchmarks.compare.kept_rows import (
    ChosenSetting,
    MethodRows,
    has_rows,
    load_rows,
    rows_file,
    save_rows,
)
from offramp.runtime.errors import BadSetting

ROW_COUNT = 400


def rows_of(
    recipe: str, rule: str, seed: int, *points: tuple[float, float], full: float = 90.0
) -> MethodRows:
    """A method with settings of these savings and accuracies in percent, and a full depth."""
    count = np.arange(ROW_COUNT)
    right = np.stack([count < ROW_COUNT * accuracy / 100 for _, accuracy in points])
    spent = np.stack([np.full(ROW_COUNT, 1 - saved / 100) for saved, _ in points])
    axes = ("layers", "macs", "bops")
    results = SettingResults(right, dict.fromkeys(axes, spent), dict.fromkeys(axes, np.ones(ROW_COUNT)))
    settings = [ChosenSetting(rule, {"threshold": 0.5}, "fp32", 0, *point) for point in points]
    settings[-1] = ChosenSetting("fixed", {"exit": 1.0}, "fp32", 0, *points[-1])
    figures = {"accuracy_at_half": 80.0, "random": 70.0, "static": 75.0}
    name = f"{recipe} + {rule}"
    full_right = count < ROW_COUNT * full / 100
    return MethodRows(name, recipe, rule, "rule", seed, results, full_right, settings, 200, figures)


def write(out: Path, *methods: MethodRows, fine_tuned: str | None = None) -> dict[str, Any]:
    """Keep rows and the listing of a comparison, the first method being the reference; judge it."""
    for rows in methods:
        save_rows(rows, out / ROWS, "key")
    names = list(dict.fromkeys(rows.name for rows in methods))
    first_right = [{"accuracy": 90.0 + seed} for seed in sorted({rows.seed for rows in methods})]
    recipes = {
        rows.recipe: {"models": [rows.recipe], "same_exits_as": None, "first_right": first_right}
        for rows in methods
    }
    listing = {
        "command": "ee-compare",
        "settings": [],
        "data": "synthetic",
        "rows": {"test": ROW_COUNT},
        "seeds": sorted({rows.seed for rows in methods}),
        "reference": names[0],
        "fine_tuned": fine_tuned,
        "recipes": recipes,
        "methods": names,
        "times": False,
    }
    (out / LISTING).write_text(json.dumps(listing))
    return judge(out, resamples=300)


def test_scores_are_those_computed_by_hand(tmp_path: Path) -> None:
    better = rows_of("b", "gate", 0, (0, 90), (50, 90), (90, 60), full=92.0)
    scores = write(tmp_path, rows_of("a", "gate", 0, (0, 90), (100, 50)), better, fine_tuned="b")["scores"]
    a, b = scores["a + gate"], scores["b + gate"]
    # a loses 0.4 points a percent; b holds 90 up to 50 % and then loses 0.75 points a percent.
    assert a["40-80"]["value"] == pytest.approx(90 - 0.4 * 60, abs=0.01)
    assert b["40-80"]["value"] == pytest.approx((10 * 90 + 30 * (90 - 0.75 * 15)) / 40, abs=0.01)
    assert b["40-80"]["difference"] == pytest.approx(b["40-80"]["value"] - 66, abs=0.02)
    assert b["80-90"]["value"] == pytest.approx(90 - 0.75 * 35, abs=0.01)
    # At a loss of d, a saves 2.5 d below 90; from 92 nothing for d below 2.
    assert a[OWN]["value"] == pytest.approx(6.25, abs=0.01)
    assert a[FINE_TUNED]["value"] == pytest.approx(3 / 5 * 3.75, abs=0.02)
    assert b[OWN]["value"] == b[FINE_TUNED]["value"]
    assert "p_holm" in b["40-80"] and "p_holm" not in a["40-80"]


def test_full_depth_is_compared_with_ordinary_fine_tuning(tmp_path: Path) -> None:
    a, b = rows_of("a", "gate", 0, (0, 90), (90, 60)), rows_of("b", "gate", 0, (0, 90), (90, 60), full=92.0)
    recipes = write(tmp_path, a, b, fine_tuned="b")["recipes"]
    assert recipes["a"]["full_depth"] == [90.0]
    assert recipes["a"]["against_fine_tuned"]["difference"] == pytest.approx(-2.0)
    without = write(tmp_path, a, b)
    assert "against_fine_tuned" not in without["recipes"]["a"]
    assert FINE_TUNED not in without["scores"]["a + gate"]


def test_seeds_that_disagree_are_in_the_interval(tmp_path: Path) -> None:
    methods = []
    for seed, gain in enumerate((-4, 1, 6)):
        methods.append(rows_of("a", "gate", seed, (0, 80), (100, 80)))
        methods.append(rows_of("b", "gate", seed, (0, 80 + gain), (100, 80 + gain)))
    entry = write(tmp_path, *methods)["scores"]["b + gate"]["40-80"]
    assert entry["difference"] == pytest.approx(1.0)
    assert entry["seed_error"] == pytest.approx(5 / np.sqrt(3), abs=1e-3)
    half = 4.303 * 5 / np.sqrt(3)
    assert [entry["low"], entry["high"]] == pytest.approx([1 - half, 1 + half], rel=0.1)


def test_rows_that_are_read_again_are_the_rows_that_were_kept(tmp_path: Path) -> None:
    rows = rows_of("a:x=1|2", "gate", 3, (0, 90), (60, 85), (90, 50))
    save_rows(rows, tmp_path, "key")
    again = load_rows(tmp_path, rows.name, 3)
    assert (again.results.right == rows.results.right).all()
    assert (again.full_right == rows.full_right).all()
    assert np.allclose(again.results.spent["macs"], rows.results.spent["macs"])
    assert (again.settings, again.trials, again.name) == (rows.settings, 200, rows.name)
    assert again.reach == pytest.approx(60.0), "the first exit for all rows is no setting of its own"
    assert has_rows(tmp_path, rows.name, 3, "key") and not has_rows(tmp_path, rows.name, 3, "other")


def test_rows_of_another_format_are_refused(tmp_path: Path) -> None:
    save_rows(rows_of("a", "gate", 0, (0, 90)), tmp_path, "key")
    file = rows_file(tmp_path, "a + gate", 0)
    with np.load(file) as stored:
        arrays = dict(stored)
    arrays["about"] = np.array(str(arrays["about"]).replace('"format": 2', '"format": 1'))
    np.savez_compressed(file, **arrays)
    with pytest.raises(ValueError, match="format 1"):
        load_rows(tmp_path, "a + gate", 0)


def test_a_reference_that_was_not_compared_is_named(tmp_path: Path) -> None:
    write(tmp_path, rows_of("a", "gate", 0, (0, 90), (90, 60)))
    listing = json.loads((tmp_path / LISTING).read_text())
    (tmp_path / LISTING).write_text(json.dumps(listing | {"reference": "c + gate"}))
    with pytest.raises(KeyError, match=r"c \+ gate"):
        judge(tmp_path, resamples=10)


def two_comparisons(folder: Path) -> list[Path]:
    """Comparisons of the same methods with seeds 0 and 1."""
    folders = [folder / "first", folder / "second"]
    for seed, place in enumerate(folders):
        place.mkdir()
        points = [(0, 90), (50, 88 + seed), (90, 60)]
        write(place, rows_of("a", "gate", seed, (0, 90), (100, 50)), rows_of("b", "gate", seed, *points))
    return folders


def test_joined_comparisons_are_one_with_all_seeds(tmp_path: Path) -> None:
    join(two_comparisons(tmp_path), tmp_path / "joined")
    joined = judge(tmp_path / "joined", resamples=300)
    at_once = tmp_path / "at_once"
    at_once.mkdir()
    methods = [
        rows_of(recipe, "gate", seed, *points)
        for seed in (0, 1)
        for recipe, points in (("a", [(0, 90), (100, 50)]), ("b", [(0, 90), (50, 88 + seed), (90, 60)]))
    ]
    assert joined["seeds"] == [0, 1]
    assert joined["scores"] == write(at_once, *methods)["scores"]


def test_a_seed_that_two_comparisons_have_is_refused(tmp_path: Path) -> None:
    first, _ = two_comparisons(tmp_path)
    with pytest.raises(BadSetting, match="seeds 0, 0: one is there twice"):
        join([first, first], tmp_path / "joined")


def test_comparisons_of_other_methods_are_not_joined(tmp_path: Path) -> None:
    first, second = two_comparisons(tmp_path)
    write(second, rows_of("a", "entropy", 1, (0, 90), (100, 50)))
    with pytest.raises(BadSetting, match=r"second: reference is not that of .*first"):
        join([first, second], tmp_path / "joined")


def test_figures_of_interleaved_seeds_come_in_the_order_of_seeds(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder, seeds in zip(folders, ((0, 2), (1,)), strict=True):
        folder.mkdir()
        write(folder, *(rows_of("a", "gate", seed, (0, 90), (100, 50)) for seed in seeds))
    join(folders, tmp_path / "joined")
    listing = json.loads((tmp_path / "joined" / LISTING).read_text())
    assert [figures["accuracy"] for figures in listing["recipes"]["a"]["first_right"]] == [90, 91, 92]


def test_a_comparison_is_not_joined_into_itself(tmp_path: Path) -> None:
    first, second = two_comparisons(tmp_path)
    with pytest.raises(BadSetting, match="name another --out"):
        join([first, second], first)
