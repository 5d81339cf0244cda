"""Tests of ee-compare: a tiny comparison from nothing to its table, interrupted and continued."""

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

from offramp.benchmarks.compare import cli
from offramp.benchmarks.compare.evaluation import _top_probability, evaluate_one_variant
from offramp.benchmarks.compare.exit_outputs import collect_outputs
from offramp.benchmarks.compare.pages import REFERENCE
from offramp.export.cli import main as split
from offramp.models.forecasts import softmax_statistics
from offramp.training.cli import train

pytestmark = pytest.mark.slow  # trains by several recipes

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
    """ee-compare with ee-train and ee-split in this process, which is faster; interrupted at the recipe
    `stop_at`.

    Gives what was trained and split, in order.
    """
    commands: list[str] = []
    real_run = subprocess.run

    def run_here(command: list[str], **rest: Any) -> Any:
        words = command[1:]
        if Path(command[0]).name not in ("ee-split", "ee-train"):
            return real_run(command, **rest)  # matplotlib looks for fonts, the first time on a machine
        if Path(command[0]).name == "ee-split":
            commands.append(f"split {Path(words[0]).name}")
            result = CliRunner().invoke(split, words)
        else:
            recipe = words[words.index("--recipe") + 1]
            if recipe == stop_at:
                raise KeyboardInterrupt
            commands.append(recipe)
            # As all tests here: accelerate allows one precision in a process.
            result = CliRunner().invoke(train, [*words, "--precision", "fp32"])
        assert result.exit_code == 0, result.output
        return None

    monkeypatch.setattr(subprocess, "run", run_here)
    words = ["--model", str(root / "model"), "--data", str(root / "data"), "--out", str(root / "out")]
    words += ["--recipes", recipes, *more]
    return CliRunner().invoke(cli.main, [*words, *(w for name in SETS for w in ("--set", name))]), commands


RECIPES = "branchynet,consistentee,quee"


def test_after_an_interruption_it_goes_on_and_trains_nothing_twice(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert names | {REFERENCE} <= set(methods)
    (reference,) = methods[REFERENCE]
    assert (reference["above"], reference["below"]) == (0.0, 0.0)
    assert against[REFERENCE] == {"difference": 0.0, "low": 0.0, "high": 0.0}
    for name in names:
        (figures,) = methods[name]
        assert figures["lines"]["macs"][0][0] < 5, "a frontier begins at full depth"
        assert against[name]["low"] <= against[name]["difference"] <= against[name]["high"]
        assert 0 <= figures["accuracy_at_half"] <= methods["first right (joint)"][0]["accuracy_at_half"] + 15
    assert methods["max_probability (joint, int8)"][0]["lines"]["bops"][0][0] > 30, (
        "int8 saves bits at full depth"
    )
    fp32 = methods[REFERENCE][0]["lines"]
    assert fp32["bops"] == fp32["macs"], (
        "in one precision, bits and multiply-accumulates have the same shares"
    )


def test_kept_outputs_of_other_weights_are_not_used(root: Path) -> None:
    out, data = root / "out", str(root / "data")
    first = collect_outputs(out / "joint_0", data).exit_outputs("dev").table.logits
    shutil.copy(out / "branchynet_0" / "weights.safetensors", out / "joint_0" / "weights.safetensors")
    second = collect_outputs(out / "joint_0", data).exit_outputs("dev").table.logits
    assert not np.allclose(first, second)
    expected = collect_outputs(out / "branchynet_0", data).exit_outputs("dev").table.logits
    assert np.allclose(second, expected, atol=1e-5)


def test_a_truncated_network_has_the_cost_of_its_own_exit_alone(root: Path) -> None:
    outputs = collect_outputs(root / "out" / "branchynet_0", str(root / "data")).exit_outputs("test")
    assert np.allclose(outputs.truncated[:, 0], outputs.costs.to_exit[:, 0])
    assert (outputs.truncated[:, 1:] < outputs.costs.to_exit[:, 1:]).all()
    assert np.allclose(outputs.truncated[:, -1], outputs.costs.full), "the network without early exits"


def test_rows_in_int8_exit_where_the_top_probability_reaches_the_threshold(root: Path) -> None:
    outputs = collect_outputs(root / "out" / "quee_0", str(root / "data"))
    evaluation, paths = evaluate_one_variant(outputs, "int8", root), outputs.variant_paths("test")
    statistics, wrong = paths.outcomes.without_change()
    for at, setting in enumerate(evaluation.chosen):
        for row in range(len(paths.outcomes)):
            above = _top_probability(statistics[row, 1, :-1]) >= setting.rule.parameters["threshold"]
            exit_at = int(np.flatnonzero([*above, True])[0])
            assert evaluation.settings.right[at, row] == (not wrong[row, 1, exit_at])
            block = outputs.checkpoint.network.spec.exits[exit_at]
            assert evaluation.settings.spent["layers"][at, row] == block


def test_the_top_probability_follows_from_the_statistics() -> None:
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * 3
    top = logits.softmax(-1).max(-1).values.numpy()
    assert np.allclose(_top_probability(softmax_statistics(logits).numpy()), top, atol=2e-5)


@pytest.mark.slow
def test_bundles_are_timed_beside_the_monolith(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, commands = run(root, monkeypatch, "quee", "--measure", "5")
    assert done.exit_code == 0, done.output
    splits = [command for command in commands if command.startswith("split")]
    assert splits == ["split joint_0", "split quee_0"]
    figures = json.loads((root / "out" / "compare.json").read_text())["milliseconds"]
    assert figures["rows"] == 5 and figures["monolith_ms"] > 0
    for name in (REFERENCE, "quee (bops)", "max_probability (joint, int8)"):
        assert figures["points"][name] and all(point["ms"] > 0 for point in figures["points"][name])
    again, commands = run(root, monkeypatch, "quee", "--measure", "5")
    assert again.exit_code == 0 and commands == [], "bundles of these weights exist"


def test_consistentee_starts_from_the_joint_checkpoint(root: Path) -> None:
    command = json.loads((root / "out" / "consistentee_0" / "training.json").read_text())["command"]
    assert command["init"] == str(root / "out" / "joint_0") and command["model"] is None


def test_an_unknown_recipe_is_named() -> None:
    wrong = CliRunner().invoke(cli.main, ["--model", "m", "--data", "d", "--recipes", "jei-dnn"])
    assert wrong.exit_code == 2 and "'jei-dnn' is not known" in wrong.output
