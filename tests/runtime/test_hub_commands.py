"""Commands other than ee-run with bundles on a hub: some take them, those that write refuse them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hub_double import HubDouble, Repository, connect, running_hub
from tiny_bundles import CLASSIFIER

pytest.importorskip("huggingface_hub", reason="the extra hub")

from offramp.runtime import inspect_cli
from offramp.runtime.tuning import bench, calibrate


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubDouble]:
    """A hub that holds the tiny classifier."""
    with running_hub() as double:
        connect(monkeypatch, double, tmp_path / "cache")
        double.repositories["user/name"] = Repository()
        files = {path.name: path.read_bytes() for path in CLASSIFIER.iterdir()}
        double.repositories["user/name"].commit("main", files)
        yield double


def test_ee_inspect_shows_a_bundle_on_the_hub(hub: HubDouble) -> None:
    done = CliRunner().invoke(inspect_cli.main, ["user/name@main", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["task"] == "text-classification"


@pytest.mark.slow
def test_ee_bench_measures_a_bundle_on_the_hub(hub: HubDouble, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "good film", "label": "positive"}\n' * 2)
    words = [
        "--bundle",
        "hub:user/name",
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--turns",
        "1",
        "--rows",
        "2",
    ]
    done = CliRunner().invoke(bench.main, words)
    assert done.exit_code == 0, done.output


def test_ee_calibrate_refuses_a_bundle_on_the_hub(hub: HubDouble, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("good film\n")
    done = CliRunner().invoke(calibrate.main, [str(tmp_path / "rows.txt"), "--bundle", "hub:user/name@v1"])
    assert done.exit_code == 2
    assert "ee-calibrate writes into the bundle" in done.stderr
    assert "hf download user/name --revision v1 --local-dir bundle/" in done.stderr
    assert hub.requests == []


def test_ee_verify_and_ee_sign() -> None:
    pytest.importorskip("rich", reason="the extra export")
    from offramp.export import sign, trt_compile

    commands: dict[click.Command, list[str]] = {sign.main: ["--key", "key.pem"], trt_compile.main: []}
    for command, words in commands.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "huggingface_hub", None)
            done = CliRunner().invoke(command, ["hub:user/name", *words])
        assert done.exit_code == 2
        assert ("ee-sign writes into" if words else "pip install 'offramp[hub]'") in done.stderr
