"""The bundle on disk: a flat folder, each file of which is checked against the manifest when it is read.

Each file is read once and hashed, and the same bytes go to the engine, so that the engine runs the bytes that
were checked. Files are read when an engine needs them, so a variant that is not used costs nothing.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from offramp.runtime.bundle.checks import read_manifest
from offramp.runtime.bundle.manifest import FILE_NAME, FileFact, Manifest
from offramp.runtime.errors import BadBundle, BundleNotFound

_LONGEST_MANIFEST = 16 * 2**20  # bytes; a manifest of 100 segments has some 300 kB


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk: its folder and its checked manifest."""

    folder: Path
    manifest: Manifest

    def read(self, name: str) -> bytes:
        """Read one file of the bundle and verify its size and sha256.

        Raises BundleNotFound if it is missing, BadBundle if it differs from the manifest.
        """
        fact = self.manifest.files.get(name)
        if fact is None:
            raise BadBundle(f"{self.folder / name}: the manifest does not list this file")
        data = _read(self.folder, name, fact.bytes)
        _compare(self.folder / name, data, fact)
        return data

    def verify(self) -> None:
        """Read and verify every file that the manifest lists, one after another."""
        for name in self.manifest.files:
            self.read(name)


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Open a bundle folder: read and check its manifest, and no other file.

    Raises BundleNotFound if there is no bundle, BadManifest, which names the field, and BadBundle for links
    and for files that are not regular.
    """
    folder = Path(path)
    cure = "write one with: python export/split.py ckpt/ (or name it with --bundle DIR)"
    if not folder.is_dir():
        raise BundleNotFound(f"{folder}: no such folder; {cure}")
    if not (folder / FILE_NAME).exists():
        raise BundleNotFound(f"{folder}: not a bundle, it has no {FILE_NAME}; {cure}")
    data = _read(folder, FILE_NAME, _LONGEST_MANIFEST)
    if len(data) > _LONGEST_MANIFEST:
        raise BadBundle(
            f"{folder / FILE_NAME}: larger than {_LONGEST_MANIFEST} bytes, so it is no manifest of offramp"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise BadBundle(f"{folder / FILE_NAME}: not UTF-8: {problem}; write the bundle again") from problem
    return Bundle(folder, read_manifest(text, source=str(folder / FILE_NAME)))


def _read(folder: Path, name: str, size: int) -> bytes:
    """Read at most size + 1 bytes of a regular file that is in the folder itself."""
    path = folder / name
    try:
        if path.resolve(strict=True).parent != folder.resolve(strict=True):
            raise BadBundle(f"{path}: a link out of the bundle; copy the file itself into the folder")
        # Not blocking: a named pipe in place of the file must be refused, not waited for.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise BadBundle(f"{path}: not a regular file; write the bundle again")
            return file.read(size + 1)
    except FileNotFoundError:
        raise BundleNotFound(f"{path}: missing; copy the bundle again, all of it") from None
    except IsADirectoryError:
        raise BadBundle(f"{path}: a folder where a file should be; write the bundle again") from None
    except (OSError, RuntimeError) as problem:  # RuntimeError: Python < 3.13 raises it for a loop of links
        if isinstance(problem, BadBundle):
            raise
        raise BadBundle(f"{path}: cannot be read: {problem}") from problem


def _compare(path: Path, data: bytes, fact: FileFact) -> None:
    cure = "the file changed after the bundle was written: copy or write the bundle again"
    if len(data) != fact.bytes:
        size = f"more than {fact.bytes}" if len(data) > fact.bytes else str(len(data))
        raise BadBundle(f"{path}: {size} bytes, the manifest has {fact.bytes}; {cure}")
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != fact.sha256:
        raise BadBundle(f"{path}: sha256 {sha256}, the manifest has {fact.sha256}; {cure}")
