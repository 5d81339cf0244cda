"""Calibration: the points say what walking at them gives, per variant, and the manifest is written whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from doubles import gpu

from offramp.runtime import load
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import OperatingPoint
from offramp.runtime.tuning.calibrate import calibrate, costs_of, main
from offramp.runtime.tuning.labelled import read_labelled

TINY = Path(__file__).parent.parent / "data" / "tiny_bundle"
TEXTS = ("good film", "bad film", "a good good plot", "dull", "film plot bad", "good", "so dull and bad")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "bundle"))


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    names = open_bundle(TINY).manifest.labels
    rows = [{"text": text, "label": names[at % len(names)]} for at, text in enumerate(TEXTS)]
    file = tmp_path / "dev.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_a_point_says_what_a_walk_at_it_gives(bundle: Path, dev: Path) -> None:
    done = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle)])
    assert done.exit_code == 0, done.output
    manifest = open_bundle(bundle).manifest
    names = {point.name for point in manifest.points}
    assert {"default", "full", "int8-default", "int8-full"} <= names
    rows = read_labelled(dev, manifest.labels)
    for point in manifest.points:
        with load(bundle, point=point.name) as session:
            assert session.variant == point.variant
            answers = [session(str(item)) for item in rows.items]
        right = [a.label == manifest.labels[n] for a, n in zip(answers, rows.labels, strict=True)]
        assert 100 * np.mean(right) == pytest.approx(point.measured["accuracy"], abs=1e-3)
        assert np.mean([a.depth for a in answers]) == pytest.approx(point.measured["mean_exit"], abs=1e-3)
        assert (point.data, point.split) == ("dev.jsonl", "dev")
    facts = manifest.provenance["calibrated"]
    assert facts["rows"] == len(TEXTS) and facts["engine"] == "ort"
    assert {path.name for path in bundle.parent.iterdir()} == {"bundle", "dev.jsonl"}


def test_the_rule_can_be_chosen_and_becomes_the_bundles_own(bundle: Path, dev: Path) -> None:
    done = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle), "--rule", "patience"])
    assert done.exit_code == 0, done.output
    manifest = open_bundle(bundle).manifest
    assert {p.rule.name for p in manifest.points} <= {"patience", "never"}
    assert manifest.rule == next(p for p in manifest.points if p.name == "default").rule


def test_a_bundle_keeps_its_own_rule_though_it_has_policies(bundle: Path, dev: Path) -> None:
    words = [str(dev), "--bundle", str(bundle)]
    assert CliRunner().invoke(main, [*words, "--rule", "patience_confident"]).exit_code == 0
    assert CliRunner().invoke(main, words).exit_code == 0
    points = open_bundle(bundle).manifest.points
    assert {p.rule.name for p in points} <= {"patience_confident", "never"}
    counted = next(p for p in points if p.rule.name == "patience_confident")
    assert set(counted.rule.parameters) == {"threshold", "patience"}
    with load(bundle, point=counted.name) as session:  # two parameters walk
        assert session("good film").depth >= 1


def test_other_variants_are_held_against_the_default_ones_full_depth(dev: Path) -> None:
    with load(TINY, rule="never") as session:
        points = calibrate(session, read_labelled(dev, session.labels))
    by_name = {point.name: point.measured["accuracy"] for point in points}
    for name, accuracy in by_name.items():
        if "within-" in name:
            assert accuracy >= by_name["full"] - float(name.rpartition("-")[2]) - 1e-3


def test_on_tensorrt_what_it_does_not_walk_keeps_its_points(
    bundle: Path, dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def points() -> dict[str, OperatingPoint]:
        return {point.name: point for point in open_bundle(bundle).manifest.points}

    assert CliRunner().invoke(main, [str(dev), "--bundle", str(bundle)]).exit_code == 0
    before = points()
    gpu.machine(monkeypatch, tmp_path / "cache")
    done = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle), "--engine", "trt"])
    assert done.exit_code == 0 and "int8 is not measured, its points stay" in done.output
    assert points()["int8-full"] == before["int8-full"]
    assert points()["full"].measured["accuracy"] == before["full"].measured["accuracy"]
    facts = open_bundle(bundle).manifest.provenance["calibrated"]
    assert (facts["engine"], facts["device"], facts["gpu"]) == ("trt", "cuda", "Double GPU, 8.6")


def test_costs_are_the_manifests() -> None:
    manifest = open_bundle(TINY).manifest
    costs = costs_of(manifest, [4, 9])
    stages = [manifest.stem, *manifest.segments]
    assert costs.full == pytest.approx([sum(s.macs.of(n) for s in stages) for n in (4, 9)])
    assert costs.to_exit[1, 0] == pytest.approx(stages[0].macs.of(9) + stages[1].macs.of(9))


def test_what_cannot_be_used_leaves_the_bundle_alone(bundle: Path, tmp_path: Path) -> None:
    before = (bundle / "manifest.json").read_bytes()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good", "label": "no such"}\n', encoding="utf-8")
    done = CliRunner().invoke(main, [str(bad), "--bundle", str(bundle)])
    assert done.exit_code == 2 and "line 1" in done.output
    assert (bundle / "manifest.json").read_bytes() == before
    done = CliRunner().invoke(main, [str(bad), "--bundle", str(tmp_path / "none")])
    assert done.exit_code == 2 and "no such folder" in done.output
