"""Write a bundle or a folder of baselines completely or not at all: as a hidden folder, which is renamed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click

from offramp.export.describe import build_manifest
from offramp.export.finished import open_finished
from offramp.export.options import ExportOptions
from offramp.export.precision import needs_reduced_range, write_variant
from offramp.export.segments import Exportable, Segment, SplitNetwork, file_name, variants_of
from offramp.export.to_onnx import to_onnx
from offramp.export.verify import VerificationReport, verify
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import FILE_NAME, SIGNATURE_NAME, FileFact, Manifest
from offramp.runtime.progress import track


class BadTarget(ValueError):
    """The folder cannot be written: it holds something that an earlier run did not write."""


def write_bundle(
    source: Exportable,
    split: SplitNetwork,
    folder: Path,
    options: ExportOptions,
    *,
    texts: Sequence[str] | None = None,
    measure: Callable[[Path], Manifest] | None = None,
) -> tuple[Manifest, VerificationReport]:
    """Write the bundle of a split network in the variants of the options, and verify it against the network.

    texts: see verify. measure: a function that is called with the finished folder before it gets its name,
    and that returns the manifest it wrote there. At the end the bundle is opened as ee-run opens it; what a
    user may not expect of it is written on stderr. Raises BadTarget, NotVerified, the errors of measure, and
    those of load() for a bundle that ee-run would refuse; then no bundle is written.
    """
    variants = options.variants
    with replace_folder(folder, overwrite=options.overwrite) as beside:
        for segment in track(list(split), "exporting", unit="graph"):
            write_graphs(segment, beside, options, weights_only=source.weights_only)
        write_files(source, beside)
        report = verify(source, beside, split, variants, texts)
        report.require_good()
        facts: dict[str, object] = {}
        if "int8" in variants and not source.weights_only:
            reduced = options.reduce_range
            facts["int8"] = {"reduce_range": needs_reduced_range() if reduced is None else reduced}
        manifest = write_manifest(beside, build_manifest(source, split, variants, facts))
        if measure is not None:
            manifest = measure(beside)
        notes = open_finished(beside)
    for text in notes:
        click.echo(f"{folder}: {text}", err=True)
    return manifest, report


def write_files(source: Exportable, folder: Path) -> None:
    """Write the files that a bundle holds in addition to its graphs."""
    for name, content in source.files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)


def write_graphs(segment: Segment, folder: Path, options: ExportOptions, *, weights_only: bool) -> None:
    """Write a segment's graphs into a folder, one for each variant in which the segment exists.

    A graph that segments share is written with the first of them.
    """
    for graph in segment.graphs:
        first, *others = variants_of(graph, options.variants)
        source = folder / file_name(graph.name, first)
        if graph.name != segment.name and source.exists():
            continue
        to_onnx(graph, source)
        for name in others:
            target = folder / file_name(graph.name, name)
            write_variant(name, source, target, weights_only=weights_only, reduce_range=options.reduce_range)


def check_target(folder: Path, *, overwrite: bool, listing: str = FILE_NAME) -> None:
    """Raise BadTarget unless `folder` is missing, empty, or written by an earlier run and may be replaced.

    listing: the file that an earlier run wrote there, which names all others. A folder that holds any other
    file is not replaced: the file would be lost.
    """
    cure = f"choose another {'--out' if listing == FILE_NAME else '--baselines'}"
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise BadTarget(f"{folder} is a file or a link, not a folder; {cure}")
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        listed = json.loads((folder / listing).read_text(encoding="utf-8"))
        files = listed["files"] if "files" in listed else [graph["file"] for graph in listed["graphs"]]
        known = {listing, SIGNATURE_NAME, *files}  # a signature of files that are replaced holds no more
    except (OSError, ValueError, KeyError, TypeError):
        raise BadTarget(f"{folder} exists and has no {listing} that we wrote; {cure}") from None
    others = sorted({entry.name for entry in folder.iterdir()} - known)
    if others:
        raise BadTarget(f"{folder / others[0]} is not in its {listing} and would be lost; move it, or {cure}")
    if not overwrite:
        raise BadTarget(f"{folder} was written by an earlier run; {cure}, or give --overwrite")


@contextlib.contextmanager
def replace_folder(folder: Path, *, overwrite: bool = False, listing: str = FILE_NAME) -> Iterator[Path]:
    """Context manager that yields a new empty folder and, at the end, puts it in place of `folder`.


    The block must fill the new folder and call write_manifest(), or write its listing. If the block fails,
    the new folder is removed and `folder` is unchanged. If the process is killed, a hidden folder remains,
    which the next run removes. Two runs must not write the same folder at once.
    """
    folder = Path(folder).absolute()
    new, old = (folder.with_name(f".{folder.name}.{word}-by-ee-split") for word in ("new", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)  # an earlier run was killed between the two renames below
    check_target(folder, overwrite=overwrite, listing=listing)
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
    except OSError as problem:
        raise BadTarget(f"{folder}: cannot be written: {problem.strerror}; choose another --out") from None
    try:
        yield new
        if not (new / listing).is_file():
            raise RuntimeError(f"{new} was never finished: it has no {listing}")
        check_target(folder, overwrite=overwrite, listing=listing)  # again, after minutes
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)  # the second renaming failed
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest into a folder of graphs, with sha256 and size of every file, and verify the folder.

    There is no fsync: a file that a power cut emptied has another hash, which readers check. Returns the
    written manifest.
    """
    files = {path.name: file_fact(path) for path in sorted(folder.iterdir()) if path.name != FILE_NAME}
    manifest = dataclasses.replace(manifest, files=files)
    (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
    written = open_bundle(folder)
    written.verify()
    return written.manifest


def file_fact(path: Path) -> FileFact:
    """Sha256 and size in bytes of a file, as a manifest lists them."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(2**20):
            digest.update(data)
    return FileFact(digest.hexdigest(), path.stat().st_size)
