"""Write a folder, a bundle or baselines, whole or not at all: as a hidden folder beside it, then renamed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from offramp.export.describe import describe
from offramp.export.options import ExportOptions
from offramp.export.precision import needs_reduced_range, write_variant
from offramp.export.segments import Exportable, Segment, SplitNetwork, file_name, variants_of
from offramp.export.to_onnx import to_onnx
from offramp.export.verify import Report, verify
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import FILE_NAME, FileFact, Manifest


class BadTarget(ValueError):
    """The folder to write cannot be had: something stands there that is not ours to remove."""


def write_bundle(
    source: Exportable,
    split: SplitNetwork,
    folder: Path,
    options: ExportOptions,
    *,
    texts: Sequence[str] | None = None,
    measure: Callable[[Path], Manifest] | None = None,
) -> tuple[Manifest, Report]:
    """Write the bundle of a split network in the variants of the options, verified; gives its manifest.

    texts: see verify. measure: called with the finished folder before it gets its name; gives the manifest
    that it wrote there. Raises BadTarget, NotVerified, and what measure raises; then no bundle is written.
    """
    variants = options.variants
    with writing(folder, overwrite=options.overwrite) as beside:
        for segment in track(list(split), "exporting", console=Console(stderr=True)):
            write_graphs(segment, beside, options, weights_only=source.weights_only)
        for name, path in source.files.items():
            shutil.copyfile(path, beside / name)
        report = verify(source, beside, split, variants, texts)
        report.require_good()
        facts: dict[str, object] = {}
        if "int8" in variants and not source.weights_only:
            reduced = options.reduce_range
            facts["int8"] = {"reduce_range": needs_reduced_range() if reduced is None else reduced}
        manifest = finish(beside, describe(source, split, variants, facts))
        if measure is not None:
            manifest = measure(beside)
    return manifest, report


def write_graphs(segment: Segment, folder: Path, options: ExportOptions, *, weights_only: bool) -> None:
    """Write a segment's graphs in all variants that it has."""
    first, *others = variants_of(segment, options.variants)
    source = folder / file_name(segment.name, first)
    to_onnx(segment, source)
    for name in others:
        target = folder / file_name(segment.name, name)
        write_variant(name, source, target, weights_only=weights_only, reduce_range=options.reduce_range)


def check_target(folder: Path, *, overwrite: bool, listing: str = FILE_NAME) -> None:
    """Raise BadTarget unless `folder` is free, empty, or one of ours that may be replaced.

    listing: the file that makes it ours and names its files. A folder that holds anything beside these is not
    replaced: that would be lost.
    """
    cure = f"choose another {'--out' if listing == FILE_NAME else '--baselines'}"
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise BadTarget(f"{folder} is a file or a link, not a folder; {cure}")
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        listed = json.loads((folder / listing).read_text(encoding="utf-8"))
        ours = {listing, *(listed["files"] if "files" in listed else (g["file"] for g in listed["graphs"]))}
    except (OSError, ValueError, KeyError, TypeError):
        raise BadTarget(f"{folder} exists and has no {listing} of ours; {cure}") from None
    strange = sorted({entry.name for entry in folder.iterdir()} - ours)
    if strange:
        raise BadTarget(
            f"{folder / strange[0]} is not in its {listing} and would be lost; move it, or {cure}"
        )
    if not overwrite:
        raise BadTarget(f"{folder} holds what an earlier run wrote; {cure}, or say --overwrite")


@contextlib.contextmanager
def writing(folder: Path, *, overwrite: bool = False, listing: str = FILE_NAME) -> Iterator[Path]:
    """A folder to fill and finish(); when the block ends it takes the place of `folder`.

    If the block fails, nothing of it stays and what stood at `folder` still does. Killed, it leaves the
    hidden folder behind, which the next run removes. Two runs must not write the same folder at once.
    """
    folder = Path(folder).absolute()
    new, old = (folder.with_name(f".{folder.name}.{word}-by-ee-split") for word in ("new", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)  # killed between the two renames below: the old one comes back
    check_target(folder, overwrite=overwrite, listing=listing)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if not (new / listing).is_file():
            raise RuntimeError(f"{new} was never finished: it has no {listing}")
        check_target(folder, overwrite=overwrite, listing=listing)  # minutes have gone by
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
    files = {path.name: file_fact(path) for path in sorted(folder.iterdir()) if path.name != FILE_NAME}
    manifest = dataclasses.replace(manifest, files=files)
    (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
    written = open_bundle(folder)
    written.verify()
    return written.manifest


def file_fact(path: Path) -> FileFact:
    """What the file is, for a manifest."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return FileFact(digest.hexdigest(), path.stat().st_size)
