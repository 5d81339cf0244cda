"""A cache of built engines and timings on disk, outside the bundle, since building takes minutes.

An engine holds machine code for one GPU and one TensorRT, and deserializing it runs that code. Therefore a
file is only used if this cache signed it: the folder holds a key of random bytes, and each file ends with its
HMAC-SHA256 under that key. A file that was copied in from elsewhere, changed or shortened counts as missing,
and so does one for other facts (graph, TensorRT, GPU, driver, profiles).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from offramp.runtime.errors import BadSetting

try:
    import fcntl
except ImportError:  # Windows: two processes may then build the same engine, and the second replaces it
    fcntl = None  # type: ignore[assignment]

_MAGIC = b"offramp engine 1\n"
_DIGEST = hashlib.sha256().digest_size


def default_cache_folder() -> Path:
    """The folder of the cache: OFFRAMP_CACHE, or offramp/ in the user's cache folder."""
    if folder := os.environ.get("OFFRAMP_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offramp"


class EngineCache:
    """A cache on disk that keeps bytes under facts (text by name), safe with several processes.

    The folder has mode 0700 and belongs to the user. Raises BadSetting if it belongs to another user or
    others can write it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = os.stat(folder)
        except OSError as problem:
            raise BadSetting(f"{folder}: no cache can be made there ({problem}); set OFFRAMP_CACHE") from None
        if not stat.S_ISDIR(status.st_mode) or not _private(status):
            raise BadSetting(
                f"{folder}: engines are kept where only you can write: chmod 700 it, or set OFFRAMP_CACHE to "
                "a folder of your own"
            )
        self._key = self._secret()

    def get(self, facts: Mapping[str, str]) -> bytes | None:
        """Return the bytes that were kept under these facts; None without bytes with a valid signature."""
        try:
            handle = os.open(self._path(facts), os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        except OSError:
            return None
        with open(handle, "rb") as file:
            if not _private(os.fstat(handle)):
                return None
            data = file.read()
        signed, digest = data[:-_DIGEST], data[-_DIGEST:]
        head = _MAGIC + _line(facts)
        if not signed.startswith(head) or not hmac.compare_digest(self._sign(signed), digest):
            return None
        return signed[len(head) :]

    def put(self, facts: Mapping[str, str], data: bytes) -> None:
        """Keep bytes under these facts; a temporary file is renamed, so that readers see all or nothing."""
        signed = _MAGIC + _line(facts) + data
        self._write(self._path(facts), signed + self._sign(signed))

    @contextmanager
    def lock(self, facts: Mapping[str, str]) -> Iterator[None]:
        """Context manager that holds the lock of these facts; one process at a time holds it.

        The lock is also released when the process is killed.
        """
        if fcntl is None:
            yield
            return
        handle = os.open(self._path(facts).with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _path(self, facts: Mapping[str, str]) -> Path:
        return self.folder / f"{hashlib.sha256(_line(facts)).hexdigest()}.engine"

    def _sign(self, data: bytes) -> bytes:
        return hmac.new(self._key, data, "sha256").digest()

    def _secret(self) -> bytes:
        """Read the cache's key; the first process makes it, and a hard link makes it appear at once."""
        path = self.folder / "key"
        if not path.exists():
            self._write(path, secrets.token_bytes(_DIGEST), replace=False)
        key = path.read_bytes()
        if len(key) != _DIGEST or not _private(os.stat(path)):
            raise BadSetting(f"{path}: not a key of this cache, or open to others; remove {self.folder}")
        return key

    def _write(self, path: Path, data: bytes, *, replace: bool = True) -> None:
        handle, name = tempfile.mkstemp(dir=self.folder, prefix=".new-")  # mode 0600
        try:
            with open(handle, "wb") as file:
                file.write(data)
            if replace:
                os.replace(name, path)
                return
            with suppress(FileExistsError):  # another process was first: its key is used
                os.link(name, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)


def _line(facts: Mapping[str, str]) -> bytes:
    return json.dumps(dict(facts), sort_keys=True).encode("ascii") + b"\n"


def _private(status: os.stat_result) -> bool:
    """Whether the user owns a file and nobody else can write it; always true on Windows."""
    if not hasattr(os, "getuid"):
        return True
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
