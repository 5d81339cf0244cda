"""Write a bundle whole or not at all: in a hidden folder beside it, manifest last, then renamed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from offramp.runtime.bundle import open_bundle
from offramp.runtime.manifest import FILE_NAME, FileFact, Manifest


class BadTarget(ValueError):
    """The folder to write cannot be had: something stands there that is not ours to remove."""


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Raise BadTarget unless `folder` is free, empty, or a bundle that may be replaced.

    A folder that holds anything beside what its manifest lists is not replaced: that would be lost.
    """
    cure = "choose another --out"
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise BadTarget(f"{folder} is a file or a link, not a folder; {cure}")
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        manifest = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        ours = {FILE_NAME, *manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise BadTarget(f"{folder} exists and is not a bundle; {cure}") from None
    strange = sorted({entry.name for entry in folder.iterdir()} - ours)
    if strange:
        raise BadTarget(
            f"{folder / strange[0]} is no part of that bundle and would be lost; move it, or {cure}"
        )
    if not overwrite:
        raise BadTarget(f"{folder} holds a bundle; {cure}, or say --overwrite")


@contextlib.contextmanager
def writing(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill and finish(); when the block ends it takes the place of `folder`.

    If the block fails, nothing of it stays and what stood at `folder` still does. Killed, it leaves the
    hidden folder behind, which the next run removes. Two runs must not write the same folder at once.
    """
    folder = Path(folder).absolute()
    new, old = (folder.with_name(f".{folder.name}.{word}-by-ee-split") for word in ("new", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)  # killed between the two renames below: the old bundle comes back
    check_target(folder, overwrite=overwrite)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if not (new / FILE_NAME).is_file():
            raise RuntimeError(f"{new} was never finished: it has no {FILE_NAME}")
        check_target(folder, overwrite=overwrite)  # minutes have gone by
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def finish(folder: Path, manifest: Manifest) -> Manifest:
    """Write a filled folder's manifest, with sha256 and size of every file; the reader then checks it all.

    No fsync: a file that a power cut emptied has another hash, and the reader says so. Gives the manifest
    that was written.
    """
    files = {path.name: _fact(path) for path in sorted(folder.iterdir()) if path.name != FILE_NAME}
    manifest = dataclasses.replace(manifest, files=files)
    (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
    written = open_bundle(folder)
    written.verify()
    return written.manifest


def _fact(path: Path) -> FileFact:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return FileFact(digest.hexdigest(), path.stat().st_size)
