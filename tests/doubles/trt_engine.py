"""Runtime and engines in the double of TensorRT; trt_double.make cuts each class to a version's names."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet, finalize

from doubles.cuda_machine import Fault
from doubles.trt_graph import Graph, Io, pack, unpack
from doubles.trt_things import Crash, Dims, Thing, plain


class Runtime(Thing):
    _plain = plain(
        engine_host_code_allowed=False,
        max_threads=1,
        DLA_core=-1,
        num_DLA_cores=0,
        error_recorder=None,
        gpu_allocator=None,
        logger=None,
        temporary_directory="",
        tempfile_control_flags=0,
        dla_workspace_allocation_strategy=None,
    )

    def __init__(self, logger: Any) -> None:
        self._start(logger)
        if not self._trt._cudart.devices:
            self._say("ERROR", "createInferRuntime: Error Code 6: CUDA initialization failure with error: 35")
            if self._trt._major < 11:
                raise TypeError("pybind11::init(): factory function returned nullptr")
            raise Crash("the real one returns an object here that ends the process when touched or freed")
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        try:
            facts, data = unpack(bytes(memoryview(serialized_engine)))
        except (ValueError, KeyError) as problem:
            return self._refuse(1, f"{problem}, trying to load damaged bytes")
        if problem := self._against(facts):
            return self._refuse(6, f"{problem}, please rebuild.")
        graph = Graph(data, facts["folder"], wide=self._trt._major >= 10)
        try:
            return self._trt.ICudaEngine(self, facts, graph)
        except Fault as problem:
            return self._refuse(2, f"OutOfMemory: no memory for the weights: {problem}")

    def _against(self, facts: dict[str, Any]) -> str:
        """Why an engine cannot be used here; "" where it can."""
        made, here = facts["trt"], self._trt._version
        if made != here:
            older, newer = ([int(part) for part in one.split(".")] for one in (made, here))
            may = facts["compatible"] and self.engine_host_code_allowed
            if not (may and older[0] == newer[0] and older < newer):
                return (
                    "The engine plan file is not compatible with this version of TensorRT, expecting library "
                    f"version {made} got {here}"
                )
        built, gpu = tuple(facts["gpu"]), self._trt._cudart.capability
        ampere = facts["level"] == "AMPERE_PLUS" and gpu >= (8, 0) <= built
        if built != gpu and not ampere:
            return (
                "The engine plan file is generated on an incompatible device, expecting compute "
                f"{built[0]}.{built[1]} got compute {gpu[0]}.{gpu[1]}"
            )
        return ""


class ICudaEngine(Thing):
    _plain = plain(error_recorder=None, profiling_verbosity=None, engine_capability=None, tactic_sources=0)

    def __init__(self, runtime: Any, facts: dict[str, Any], graph: Graph) -> None:
        self._start(runtime._logger)
        self._runtime, self._facts, self._graph = runtime, facts, graph
        self._tensors = {io.name: io for io in (*graph.inputs, *graph.outputs)}
        self._inputs = [io.name for io in graph.inputs]
        self._profiles = [
            {name: tuple(map(tuple, shapes)) for name, shapes in profile.items()}
            for profile in facts["profiles"]
        ]
        self._needs = [
            graph.scratch({name: shapes[2] for name, shapes in profile.items()}) for profile in self._profiles
        ]
        self._contexts: WeakSet[Any] = WeakSet()
        cudart = self._trt._cudart
        finalize(self, cudart.release, cudart.reserve(len(graph.data))).atexit = False

    @property
    def name(self) -> str:
        return str(self._facts["name"])

    @property
    def num_layers(self) -> int:
        return len(self._graph.nodes)

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def device_memory_size(self) -> int:
        return max(self._needs)

    device_memory_size_v2 = device_memory_size

    def get_device_memory_size_for_profile(self, profile_index: int) -> int:
        return self._needs[profile_index]

    get_device_memory_size_for_profile_v2 = get_device_memory_size_for_profile

    @property
    def has_implicit_batch_dimension(self) -> bool:
        return False

    @property
    def refittable(self) -> bool:
        return False

    def get_tensor_name(self, index: int) -> Any:
        names = list(self._tensors)
        return names[index] if 0 <= index < len(names) else self._refuse(3, f"no tensor {index}")

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._trt.TensorIOMode
        if self._tensor(name) is None:
            return modes.NONE
        return modes.INPUT if name in self._inputs else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        io = self._tensor(name)
        return getattr(self._trt.DataType, "FLOAT" if io is None else io.kind)

    def get_tensor_shape(self, name: str) -> Dims:
        io = self._tensor(name)
        return Dims((-1,) if io is None else io.shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        if name not in self._inputs or not 0 <= profile_index < len(self._profiles):
            self._refuse(3, f"no input {name!r} or no profile {profile_index}")
            return []
        return [Dims(shape) for shape in self._profiles[profile_index][name]]

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def serialize(self) -> Any:
        return self._trt.IHostMemory(pack(self._facts, self._graph))

    def create_execution_context(self, strategy: Any = None) -> Any:
        strategies = getattr(self._trt, "ExecutionContextAllocationStrategy", None)
        if strategy is None:
            return self._context(False)
        if strategies is None:
            raise TypeError("create_execution_context(): incompatible function arguments")
        return self._context(
            self._of(strategy, "ExecutionContextAllocationStrategy") is strategies.USER_MANAGED
        )

    def create_execution_context_without_device_memory(self) -> Any:
        return self._context(True)

    def _context(self, lent: bool) -> Any:
        try:
            return self._trt.IExecutionContext(self, lent)
        except Fault as problem:
            return self._refuse(2, f"OutOfMemory: no memory for a context: {problem}")

    def _tensor(self, name: str) -> Io | None:
        if name not in self._tensors:
            self._refuse(3, f"the given tensor name {name} does not correspond to an input or output")
        return self._tensors.get(name)
