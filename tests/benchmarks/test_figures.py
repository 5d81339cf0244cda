"""Tests of benchmarks.figures: the tables of the documents are those of the result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offramp.benchmarks import figures
from offramp.benchmarks.compare.pages import markdown_table

MACHINE = {"cpu": "A CPU", "when": "2026-11-28T12:00:00+00:00"}


@pytest.mark.slow  # computes all tables
@pytest.mark.parametrize("file", figures.DOCUMENTS, ids=lambda file: file.name)
def test_the_tables_of_the_documents_are_those_of_the_result_files(file: Path) -> None:
    _, inside, _ = figures.split_at_marks(file.read_text(encoding="utf-8"))
    expected = "\n".join(figures.DOCUMENTS[file]()).strip("\n")
    assert inside == expected, "make figures"


def test_a_text_without_marks_is_refused() -> None:
    assert figures.split_at_marks(f"a{figures.BEGIN}\n\nb\n\n{figures.END}c") == ("a", "b", "c")
    with pytest.raises(ValueError, match="missing"):
        figures.split_at_marks(f"a{figures.BEGIN}b")


def test_a_grid_is_a_markdown_table() -> None:
    assert markdown_table(("a", "b"), [[1, "x"]]) == ["| a | b |", "|---|---|", "| 1 | x |", ""]


def test_the_truncated_graph_shown_is_the_most_accurate_that_is_no_slower_than_the_walk() -> None:
    rows = [
        {"name": "walk default", "kind": "walk", "accuracy": 90.0, "mean_ms": 5.0},
        {"name": "monolith", "kind": "monolith", "accuracy": 91.0, "mean_ms": 10.0},
        {"name": "first 3 blocks", "kind": "truncated", "accuracy": 80.0, "mean_ms": 3.0},
        {"name": "first 5 blocks", "kind": "truncated", "accuracy": 85.0, "mean_ms": 5.2},
        {"name": "first 6 blocks", "kind": "truncated", "accuracy": 88.0, "mean_ms": 6.0},
    ]
    shown = [row["name"] for row in figures.rows_to_show(rows)]
    assert shown == ["walk default", "monolith", "first 5 blocks"]


def write(folder: Path, kind: str, facts: dict[str, Any]) -> None:
    (folder / f"{kind}_smollm2.json").write_text(json.dumps(facts | {"machine": MACHINE}), encoding="utf-8")


def test_drafts_by_bundle_and_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert figures.lossless_table() == [] and figures.overhead_table() == []
    row = {"same": 99, "speed": 1.3, "speed_median": 1.25, "accepted": {"1": 0.5}}
    bundle = {"cuts": [4, 8, 30], "rules": {"full": {}, "1,2": row}}
    write(
        tmp_path, "lossless", {"variant": "fp32", "count": 100, "tokens": 64, "bundles": {"trained": bundle}}
    )
    table = figures.lossless_table()
    assert table[0].endswith("(A CPU, 2026-11-28)")
    assert table[-2] == "| trained | exit 1, 2 drafts | 99 of 100 | 1.30 | 1.25 | exit 1: 50% |"


def test_a_task_has_a_table_with_the_name_of_its_quality(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = {"variant": "fp32", "f1": 90.0, "mean_exit": 6.0, "macs_share": 0.5, "mean_ms": 2.0}
    about = {"quality": "f1", "rows": 7, "cpu": "C", "threads": 2, "onnxruntime": "1", "when": "2026"}
    candidates = [candidate | {"name": "walk"}, candidate | {"name": "monolith", "mean_ms": 4.0}]
    result = {"commands": ["ee-bench"], "bench": {"about": about, "candidates": candidates}}
    (tmp_path / "task_x.json").write_text(json.dumps(result))
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    lines = "\n".join(figures.task_tables())
    assert "f1 %" in lines and "| walk | 90.00 | 6.00 | 50.0 | 2.00 | 2.00 |  |" in lines


def test_retrieval_has_a_table_of_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"command": "r", "queries": 2, "corpus": 3, "settings": [{"setting": "full", "recall": 99.5}]}
    (tmp_path / "retrieval_x.json").write_text(json.dumps(result))
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert "| full | 99.5 |" in "\n".join(figures.retrieval_tables())
