"""A bundle on disk: what is read is what the manifest says, or an error."""

import os
import shutil
from pathlib import Path

import pytest

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.errors import BadBundle, BadManifest, BundleNotFound

TINY = Path(__file__).parents[1] / "data" / "tiny_bundle"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "bundle"))


def test_every_file_of_the_tiny_bundle_is_as_listed() -> None:
    bundle = open_bundle(TINY)
    bundle.verify()
    assert {path.name for path in TINY.iterdir()} == {*bundle.manifest.files, "manifest.json"}


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; write one with"):
        open_bundle(tmp_path / "nowhere")


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFound, match=r"no manifest\.json"):
        open_bundle(tmp_path)


def test_a_changed_byte(folder: Path) -> None:
    path = folder / "segment_00.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadBundle, match=r"segment_00\.onnx: sha256 .* the manifest says"):
        open_bundle(folder).read("segment_00.onnx")


@pytest.mark.parametrize("change", [-1, 1])
def test_another_size(folder: Path, change: int) -> None:
    path = folder / "stem.onnx"
    data = path.read_bytes()
    path.write_bytes(data[:-1] if change < 0 else data + b"x")
    with pytest.raises(BadBundle, match=r"stem\.onnx: .*bytes, the manifest says"):
        open_bundle(folder).read("stem.onnx")


def test_files_are_read_only_when_asked_for(folder: Path) -> None:
    (folder / "segment_01_int8.onnx").unlink()
    bundle = open_bundle(folder)
    assert bundle.read("stem.onnx") == (TINY / "stem.onnx").read_bytes()
    with pytest.raises(BundleNotFound, match=r"segment_01_int8\.onnx: missing"):
        bundle.read("segment_01_int8.onnx")


def test_a_file_that_is_not_listed(folder: Path) -> None:
    (folder / "other.onnx").write_bytes(b"")
    with pytest.raises(BadBundle, match="does not list"):
        open_bundle(folder).read("other.onnx")


def test_a_link_out_of_the_bundle(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    shutil.move(folder / "stem.onnx", outside)
    (folder / "stem.onnx").symlink_to(outside)
    with pytest.raises(BadBundle, match="a link out of the bundle"):
        open_bundle(folder).read("stem.onnx")


def test_a_loop_of_links(folder: Path) -> None:
    (folder / "stem.onnx").unlink()
    (folder / "stem.onnx").symlink_to(folder / "stem.onnx")
    with pytest.raises(BadBundle, match=r"stem\.onnx"):
        open_bundle(folder).read("stem.onnx")


def test_a_bundle_reached_through_a_link_is_fine(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(folder)
    assert open_bundle(tmp_path / "current").read("stem.onnx")


def test_a_folder_in_place_of_a_file(folder: Path) -> None:
    (folder / "stem.onnx").unlink()
    (folder / "stem.onnx").mkdir()
    with pytest.raises(BadBundle, match=r"stem\.onnx"):
        open_bundle(folder).read("stem.onnx")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_in_place_of_a_file_is_not_waited_for(folder: Path) -> None:
    (folder / "stem.onnx").unlink()
    os.mkfifo(folder / "stem.onnx")
    with pytest.raises(BadBundle, match="not a regular file"):
        open_bundle(folder).read("stem.onnx")


def test_a_manifest_that_is_not_utf8(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"\xff{}")
    with pytest.raises(BadBundle, match="not UTF-8"):
        open_bundle(folder)


def test_a_manifest_cut_short(folder: Path) -> None:
    text = (folder / "manifest.json").read_text(encoding="utf-8")
    (folder / "manifest.json").write_text(text[:500], encoding="utf-8")
    with pytest.raises(BadManifest, match=r"manifest\.json: not valid JSON"):
        open_bundle(folder)
