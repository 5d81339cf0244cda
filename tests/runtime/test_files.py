"""A bundle on disk: a file is what its manifest describes, or it is refused."""

import os
import shutil
from pathlib import Path

import pytest
from tiny_bundles import CLASSIFIER, GENERATOR

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.errors import BadBundle, BadManifest, BundleNotFound


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))


@pytest.mark.parametrize("tiny", [CLASSIFIER, GENERATOR])
def test_tiny_bundle_matches_its_manifest(tiny: Path) -> None:
    bundle = open_bundle(tiny)
    bundle.verify()
    assert {path.name for path in tiny.iterdir()} == {*bundle.manifest.files, "manifest.json"}


def test_open_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; write one with"):
        open_bundle(tmp_path / "nowhere")


def test_open_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFound, match=r"no manifest\.json"):
        open_bundle(tmp_path)


def test_read_changed_byte(folder: Path) -> None:
    path = folder / "segment_00.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadBundle, match=r"segment_00\.onnx: sha256 .* the manifest has"):
        open_bundle(folder).read("segment_00.onnx")


@pytest.mark.parametrize("change", [-1, 1])
def test_read_other_size(folder: Path, change: int) -> None:
    path = folder / "stem.onnx"
    data = path.read_bytes()
    path.write_bytes(data[:-1] if change < 0 else data + b"x")
    with pytest.raises(BadBundle, match=r"stem\.onnx: .*bytes, the manifest has"):
        open_bundle(folder).read("stem.onnx")


def test_open_reads_no_file_but_the_manifest(folder: Path) -> None:
    (folder / "segment_01_int8.onnx").unlink()
    bundle = open_bundle(folder)
    assert bundle.read("stem.onnx") == (CLASSIFIER / "stem.onnx").read_bytes()
    with pytest.raises(BundleNotFound, match=r"segment_01_int8\.onnx: missing"):
        bundle.read("segment_01_int8.onnx")


def test_read_unlisted_file(folder: Path) -> None:
    (folder / "other.onnx").write_bytes(b"")
    with pytest.raises(BadBundle, match="does not list"):
        open_bundle(folder).read("other.onnx")


def test_read_link_out_of_bundle(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    shutil.move(folder / "stem.onnx", outside)
    (folder / "stem.onnx").symlink_to(outside)
    with pytest.raises(BadBundle, match="a link out of the bundle"):
        open_bundle(folder).read("stem.onnx")


def test_read_loop_of_links(folder: Path) -> None:
    (folder / "stem.onnx").unlink()
    (folder / "stem.onnx").symlink_to(folder / "stem.onnx")
    with pytest.raises(BadBundle, match=r"stem\.onnx"):
        open_bundle(folder).read("stem.onnx")


def test_open_bundle_through_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(folder)
    assert open_bundle(tmp_path / "current").read("stem.onnx")


def test_read_folder_in_place_of_file(folder: Path) -> None:
    (folder / "stem.onnx").unlink()
    (folder / "stem.onnx").mkdir()
    with pytest.raises(BadBundle, match=r"stem\.onnx"):
        open_bundle(folder).read("stem.onnx")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_read_pipe_in_place_of_file_does_not_block(folder: Path) -> None:
    (folder / "stem.onnx").unlink()
    os.mkfifo(folder / "stem.onnx")
    with pytest.raises(BadBundle, match="not a regular file"):
        open_bundle(folder).read("stem.onnx")


def test_open_manifest_not_utf8(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"\xff{}")
    with pytest.raises(BadBundle, match="not UTF-8"):
        open_bundle(folder)


def test_open_truncated_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text(encoding="utf-8")
    (folder / "manifest.json").write_text(text[:500], encoding="utf-8")
    with pytest.raises(BadManifest, match=r"manifest\.json: not valid JSON"):
        open_bundle(folder)
