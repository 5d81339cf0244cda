"""Pull a bundle from a model hub into a cache of complete bundles, one folder for each commit.

The cache of huggingface_hub is made of links, which bundles refuse, and it stores what a server sends before
it is compared with anything. So files are read from the hub's addresses here, with the library's own
connection, token and settings: each is compared with the manifest's sha256 while it is written, and none is
longer than the manifest says. A bundle gets its name in the cache when all of it is there.

    $HF_HOME/assets/offramp/user--name/<commit>/       the bundle
    $HF_HOME/assets/offramp/user--name/refs/main       the commit that main was when the hub was last asked
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import FILE_NAME, SIGNATURE_NAME, FileFact
from offramp.runtime.bundle.signature import SIGNATURE_BYTES
from offramp.runtime.errors import BadBundle, BundleNotFound, RunWarning
from offramp.runtime.hub.client import (
    Progress,
    hub_errors,
    is_unreachable,
    progress_bar,
    request_headers,
    require_hub,
    translate,
)
from offramp.runtime.hub.reference import HubReference

LONGEST_MANIFEST = 16 * 2**20  # bytes: what open_bundle reads of one
CHUNK = 2**20
ATTEMPTS, PAUSE = 5, 1.0  # of reading a file, and seconds between them
UNFINISHED, LEFT_AFTER = ".pull-", 24 * 3600  # folders of pulls that were killed, removed after these seconds
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PUSH_AGAIN = "the files on the hub are not those of its manifest: push the bundle again with ee-push"


class OfflineWarning(RunWarning):
    """The hub cannot be reached, and the cached bundle of the same revision is used."""


def pull_bundle(reference: HubReference) -> Path:
    """The folder of a bundle on the hub, in the cache; it is pulled unless all of it is there.

    Only the files that the manifest names are read, and its signature. The hub is asked which commit a branch
    or tag is; a full commit that is cached needs no network. If the hub cannot be reached, the commit of the
    same revision that was pulled last is used, with an OfflineWarning unless HF_HUB_OFFLINE is set. Raises
    BundleNotFound for a repository or revision that is missing, private, or neither reachable nor cached,
    BadBundle for files that are not those of the manifest, BadSetting if huggingface_hub is missing.
    """
    require_hub()
    cache = cache_folder(reference.repository)
    try:
        commit = _find_commit(reference, cache)
        if not _is_whole(cache / commit):
            _download(reference, commit, cache)
        _remember(reference, commit, cache)
    except hub_errors() as problem:
        raise translate(problem, reference) from problem
    return cache / commit


def _is_whole(folder: Path) -> bool:
    """Whether a bundle in the cache has its manifest, and every file in its size.

    Files may be missing or cut: who cleans caches removes some of them, and a machine may have lost power. A
    session compares their contents when it opens them.
    """
    try:
        files = open_bundle(folder).manifest.files
        return all((folder / name).stat().st_size == fact.bytes for name, fact in files.items())
    except (OSError, BadBundle):
        return False


def cache_folder(repository: str) -> Path:
    """The folder of a repository's bundles, whether it exists or not; see HF_HOME and HF_ASSETS_CACHE."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE).expanduser() / "offramp" / repository.replace("/", "--")


