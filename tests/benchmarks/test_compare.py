"""Tests of benchmarks.compare: a tiny comparison from nothing to its table, interrupted and gone on with."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner, Result

from offramp.benchmarks import compare
from offramp.benchmarks.contest import _top, sure_entry
from offramp.benchmarks.heard import listen_to
from offramp.export.cli import main as split
from offramp.training.cli import train

SETS = ("epochs=2", "batch_size=8", "lr=0.002", "heads_lr=0.01")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("compare")
    tiny.model_folder(folder / "model", "bert")
    tiny.data_folder(folder / "data")
    return folder


def run(
    root: Path, monkeypatch: pytest.MonkeyPatch, recipes: str, *more: str, stop_at: str | None = None
) -> tuple[Result, list[str]]:
    """ee-compare with ee-train and ee-split in this process, which is quicker; it dies at a recipe."""
    made: list[str] = []
    outside = subprocess.run

    def here(command: list[str], **rest: Any) -> Any:
        words = command[1:]
        if Path(command[0]).name not in ("ee-split", "ee-train"):
            return outside(command, **rest)  # matplotlib, the first time on a machine, asks for its fonts
        if Path(command[0]).name == "ee-split":
            made.append(f"split {Path(words[0]).name}")
            result = CliRunner().invoke(split, words)
        else:
            recipe = words[words.index("--recipe") + 1]
            if recipe == stop_at:
                raise KeyboardInterrupt
            made.append(recipe)
            # As all tests here: accelerate lets a process have one precision.
            result = CliRunner().invoke(train, [*words, "--precision", "fp32"])
        assert result.exit_code == 0, result.output
        return None

    monkeypatch.setattr(compare.subprocess, "run", here)
    words = ["--model", str(root / "model"), "--data", str(root / "data"), "--out", str(root / "out")]
    words += ["--recipes", recipes, *more]
    return CliRunner().invoke(compare.main, [*words, *(w for name in SETS for w in ("--set", name))]), made


RECIPES = "branchynet,consistentee,quee"


def test_interrupted_it_goes_on_and_trains_nothing_twice(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped, before = run(root, monkeypatch, RECIPES, stop_at="consistentee")
    assert stopped.exit_code != 0 and before == ["joint", "branchynet"]
    assert not (root / "out" / "compare.json").exists()
    done, after = run(root, monkeypatch, RECIPES)
    assert done.exit_code == 0, done.output
    assert after == ["consistentee", "quee"]
    result = json.loads((root / "out" / "compare.json").read_text())
    methods, against = result["methods"], result["against_max_probability"]
    page = (root / "out" / "compare.html").read_text()
    assert page.count("<svg") == 3 and "branchynet (entropy)" in page and "<link" not in page
    names = {"branchynet (entropy)", "consistentee (gate)", "quee (bops)", "max_probability (joint, int8)"}
    assert names | {compare.REFERENCE} <= set(methods)
    (reference,) = methods[compare.REFERENCE]
    assert (reference["above"], reference["below"]) == (0.0, 0.0)
    assert against[compare.REFERENCE] == {"difference": 0.0, "low": 0.0, "high": 0.0}
    for name in names:
        (figures,) = methods[name]
        assert figures["lines"]["macs"][0][0] < 5, "a line begins at full depth"
        assert against[name]["low"] <= against[name]["difference"] <= against[name]["high"]
        assert 0 <= figures["accuracy_at_half"] <= methods["first right (joint)"][0]["accuracy_at_half"] + 15
    assert methods["max_probability (joint, int8)"][0]["lines"]["bops"][0][0] > 30, (
        "int8 saves bits at full depth"
    )
    fp32 = methods[compare.REFERENCE][0]["lines"]
    assert fp32["bops"] == fp32["macs"], "in one precision bits and multiply-accumulates are one"


def test_what_was_heard_of_other_weights_is_not_taken_for_these(root: Path) -> None:
    out, data = root / "out", str(root / "data")
    ears = listen_to(out / "joint_0", data)
    first = ears.heard("dev").table.logits
    shutil.copy(out / "branchynet_0" / "weights.safetensors", out / "joint_0" / "weights.safetensors")
    other = listen_to(out / "joint_0", data).heard("dev").table.logits
    assert not np.allclose(first, other)
    assert np.allclose(other, listen_to(out / "branchynet_0", data).heard("dev").table.logits, atol=1e-5)


def test_a_truncated_network_pays_for_its_own_exit_alone(root: Path) -> None:
    heard = listen_to(root / "out" / "branchynet_0", str(root / "data")).heard("test")
    assert np.allclose(heard.alone[:, 0], heard.costs.to_exit[:, 0])
    assert (heard.alone[:, 1:] < heard.costs.to_exit[:, 1:]).all()
    assert np.allclose(heard.alone[:, -1], heard.costs.full), "the last is the network without early exits"


def test_exits_in_int8_leave_where_their_top_probability_says(root: Path) -> None:
    ears = listen_to(root / "out" / "quee_0", str(root / "data"))
    entry, paths = sure_entry(ears, "int8", root), ears.paths("test")
    seen, wrong = paths.outcomes.straight()
    for at, choice in enumerate(entry.choices):
        for row in range(len(paths.outcomes)):
            sure = _top(seen[row, 1, :-1]) >= choice.rule.parameters["threshold"]
            exit_at = int(np.flatnonzero([*sure, True])[0])
            assert entry.settings.right[at, row] == (not wrong[row, 1, exit_at])
            assert entry.settings.spent["layers"][at, row] == ears.loaded.network.spec.exits[exit_at]


@pytest.mark.slow
def test_bundles_are_timed_beside_the_single_graph(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, made = run(root, monkeypatch, "quee", "--measure", "5")
    assert done.exit_code == 0, done.output
    assert [what for what in made if what.startswith("split")] == ["split joint_0", "split quee_0"]
    found = json.loads((root / "out" / "compare.json").read_text())["milliseconds"]
    assert found["rows"] == 5 and found["monolith_ms"] > 0
    for name in (compare.REFERENCE, "quee (bops)", "max_probability (joint, int8)"):
        assert found["points"][name] and all(point["ms"] > 0 for point in found["points"][name])
    again, nothing = run(root, monkeypatch, "quee", "--measure", "5")
    assert again.exit_code == 0 and nothing == [], "bundles of these weights are there"


def test_consistentee_goes_on_from_the_joint_checkpoint(root: Path) -> None:
    command = json.loads((root / "out" / "consistentee_0" / "training.json").read_text())["command"]
    assert command["init"] == str(root / "out" / "joint_0") and command["model"] is None


def test_an_unknown_recipe_is_named() -> None:
    wrong = CliRunner().invoke(compare.main, ["--model", "m", "--data", "d", "--recipes", "jei-dnn"])
    assert wrong.exit_code == 2 and "'jei-dnn' is not known" in wrong.output


def said(low: float = -1.0, high: float = 1.0, **more: float) -> str:
    figures = {"accuracy_at_half": 90.0, "random": 80.0, "static": 85.0} | more
    return compare.verdict([figures], {"low": low, "high": high})


def test_what_does_not_beat_its_controls_is_said() -> None:
    assert said() == ""
    assert said(static=91.0) == "does not beat static"
    assert said(high=-0.1) == "below max-probability"
    assert said(random=95.0, low=0.1) == "does not beat random; above max-probability"
