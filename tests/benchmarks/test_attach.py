"""benchmarks/attach.py: figures of an attached checkpoint, from points chosen by agreement on dev."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner

from offramp.benchmarks.attach import main
from offramp.export.cli import main as split
from offramp.training.cli import train

pytestmark = pytest.mark.slow  # trains and evaluates


def test_points_state_accuracy_and_agreement_on_test(tmp_path: Path) -> None:
    model = tiny.classifier_folder(tmp_path / "tuned", steps=30, blocks=2)
    (model / "fine_tune.json").write_text(json.dumps({"accuracy": 90.0, "rows": 32}))
    data = tiny.data_folder(tmp_path / "data")
    (tmp_path / "traffic.txt").write_text("".join(row["text"] + "\n" for row in tiny.rows(60, 5)))
    words = ["--model", str(model), "--data", str(tmp_path / "traffic.txt"), "--precision", "fp32"]
    trained = CliRunner().invoke(train, [*words, "--set", "epochs=2", "--out", str(tmp_path / "attached")])
    assert trained.exit_code == 0, trained.output
    bundle = tmp_path / "bundle"
    written = CliRunner().invoke(split, [str(tmp_path / "attached"), "--out", str(bundle)])
    assert written.exit_code == 0, written.output
    place = [str(tmp_path / "attached"), "--data", str(data), "--user-model", str(model)]
    place += ["--bundle", str(bundle)]
    done = CliRunner().invoke(main, [*place, "--json", str(tmp_path / "result.json")])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "result.json").read_text())
    (method,) = result["methods"]
    assert method["exit_agreement"][-1] == 100
    assert [point["loss"] for point in method["points"]] == [0.5, 1.0, 1.5, 2.0, 3.0, 5.0]
    assert all(point["dev"]["agreement"] >= 100 - point["loss"] for point in method["points"])
    assert "full depth" in done.output and "% saved" in done.output
    assert result["bundle"]["labels_equal"] == 100 and result["bundle"]["largest_difference"] < 1e-4
    assert result["bundle"]["rows"] == 32
