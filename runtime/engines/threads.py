"""One thread pool for all segments: the default, a spinning pool in every session, costs a factor of two.

ONNX Runtime's idle workers spin for a while after each run. With one pool a session, the workers of the last
segment still burn the cores while the next segment runs. One pool for the whole process
(`set_global_thread_pool_sizes`) removes that; where it cannot be had, pools that do not spin come within a
few per cent.
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
_made: Pool | None = None  # the process's pool can be made once, so what was made is the process's fact


@dataclass(frozen=True)
class Pool:
    """Which pool the sessions run on; threads 0: an application made the pool and did not say how large."""

    kind: str
    threads: int
    shared: bool


def claim(ort: ModuleType, threads: int | None) -> Pool:
    """The process's pool of `threads` (None: one a core that we may use), made on the first call.

    Raises EngineUnavailable where this process already has ours in another size: ONNX Runtime cannot change
    it.
    """
    global _made
    with _lock:
        if _made is not None and _made.shared:
            if threads not in (None, _made.threads) and _made.threads:
                raise EngineUnavailable(
                    f"threads {threads}: this process already walks with {_made.threads}, and ONNX Runtime "
                    f"cannot change its pool; use threads={_made.threads} or None, or another process"
                )
            if _made.threads or threads is None:
                return _made
        wish = usable_cores() if threads is None else threads
        if not (
            hasattr(ort, "set_global_thread_pool_sizes")
            and hasattr(ort.SessionOptions, "use_per_session_threads")
        ):
            return Pool(
                f"one a session, not spinning (onnxruntime {ort.__version__} has no global pool)", wish, False
            )
        try:
            ort.set_global_thread_pool_sizes(wish, 1)
        except (
            Exception
        ):  # ORT's own error types share no base; it refuses when the application made its pool first
            if threads is not None:
                return Pool(
                    "one a session, not spinning (the application had made the global pool)", wish, False
                )
            _made = Pool("global, made by the application", 0, True)
        else:
            _made = Pool("global", wish, True)
        return _made


def apply(pool: Pool, options: Any) -> None:
    """Set session options so that the session runs on the pool."""
    if pool.shared:
        options.use_per_session_threads = (
            False  # the numbers of threads stay alone: setting them prints warnings
        )
    else:
        options.intra_op_num_threads = pool.threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")


def usable_cores() -> int:
    """Physical cores that this process may use: affinity, hyper-threads counted once, container quota."""
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
    """Whole cores that the control group grants (cgroup 2); a large number where it says nothing."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return -(-int(quota) // int(period))
    except (OSError, ValueError):  # ValueError: "max", no limit
        return 1 << 16
