"""One thread pool for all segments; ONNX Runtime's default, a spinning pool a session, doubles the time.

ONNX Runtime's idle workers spin for a while after each run. With one pool a session, the workers of the last
segment still use the cores while the next segment runs. One pool for the whole process
(`set_global_thread_pool_sizes`) removes that; where it is not available, pools that do not spin are within a
few per cent of it.

Once a process has a global pool, ONNX Runtime refuses every session with its own pool, which is the default.
An application that opens other sessions sets use_per_session_threads = False in them, or passes
global_pool=False here.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from offramp.runtime.errors import EngineUnavailable

_lock = threading.Lock()
_global_pool: Pool | None = None  # a process can make its global pool only once


@dataclass(frozen=True)
class Pool:
    """The thread pool on which sessions run.

    kind: a description for users. threads: 0 if an application made the pool and its size is not known.
    shared: whether it is ONNX Runtime's global pool.
    """

    kind: str
    threads: int
    shared: bool


def claim_pool(ort: ModuleType, threads: int | None, global_pool: bool) -> Pool:
    """Return the thread pool on which to run; the first call makes it.

    threads: None is one for each usable core. global_pool: use one pool for the whole process. Raises
    EngineUnavailable if the process already has another pool: ONNX Runtime can neither change it
    nor open sessions beside it.
    """
    global _global_pool
    with _lock:
        if _global_pool is not None:
            if not global_pool or threads not in (None, _global_pool.threads):
                size = (
                    f"of {_global_pool.threads} threads"
                    if _global_pool.threads
                    else "made by the application"
                )
                raise EngineUnavailable(
                    f"threads={threads}, global_pool={global_pool}: this process already walks on a global "
                    f"pool {size}, and ONNX Runtime cannot change it; leave both out, or use another process"
                )
            return _global_pool
        count = usable_cores() if threads is None else threads
        if threads == 1:
            return Pool("none, one thread", 1, False)  # no workers, so nothing to share
        if not global_pool:
            return Pool("one a session, not spinning", count, False)
        if not (
            hasattr(ort, "set_global_thread_pool_sizes")
            and hasattr(ort.SessionOptions, "use_per_session_threads")
        ):
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
    """Set session options so that another session can open in a process that has walked.

    The session runs on the process's global pool, if this module made one.
     options:
    onnxruntime.SessionOptions whose numbers of threads are not set. For benchmarks and checks.
    """
    if _global_pool is not None:
        apply_pool(_global_pool, options)


def usable_cores() -> int:
    """Number of physical cores that this process may use.

    It respects affinity and container quota, and counts hyper-threads of one core once.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = {_siblings(cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min(len(cores), _quota()))


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _quota() -> int:
    """Whole cores that the control group allows (cgroup 2); a large number without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return -(-int(quota) // int(period))
    except (OSError, ValueError):  # ValueError: "max", no limit
        return 1 << 16
