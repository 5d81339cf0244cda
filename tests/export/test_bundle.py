"""A bundle appears whole or not at all, and nothing that is not a bundle is ever removed."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from offramp.export.bundle import BadTarget, replace_folder, write_manifest
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import Manifest

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "tiny_bundle"


def manifest(first_label: str = "negative") -> Manifest:
    """The checked-in bundle's manifest with another label, to tell bundles apart."""
    known = open_bundle(SAMPLE).manifest
    return dataclasses.replace(known, labels=(first_label, *known.labels[1:]), files={})


def fill(folder: Path) -> None:
    for file in SAMPLE.iterdir():
        if file.name != "manifest.json":
            shutil.copyfile(file, folder / file.name)


def write(folder: Path, first_label: str = "negative", *, overwrite: bool = False) -> None:
    with replace_folder(folder, overwrite=overwrite) as beside:
        fill(beside)
        write_manifest(beside, manifest(first_label))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_what_the_reader_takes(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "bundle")
    bundle = open_bundle(tmp_path / "deep" / "bundle")
    bundle.verify()
    assert set(bundle.manifest.files) == set(names(SAMPLE)) - {"manifest.json"}
    assert names(tmp_path / "deep") == ["bundle"]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), replace_folder(tmp_path / "bundle") as beside:
        fill(beside)
        raise KeyError
    assert names(tmp_path) == []


def test_a_place_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadTarget, match=r"file/bundle: cannot be written: Not a directory; choose another"):
        write(tmp_path / "file" / "bundle")


def test_an_unfinished_folder_gets_no_name(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="never finished"), replace_folder(tmp_path / "bundle") as beside:
        fill(beside)
    assert names(tmp_path) == []


@pytest.mark.slow
def test_killed_it_leaves_no_bundle_and_the_next_run_is_not_in_its_way(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from offramp.export.bundle import replace_folder\n"
        "with replace_folder(Path(sys.argv[1])) as beside:\n"
        " (beside / 'stem.onnx').write_bytes(b'half')\n"
        " os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "bundle")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "bundle").exists() and len(names(tmp_path)) == 1
    write(tmp_path / "bundle")
    assert names(tmp_path) == ["bundle"]
    open_bundle(tmp_path / "bundle").verify()


def test_an_old_bundle_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    write(tmp_path / "bundle", "old")
    with pytest.raises(KeyError), replace_folder(tmp_path / "bundle", overwrite=True):
        raise KeyError
    assert open_bundle(tmp_path / "bundle").manifest.labels[0] == "old"
    write(tmp_path / "bundle", "new", overwrite=True)
    assert open_bundle(tmp_path / "bundle").manifest.labels[0] == "new"
    assert names(tmp_path) == ["bundle"]


def test_killed_between_the_renames_the_old_bundle_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "bundle", "old")
    (tmp_path / "bundle").rename(tmp_path / ".bundle.old-by-ee-split")
    with pytest.raises(KeyError), replace_folder(tmp_path / "bundle", overwrite=True):
        raise KeyError
    assert open_bundle(tmp_path / "bundle").manifest.labels[0] == "old"


def test_a_bundle_is_replaced_only_when_told(tmp_path: Path) -> None:
    write(tmp_path / "bundle", "old")
    with pytest.raises(BadTarget, match="--overwrite"):
        write(tmp_path / "bundle", "new")
    assert open_bundle(tmp_path / "bundle").manifest.labels[0] == "old"


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.txt").write_text("years of work")
    with pytest.raises(BadTarget, match=r"has no manifest\.json that we wrote"):
        write(tmp_path / "bundle", overwrite=True)
    assert names(tmp_path / "bundle") == ["thesis.txt"]


def test_a_strange_file_in_a_bundle_is_not_removed_with_it(tmp_path: Path) -> None:
    write(tmp_path / "bundle")
    (tmp_path / "bundle" / "notes.txt").write_text("mine")
    with pytest.raises(BadTarget, match=r"notes\.txt is not in its manifest"):
        write(tmp_path / "bundle", overwrite=True)
    assert (tmp_path / "bundle" / "notes.txt").exists()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_or_a_link_is_refused(tmp_path: Path, kind: str) -> None:
    if kind == "file":
        (tmp_path / "bundle").write_text("")
    else:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "bundle").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadTarget, match="a file or a link"):
        write(tmp_path / "bundle", overwrite=True)


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    write(tmp_path / "bundle")
    open_bundle(tmp_path / "bundle").verify()
