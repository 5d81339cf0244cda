"""One thread pool for all segments: the default, a spinning pool in every session, costs a factor of two.

ONNX Runtime's idle workers spin for a while after each run. With one pool a session, the workers of the last
segment still burn the cores while the next segment runs. One pool for the whole process
(`set_global_thread_pool_sizes`) removes that; where it cannot be had, pools that do not spin come within a
few per cent.

The price: once a process has a global pool, ONNX Runtime refuses every session that wants its own, which is
the default. An application that opens other sessions sets use_per_session_threads = False in them, or asks
for global_pool=False here.
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


def claim(ort: ModuleType, threads: int | None, global_pool: bool) -> Pool:
    """The pool to run on with `threads` (None: one a core that we may use), made on the first call.

    Raises EngineUnavailable where the process has a pool that contradicts the wish: ONNX Runtime can neither
    change it nor open sessions beside it.
    """
    global _made
    with _lock:
        if _made is not None:
            if not global_pool or threads not in (None, _made.threads):
                size = f"of {_made.threads} threads" if _made.threads else "made by the application"
                raise EngineUnavailable(
                    f"threads={threads}, global_pool={global_pool}: this process already walks on a global "
                    f"pool {size}, and ONNX Runtime cannot change it; leave both out, or use another process"
                )
            return _made
        wish = usable_cores() if threads is None else threads
        if threads == 1:
            return Pool("none, one thread", 1, False)  # no workers, nothing to share, and no price to pay
        if not global_pool:
            return Pool("one a session, not spinning", wish, False)
        if not (
            hasattr(ort, "set_global_thread_pool_sizes")
            and hasattr(ort.SessionOptions, "use_per_session_threads")
        ):
            lacks = f"onnxruntime {ort.__version__} has no global pool"
            return Pool(f"one a session, not spinning ({lacks})", wish, False)
        try:
            ort.set_global_thread_pool_sizes(wish, 1)
            _made = Pool("global", wish, True)
        except Exception as problem:  # ORT's own error types share no base; it refuses a second pool
            if threads is not None:
                raise EngineUnavailable(
                    f"threads={threads}: the application has already made ONNX Runtime's global pool "
                    f"({problem}); leave threads out to walk on that pool"
                ) from problem
            _made = Pool("global, made by the application", 0, True)
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


def fit(options: Any) -> None:
    """Let a session of the caller's own open beside a walk: on the process's global pool, if we made one.

    options: onnxruntime.SessionOptions with the numbers of threads left alone. For benchmarks and checks.
    """
    if _made is not None:
        apply(_made, options)


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
