"""Tests of benchmarks.compare.pages: tables of one data set, means over data sets, the document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offramp.benchmarks.compare import pages
from offramp.benchmarks.compare.frontiers import HEADLINE
from offramp.benchmarks.compare.judge import OWN, SCORES

REFERENCE = "joint + max_probability"


def entry(difference: float, row_error: float = 0.1, p: float = 0.001, **more: float) -> dict[str, float]:
    figures = {"value": 80 + difference, "difference": difference, "row_error": row_error, "seed_error": 0.0}
    return figures | {"low": difference - 0.2, "high": difference + 0.2, "p": p, "p_holm": p} | more


def result(data: str, seeds: tuple[int, ...] = (0, 1), **differences: float) -> dict[str, Any]:
    """The result of one data set: the reference and methods a, b, … with these differences in every score."""
    names = {REFERENCE: 0.0} | {f"joint + {name}": value for name, value in differences.items()}
    figures = {"accuracy_at_half": 90.0, "random": 80.0, "static": 85.0}
    method = {
        "recipe": "joint",
        "trials": 200,
        "reach": 88.0,
        "seeds": [figures | {"seed": seed} for seed in seeds],
        "layers_saved": {"own": [10.0, 20.0, 30.0]},
    }
    first_right = [{"accuracy": 97.0, "macs_saved": 70.0} for _ in seeds]
    return {
        "command": "ee-compare --model m",
        "data": data,
        "rows": {"dev": 10, "test": 20},
        "seeds": list(seeds),
        "reference": REFERENCE,
        "recipes": {
            "joint": {
                "models": ["joint"],
                "same_exits_as": None,
                "first_right": first_right,
                "full_depth": [91.0] * len(seeds),
            }
        },
        "methods": dict.fromkeys(names, method),
        "scores": {
            name: {score: entry(value) for score in (HEADLINE, "10-40", "80-90", OWN)}
            for name, value in names.items()
        },
    }


def test_data_sets_have_the_same_weight() -> None:
    table = pages.summary_table([result("x", a=1.0), result("y", a=3.0)])
    # Errors of 0.1 each: that of the mean is 0.07, and the interval 1.96 times as wide to each side.
    assert table[2] == "| joint + a | +1.00 | +3.00 | +2.00 [+1.86, +2.14] | < 0.001 | above |"
    assert pages.summary_table([result("x", a=1.0)]) == []


def test_a_method_that_a_data_set_lacks_is_left_out_of_the_mean() -> None:
    means = pages.mean_scores([result("x", a=1.0, b=1.0), result("y", a=1.0)])
    assert list(means) == ["joint + a"]
    assert set(means["joint + a"]) < set(SCORES), "nothing was compared with ordinary fine-tuning"


def test_the_mean_names_methods_that_it_lacks_and_data_sets_without_an_error_over_seeds() -> None:
    results = [result("x", seeds=(0,), a=1.0, b=1.0), result("y", a=1.0)]
    document = pages.comparison_document({"": results})
    assert "Data sets with one seed: x. Their errors in the mean are over rows only." in document
    assert "Not in the mean, because a data set lacks them: joint + b." in document
    assert pages.summary_notes([result("x", a=1.0), result("y", a=1.0)]) == []
    assert pages.summary_notes(results[:1]) == [], "there is no mean"


def test_differences_from_different_references_have_no_mean() -> None:
    other = result("y", a=1.0) | {"reference": "joint + a"}
    with pytest.raises(ValueError, match=r"x, y: compared with different references.*joint \+ a"):
        pages.mean_scores([result("x", a=1.0), other])


def test_holm_is_over_the_methods_of_the_mean() -> None:
    means = pages.mean_scores([result("x", a=0.15, b=0.15), result("y", a=0.15, b=0.15)])
    p = means["joint + a"][HEADLINE]
    assert p["p_holm"] == pytest.approx(2 * p["p"])


def test_the_reference_has_values_and_no_verdict() -> None:
    reference, other = pages.verdict_rows(result("x", a=-1.0))
    assert reference[:5] == [REFERENCE, "200", "80.00", "reference", ""] and reference[-1] == ""
    assert other[3:5] == ["-1.00 [-1.20, -0.80]", "0.001"] and other[-1] == "below"
    assert other[7:9] == ["79.00, -1.00 [-1.20, -0.80]", ""], "no column of fine-tuning"


def test_the_verdict_follows_the_corrected_p_value() -> None:
    assert pages.side_of_zero(entry(1.0, p_holm=0.06)) == "not apart"
    assert pages.side_of_zero(entry(1.0, p_holm=0.04)) == "above"


def test_controls_that_a_method_does_not_beat_are_named() -> None:
    figures = {"accuracy_at_half": 90.0, "random": 80.0, "static": 85.0}
    assert pages.controls([figures]) == ""
    assert pages.controls([figures | {"static": 91.0}]) == "does not beat static"
    assert pages.controls([figures | {"static": 91.0, "random": 90.0}]) == "does not beat random and static"


def test_points_that_training_set_are_means_over_seeds_by_model() -> None:
    compared = result("x")
    recipe, points = "consistentee:alpha=1|2", []
    for seed in (0.0, 2.0):
        figures = {"full_depth": 92.0, "layers_saved": 40.0, "macs_saved": 50.0, "point": "trained"}
        points.append([figures | {"accuracy": 90.0 + seed}, figures | {"accuracy": 80.0 + seed}])
    compared["recipes"][recipe] = {"models": ["consistentee:alpha=1", "consistentee:alpha=2"]}
    compared["methods"] = {f"{recipe} + published": {"recipe": recipe, "published": points}}
    first, second = pages.published_rows(compared)
    assert first == ["consistentee:alpha=1", "trained", "91.00 (1.41)", "-1.00", "40.0", "50.0"]
    assert second[0] == "consistentee:alpha=2" and second[2].startswith("81.00")


def test_one_seed_is_said_to_be_rows_only() -> None:
    lines = "\n".join(pages.result_lines(result("x", seeds=(0,)), "x"))
    assert "## x (20 rows of test, seed 0, intervals over rows only)" in lines
    assert "seeds 0, 1)" in "\n".join(pages.result_lines(result("x"), "x"))


def test_the_speed_near_full_depth_is_a_row_for_each_recipe_and_precision() -> None:
    near = {
        "recipe": "joint",
        "variant": "int8",
        "rule": "max_probability",
        "parameters": {"threshold": 0.91234},
        "accuracy": 90.1,
        "difference": [-0.3, -0.9, 0.3],
        "ms": 1.234,
        "times_fp32": [4.0, 3.5, 4.5],
        "times_int8": [2.0, 1.8, 2.2],
    }
    (row,) = pages.near_rows({"milliseconds": {"within": [near]}})
    assert row[2] == "max_probability threshold 0.912" and row[4] == "-0.30 [-0.90, +0.30]"
    assert row[-2:] == ["4.00 [3.50, 4.50]", "2.00 [1.80, 2.20]"]


def test_values_of_a_setting_do_not_end_a_cell() -> None:
    assert pages.markdown_table(("a",), [["alpha=1|2"]])[2] == "| alpha=1\\|2 |"


def test_files_are_grouped_by_their_name_before_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    assert pages.read_comparisons() == {}
    for name in ("compare_x", "compare_exits_x", "compare_exits_y"):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(name[-1], a=1.0)))
    groups = pages.read_comparisons()
    assert {name: [r["data"] for r in results] for name, results in groups.items()} == {
        "": ["x"],
        "exits": ["x", "y"],
    }
    document = pages.comparison_document(groups)
    assert "## exits: over all data sets" in document and "## Over all data sets" not in document


def test_the_document_says_so_without_results() -> None:
    assert pages.NO_RESULTS in pages.comparison_document({})


@pytest.mark.slow  # computes all tables
def test_the_document_is_written_from_the_result_files() -> None:
    expected = pages.comparison_document(pages.read_comparisons(), pages.read_results("agreement"))
    assert pages.DOCUMENT.read_text(encoding="utf-8") == expected, "python benchmarks/compare/pages.py"
