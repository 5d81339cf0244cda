"""Recipe quee from data to answers: training, forecasts, bundle, walks that change precision, calibration."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer

from offramp.export.cli import main as split
from offramp.runtime import load
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.rules import bind
from offramp.runtime.tuning.calibrate import main as calibrate
from offramp.training.batches import encode_texts
from offramp.training.checkpoint import load_checkpoint, save_checkpoint
from offramp.training.classifier import load_initial_checkpoint
from offramp.training.cli import evaluate, train
from offramp.training.data import Rows
from offramp.training.forecasters import network_forecaster
from offramp.training.outcomes import collect_outcomes
from offramp.training.replay import replay_walks
from offramp.training.walk_tree import grow_tree

pytestmark = pytest.mark.slow  # trains and exports two networks

JOINT = ["epochs=4", "batch_size=8", "lr=0.002", "heads_lr=0.01"]
NAMES = ("fp32", "int8", "int4")
LIMITS = {"changes": 2.0}
QUEE = ["--set", f"variants={','.join(NAMES)}", "--set", "order=free"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quee")
    torch.set_num_threads(1)
    model, data = tiny.model_folder(root / "model"), tiny.data_folder(root / "data", dev=48)
    common = ["--data", str(data), "--precision", "fp32"]
    sets = [word for name in JOINT for word in ("--set", name)]
    for command, *words in [
        [train, *common, "--model", str(model), "--recipe", "joint", "--out", str(root / "joint"), *sets],
        [
            train,
            *common,
            "--init",
            str(root / "joint"),
            "--recipe",
            "quee",
            "--out",
            str(root / "ckpt"),
            *QUEE,
        ],
    ]:
        done = CliRunner().invoke(command, words)  # type: ignore[arg-type]
        assert done.exit_code == 0, done.output
    # Forecasts fitted on 48 rows choose few paths; random ones give every kind of walk, which the tests need.
    random = load_checkpoint(root / "ckpt")
    torch.manual_seed(2)
    with torch.no_grad():
        for forecast in random.network.forecasts:
            forecast.last.weight.normal_(0, 1.0)
            bias = forecast.last.bias.zero_().view(3, 1 + 3 * forecast.ahead)  # [variant now, paths]
            for now in range(3):  # favours a change of variant
                bias[now, 1:].view(3, forecast.ahead)[torch.arange(3) != now] = -1.5
    save_checkpoint(random, root / "random")
    words = [str(root / "random"), "--out", str(root / "bundle"), "--variants", ",".join(NAMES)]
    done = CliRunner().invoke(split, words)
    assert done.exit_code == 0, done.output
    return root


def test_the_backbone_is_not_touched(root: Path) -> None:
    before, after = (load_checkpoint(root / name) for name in ("joint", "ckpt"))
    assert after.network.spec.forecast == NAMES and after.network.spec.forecast_inputs == "both"
    old, new = before.network.state_dict(), after.network.state_dict()
    assert all((new[name] == value).all() for name, value in old.items())
    assert {name.split(".")[0] for name in set(new) - set(old)} == {"forecasts"}


def test_training_reports_frontiers_and_points(root: Path) -> None:
    training = load_checkpoint(root / "ckpt").training
    frontiers = training["frontiers"]["accuracy_at"]
    assert {"quee, mlp", "quee, oracle", "exiting alone, int8", "quantizing alone"} <= set(frontiers)
    assert {f"quee, mlp of {inputs}" for inputs in ("statistics", "features", "both")} <= set(frontiers)
    assert frontiers["quee, mlp of both"] == frontiers["quee, mlp"]
    assert all(frontiers["quee, oracle"]["75"] >= frontier["75"] for frontier in frontiers.values())
    points = {point["name"]: point for point in training["operating_points"]}
    assert points["default"]["measured"]["accuracy"] >= points["full"]["measured"]["accuracy"] - 0.5


def test_rows_that_change_their_precision_walk_as_they_were_replayed(root: Path) -> None:
    """Simulated precision, forecasts and rule in torch and numpy against graphs, engine and walker."""
    checkpoint = load_checkpoint(root / "random")
    texts = [row["text"] for row in map(json.loads, (root / "data/dev.jsonl").read_text().splitlines())]
    rows = Rows(texts, None, np.zeros(len(texts), np.int64))
    encoded = encode_texts(rows, Tokenizer.from_file(str(checkpoint.tokenizer)), checkpoint.text)
    tree = grow_tree(3, 3, 2, increase=True)
    outcomes = collect_outcomes(checkpoint.network, encoded, NAMES, tree)
    forecast = network_forecaster(checkpoint.network.forecasts)
    costs = open_bundle(root / "bundle").manifest.costs
    kinds, same, batched = set(), [], []
    for start, price in itertools.product(NAMES, (0.02, 0.2)):
        spec = RuleSpec("quee", {"price": price, **LIMITS})
        plans = replay_walks(bind(spec, 3, costs), outcomes, forecast, outcomes.variants.index(start))
        expected = [[outcomes.variants[v] for v in plan if v >= 0] for plan in plans]
        with load(root / "bundle", rule=spec, variant=start) as session:
            walked = [[variant for _, variant in session(text).steps] for text in texts]
            together = [[variant for _, variant in a.steps] for a in session.map(texts, batch_size=8)]
        kinds |= {tuple(name for name, _ in itertools.groupby(steps)) for steps in walked}
        same += [a == b for a, b in zip(walked, expected, strict=True)]
        batched += [a == b for a, b in zip(walked, together, strict=True)]
    assert {len(kind) for kind in kinds} == {1, 2, 3}, "walks with two changes are among them"
    assert {start for start, *_ in kinds} == {*NAMES} and len(kinds) > 8
    assert np.mean(same) > 0.95  # a level of int8 that falls to the other side can change a close decision
    assert np.mean(batched) > 0.8  # int8 takes one scale for all rows of a batch


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


def test_other_prices_keep_to_the_walks_of_the_fit(root: Path) -> None:
    with load(root / "bundle", rule="quee", threshold=0.07) as session:
        assert session.rule.parameters.items() >= {"price": 0.07, **LIMITS}.items()


def test_ee_eval_reads_a_quee_checkpoint(root: Path, tmp_path: Path) -> None:
    words = [str(root / "ckpt"), "--data", str(root / "data"), "--json", str(tmp_path / "e.json")]
    done = CliRunner().invoke(evaluate, [*words, "--picture", str(tmp_path / "e.png")])
    assert done.exit_code == 0, done.output


def test_variants_without_forecasts_are_refused(root: Path, tmp_path: Path) -> None:
    for variants, message in (
        ("fp32,fp16", "no error forecast for variant fp16"),
        ("fp32,int4,int8", "in the order of the error forecasts: fp32, int8, int4"),
    ):
        words = [str(root / "ckpt"), "--out", str(tmp_path / "b"), "--variants", variants]
        done = CliRunner().invoke(split, words)
        assert done.exit_code == 2 and message in done.output


def test_another_recipe_started_from_it_drops_its_forecasts(root: Path) -> None:
    for policy in (None, "statistics"):
        checkpoint = load_initial_checkpoint(str(root / "ckpt"), policy, seed=0)
        assert checkpoint.network.spec.forecast == () and len(checkpoint.network.forecasts) == 0


def test_images_are_calibrated_by_ee_split_and_by_ee_calibrate(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model, data = tiny.image_model_folder(tmp_path / "model", "vit"), tiny.image_folder(tmp_path / "data")
    common = ["--data", str(data), "--precision", "fp32"]
    sets = [word for name in JOINT for word in ("--set", name)]
    joint, checkpoint, bundle = (str(tmp_path / name) for name in ("joint", "ckpt", "bundle"))
    for command, *words in [
        [train, *common, "--model", str(model), "--recipe", "joint", "--out", joint, *sets],
        [train, *common, "--init", joint, "--recipe", "quee", "--out", checkpoint],
        [split, checkpoint, "--out", bundle, "--dev", str(data / "dev")],
        [calibrate, str(data / "dev"), "--bundle", bundle],
    ]:
        done = CliRunner().invoke(command, words)  # type: ignore[arg-type]
        assert done.exit_code == 0, done.output
        if command is not train:
            manifest = open_bundle(bundle).manifest
            assert manifest.costs["ms"].tokens == load_checkpoint(checkpoint).network.longest
            assert {"default", "full"} <= {point.name for point in manifest.points}
