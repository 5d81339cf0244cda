"""Tests of benchmarks.readme: the README says what the result files say."""

from __future__ import annotations

from offramp.benchmarks.readme import BEGIN, END, ROOT, chosen, grid, short, tables


def test_the_figures_in_the_readme_are_those_of_the_result_files() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    inside = text.partition(BEGIN)[2].partition(END)[0]
    assert inside.strip() == short().strip(), "make figures"
    assert (ROOT / "docs" / "measured.md").read_text(encoding="utf-8") == tables(), "make figures"


def test_a_grid_is_a_markdown_table() -> None:
    assert grid(("a", "b"), [[1, "x"]]) == ["| a | b |", "|---|---|", "| 1 | x |", ""]


def test_the_truncated_graph_shown_is_the_most_accurate_that_is_no_slower_than_the_walk() -> None:
    rows = [
        {"name": "walk default", "kind": "walk", "accuracy": 90.0, "mean_ms": 5.0},
        {"name": "monolith", "kind": "monolith", "accuracy": 91.0, "mean_ms": 10.0},
        {"name": "first 3 blocks", "kind": "truncated", "accuracy": 80.0, "mean_ms": 3.0},
        {"name": "first 5 blocks", "kind": "truncated", "accuracy": 85.0, "mean_ms": 5.2},
        {"name": "first 6 blocks", "kind": "truncated", "accuracy": 88.0, "mean_ms": 6.0},
    ]
    assert [row["name"] for row in chosen(rows)] == ["walk default", "monolith", "first 5 blocks"]
