"""Thread pools of ONNX Runtime, and the number of threads that this process should use.

ONNX Runtime's default, a spinning pool for each session, doubles the time of a walk: the idle workers of the
last segment still use the cores while the next segment runs. Two settings avoid that. Pools that do not spin,
one for each segment, are the default of load(): they leave the rest of the process as it is. One pool for the
whole process (`set_global_thread_pool_sizes`) is a few per cent faster and is what the commands use; from
then on ONNX Runtime refuses every session of that process that does not set use_per_session_threads = False,
and sessions do not survive a fork.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from offramp.runtime.errors import EngineUnavailable, SessionForked
from offramp.runtime.forks import after_fork

# An ONNX model of one node, Identity: an application's global pool shows itself by refusing a session of it.
_PROBE = (
    b'\x08\x08:+\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01g'
    b"Z\t\n\x01x\x12\x04\n\x02\x08\x01b\t\n\x01y\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)

FORKED_POOL = (
    "the process was forked after ONNX Runtime's global pool was made (global_pool=True), whose threads it "
    "does not have: leave global_pool out of load(), or call load() in the child alone"
)
_lock = threading.Lock()
_global_pool: Pool | None = None  # a process can make its global pool only once
_forked = False  # whether the global pool belongs to a process from which this one was forked


@dataclass(frozen=True)
class Pool:
    """The thread pool on which sessions run.

    kind: a description for users. threads: 0 if an application made the pool and its size is not known.
    shared: whether it is ONNX Runtime's global pool.
    """

    kind: str
    threads: int
    shared: bool

    @property
    def has_workers(self) -> bool:
        """Whether sessions on it have threads, which a forked process does not have."""
        return self.shared or self.threads != 1

    def check_forked(self) -> None:
        """Raise SessionForked if a forked process cannot open sessions like those of its parent."""
        if self.shared:
            raise SessionForked(FORKED_POOL)


def claim_pool(ort: ModuleType, threads: int | None, global_pool: bool) -> Pool:
    """Return the thread pool on which to run.

    threads: None is one for each usable core. global_pool: make one pool for the whole process, if it has
    none. A process that has one runs every session on it, with either value. Raises EngineUnavailable if that
    pool has another number of threads, as ONNX Runtime can neither change it nor open sessions beside it, and
    SessionForked if it belongs to the process from which this one was forked.
    """
    global _global_pool
    with _lock:
        if _forked:
            raise SessionForked(FORKED_POOL)
        if _global_pool is None and not global_pool and _application_has_global_pool(ort):
            _global_pool = Pool("global, made by the application", 0, True)
        if _global_pool is not None:
            if threads not in (None, _global_pool.threads):
                size = (
                    f"of {_global_pool.threads} threads"
                    if _global_pool.threads
                    else "made by the application"
                )
                raise EngineUnavailable(
                    f"threads={threads}: this process has a global pool {size}, and ONNX Runtime cannot "
                    "change it; leave threads out, or use another process"
                )
            return _global_pool
        count = usable_cores() if threads is None else threads
        if count == 1:
            return Pool("none, one thread", 1, False)  # no workers, so nothing to share
        if not global_pool:
            return Pool("one a session, not spinning", count, False)
        if not _knows_global_pools(ort):
            reason = f"onnxruntime {ort.__version__} has no global pool"
            return Pool(f"one a session, not spinning ({reason})", count, False)
        try:
            ort.set_global_thread_pool_sizes(count, 1)
            _global_pool = Pool("global", count, True)
        except Exception as problem:  # ORT's own error types share no base; it refuses a second pool
            if threads is not None:
                raise EngineUnavailable(
                    f"threads={threads}: the application has already made ONNX Runtime's global pool "
                    f"({problem}); leave threads out to walk on that pool"
                ) from problem
            _global_pool = Pool("global, made by the application", 0, True)
        return _global_pool


def apply_pool(pool: Pool, options: Any) -> None:
    """Set ONNX Runtime's session options so that the session runs on a pool."""
    if pool.shared:
        options.use_per_session_threads = False  # setting numbers of threads too would print warnings
    else:
        options.intra_op_num_threads = pool.threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")


def share_global_pool(options: Any) -> None:
    """Set session options so that another session can open in a process that has a global pool.

    The session runs on that pool, if this module made or met one. options: onnxruntime.SessionOptions whose
    numbers of threads are not set. For benchmarks and checks.
    """
    if _global_pool is not None:
        apply_pool(_global_pool, options)


def usable_cores(root: Path = Path("/"), cpus: Collection[int] | None = None) -> int:
    """Number of physical cores that this process may use, at least 1: the default number of threads.

    Hyper-threads of one core count once. A CPU limit of the control group (versions 1 and 2, also of a parent
    group) counts rounded up, so that a limit of 1.5 CPUs gives 2 threads. root: the folder with sys/ and
    proc/. cpus: numbers of the CPUs that the process may run on; None: as the system says (affinity).
    """
    if cpus is None:
        if not hasattr(os, "sched_getaffinity"):
            return os.cpu_count() or 1
        cpus = os.sched_getaffinity(0)
    cores = len({_siblings(root, cpu) for cpu in cpus})
    limits = [-(-quota // period) for quota, period in _quotas(root)]
    return max(1, min([cores, *limits]))


def _siblings(root: Path, cpu: int) -> str:
    try:
        return (root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _quotas(root: Path) -> Iterator[tuple[int, int]]:
    """The limits of this process's control groups and their parents: microseconds of CPU in each period."""
    for folder in _control_groups(root):
        for read in (_quota_v2, _quota_v1):
            try:
                quota, period = read(folder)
            except (OSError, ValueError):  # no such file; ValueError: "max", no limit
                continue
            if quota > 0 and period > 0:  # version 1 writes -1 where there is no limit
                yield quota, period


def _quota_v2(folder: Path) -> tuple[int, int]:
    quota, period = (folder / "cpu.max").read_text().split()
    return int(quota), int(period)


def _quota_v1(folder: Path) -> tuple[int, int]:
    return int((folder / "cpu.cfs_quota_us").read_text()), int((folder / "cpu.cfs_period_us").read_text())


def _control_groups(root: Path) -> Iterator[Path]:
    """Folders of the control groups that may limit the CPUs: the process's own ones and all their parents.

    In a container the path of proc/self/cgroup may be that of the host, which is not mounted there: then its
    folders do not exist, and the mount's top is the container's own group.
    """
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        number, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if number == "0":
            tops = [mount, mount / "unified"]
        elif "cpu" in names:
            tops = [mount / controllers, mount / "cpu"]
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for top in tops:
            for count in range(len(parts), -1, -1):
                yield top.joinpath(*parts[:count])


def _knows_global_pools(ort: ModuleType) -> bool:
    return hasattr(ort, "set_global_thread_pool_sizes") and hasattr(
        ort.SessionOptions, "use_per_session_threads"
    )


def _application_has_global_pool(ort: ModuleType) -> bool:
    """Whether a session opens on a global pool and not with threads of its own."""
    return _knows_global_pools(ort) and not _opens(ort, True) and _opens(ort, False)


def _opens(ort: ModuleType, own_threads: bool) -> bool:
    """Whether ONNX Runtime opens a session of a tiny graph; own_threads: use_per_session_threads."""
    options = ort.SessionOptions()
    options.use_per_session_threads, options.log_severity_level = own_threads, 4
    if own_threads:
        options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        ort.InferenceSession(_PROBE, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception:  # ORT's own error types share no base
        return False
    return True


def _in_child() -> None:
    global _lock, _forked
    _lock = threading.Lock()
    _forked = _global_pool is not None


after_fork(_in_child)
