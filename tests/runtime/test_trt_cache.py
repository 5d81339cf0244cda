"""The cache of engines: get() returns what put() kept, and nothing that the cache did not sign."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from offramp.runtime import BadSetting
from offramp.runtime.engines import trt_cache
from offramp.runtime.engines.trt_cache import EngineCache

FACTS = {"graph": "a" * 64, "gpu": "Orin 8.7", "driver": "12.6"}
pytestmark = pytest.mark.skipif(os.name == "nt", reason="modes and owners of files")


def engines(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.engine"))


def test_get_returns_what_was_put_under_the_same_facts(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "cache")
    assert cache.get(FACTS) is None
    cache.put(FACTS, b"engine")
    assert cache.get(FACTS) == b"engine"
    assert EngineCache(tmp_path / "cache").get(dict(reversed(FACTS.items()))) == b"engine"
    for fact in FACTS:
        assert cache.get(FACTS | {fact: "other"}) is None


def test_a_second_put_replaces_the_first(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    cache.put(FACTS, b"one")
    cache.put(FACTS, b"two")
    assert cache.get(FACTS) == b"two" and len(engines(tmp_path)) == 1


def test_nobody_else_can_read_or_write_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        cache = EngineCache(tmp_path / "cache")
        cache.put(FACTS, b"engine")
        with cache.lock(FACTS):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "cache").iterdir()} == {0o600}


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(BadSetting, match="chmod 700 it, or set OFFRAMP_CACHE"):
        EngineCache(tmp_path)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BadSetting, match="set OFFRAMP_CACHE"):
        EngineCache(tmp_path / "file")


def test_a_file_that_others_can_write_is_not_used(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    cache.put(FACTS, b"engine")
    engines(tmp_path)[0].chmod(0o666)
    assert cache.get(FACTS) is None


def test_a_changed_or_shortened_file_is_not_used(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    cache.put(FACTS, b"engine")
    (file,) = engines(tmp_path)
    whole = file.read_bytes()
    for at in range(0, len(whole), 5):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert cache.get(FACTS) is None
    for length in range(0, len(whole), 5):
        file.write_bytes(whole[:length])
        assert cache.get(FACTS) is None
    file.write_bytes(whole)
    assert cache.get(FACTS) == b"engine"


def test_a_file_of_another_cache_is_not_used(tmp_path: Path) -> None:
    """As when the folder's files are copied from one device to another."""
    mine, other = EngineCache(tmp_path / "mine"), EngineCache(tmp_path / "other")
    other.put(FACTS, b"engine")
    shutil.copy(engines(tmp_path / "other")[0], tmp_path / "mine")
    assert mine.get(FACTS) is None and other.get(FACTS) == b"engine"


def test_a_file_for_other_facts_is_not_used_under_another_name(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    cache.put(FACTS, b"engine")
    cache.put(FACTS | {"driver": "13.0"}, b"another")
    one, two = engines(tmp_path)
    one.write_bytes(two.read_bytes())
    assert [cache.get(FACTS), cache.get(FACTS | {"driver": "13.0"})].count(None) == 1


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    cache.put(FACTS, b"engine")
    (file,) = engines(tmp_path)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert cache.get(FACTS) is None


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = EngineCache(tmp_path)
    cache.put(FACTS, b"engine")
    names = {file.name for file in tmp_path.iterdir()}

    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trt_cache.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        cache.put(FACTS, b"longer than before")
    assert cache.get(FACTS) == b"engine" and {file.name for file in tmp_path.iterdir()} == names


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv("OFFRAMP_CACHE", raising=False)
    assert trt_cache.default_cache_folder() == Path("/somewhere/offramp")
    monkeypatch.setenv("OFFRAMP_CACHE", "/else")
    assert trt_cache.default_cache_folder() == Path("/else")


@pytest.mark.slow
def test_of_many_processes_one_builds_and_all_agree_on_the_key(tmp_path: Path) -> None:
    code = f"""
import os, sys, time
from pathlib import Path
from offramp.runtime.engines.trt_cache import EngineCache
while not os.path.exists({str(tmp_path / "go")!r}): time.sleep(0.001)
cache = EngineCache(Path({str(tmp_path / "cache")!r}))
with cache.lock({FACTS!r}):
    if cache.get({FACTS!r}) is None:
        time.sleep(0.05)
        cache.put({FACTS!r}, sys.argv[1].encode())
        print("built")
print(cache.get({FACTS!r}).decode())
"""
    command = [sys.executable, "-c", code]
    runs = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(4)]
    (tmp_path / "go").touch()
    outputs = [run.communicate(timeout=60)[0].split() for run in runs]
    assert sum("built" in words for words in outputs) == 1
    assert len({words[-1] for words in outputs}) == 1
