"""Command ee-inspect: what a bundle is, without running a graph."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_bundles import CLASSIFIER, DATA, GENERATOR

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.inspect_cli import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def as_json(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(run(folder, "--json").stdout)
    return value


BUNDLES = [path.parent for path in sorted(DATA.glob("**/manifest.json"))]


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
def test_every_graph_of_a_bundle_is_listed(bundle: Path) -> None:
    graphs = as_json(bundle)["graphs"]
    assert {graph["file"] for graph in graphs} == open_bundle(bundle).manifest.graph_files
    assert all(graph["nodes"] == sum(graph["operators"].values()) > 0 for graph in graphs)


def test_report_shows_task_labels_points_and_graphs() -> None:
    result = run(CLASSIFIER)
    assert result.exit_code == 0
    for part in ("text-classification", "negative, positive", "4 blocks", "segment_01", "2-3", "MatMul"):
        assert part in result.stdout
    assert "default: gate threshold=0.5" in result.stdout and "no guarantee" in result.stdout
    assert "signature" in result.stdout and "none" in result.stdout


def test_report_of_a_decoder_lists_heads_and_cache_fills() -> None:
    names = {graph["segment"] for graph in as_json(GENERATOR)["graphs"]}
    assert {"stem", "head", "draft", "fill_01"} <= names


def test_guarantee_is_said(folder: Path) -> None:
    value = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    value["points"][0]["guarantee"] = {
        "risk": "disagreement",
        "limit": 0.01,
        "confidence": 0.95,
        "rows": 500,
        "observed": 0.001,
        "bound": 0.008,
        "bound_name": "clopper-pearson",
        "groups": "class",
    }
    (folder / "manifest.json").write_text(json.dumps(value), encoding="utf-8")
    expected = "guaranteed: disagreement of each class at most 0.01 with confidence 0.95, by 500 rows"
    assert expected in run(folder).stdout


def test_characters_that_control_a_terminal_are_escaped(folder: Path) -> None:
    value = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    value["labels"][0], value["provenance"]["note\x1b[1A"] = "\u202eevil\x1b[2J", "\x07"
    (folder / "manifest.json").write_text(json.dumps(value), encoding="utf-8")
    text = run(folder).stdout
    assert "\\u202eevil\\x1b[2J" in text
    assert all(line.isprintable() for line in text.splitlines())


def test_damaged_file_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"{}")
    result = run(folder)
    assert result.exit_code == 2 and "tokenizer.json: 2 bytes" in result.stderr and not result.stdout


def test_signature_without_a_key_is_said_to_be_unverified(folder: Path) -> None:
    (folder / "manifest.json.sig").write_bytes(b"x" * 64)
    assert "not verified" in run(folder).stdout


def test_folder_that_is_no_bundle_ends_with_2(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 2 and "ee-inspect: " in result.stderr
