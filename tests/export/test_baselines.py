"""Which truncated graphs are written, and what is refused; the folder itself is checked in test_cli."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offramp.export import baselines
from offramp.export.baselines import blocks_around_mean_exits, write_baselines
from offramp.export.describe import build_manifest
from offramp.export.options import ExportOptions
from offramp.export.segments import Segment
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import FileFact, OperatingPoint, RuleSpec
from offramp.runtime.errors import BadBundle
from offramp.runtime.tuning.baselines import read_baselines

pytestmark = pytest.mark.slow

MANIFEST = open_bundle(Path(__file__).parent.parent / "data" / "tiny_bundle").manifest  # exits after 1, 3, 4


@pytest.mark.parametrize(
    ("means", "blocks"),
    [
        ([], [3]),  # no points: the middle exit
        ([1.7], [1, 3]),
        ([3.0], [3]),
        ([1.7, 3.5], [1, 3]),  # the last exit is the monolith
        ([4.0], [3]),
    ],
)
def test_both_sides_of_the_blocks_around_mean_exits(means: list[float], blocks: list[int]) -> None:
    points = tuple(
        OperatingPoint(str(mean), RuleSpec("never", {}), "fp32", "", "dev", {"mean_exit": mean})
        for mean in means
    )
    assert blocks_around_mean_exits(dataclasses.replace(MANIFEST, points=points)) == blocks


@pytest.mark.parametrize(("count", "blocks"), [(1, []), (2, [1]), (3, [3])])
@pytest.mark.parametrize("measured", [{}, {"mean_exit": 1.0}, {"mean_exit": 4.0}])
def test_the_last_exit_is_never_cut_off(count: int, blocks: list[int], measured: dict[str, float]) -> None:
    points = (OperatingPoint("one", RuleSpec("never", {}), "fp32", "", "dev", measured),)
    few = dataclasses.replace(MANIFEST, segments=MANIFEST.segments[:count], points=points)
    at_one = [1] if count > 1 else []
    assert blocks_around_mean_exits(few) == (at_one if measured.get("mean_exit") == 1.0 else blocks)


@pytest.fixture
def tiny_export(exported: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two exits; the exporter is replaced by a copy of one segment: nobody looks into the graphs."""
    export = exported("bert")

    def copy(segment: Segment, path: Path) -> None:
        shutil.copyfile(export.folder / "segment_01.onnx", path)

    monkeypatch.setattr(baselines, "to_onnx", copy)
    return export


def test_each_block_once(tiny_export: Any, tmp_path: Path) -> None:
    manifest = build_manifest(tiny_export.source, tiny_export.split, ("fp32",))
    write_baselines(
        tiny_export.source,
        tiny_export.folder,
        manifest,
        tmp_path / "baselines",
        ExportOptions(),
        blocks=(1, 1),
    )
    graphs = read_baselines(tmp_path / "baselines", manifest).graphs
    assert [(graph.name, graph.exit) for graph in graphs[-2:]] == [("nested if", 2), ("first 1 blocks", 1)]


def test_a_block_that_ends_no_segment_is_refused(tiny_export: Any, tmp_path: Path) -> None:
    manifest = build_manifest(tiny_export.source, tiny_export.source.split((2,)), ("fp32",))
    with pytest.raises(ValueError, match=r"no exit after block 1: its exits are after \[2\]"):
        write_baselines(
            tiny_export.source,
            tiny_export.folder,
            manifest,
            tmp_path / "baselines",
            ExportOptions(),
            blocks=(1,),
        )
    assert not list(tmp_path.iterdir())


def test_what_the_reader_refuses_gets_no_name(
    tiny_export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "file_fact", lambda path: FileFact("not a digest", 3))
    manifest = build_manifest(tiny_export.source, tiny_export.split, ("fp32",))
    with pytest.raises(BadBundle, match="sha256"):
        write_baselines(
            tiny_export.source,
            tiny_export.folder,
            manifest,
            tmp_path / "baselines",
            ExportOptions(),
            blocks=(1,),
        )
    assert not list(tmp_path.iterdir())
