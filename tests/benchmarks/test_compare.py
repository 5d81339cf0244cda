"""Tests of benchmarks.compare: a tiny comparison from nothing to its table, interrupted and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner, Result

from offramp.benchmarks import compare
from offramp.training.cli import train

SETS = ("epochs=2", "batch_size=8", "lr=0.002", "heads_lr=0.01")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("compare")
    tiny.model_folder(folder / "model", "bert")
    tiny.data_folder(folder / "data")
    return folder


def run(root: Path, monkeypatch: pytest.MonkeyPatch, stop_at: str | None = None) -> tuple[Result, list[str]]:
    """ee-compare with ee-train in this process, which is quicker than a new one; it dies at a recipe."""
    trained: list[str] = []

    def here(command: list[str], **rest: Any) -> None:
        words = command[1:]
        recipe = words[words.index("--recipe") + 1]
        if recipe == stop_at:
            raise KeyboardInterrupt
        trained.append(recipe)
        # As all tests here: accelerate lets a process have one precision.
        result = CliRunner().invoke(train, [*words, "--precision", "fp32"])
        assert result.exit_code == 0, result.output

    monkeypatch.setattr(compare.subprocess, "run", here)
    words = ["--model", str(root / "model"), "--data", str(root / "data"), "--out", str(root / "out")]
    words += ["--recipes", "branchynet,consistentee"]
    return CliRunner().invoke(compare.main, [*words, *(w for name in SETS for w in ("--set", name))]), trained


def test_interrupted_it_goes_on_and_trains_nothing_twice(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped, before = run(root, monkeypatch, stop_at="consistentee")
    assert stopped.exit_code != 0 and before == ["joint", "branchynet"]
    assert not (root / "out" / "compare.json").exists()
    done, after = run(root, monkeypatch)
    assert done.exit_code == 0, done.output
    assert after == ["consistentee"]
    result = json.loads((root / "out" / "compare.json").read_text())
    methods = result["methods"]
    page = (root / "out" / "compare.html").read_text()
    assert "<svg" in page and "branchynet (entropy)" in page and "<link" not in page
    assert {"branchynet (entropy)", "consistentee (gate)", compare.REFERENCE} <= set(methods)
    (reference,) = methods[compare.REFERENCE]
    assert (reference["above"], reference["below"], reference["difference"]) == (0.0, 0.0, 0.0)
    for name in ("branchynet (entropy)", "consistentee (gate)"):
        (figures,) = methods[name]
        assert figures["saved"][0] < 5, "a line begins at full depth"
        assert figures["low"] <= figures["difference"] <= figures["high"]
        assert 0 <= figures["accuracy_at_half"] <= methods["first right (joint)"][0]["accuracy_at_half"] + 15


def test_consistentee_goes_on_from_the_joint_checkpoint(root: Path) -> None:
    command = json.loads((root / "out" / "consistentee_0" / "training.json").read_text())["command"]
    assert command["init"] == str(root / "out" / "joint_0") and command["model"] is None


def test_an_unknown_recipe_is_named() -> None:
    wrong = CliRunner().invoke(compare.main, ["--model", "m", "--data", "d", "--recipes", "jei-dnn"])
    assert wrong.exit_code == 2 and "'jei-dnn' is not known" in wrong.output


def figures(**more: float) -> list[dict[str, float]]:
    return [{"accuracy_at_half": 90.0, "random": 80.0, "static": 85.0, "low": -1.0, "high": 1.0} | more]


def test_what_does_not_beat_its_controls_is_said() -> None:
    assert compare.verdict(figures()) == ""
    assert compare.verdict(figures(static=91.0)) == "does not beat static"
    assert compare.verdict(figures(high=-0.1)) == "below max-probability"
    assert compare.verdict(figures(random=95.0, low=0.1)) == "does not beat random; above max-probability"
