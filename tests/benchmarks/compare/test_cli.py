"""Tests of ee-compare: a tiny comparison from nothing to its tables, interrupted, continued, recomputed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner, Result

from offramp.benchmarks.compare import cli
from offramp.benchmarks.compare.evaluation import (
    _top_probability,
    evaluate_exits,
    evaluate_one_variant,
    evaluate_published,
    simulate_settings,
    thin_settings,
)
from offramp.benchmarks.compare.exit_outputs import collect_outputs, exits_digest
from offramp.benchmarks.compare.judge import FINE_TUNED
from offramp.export.cli import main as split
from offramp.models.forecasts import softmax_statistics
from offramp.runtime.errors import BadSetting
from offramp.runtime.rules import RuleSpec, bind, simulate
from offramp.runtime.rules.sweep import STEPS, settings_to_try
from offramp.training.cli import train

slow = pytest.mark.slow  # trains by several recipes

SETS = ("epochs=2", "batch_size=8", "lr=0.002", "heads_lr=0.01")
ALPHAS = "consistentee:alpha=0.01|0.05,rounds=1,stage3=false,heads_lr=0.01,policy_epochs=1"
RECIPES = f"{ALPHAS} branchynet quee:changes=1"


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

    Gives the names of the folders that were trained and split, in order.
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
            if words[words.index("--recipe") + 1] == stop_at:
                raise KeyboardInterrupt
            commands.append(Path(words[words.index("--out") + 1]).name)
            # As all tests here: accelerate allows one precision in a process.
            result = CliRunner().invoke(train, [*words, "--precision", "fp32"])
        assert result.exit_code == 0, result.output
        return None

    monkeypatch.setattr(subprocess, "run", run_here)
    words = ["--model", str(root / "model"), "--data", str(root / "data"), "--out", str(root / "out")]
    words += ["--recipes", recipes, *more]
    return CliRunner().invoke(cli.main, [*words, *(w for name in SETS for w in ("--set", name))]), commands


def result_of(root: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((root / "out" / "compare.json").read_text())
    return result


@slow
def test_after_an_interruption_it_goes_on_and_trains_nothing_twice(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, before = run(root, monkeypatch, RECIPES, stop_at="branchynet")
    names = [
        f"consistentee-alpha={a}-rounds=1-stage3=false-heads_lr=0.01-policy_epochs=1_0" for a in (0.01, 0.05)
    ]
    assert stopped.exit_code != 0 and [before[0], *before[2:]] == ["joint_0", *names]
    assert before[1].startswith("joint-") and "pooling=cls" in before[1], "the start of both"
    assert not (root / "out" / "compare.json").exists()
    done, after = run(root, monkeypatch, RECIPES)
    assert done.exit_code == 0, done.output
    assert after == ["branchynet_0", "quee-changes=1_0"]


@slow
def test_a_method_is_the_exits_of_a_recipe_with_a_rule(root: Path) -> None:
    result = result_of(root)
    rules = cli.PLAIN_RULES.split(",")
    expected = [f"joint + {rule}" for rule in rules]
    expected += [f"{ALPHAS} + {rule}" for rule in ("published", "gate", *rules)]
    expected += [f"branchynet + {rule}" for rule in ("entropy", "max_probability", "margin", "patience")]
    expected += ["quee:changes=1 + quee", "quee:changes=1 + max_probability in int8"]
    assert list(result["methods"]) == expected
    assert result["recipes"]["quee:changes=1"]["same_exits_as"] == "joint", "rules are tried there"
    methods = result["methods"]
    assert methods[f"{ALPHAS} + published"]["trials"] == 2, "one model a value"
    assert all(entry["trials"] <= STEPS for entry in methods.values())
    published = methods[f"{ALPHAS} + published"]["published"]
    assert [point["point"] for point in published[0]] == ["trained", "trained"]
    int8 = methods["quee:changes=1 + max_probability in int8"]["lines"]["bops"]
    assert int8[0][0] > 30, "int8 saves bits at full depth"
    fp32 = methods["joint + max_probability"]["lines"]
    assert fp32["bops"] == fp32["macs"], "in one precision both have the same shares"
    for name, entry in methods.items():
        assert entry["lines"]["macs"][0][-1] == pytest.approx(fp32["macs"][0][-1], abs=4), (
            f"{name}: every method can leave at the first exit"
        )
    reference = result["scores"]["joint + max_probability"]["40-80"]
    assert (reference["difference"], reference["low"], reference["high"]) == (0.0, 0.0, 0.0)
    assert FINE_TUNED not in result["scores"]["joint + max_probability"], "deebert was not compared"
    page = (root / "out" / "compare.html").read_text()
    assert page.count("<svg") == 3 and "branchynet + entropy" in page and "<link" not in page


@slow
def test_recomputing_needs_no_network_and_gives_the_same_file(root: Path) -> None:
    moved = root / "moved"
    moved.mkdir()
    shutil.copytree(root / "out" / "rows", moved / "rows")
    shutil.copy(root / "out" / "comparison.json", moved)
    again = CliRunner().invoke(cli.main, ["--recompute", "--out", str(moved)])
    assert again.exit_code == 0, again.output
    assert (moved / "compare.json").read_bytes() == (root / "out" / "compare.json").read_bytes()


@slow
def test_a_curve_of_several_models_holds_their_points_and_chooses_on_dev(root: Path) -> None:
    result = result_of(root)
    labels = [label.replace(":", "-").replace(",", "-") for label in result["recipes"][ALPHAS]["models"]]
    models = [collect_outputs(root / "out" / f"{label}_0", str(root / "data")) for label in labels]
    curve = evaluate_published("c", models, 0)
    assert curve.trials == 2 and curve.kind == "published"
    assert {setting.rule for setting in curve.settings} <= {"gate", "never", "fixed"}
    for point, model in zip(curve.published, models, strict=True):
        table = model.exit_outputs("test").table
        exits = simulate(bind(RuleSpec("gate", {"threshold": 0.5}), 3), table.logits, table.gates)
        assert point["accuracy"] == pytest.approx(100 * table.right[np.arange(len(exits)), exits].mean())
    swept = evaluate_exits("c", models, "gate", 0)
    assert swept.trials <= STEPS and {setting.model for setting in swept.settings} <= {0, 1}
    dev = [setting.accuracy for setting in swept.settings]
    saved = [setting.macs_saved for setting in swept.settings]
    assert dev == sorted(dev) and saved == sorted(saved, reverse=True), "undominated on dev"
    assert exits_digest(models[0].folder) == exits_digest(models[1].folder), "they differ in policies alone"


@slow
def test_kept_outputs_of_other_weights_are_not_used(root: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", str(root / "data")
    for name in ("joint_0", "branchynet_0"):
        shutil.copytree(root / "out" / name, out / name)
    first = collect_outputs(out / "joint_0", data).exit_outputs("dev").table.logits
    shutil.copy(out / "branchynet_0" / "weights.safetensors", out / "joint_0" / "weights.safetensors")
    second = collect_outputs(out / "joint_0", data).exit_outputs("dev").table.logits
    assert not np.allclose(first, second)
    expected = collect_outputs(out / "branchynet_0", data).exit_outputs("dev").table.logits
    assert np.allclose(second, expected, atol=1e-5)


@slow
def test_a_truncated_network_has_the_cost_of_its_own_exit_alone(root: Path) -> None:
    outputs = collect_outputs(root / "out" / "branchynet_0", str(root / "data")).exit_outputs("test")
    assert np.allclose(outputs.truncated[:, 0], outputs.costs.to_exit[:, 0])
    assert (outputs.truncated[:, 1:] < outputs.costs.to_exit[:, 1:]).all()
    assert np.allclose(outputs.truncated[:, -1], outputs.costs.full), "the network without early exits"


@slow
@pytest.mark.parametrize("rule", ["max_probability", "entropy", "margin", "gate", "patience"])
def test_settings_are_simulated_together_as_one_by_one(root: Path, rule: str) -> None:
    folder = next((root / "out").glob("consistentee-alpha=0.01*_0"))
    table = collect_outputs(folder, str(root / "data")).exit_outputs("test").table
    values = thin_settings(settings_to_try(rule, table), 20)
    name = "patience" if rule == "patience" else "threshold"
    specs = [RuleSpec(rule, {name: float(value)}) for value in values]  # type: ignore[arg-type]
    together = simulate_settings(rule, values, specs, table)
    alone = [simulate(bind(spec, 3), table.logits, table.gates) for spec in specs]
    assert (together == np.stack(alone)).all()


@slow
def test_rows_in_int8_exit_where_the_top_probability_reaches_the_threshold(root: Path) -> None:
    outputs = collect_outputs(root / "out" / "quee-changes=1_0", str(root / "data"))
    rows, paths = evaluate_one_variant("quee", outputs, "int8", 0), outputs.variant_paths("test")
    nodes = paths.outcomes.tree.straight[1]
    for at, setting in enumerate(rows.settings):
        for row in range(len(paths.outcomes)):
            above = _top_probability(paths.statistics[row, nodes[:-1]]) >= setting.parameters["threshold"]
            exit_at = int(np.flatnonzero([*above, True])[0])
            assert rows.results.right[at, row] == (not paths.outcomes.wrong[row, nodes[exit_at]])
            block = outputs.checkpoint.network.spec.exits[exit_at]
            assert rows.results.spent["layers"][at, row] == block


@slow
def test_bundles_are_timed_beside_both_monoliths(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("quee:changes=1", "--measure", "5", "--rules", "max_probability")
    done, commands = run(root, monkeypatch, *words, "--max-drop", "100")
    assert done.exit_code == 0, done.output
    assert [c for c in commands if c.startswith("split")] == ["split joint_0", "split quee-changes=1_0"]
    figures = result_of(root)["milliseconds"]
    assert figures["rows"] == 5 and set(figures["monolith_ms"]) == {"fp32", "int8"}
    for name in ("joint + max_probability", "quee:changes=1 + quee"):
        assert figures["points"][name] and all(point["ms"] > 0 for point in figures["points"][name])
    near = figures["within"]
    assert [(entry["recipe"], entry["variant"]) for entry in near] == [("joint", "fp32"), ("joint", "int8")]
    for entry in near:
        assert entry["parameters"] == {"exit": 1.0} or entry["rule"] == "max_probability"
        assert entry["difference"][1] <= entry["difference"][0] <= entry["difference"][2]
        assert all(entry[f"times_{v}"][1] <= entry[f"times_{v}"][0] for v in ("fp32", "int8"))
    again, commands = run(root, monkeypatch, *words)
    assert again.exit_code == 0 and commands == [], "bundles of these weights exist"


def test_full_depth_of_the_control_in_int8_is_that_of_the_recipe_in_fp32() -> None:
    rows, exits = 4, 2
    right = np.array([[False, True], [True, True], [False, True], [True, False]])  # in fp32
    nodes = np.arange(2 * exits).reshape(2, exits)  # of fp32, and of int8, where every row is wrong
    costs = np.tile([0.5, 1.0], (rows, 1))
    spent = dict.fromkeys(("layers", "macs", "bops"), costs)
    full = dict.fromkeys(spent, np.ones(rows))
    in_fp32 = SimpleNamespace(table=SimpleNamespace(right=right), spent=spent, full=full, truncated=costs)
    paths = SimpleNamespace(
        outcomes=SimpleNamespace(
            variants=("fp32", "int8"),
            tree=SimpleNamespace(straight=nodes),
            wrong=np.concatenate([~right, np.ones((rows, exits), bool)], axis=1),
        ),
        statistics=softmax_statistics(torch.eye(2)[:1].repeat(rows, 2 * exits, 1)).numpy(),
        costs=SimpleNamespace(stem=np.zeros(rows), steps=np.full((rows, 2, exits), 0.5)),
    )
    outputs: Any = SimpleNamespace(exit_outputs=lambda split: in_fp32, variant_paths=lambda split: paths)
    control = evaluate_one_variant("quee", outputs, "int8", 0)
    assert not control.results.right.any(), "its answers are those in int8"
    assert control.full_right.tolist() == right[:, -1].tolist()


def test_the_top_probability_follows_from_the_statistics() -> None:
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * 3
    top = logits.softmax(-1).max(-1).values.numpy()
    assert np.allclose(_top_probability(softmax_statistics(logits).numpy()), top, atol=2e-5)


def test_settings_are_thinned_evenly_with_their_ends() -> None:
    assert thin_settings([1.0, 2.0, 3.0, 4.0, 5.0], 3) == [1.0, 3.0, 5.0]
    assert thin_settings([1.0, 2.0], 3) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--recipes", "jei-dnn"), "'jei-dnn' is not known"),
        (("--recipes", "joint:nosuch=1"), "nosuch"),
        (("--rules", "nosuch"), "'nosuch' is not known"),
        (("--reference", "joint"), "expected 'RECIPE + RULE'"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_trained(words: tuple[str, ...], named: str) -> None:
    wrong = CliRunner().invoke(cli.main, ["--model", "m", "--data", "d", *words])
    assert wrong.exit_code == 2 and named in wrong.output


def test_a_comparison_needs_a_model_and_recomputing_a_comparison(tmp_path: Path) -> None:
    without = CliRunner().invoke(cli.main, ["--data", "d"])
    assert without.exit_code == 2 and "--model" in without.output
    nothing = CliRunner().invoke(cli.main, ["--recompute", "--out", str(tmp_path)])
    assert nothing.exit_code == 2 and "holds no comparison" in nothing.output


def test_recipes_take_the_place_of_those_of_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def note(comparison: cli.Comparison, command: str) -> dict[str, Any]:
        seen.extend(spec.text for spec in comparison.specs)
        raise BadSetting("seen")

    monkeypatch.setattr(cli, "compare", note)
    arguments = ["--model", "m", "--data", "d", "--out", str(tmp_path / "out"), "--preset", "paper"]
    CliRunner().invoke(cli.main, [*arguments, "--recipes", "berxit consistentee"])
    assert seen == ["joint:epochs=4", "berxit", "consistentee"]  # the reference is always compared
