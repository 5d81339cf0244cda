"""The bundle on disk: a flat folder, each file of which is checked against the manifest when it is read.

Each file is read once and hashed, and the same bytes go to the engine, so that the engine runs the bytes that
were checked. Graphs are checked further before an engine sees them (graph_checks): Bundle.read is the only
way to a file of a bundle. Files are read when an engine needs them, so a variant that is not used costs
nothing.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from offramp.runtime.bundle.checks import read_manifest
from offramp.runtime.bundle.external import SUFFIX
from offramp.runtime.bundle.graph_checks import GraphFacts, check_graph
from offramp.runtime.bundle.manifest import FILE_NAME, SIGNATURE_NAME, FileFact, Manifest
from offramp.runtime.bundle.signature import SIGNATURE_BYTES, check_signature
from offramp.runtime.errors import BadBundle, BundleNotFound

_LONGEST_MANIFEST = 16 * 2**20  # bytes; a manifest of 100 segments has some 300 kB
_CHANGED = "the file changed after the bundle was written: copy or write the bundle again"


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk: its folder and its checked manifest."""

    folder: Path
    manifest: Manifest

    def read(self, name: str) -> bytes:
        """Read one file of the bundle, verify its size and sha256, and check it if it is a graph.

        Raises BundleNotFound if it is missing, BadBundle if it differs from the manifest or is a graph that
        no engine may open.
        """
        data = self._read_verified(name)
        if name in self._graph_files:
            check_graph(data, str(self.folder / name), weights=self.weights_of(name))
        return data

    def weights_of(self, graph: str) -> tuple[str, int] | None:
        """Name and bytes of the file that holds weights of a graph; None if the graph has all of them."""
        fact = self.manifest.files.get(graph + SUFFIX)
        return None if fact is None else (graph + SUFFIX, fact.bytes)

    def read_graph_facts(self, name: str) -> GraphFacts:
        """Read one graph, verify it as read() does, and return what it holds."""
        data = self._read_verified(name)
        return check_graph(data, str(self.folder / name), weights=self.weights_of(name))

    def verify(self) -> None:
        """Read and verify every file that the manifest lists, one after another."""
        for name in self.manifest.files:
            self.read(name)

    @cached_property
    def _graph_files(self) -> frozenset[str]:
        return self.manifest.graph_files

    def _read_verified(self, name: str) -> bytes:
        fact = self.manifest.files.get(name)
        if fact is None:
            raise BadBundle(f"{self.folder / name}: the manifest does not list this file")
        data = _read(self.folder, name, fact.bytes)
        _compare(self.folder / name, data, fact)
        return data


def open_bundle(
    path: str | os.PathLike[str], require_signature: str | os.PathLike[str] | None = None
) -> Bundle:
    """Open a bundle folder: read and check its manifest, and no other file.

    require_signature: file of a public key that must have signed the manifest, which is then verified before
    anything of it is interpreted. Raises BundleNotFound if there is no bundle, BadSignature, BadManifest,
    which names the field, and BadBundle for links and for files that are not regular.
    """
    folder = Path(path)
    cure = "write one with: python export/split.py ckpt/ (or name it with --bundle DIR)"
    if not folder.is_dir():
        raise BundleNotFound(f"{folder}: no such folder; {cure}")
    if not (folder / FILE_NAME).exists():
        raise BundleNotFound(f"{folder}: not a bundle, it has no {FILE_NAME}; {cure}")
    data = _read(folder, FILE_NAME, _LONGEST_MANIFEST, exact=False)
    if require_signature is not None:
        check_signature(folder, data, read_signature(folder), require_signature)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise BadBundle(f"{folder / FILE_NAME}: not UTF-8: {problem}; write the bundle again") from problem
    return Bundle(folder, read_manifest(text, source=str(folder / FILE_NAME)))


def read_signature(folder: Path) -> bytes | None:
    """The signature beside a manifest, or None if there is none; it is not verified here."""
    if not os.path.lexists(folder / SIGNATURE_NAME):
        return None
    return _read(folder, SIGNATURE_NAME, SIGNATURE_BYTES, exact=False)


def _read(folder: Path, name: str, size: int, *, exact: bool = True) -> bytes:
    """Read a regular file that is in the folder itself and has `size` bytes, or at most these if not exact.

    The size is compared before anything is read: a sparse file of gigabytes costs a few bytes of disk. One
    byte more is read, so that a file that grows meanwhile differs from what was expected.
    """
    path = folder / name
    try:
        if path.resolve(strict=True).parent != folder.resolve(strict=True):
            raise BadBundle(f"{path}: a link out of the bundle; copy the file itself into the folder")
        # Not blocking: a named pipe in place of the file must be refused, not waited for.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise BadBundle(f"{path}: not a regular file; write the bundle again")
            held = os.fstat(handle).st_size
            if exact and held != size:
                raise BadBundle(f"{path}: {held} bytes, the manifest has {size}; {_CHANGED}")
            if held > size:
                raise BadBundle(f"{path}: {held} bytes; one of offramp has at most {size}")
            return file.read(held + 1)
    except FileNotFoundError:
        raise BundleNotFound(f"{path}: missing; copy the bundle again, all of it") from None
    except IsADirectoryError:
        raise BadBundle(f"{path}: a folder where a file should be; write the bundle again") from None
    except (OSError, RuntimeError) as problem:  # RuntimeError: Python < 3.13 raises it for a loop of links
        if isinstance(problem, BadBundle):
            raise
        raise BadBundle(f"{path}: cannot be read: {problem}") from problem


def _compare(path: Path, data: bytes, fact: FileFact) -> None:
    if len(data) != fact.bytes:
        raise BadBundle(f"{path}: its size changed while it was read; {_CHANGED}")
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != fact.sha256:
        raise BadBundle(f"{path}: sha256 {sha256}, the manifest has {fact.sha256}; {_CHANGED}")
