"""Hostile bundles are refused before an engine sees them, in one line that names the file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from doubles import gpu
from hostile_attacks import ATTACKS, of_kind
from hostile_bundles import (
    Attack,
    external,
    loop,
    other_neighbour,
    read_json,
    rehash,
    rehash_baselines,
    write_json,
)
from tiny_bundles import CLASSIFIER, GENERATOR

from offramp.runtime import load
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.errors import BadBundle, BundleNotFound

MOST_CHARACTERS = 1200


def refusal(folder: Path) -> str:
    """What opening and verifying a bundle says, which must refuse it."""
    with pytest.raises((BadBundle, BundleNotFound)) as caught:
        open_bundle(folder).verify()
    return str(caught.value)


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_hostile_bundle_is_refused(attack: Attack, tmp_path: Path) -> None:
    folder = attack.apply(tmp_path / "bundle")
    with pytest.raises((BadBundle, BundleNotFound), match=attack.refusal) as caught:
        open_bundle(folder).verify()
    message = str(caught.value)
    assert message.isprintable() and len(message) < MOST_CHARACTERS
    assert str(folder) in message


def test_there_are_sixty_attacks_with_names_of_their_own() -> None:
    assert len({str(attack) for attack in ATTACKS}) == len(ATTACKS) >= 60


@pytest.mark.parametrize("threat", [9, 12, 16])
def test_engine_never_gets_a_refused_graph(
    threat: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = of_kind(threat)[0]
    folder = attack.apply(tmp_path / "bundle")
    hostile, opened = (folder / "segment_00.onnx").read_bytes(), []
    real = onnxruntime.InferenceSession

    def record(data: Any, *arguments: Any, **options: Any) -> Any:
        opened.append(data)
        return real(data, *arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    with pytest.raises(BadBundle, match=attack.refusal):
        load(folder, share=False)
    assert opened and all(isinstance(data, bytes) and data != hostile for data in opened)


def test_weights_in_the_working_directory_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(CLASSIFIER, tmp_path / "bundle")
    external("weights.bin")(tmp_path / "bundle")
    monkeypatch.chdir(tmp_path / "bundle")
    with pytest.raises(BadBundle, match="external data"):
        load(".")


def test_graph_of_another_segment_is_refused(tmp_path: Path) -> None:
    shutil.copytree(CLASSIFIER, tmp_path / "bundle")
    other_neighbour(tmp_path / "bundle")
    with pytest.raises(BadBundle, match=r"segment_00\.onnx: inputs .* the manifest has"):
        load(tmp_path / "bundle")


def test_file_swapped_after_it_was_read_changes_nothing(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))
    bundle = open_bundle(folder)
    data = bundle.read("segment_00.onnx")
    os.replace(folder / "segment_01.onnx", folder / "segment_00.onnx")
    assert data == (CLASSIFIER / "segment_00.onnx").read_bytes()
    with pytest.raises(BadBundle):
        bundle.read("segment_00.onnx")


def test_hard_link_is_a_file_like_any_other(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))
    os.link(folder / "stem.onnx", tmp_path / "elsewhere.onnx")
    assert open_bundle(folder).read("stem.onnx") == (CLASSIFIER / "stem.onnx").read_bytes()
    (tmp_path / "elsewhere.onnx").write_bytes(b"other")  # and so is the file in the bundle
    assert "stem.onnx: 5 bytes" in refusal(folder)


def test_sparse_file_of_gigabytes_costs_no_memory(tmp_path: Path) -> None:
    import tracemalloc

    (attack,) = [attack for attack in of_kind(4) if "3 GiB" in attack.name]
    folder = attack.apply(tmp_path / "bundle")
    tracemalloc.start()
    try:
        refusal(folder)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("source", [CLASSIFIER, GENERATOR], ids=["classifier", "decoder"])
def test_a_bundle_as_it_was_written_is_accepted(source: Path) -> None:
    open_bundle(source).verify()


def test_nothing_opens_a_file_that_only_lies_there(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))
    for name in ("segment_00.engine", "segment_00.plan", "custom_ops.so", "segment_00.onnx.data"):
        os.mkfifo(folder / name)  # whoever opened it would wait
    with load(folder) as session:
        assert session("good film").label  # type: ignore[operator, union-attr]


def test_engines_in_a_bundle_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = gpu.machine(monkeypatch, tmp_path / "cache")
    folder = Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))
    with load(folder, engine="trt"):
        engines = [path.read_bytes() for path in (tmp_path / "cache").rglob("*.engine")]
    shutil.rmtree(tmp_path / "cache")
    value = read_json(folder)
    for number, data in enumerate(engines):  # listed, and named like the graphs
        (folder / f"segment_{number:02d}.engine").write_bytes(data)
        value["files"][f"segment_{number:02d}.engine"] = {"sha256": "", "bytes": 0}
    write_json(folder, value)
    rehash(folder)
    built = machine.trt.builds
    with load(folder, engine="trt", share=False):
        assert machine.trt.builds == 2 * built > 0  # each built again, none taken from the bundle


def test_hostile_baseline_is_refused(tmp_path: Path) -> None:
    from offramp.runtime.tuning.baselines import open_baseline, read_baselines

    manifest = open_bundle(CLASSIFIER).manifest
    folder = Path(shutil.copytree(CLASSIFIER.with_name("tiny_baselines"), tmp_path / "baselines"))
    rehash_baselines(folder, "nested.onnx", loop())
    (fact,) = [fact for fact in read_baselines(folder, manifest).graphs if fact.file == "nested.onnx"]
    with pytest.raises(BadBundle, match=r"nested\.onnx: .*'Loop' is not allowed"):
        open_baseline(folder, fact, manifest, threads=None, threshold=0.5)
