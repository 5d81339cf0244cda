"""Flipped bits: none of a signed bundle is accepted, and none of a file that an unsigned manifest lists."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_bundles import CLASSIFIER, GENERATOR

from offramp.export.sign import sign_bundle, write_keys
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.graph_checks import check_graph
from offramp.runtime.bundle.manifest import FILE_NAME, SIGNATURE_NAME
from offramp.runtime.errors import BadBundle, OfframpError

SOURCES = [CLASSIFIER, GENERATOR]
IDS = ["classifier", "decoder"]


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def draw(folder: Path, flips: int, seed: int = 0) -> list[tuple[str, int]]:
    """Random (file, bit), each file equally often: a small one matters as much as a large one."""
    random = np.random.default_rng(seed)
    sizes = {path.name: 8 * path.stat().st_size for path in sorted(folder.iterdir())}
    names = list(sizes)
    return [
        (name, int(random.integers(sizes[name])))
        for name in (names[int(random.integers(len(names)))] for _ in range(flips))
    ]


def count_accepted(source: Path, work: Path, flips: int) -> int:
    """How many flips in a signed copy of a bundle are not refused by opening and verifying it."""
    folder = Path(shutil.copytree(source, work / "bundle"))
    public = write_keys(work / "key.pem")
    sign_bundle(folder, work / "key.pem")
    whole, accepted = open_bundle(folder, public), 0
    for name, bit in draw(folder, flips):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(flip(data, bit))
        try:
            if name in whole.manifest.files:
                whole.read(name)
            else:  # the manifest or the signature, which are read when a bundle is opened
                open_bundle(folder, public)
            accepted += 1
        except BadBundle:
            pass
        (folder / name).write_bytes(data)
    return accepted


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=IDS)
def test_250_flips_of_a_signed_bundle_are_refused(source: Path, tmp_path: Path) -> None:
    assert count_accepted(source, tmp_path, 250) == 0


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=IDS)
def test_5000_flips_of_a_signed_bundle_are_refused(source: Path, tmp_path: Path) -> None:
    assert count_accepted(source, tmp_path, 5000) == 0


@pytest.mark.parametrize("source", SOURCES, ids=IDS)
def test_flips_of_files_are_refused_without_a_signature(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "bundle"))
    bundle = open_bundle(folder)
    for name, bit in draw(folder, 100, seed=1):
        if name == FILE_NAME:
            continue
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(flip(data, bit))
        with pytest.raises(BadBundle, match="sha256"):
            bundle.read(name)
        (folder / name).write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=IDS)
def test_flips_of_an_unsigned_manifest_are_refused_or_change_no_more_than_what_it_says(
    source: Path, tmp_path: Path
) -> None:
    # A letter of a label can change: only a signature tells. Nothing but typed errors may be raised.
    folder = Path(shutil.copytree(source, tmp_path / "bundle"))
    data, refused = (folder / FILE_NAME).read_bytes(), 0
    files = open_bundle(folder).manifest.files
    for bit in np.random.default_rng(2).integers(8 * len(data), size=100):
        (folder / FILE_NAME).write_bytes(flip(data, int(bit)))
        try:
            bundle = open_bundle(folder)
            bundle.verify()
            assert bundle.manifest.files == files
        except OfframpError:
            refused += 1
    assert refused > 50


def test_cut_off_at_any_length_a_graph_is_refused() -> None:
    data = (CLASSIFIER / "segment_00.onnx").read_bytes()
    facts = check_graph(data, "whole")
    for length in range(0, len(data), 37):
        try:
            rest = check_graph(data[:length], "cut")
        except BadBundle:
            continue
        # Cut between two fields of the model: no nodes are missing, and a hash would tell all the same.
        assert rest.operators == facts.operators
        assert hashlib.sha256(data[:length]).digest() != hashlib.sha256(data).digest()


def test_signature_is_no_file_of_the_bundle(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))
    write_keys(tmp_path / "key.pem")
    sign_bundle(folder, tmp_path / "key.pem")
    assert SIGNATURE_NAME not in open_bundle(folder).manifest.files
    assert {path.name for path in folder.iterdir()} == {
        *open_bundle(CLASSIFIER).manifest.files,
        FILE_NAME,
        SIGNATURE_NAME,
    }