def _find_commit(reference: HubReference, cache: Path) -> str:
    """The commit of a revision: asked of the hub, or the one that is cached if that is enough."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import OfflineModeIsEnabled

    revision = reference.revision
    pinned = _COMMIT.fullmatch(revision) is not None
    if pinned and (cache / revision).is_dir():
        return revision
    try:
        url = hf_hub_url(reference.repository, FILE_NAME, revision=revision)
        commit = get_hf_file_metadata(url, library_name="offramp").commit_hash
    except hub_errors() as problem:
        if not is_unreachable(problem):
            raise
        cached = _remembered(reference, cache)
        if cached is None:
            error = translate(problem, reference)
            raise type(error)(f"{reference} is not in the cache {cache}, and {error}") from problem
        if not isinstance(problem, OfflineModeIsEnabled):
            warnings.warn(
                f"{reference}: the hub cannot be reached ({type(problem).__name__}); the bundle that was "
                f"pulled last is used, commit {cached}",
                OfflineWarning,
                stacklevel=6,
            )
        return cached
    if commit is None or not _COMMIT.fullmatch(commit):
        raise BundleNotFound(f"{url}: the answer names no commit; check that HF_ENDPOINT is a model hub")
    if pinned and commit != revision:
        raise BadBundle(f"{reference}: the hub answers with commit {commit}; name a revision that it has")
    return commit


def _remembered(reference: HubReference, cache: Path) -> str | None:
    """The commit that a revision was when it was last asked for, if that bundle is still in the cache."""
    try:
        commit = _reference_file(reference, cache).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return commit if _COMMIT.fullmatch(commit) and (cache / commit).is_dir() else None


def _remember(reference: HubReference, commit: str, cache: Path) -> None:
    """Write down which commit a revision is, for the time when the hub cannot be asked."""
    if reference.revision == commit or _remembered(reference, cache) == commit:
        return
    file = _reference_file(reference, cache)
    new = file.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):  # a cache that can be read alone serves, too
        file.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(commit, encoding="ascii")
        os.replace(new, file)


def _reference_file(reference: HubReference, cache: Path) -> Path:
    return cache / "refs" / quote(reference.revision, safe="")


def _download(reference: HubReference, commit: str, cache: Path) -> None:
    """Pull a commit's bundle into a new folder, and give it its name in the cache when it is complete.

    Of two processes that do this at once, the first to finish gives its folder the name; the other takes it.
    A folder of this name that is not whole is removed then.
    """
    folder, place = cache / f"{UNFINISHED}{uuid.uuid4().hex}", cache / commit
    damaged = folder.with_name(f"{folder.name}-damaged")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(cache)
        folder.mkdir()
        _download_files(reference, commit, folder)
        if place.is_dir() and not _is_whole(place):
            with contextlib.suppress(FileNotFoundError):  # another process has done it
                place.rename(damaged)
        try:
            folder.rename(place)
        except OSError:
            if not place.is_dir():
                raise
    except hub_errors() as problem:
        if not place.is_dir():
            raise
        error = translate(problem, reference)
        raise type(error)(f"the copy in the cache, {place}, is not whole, and {error}") from problem
    except OSError as problem:
        if isinstance(problem, BundleNotFound):
            raise
        raise BundleNotFound(
            f"{reference}: the cache {cache} cannot be written: {problem.strerror or problem}; make room, or "
            "set HF_HOME to another folder"
        ) from problem
    finally:
        for left in (folder, damaged):
            shutil.rmtree(left, ignore_errors=True)


def _download_files(reference: HubReference, commit: str, folder: Path) -> None:
    """Read the manifest, its signature if there is one, and every file that the manifest names."""
    from huggingface_hub.errors import EntryNotFoundError

    source = _Source(reference, commit)
    source.fetch(folder / FILE_NAME, LONGEST_MANIFEST)
    try:
        source.fetch(folder / SIGNATURE_NAME, SIGNATURE_BYTES)
    except EntryNotFoundError:  # most bundles are not signed
        (folder / SIGNATURE_NAME).unlink()
    try:
        files = open_bundle(folder).manifest.files
    except BadBundle as problem:  # it names the file, in a folder that is removed
        text = str(problem).replace(str(folder), str(reference))
        raise type(problem)(f"{text}; {_PUSH_AGAIN}") from problem
    size, free = sum(fact.bytes for fact in files.values()), shutil.disk_usage(folder).free
    if size > free:
        raise BundleNotFound(
            f"{reference}: it has {size:,} bytes, and the disk of {folder.parent} has {free:,} left; make "
            "room, or set HF_HOME to a folder on another disk"
        )
    with progress_bar(size, reference.repository) as progress:
        for name, fact in files.items():
            source.fetch(folder / name, fact.bytes, fact, progress)


class _Source:
    """The files of one commit of a repository."""

    def __init__(self, reference: HubReference, commit: str) -> None:
        self._reference, self._commit = reference, commit

    def fetch(
        self, path: Path, limit: int, fact: FileFact | None = None, progress: Progress | None = None
    ) -> None:
        """Write the file with the name of `path` there; it has at most `limit` bytes.

        fact: size and sha256 that it must have. After a connection that breaks off, the rest is asked for.
        Raises BadBundle for another file, errors of huggingface_hub, and OSError if it cannot be written.
        """
        from huggingface_hub.errors import OfflineModeIsEnabled

        with path.open("wb") as file:
            digest, size = hashlib.sha256(), 0
            for attempt in range(ATTEMPTS):
                try:
                    with self._open(path.name, size) as (chunks, begin):
                        if begin != size:  # the server began anew
                            file.seek(begin)
                            file.truncate()
                            digest, size = hashlib.sha256(), begin
                        for chunk in chunks:
                            size += len(chunk)
                            if size > limit:
                                raise self._wrong(path.name, f"more than {limit:,} bytes")
                            digest.update(chunk)
                            file.write(chunk)
                            if progress is not None:
                                progress.update(len(chunk))
                    break
                except hub_errors() as problem:
                    if fact is not None and size == fact.bytes:
                        break
                    never = isinstance(problem, OfflineModeIsEnabled)  # asked again, it says the same
                    if never or not is_unreachable(problem) or attempt == ATTEMPTS - 1:
                        raise
                    time.sleep(PAUSE)
            file.flush()
            os.fsync(file.fileno())  # before its folder gets its name, which may be on the disk sooner
        if fact is not None and size != fact.bytes:
            raise self._wrong(path.name, f"{size:,} bytes, the manifest has {fact.bytes:,}")
        if fact is not None and digest.hexdigest() != fact.sha256:
            raise self._wrong(path.name, f"sha256 {digest.hexdigest()}, the manifest has {fact.sha256}")

    @contextlib.contextmanager
    def _open(self, name: str, begin: int) -> Iterator[tuple[Iterator[bytes], int]]:
        """The bytes of a file, and the first one's place: `begin`, or 0 if the server sends no parts."""
        from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status

        url = hf_hub_url(self._reference.repository, name, revision=self._commit)
        # The user's token is among them; a redirect to another host takes it away.
        headers = request_headers() | {"Accept-Encoding": "identity"}
        if begin:
            headers["Range"] = f"bytes={begin}-"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            yield response.iter_bytes(CHUNK), begin if response.status_code == 206 else 0

    def _wrong(self, name: str, what: str) -> BadBundle:
        return BadBundle(f"{self._reference}: {name} at commit {self._commit}: {what}; {_PUSH_AGAIN}")


def _remove_unfinished(cache: Path) -> None:
    """Remove folders of pulls that were killed: those in which nothing was written for a day."""
    oldest = time.time() - LEFT_AFTER
    for folder in cache.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError):  # another process removes it, too, or gave it its name
            if max(entry.stat().st_mtime for entry in (folder, *folder.iterdir())) < oldest:
                shutil.rmtree(folder, ignore_errors=True)
