"""docs/budgets.md: every block is run, in order, on a tiny bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

import documents
import pytest
from tiny_bundles import CLASSIFIER, texts


@pytest.mark.slow  # seven commands
def test_every_block_of_budgets_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(CLASSIFIER, tmp_path / "bundle")
    for name, seed in (("calibration.txt", 5), ("input.txt", 6)):
        (tmp_path / name).write_text("\n".join(texts(1500, seed)) + "\n", encoding="utf-8")
    blocks, printed = documents.run_blocks("budgets.md", tmp_path)
    assert blocks == 5
    assert "int8-risk-0.3" in printed and "mean depth 0.9: mean 0." in printed
    assert "limit 20.00% (guarantee of risk-0.2): within it" in printed
