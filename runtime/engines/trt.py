"""The TensorRT engine: finds out what is missing and says so. Walking on TensorRT is not in this version."""

from __future__ import annotations

import ctypes
from importlib import import_module
from importlib.util import find_spec
from typing import NoReturn

from offramp.runtime.bundle import Bundle
from offramp.runtime.errors import EngineUnavailable

_DRIVERS = ("libcuda.so.1", "nvcuda.dll")
_MODULES = ("tensorrt", "tensorrt_rtx")


def open(
    bundle: Bundle, *, device: str, variant: str, threads: int | None, global_pool: bool, share: bool
) -> NoReturn:
    """Always raises EngineUnavailable naming the first missing piece and its cure; never takes ORT."""
    missing = missing_piece()
    if missing is None:
        missing = "TensorRT is there, but this version of offramp cannot walk on it yet: use --engine ort"
    raise EngineUnavailable(f"engine trt: {missing}")


def missing_piece() -> str | None:
    """The first thing without which TensorRT cannot run here, and how to get it; None when all is there.

    The driver is asked before any tensorrt module is imported: without a driver, TensorRT's own objects crash
    the process.
    """
    installed = [name for name in _MODULES if find_spec(name) is not None]
    module = "" if installed else " (the Python module tensorrt is not installed either)"
    driver = _driver_problem()
    if driver is not None:
        return f"{driver}{module}; TensorRT needs an NVIDIA GPU: install its driver, or use --engine ort"
    if not installed:
        return (
            "no Python module tensorrt or tensorrt_rtx; pip install 'offramp[trt]' (on a Jetson: make "
            "the virtual environment with --system-site-packages: JetPack brings it), or use --engine ort"
        )
    problems = []
    for name in installed:
        try:
            import_module(name)
            return None
        except (ImportError, OSError) as problem:  # e.g. the bindings without their libraries
            problems.append(f"{name} cannot be imported: {problem}")
    cure = "reinstall with: pip install --force-reinstall 'offramp[trt]', or use --engine ort"
    return f"{'; '.join(problems)}; {cure}"


def _driver_problem() -> str | None:
    for name in _DRIVERS:
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        code = driver.cuInit(0)
        return (
            None
            if code == 0
            else f"the CUDA driver {name} does not start (cuInit gives {code}, no usable GPU)"
        )
    return f"no CUDA driver on this machine ({_DRIVERS[0]} is not found)"
