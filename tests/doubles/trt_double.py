"""A double of the Python module tensorrt in any of four versions; engines run on ONNX Runtime's CPU.

An engine has its whole life: parsed, built under profiles, deserialized, given shapes and addresses, executed
on a stream of the double of CUDA. A name that a version of the bindings does not have is not there:
tests/data/trt_names.json. What the real one refuses at run time is refused here: an address that is not set,
a shape outside of the profile, scratch memory too small or not aligned, an output over another tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from enum import Enum, IntEnum
from functools import cache
from operator import index
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from weakref import WeakSet, finalize, ref

import numpy as np
import onnxruntime
from doubles.cuda_double import ALIGNMENT, Cudart, Fault

from offramp.runtime.engines import threads

VERSIONS = ("8.6.1", "10.3.0", "10.16.1", "11.4.0")
_TABLE = Path(__file__).parents[1] / "data" / "trt_names.json"
_ENUMS = (
    *("DataType", "NetworkDefinitionCreationFlag", "TensorIOMode", "BuilderFlag", "PreviewFeature"),
    "ExecutionContextAllocationStrategy",
)
_CLASSES = (
    *("ILogger", "Builder", "INetworkDefinition", "OnnxParser", "ParserError", "IOptimizationProfile"),
    *("ITimingCache", "IBuilderConfig", "Runtime", "ICudaEngine", "IExecutionContext"),
)
_SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
_KINDS = {  # ONNX Runtime's types: TensorRT's name, numpy's dtype
    "tensor(float)": ("FLOAT", np.float32),
    "tensor(float16)": ("HALF", np.float16),
    "tensor(int64)": ("INT64", np.int64),
    "tensor(int32)": ("INT32", np.int32),
    "tensor(bool)": ("BOOL", np.bool_),
}
_NO_INT64 = {"INT64": ("INT32", np.int32)}  # before 10
_SCRIBBLE = 0x5A  # on scratch memory, before and after a run
_UNKNOWN = (b"com.microsoft", b"DynamicQuantizeLinear", b"MatMulInteger")

Shape = tuple[int, ...]


def make(version: str, cudart: Cudart, *, name: str = "tensorrt") -> Any:
    """The module in a version, on that device; "rtx": the names of 11.4, as tensorrt_rtx has them.

    builds: how many engines were built.
    """
    module: Any = ModuleType(name)
    rtx = version == "rtx"
    names = _names(VERSIONS[-1] if rtx else version)
    module.builds, module._cudart, module._rtx = 0, cudart, rtx
    module._old = version.startswith("8.")  # weak types, no int64, a profile is shared only when asked for
    module.__version__ = "1.7.1.116" if rtx else version
    for kind in _ENUMS:
        if kind in names[""]:
            setattr(module, kind, Enum(kind, sorted(names[kind] - {"name", "value"}), start=0))
            getattr(module, kind).__int__ = lambda member: member.value
    for kind in _CLASSES:
        body = {
            key: value
            for key, value in vars(globals()[kind]).items()
            if key in names[kind] or (key.startswith("_") and key not in ("__dict__", "__weakref__"))
        }
        setattr(module, kind, type(kind, (_Thing,), {**body, "_trt": module}))
    module.ILogger.Severity = IntEnum("Severity", _SEVERITIES, start=0)
    if rtx:
        module.IRuntimeCache = object()
    return module


@cache
def _names(version: str) -> dict[str, set[str]]:
    """Names of a version by the class that has them; "" is the module."""
    names: dict[str, set[str]] = {}
    for path, versions in json.loads(_TABLE.read_text(encoding="utf-8")).items():
        if version in versions:
            owner, _, name = path.rpartition(".")
            names.setdefault(owner, set()).add(name)
    return names


class _Graph:
    """One ONNX model with its inputs and outputs: (TensorRT's name of the dtype, numpy's, dimensions)."""

    def __init__(self, data: bytes, old: bool) -> None:
        if unknown := [name.decode() for name in _UNKNOWN if name in data]:
            raise ValueError(f"UNSUPPORTED_NODE: no importer registered for {unknown}")
        self.data, self._session = data, _session(hashlib.sha256(data).digest(), data)
        self.inputs, self.outputs = (
            {node.name: self._tensor(node, old) for node in nodes}
            for nodes in (self._session.get_inputs(), self._session.get_outputs())
        )
        self.tensors = self.inputs | self.outputs

    def problem(self, shapes: Mapping[str, Shape]) -> str:
        """What is wrong with these shapes of inputs: fixed dimensions, and free ones that share a name."""
        sizes: dict[str, int] = {}
        for name, (_, _, dims) in self.inputs.items():
            shape = shapes[name]
            if len(shape) != len(dims):
                return f"{name} has {len(dims)} dimensions, {shape} has {len(shape)}"
            for dim, size in zip(dims, shape, strict=True):
                if size != (sizes.setdefault(dim, size) if isinstance(dim, str) else dim):
                    return f"{name} is {shape}, its dimensions are {dims}"
        return ""

    def shapes_of_outputs(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """By the names of dimensions, and where these do not say, by a run on zeros."""
        sizes = {
            dim: size
            for name, (_, _, dims) in self.inputs.items()
            for dim, size in zip(dims, shapes[name], strict=True)
        }
        outputs = {
            name: tuple(sizes.get(dim, dim) for dim in dims) for name, (_, _, dims) in self.outputs.items()
        }
        if all(isinstance(size, int) for shape in outputs.values() for size in shape):
            return outputs
        zeros = {name: np.zeros(shapes[name], dtype) for name, (_, dtype, _) in self.inputs.items()}
        return {name: array.shape for name, array in self.run(zeros).items()}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs in the types that TensorRT gives them."""
        cast = {n.name: feeds[n.name].astype(_KINDS[n.type][1]) for n in self._session.get_inputs()}
        arrays = self._session.run(list(self.outputs), cast)
        return {
            name: array.astype(dtype)
            for (name, (_, dtype, _)), array in zip(self.outputs.items(), arrays, strict=True)
        }

    def scratch(self, shapes: Mapping[str, Shape]) -> int:
        """Bytes of scratch memory for these shapes of inputs; it grows with them."""
        every = {**shapes, **self.shapes_of_outputs(shapes)}
        return ALIGNMENT * (8 + sum(math.prod(shape) for shape in every.values()) // 64)

    def _tensor(self, node: Any, old: bool) -> tuple[str, Any, tuple[Any, ...]]:
        kind, dtype = _KINDS[node.type]
        return (*(_NO_INT64.get(kind, (kind, dtype)) if old else (kind, dtype)), tuple(node.shape))


_sessions: dict[bytes, Any] = {}


def _session(digest: bytes, data: bytes) -> Any:
    """One session a graph, for all doubles of the process."""
    if digest not in _sessions:
        options = onnxruntime.SessionOptions()
        threads.share_global_pool(options)
        if getattr(options, "use_per_session_threads", True):
            options.intra_op_num_threads = options.inter_op_num_threads = 1
        _sessions[digest] = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return _sessions[digest]


class _Thing:
    """An object of TensorRT's; make() gives each class the names of one version."""

    _trt: ClassVar[Any]
    _logger: Any

    def _error(self, text: str) -> None:
        self._logger.log(self._trt.ILogger.Severity.ERROR, f"{type(self).__name__}: {text}")


class ILogger(_Thing):
    def __init__(self) -> None:
        self._ready = True

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError("TensorRT calls ILogger.log: override it")


# Building.


class Builder(_Thing):
    def __init__(self, logger: Any) -> None:
        assert logger._ready, "the real one crashes on a logger without ILogger.__init__"
        self._logger = logger

    def create_network(self, flags: int = 0) -> Any:
        return self._trt.INetworkDefinition(self._logger, flags)

    def create_builder_config(self) -> Any:
        return self._trt.IBuilderConfig(self._logger)

    def create_optimization_profile(self) -> Any:
        return self._trt.IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        graph: _Graph = network._graph
        if not config._profiles:
            return self._error("no optimization profile has been defined")
        for profile in config._profiles:
            if missing := graph.inputs.keys() - profile:
                return self._error(f"dynamic inputs {missing} are missing in a profile")
            for bound in range(3):
                if problem := graph.problem({name: shapes[bound] for name, shapes in profile.items()}):
                    return self._error(problem)
        if config._cache is not None:
            config._cache._entries += 1
        self._trt.builds += 1
        shared = not self._trt._old or "PROFILE_SHARING_0806" in config._features
        head = json.dumps({"profiles": config._profiles, "shared": shared}).encode()
        return len(head).to_bytes(4, "little") + head + graph.data


class INetworkDefinition(_Thing):
    num_layers = 0  # the layers of a weakly typed network are tested by themselves

    def __init__(self, logger: Any, flags: int) -> None:
        self._logger, self._graph = logger, None
        self._explicit = not self._trt._old or flags == 1

    def get_layer(self, index: int) -> Any:
        raise AssertionError(f"no layer {index}")


class ParserError(_Thing):
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class OnnxParser(_Thing):
    def __init__(self, network: Any, logger: Any) -> None:
        self._network, self._logger, self._errors = network, logger, []

    def parse(self, model: Any, path: str | None = None) -> bool:
        try:
            if not self._network._explicit:
                raise ValueError("the network was not created with EXPLICIT_BATCH")
            self._network._graph = _Graph(bytes(model), self._trt._old)
        except Exception as problem:  # ORT's error types share no base
            self._errors.append(self._trt.ParserError(str(problem)))
            self._error(str(problem))
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._errors[index]


class IOptimizationProfile(_Thing):
    def __init__(self) -> None:
        self._shapes: dict[str, Sequence[Shape]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._shapes[input] = tuple(min), tuple(opt), tuple(max)


class ITimingCache(_Thing):
    def __init__(self, entries: int) -> None:
        self._entries = entries

    def serialize(self) -> bytes:
        return b"timings %d" % self._entries


class IBuilderConfig(_Thing):
    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._profiles: list[dict[str, Any]] = []
        self._features: set[str] = set()
        self._cache: Any = None

    def add_optimization_profile(self, profile: Any) -> int:
        for bounds in profile._shapes.values():
            if not all(a <= b <= c for a, b, c in zip(*bounds, strict=True)):
                self._error("invalid optimization profile: MIN<=OPT<=MAX does not hold")
                return -1
        self._profiles.append(profile._shapes)
        return len(self._profiles) - 1

    def clear_flag(self, flag: Any) -> None: ...

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        (self._features.add if enable else self._features.discard)(feature.name)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        assert not self._trt._rtx, "deprecated in TensorRT-RTX"
        if serialized_timing_cache and not serialized_timing_cache.startswith(b"timings "):
            return self._error("the timing cache cannot be read")
        return self._trt.ITimingCache(int(serialized_timing_cache[8:] or 0))

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache


# Running.


class Runtime(_Thing):
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        data = bytes(serialized_engine)
        end = 4 + int.from_bytes(data[:4], "little")
        try:
            graph = _Graph(data[end:], self._trt._old)
            return self._trt.ICudaEngine(self._logger, json.loads(data[4:end]), graph)
        except Fault as problem:
            return self._error(f"OutOfMemory: no memory for the weights: {problem}")


class ICudaEngine(_Thing):
    def __init__(self, logger: Any, head: dict[str, Any], graph: _Graph) -> None:
        self._logger, self._graph, self._shared = logger, graph, head["shared"]
        self._profiles = [
            {name: tuple(map(tuple, shapes)) for name, shapes in profile.items()}
            for profile in head["profiles"]
        ]
        self._need = max(graph.scratch({n: s[2] for n, s in profile.items()}) for profile in self._profiles)
        self._contexts: WeakSet[Any] = WeakSet()
        cudart = self._trt._cudart
        finalize(self, cudart.release, cudart.reserve(len(graph.data))).atexit = False

    @property
    def num_io_tensors(self) -> int:
        return len(self._graph.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._graph.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._trt.TensorIOMode
        return modes.INPUT if name in self._graph.inputs else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self._trt.DataType, self._graph.tensors[name][0])

    def get_tensor_shape(self, name: str) -> Shape:
        return tuple(dim if isinstance(dim, int) else -1 for dim in self._graph.tensors[name][2])

    @property
    def device_memory_size(self) -> int:
        return self._need

    device_memory_size_v2 = device_memory_size

    def create_execution_context(self, strategy: Any) -> Any:
        assert strategy is self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return self._trt.IExecutionContext(self)

    def create_execution_context_without_device_memory(self) -> Any:
        return self._trt.IExecutionContext(self)


class IExecutionContext(_Thing):
    def __init__(self, engine: Any) -> None:
        self._logger, self._engine = engine._logger, engine
        self._memory, self._size = 0, 0
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, Shape] = {}
        self._profile = 0 if len(engine._profiles) == 1 else -1
        self._last_run: Any = None  # the shapes of the last run, until they change
        engine._contexts.add(self)

    def set_device_memory(self, memory: int, size: int) -> None:
        self._memory, self._size = index(memory), size

    @property
    def device_memory(self) -> int:
        return self._memory

    @device_memory.setter
    def device_memory(self, memory: int) -> None:
        self._memory, self._size = index(memory), self._engine._need

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        others = {context._profile for context in self._engine._contexts if context is not self}
        if not self._engine._shared and profile_index in others:
            return self._fail(f"profile {profile_index} has been chosen by another context")
        self._profile, self._shapes = profile_index, {}
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        if self._profile < 0:
            return self._fail("no optimization profile was chosen")
        low, _, high = self._engine._profiles[self._profile][name]
        if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return self._fail(f"{name}: {shape} is not in profile {self._profile}: {low} to {high}")
        self._shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        missing = [name for name in self._engine._graph.inputs if name not in self._shapes]
        if not missing and (problem := self._engine._graph.problem(self._shapes)):
            raise RuntimeError(problem)
        return missing

    def get_tensor_shape(self, name: str) -> Shape:
        return {**self._shapes, **self._engine._graph.shapes_of_outputs(self._shapes)}[name]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = index(memory)
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        graph, cudart = self._engine._graph, self._trt._cudart
        if missing := self.infer_shapes():
            return self._fail(f"input shapes of {missing} are not set")
        if unset := [name for name in graph.tensors if not self._addresses.get(name)]:
            return self._fail(f"address is not set for {unset}")
        if not self._memory or self._memory % ALIGNMENT or self._size < self._engine._need:
            return self._fail(f"device memory {self._memory:#x} of {self._size} bytes is not what is needed")
        shapes = frozenset(self._shapes.items())
        if cudart.capturing(stream_handle) and self._last_run != shapes:
            return self._fail("operation not permitted in a capture: no run at these shapes before")
        self._last_run = shapes
        cudart.enqueue(stream_handle, self._work())
        return True

    def _fail(self, text: str) -> bool:
        self._error(text)
        return False

    def _work(self) -> Any:
        """What the device does: on the shapes and addresses of now, and on what lies there when it runs."""
        graph, cudart, context = self._engine._graph, self._trt._cudart, ref(self)
        shapes = {**self._shapes, **graph.shapes_of_outputs(self._shapes)}
        places, scratch, need = dict(self._addresses), self._memory, self._engine._need

        def work() -> None:
            if context() is None:
                raise Fault("cudaErrorIllegalAddress", "the context was destroyed before it ran")
            memory = cudart.check(scratch, need, ("device",))
            views = {
                name: cudart.view(places[name], shapes[name], dtype)
                for name, (_, dtype, _) in graph.tensors.items()
            }
            for output in graph.outputs:  # a kernel may write one before another has read the other
                for name, view in views.items():
                    if name != output and np.may_share_memory(view, views[output]):
                        raise Fault("cudaErrorIllegalAddress", f"{output} lies over {name}")
            memory[:] = _SCRIBBLE
            outputs = graph.run({name: views[name].copy() for name in graph.inputs})
            for name, array in outputs.items():
                views[name][...] = array
            memory[:] = _SCRIBBLE

        return work
