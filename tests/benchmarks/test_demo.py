"""The demo's rows: those of its promise train nothing, and a checkpoint of other rows is not taken."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from tiny_bundles import bundle_with_points

from offramp.benchmarks import demo
from offramp.runtime.bundle.files import open_bundle


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [json.dumps({"text": f"film {number}", "label": "good"}) + "\n" for number in range(10)]
    (tmp_path / "train.jsonl").write_text("".join(rows), encoding="utf-8")
    return tmp_path


def test_calibration_rows_are_taken_from_training(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "CALIBRATION_ROWS", 3)
    every = (data / "train.jsonl").read_text(encoding="utf-8")
    demo.set_calibration_rows_apart(data, data / "apart.jsonl")
    train, apart = ((data / name).read_text(encoding="utf-8") for name in ("train.jsonl", "apart.jsonl"))
    assert len(apart.splitlines()) == 3 and train + apart == every


def test_a_checkpoint_of_other_rows_is_refused(data: Path) -> None:
    training = data / "training.json"
    demo.require_same_rows(training, data / "train.jsonl")  # nothing was trained yet
    training.write_text(json.dumps({"data": {"rows": {"train": 10}}}), encoding="utf-8")
    demo.require_same_rows(training, data / "train.jsonl")
    training.write_text(json.dumps({"data": {"rows": {"train": 13}}}), encoding="utf-8")
    with pytest.raises(SystemExit, match="trained on 13 rows, not these 10"):
        demo.require_same_rows(training, data / "train.jsonl")


@pytest.mark.parametrize(("differ", "word"), [(0.0, "is kept"), (1.0, "is not kept")])
def test_the_promise_is_printed_beside_what_test_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], differ: float, word: str
) -> None:
    manifest = open_bundle(bundle_with_points(tmp_path, guaranteed=True)).manifest
    default = dataclasses.replace(manifest.points[0], name="default")
    demo.print_promise(dataclasses.replace(manifest, points=(default,)), differ, 40)
    assert f"40 test reviews: {differ:.1%}; the promise {word}" in capsys.readouterr().out
