"""From data to checkpoint, bundle and answers on a tiny model, by the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner

from offramp.export.cli import main as split
from offramp.runtime import load
from offramp.runtime.cli import main as run
from offramp.training.cli import train

pytestmark = pytest.mark.slow  # trains and exports a network; the parts have default tests of their own


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("journey")
    model, data = tiny.model_folder(root / "model", "mpnet"), tiny.data_folder(root / "data")
    # Torch's threads and ONNX Runtime's would compete for the same cores.
    torch.set_num_threads(1)
    sets = ["epochs=10", "batch_size=8", "lr=0.002", "heads_lr=0.01", "policy_epochs=20", "policy_lr=0.01"]
    words = ["--model", str(model), "--data", str(data), "--out", str(root / "ckpt"), "--precision", "fp32"]
    words += ["--recipe", "consistentee_plus"]
    trained = CliRunner().invoke(train, [*words, *(word for name in sets for word in ("--set", name))])
    assert trained.exit_code == 0, trained.output
    exported = CliRunner().invoke(split, [str(root / "ckpt"), "--out", str(root / "bundle")])
    assert exported.exit_code == 0, exported.output
    return root / "bundle"


def test_the_bundle_answers_with_the_learned_labels(bundle: Path) -> None:
    rows = tiny.rows(40, seed=9)
    with load(bundle) as session:
        answers = list(session.map([str(row["text"]) for row in rows], batch_size=8))
    right = [answer.label == str(row["label"]) for answer, row in zip(answers, rows, strict=True)]
    assert sum(right) >= 34
    assert {len(answer.steps) for answer in answers} <= {1, 2, 3}


def test_an_operating_point_measures_on_dev_as_in_its_manifest(bundle: Path) -> None:
    """Export, engine, walker and rule together reproduce what training measured in torch."""
    data = bundle.parent / "data" / "dev.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for name in ("full", "trained", "default"):
        with load(bundle, point=name) as session:
            measured = next(p.measured for p in session.manifest.points if p.name == name)
            answers = [session(row["text"]) for row in rows]
        accuracy = (
            100 * sum(a.label == str(r["label"]) for a, r in zip(answers, rows, strict=True)) / len(rows)
        )
        assert accuracy == pytest.approx(measured["accuracy"], abs=0.01)
        assert sum(a.depth for a in answers) / len(rows) == pytest.approx(measured["mean_exit"], abs=0.01)


def test_ee_run_reads_lines_and_writes_json(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "input.txt"
    file.write_text("a very good film\nthe plot is dull\n")
    done = CliRunner().invoke(run, ["--bundle", str(bundle), str(file)])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["label"] for line in lines] == ["1", "0"]
    assert all({"label", "score", "exit", "depth", "ms"} <= set(line) for line in lines)
