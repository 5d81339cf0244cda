"""docs/your-model.md and docs/tasks.md: every block is run, in order, on tiny models."""

from __future__ import annotations

from pathlib import Path

import documents
import pytest
import tiny
import tiny_tasks

from offramp.models.tasks import EMBEDDING, MULTI_LABEL, REGRESSION, TOKENS

pytestmark = pytest.mark.slow  # trains and exports
BLOCKS = 2  # each takes seconds to export


def write_traffic(folder: Path) -> None:
    (folder / "traffic.txt").write_text("".join(row["text"] + "\n" for row in tiny.rows(60, 5)))


def test_every_block_of_your_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.classifier_folder(tmp_path / "my-finetuned", blocks=BLOCKS)
    write_traffic(tmp_path)
    tiny.data_folder(tmp_path / "data")
    (tmp_path / "data" / "test.jsonl").rename("test.jsonl")
    blocks, printed = documents.run_blocks("your-model.md", tmp_path)
    assert blocks == 7
    assert "exit_agreement" in printed and '"label": "positive"' in printed


def test_every_block_of_tasks_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.model_folder(tmp_path / "my-backbone", blocks=BLOCKS)
    tiny_tasks.model_folder(tmp_path / "my-encoder", EMBEDDING, blocks=BLOCKS)
    for name, task in (("comments", MULTI_LABEL), ("commands", TOKENS), ("scores", REGRESSION)):
        tiny_tasks.data_folder(tmp_path / name, task, 32, 16, 16)
    write_traffic(tmp_path)
    (tmp_path / "input.txt").write_text("a good film\n")
    blocks, printed = documents.run_blocks("tasks.md", tmp_path)
    assert blocks == 7
    for field in ('"labels"', '"entities"', '"value"', '"embedding"'):
        assert field in printed
