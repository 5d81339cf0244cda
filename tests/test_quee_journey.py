"""Recipe quee from data to answers: joint, forecasts, bundle, walks that change precision, calibration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

from offramp.export.cli import main as split
from offramp.runtime import load
from offramp.runtime.bundle import open_bundle
from offramp.runtime.calibrate import main as calibrate
from offramp.runtime.manifest import RuleSpec
from offramp.training.checkpoint import load_checkpoint
from offramp.training.cli import evaluate, train
from offramp.training.prepare import network_from_checkpoint

JOINT = ["epochs=4", "batch_size=8", "lr=0.002", "heads_lr=0.01"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quee")
    torch.set_num_threads(1)
    model, data = tiny.model_folder(root / "model"), tiny.data_folder(root / "data", dev=48)
    common = ["--data", str(data), "--precision", "fp32"]
    sets = [word for name in JOINT for word in ("--set", name)]
    steps = [
        [train, *common, "--model", str(model), "--recipe", "joint", "--out", str(root / "joint"), *sets],
        [train, *common, "--init", str(root / "joint"), "--recipe", "quee", "--out", str(root / "ckpt")],
        [split, str(root / "ckpt"), "--out", str(root / "bundle"), "--variants", "fp32,int8"],
    ]
    for command, *words in steps:
        done = CliRunner().invoke(command, words)  # type: ignore[arg-type]
        assert done.exit_code == 0, done.output
    return root


def test_the_backbone_is_not_touched(root: Path) -> None:
    before, after = (load_checkpoint(root / name) for name in ("joint", "ckpt"))
    assert after.network.spec.forecast == ("fp32", "int8")
    old, new = before.network.state_dict(), after.network.state_dict()
    assert all((new[name] == value).all() for name, value in old.items())
    assert {name.split(".")[0] for name in set(new) - set(old)} == {"forecasts"}


def test_training_tells_frontiers_and_points(root: Path) -> None:
    told = load_checkpoint(root / "ckpt").training
    lines = told["frontiers"]["accuracy_at"]
    assert {"quee, mlp", "quee, oracle", "leaving alone, int8", "quantizing alone"} <= set(lines)
    assert all(lines["quee, oracle"]["75"] >= line["75"] for line in lines.values())
    points = {point["name"]: point for point in told["operating_points"]}
    assert points["default"]["measured"]["accuracy"] >= points["full"]["measured"]["accuracy"] - 0.5


def test_rows_change_their_precision_in_the_middle(root: Path) -> None:
    texts = [str(row["text"]) for row in tiny.rows(40, seed=9)]
    kinds, answers = set(), {}
    for price in (0.0, 0.01, 0.03, 0.1, 0.3):
        with load(root / "bundle", rule=RuleSpec("quee", {"price": price})) as session:
            answers[price] = [session(text) for text in texts]
            together = list(session.map(texts, batch_size=8))
        for one in answers[price]:
            kinds.add(tuple(dict.fromkeys(variant for _, variant in one.steps)))
        same = [a.steps == b.steps for a, b in zip(answers[price], together, strict=True)]
        assert np.mean(same) > 0.8  # int8 takes one scale a batch, so that a few decisions may differ
    assert kinds & {("fp32", "int8"), ("int8", "fp32")}, kinds
    depths = [np.mean([answer.depth for answer in found]) for found in answers.values()]
    assert depths[-1] < depths[0]


def test_a_point_walks_on_dev_as_training_said(root: Path) -> None:
    """Simulated precision and replayed walks against the engine; cross-fitting alone makes them differ."""
    rows = [json.loads(line) for line in (root / "data/dev.jsonl").read_text().splitlines()]
    with load(root / "bundle", point="default") as session:
        point = next(p for p in session.manifest.points if p.name == "default")
        answers = [session(row["text"]) for row in rows]
    right = [answer.label == str(row["label"]) for answer, row in zip(answers, rows, strict=True)]
    assert 100 * np.mean(right) == pytest.approx(point.measured["accuracy"], abs=10)
    assert np.mean([a.depth for a in answers]) == pytest.approx(point.measured["mean_exit"], abs=0.7)


def test_calibration_measures_milliseconds_by_walking(root: Path) -> None:
    done = CliRunner().invoke(calibrate, [str(root / "data/dev.jsonl"), "--bundle", str(root / "bundle")])
    assert done.exit_code == 0, done.output
    manifest = open_bundle(root / "bundle").manifest
    assert set(manifest.costs) == {"bops", "ms"}
    assert min(min(steps) for steps in manifest.costs["ms"].steps.values()) > 0
    points = {point.name: point for point in manifest.points}
    assert {"default", "full"} <= set(points) and points["full"].rule.name == "never"
    assert points["default"].measured["accuracy"] >= points["full"].measured["accuracy"] - 0.5
    rows = [json.loads(line) for line in (root / "data/dev.jsonl").read_text().splitlines()]
    with load(root / "bundle") as session:
        assert (session.rule, session.variant) == (points["default"].rule, points["default"].variant)
        answers = [session(row["text"]) for row in rows]
    right = [answer.label == str(row["label"]) for answer, row in zip(answers, rows, strict=True)]
    assert 100 * np.mean(right) == pytest.approx(points["default"].measured["accuracy"], abs=1e-3)


def test_ee_eval_reads_a_quee_checkpoint(root: Path, tmp_path: Path) -> None:
    words = [str(root / "ckpt"), "--data", str(root / "data"), "--json", str(tmp_path / "e.json")]
    done = CliRunner().invoke(evaluate, [*words, "--picture", str(tmp_path / "e.png")])
    assert done.exit_code == 0, done.output


def test_variants_without_forecasts_are_refused(root: Path, tmp_path: Path) -> None:
    words = [str(root / "ckpt"), "--out", str(tmp_path / "b"), "--variants", "fp32,int4"]
    done = CliRunner().invoke(split, words)
    assert done.exit_code == 2 and "no error forecast for variant int4" in done.output


def test_going_on_from_it_with_another_recipe_drops_its_forecasts(root: Path) -> None:
    for policy in (None, "statistics"):
        again = network_from_checkpoint(str(root / "ckpt"), ("0", "1"), policy, seed=0)
        assert again.network.spec.forecast == () and len(again.network.forecasts) == 0
