"""A double of the Python module tensorrt, in any of four versions: engines that run on ONNX Runtime's CPU.

An engine goes through its whole life: a network is parsed, built under profiles, deserialized, given shapes
and addresses, executed on a stream of the double of CUDA. What a version of the bindings does not have is not
there, by tests/data/trt_names.json.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from doubles import trt_build, trt_context, trt_engine, trt_network, trt_things
from doubles.cuda_double import Cudart
from doubles.trt_things import Absent, Crash, Named, NotInDouble, Ordered

__all__ = ["VERSIONS", "Crash", "NotInDouble", "make"]

VERSIONS = ("8.6.1", "10.3.0", "10.16.1", "11.4.0")
_TABLE = Path(__file__).parents[1] / "data" / "trt_names.json"
# Numbers that are not simply the order of the table's names. Nobody should need them.
_NUMBERS = {
    "DataType": [
        "FLOAT",
        "HALF",
        "INT8",
        "INT32",
        "BOOL",
        "UINT8",
        "FP8",
        "BF16",
        "INT64",
        "INT4",
        "FP4",
        "E8M0",
    ],
    "NetworkDefinitionCreationFlag": ["EXPLICIT_BATCH", "STRONGLY_TYPED"],
    "MemoryPoolType": ["WORKSPACE", "DLA_MANAGED_SRAM", "DLA_LOCAL_DRAM", "DLA_GLOBAL_DRAM", "TACTIC_DRAM"],
    "TensorIOMode": ["NONE", "INPUT", "OUTPUT"],
    "HardwareCompatibilityLevel": ["NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"],
    "ExecutionContextAllocationStrategy": ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"],
    "ProfilingVerbosity": ["LAYER_NAMES_ONLY", "NONE", "DETAILED"],
    "BuilderFlag": ["FP16", "INT8", "DEBUG", "GPU_FALLBACK", "REFIT", "DISABLE_TIMING_CACHE", "TF32"],
    "PreviewFeature": [],
    "Severity": ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"],
}
_CLASSES: tuple[type, ...] = (
    *(trt_things.ILogger, trt_things.IHostMemory, trt_build.Builder, trt_network.INetworkDefinition),
    *(trt_network.ITensor, trt_network.ILayer, trt_network.OnnxParser, trt_network.ParserError),
    *(trt_build.IBuilderConfig, trt_build.IOptimizationProfile, trt_build.ITimingCache),
    *(trt_engine.Runtime, trt_engine.ICudaEngine, trt_context.IExecutionContext),
)


def make(version: str, cudart: Cudart, *, name: str = "tensorrt") -> Any:
    """The module in a version, on that device; "rtx": the names of 11.4, as tensorrt_rtx has them.

    builds: how many engines were built. build_problem: said by the builder instead of building.
    empty_cache_for_bad_one: a timing cache that cannot be read becomes an empty one and not None.
    """
    module: Any = ModuleType(name)
    module.builds, module.build_problem, module.empty_cache_for_bad_one = 0, "", False
    module._cudart, module._rtx, module._pending = cudart, version == "rtx", []
    module._version = VERSIONS[-1] if version == "rtx" else version
    module._major = int(module._version.split(".")[0])
    module.__version__ = "1.7.1.116" if version == "rtx" else version
    names = _names(module._version)
    for kind in (kind for kind in _NUMBERS if kind in names):
        setattr(module, kind, _enum(kind, names[kind], Named))
    severity = _enum("Severity", names["ILogger.Severity"], Ordered)
    for implementation in _CLASSES:
        setattr(module, implementation.__name__, _cut(module, implementation, names[implementation.__name__]))
    for logger in (module.ILogger, _logger(module)):
        logger.Severity = severity
        for member in severity:
            setattr(logger, member.name, member)
    for path in names[""] - set(vars(module)):
        setattr(module, path, Absent(path))
    if module._rtx:
        module.IRuntimeCache = Absent("IRuntimeCache")  # one of its own
    return module


@cache
def _names(version: str) -> dict[str, set[str]]:
    """Names of a version by the class that has them; "" is the module."""
    found: dict[str, set[str]] = {}
    for path, versions in json.loads(_TABLE.read_text(encoding="utf-8")).items():
        if version in versions:
            owner, _, name = path.rpartition(".")
            found.setdefault(owner, set()).add(name)
    return found


def _enum(kind: str, names: set[str], base: Any) -> Any:
    ordered = [name for name in _NUMBERS[kind] if name in names]
    ordered += sorted(names - {"name", "value", *ordered})
    return base(kind, ordered, start=0)


def _cut(module: Any, implementation: type, names: set[str]) -> type:
    """The class with the names of the version: what has no code gets an Absent, what is not in it goes."""
    plain = getattr(implementation, "_plain", {})
    held = {**plain, **vars(implementation)}
    body = {key: value for key, value in held.items() if key.startswith("_") or key in names}
    for key in ("__dict__", "__weakref__"):
        body.pop(key, None)
    for key in names - set(body):
        body[key] = Absent(f"{implementation.__name__}.{key}")
    body |= {"_own": True, "_trt": module, "__module__": module.__name__}
    return type(implementation)(implementation.__name__, implementation.__bases__, body)


def _logger(module: Any) -> Any:
    """trt.Logger, which prints."""

    class Logger(module.ILogger):
        def __init__(self, min_severity: Any = None) -> None:
            module.ILogger.__init__(self)
            self.min_severity = module.ILogger.Severity.WARNING if min_severity is None else min_severity

        def log(self, severity: Any, msg: str) -> None:
            if severity <= self.min_severity:
                sys.stderr.write(f"[TRT] [{severity.name[0]}] {msg}\n")

    module.Logger = Logger
    return Logger
