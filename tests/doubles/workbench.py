"""What tests do with the doubles of CUDA and TensorRT: build tiny graphs, bind them, run them."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from doubles import trt_double
from doubles.cuda_double import Cudart, cudaMemcpyKind

from offramp.runtime.engines import threads

TINY = Path(__file__).parents[1] / "data" / "tiny_bundle"
SEGMENT = (TINY / "segment_00.onnx").read_bytes()
STEM = (TINY / "stem.onnx").read_bytes()
SIZES = ({"batch": 1, "seq": 1}, {"batch": 2, "seq": 8}, {"batch": 4, "seq": 48})
H2D, D2H = cudaMemcpyKind.cudaMemcpyHostToDevice, cudaMemcpyKind.cudaMemcpyDeviceToHost


def dims(number: int) -> dict[str, list[Any]]:
    """Inputs of the stem (0) or a segment, with their dimensions, by the manifest."""
    manifest = json.loads((TINY / "manifest.json").read_text())
    stage = [manifest["stem"], *manifest["segments"]][number]
    return {tensor["name"]: tensor["shape"] for tensor in stage["variants"]["fp32"]["inputs"]}


def shape(of: list[Any], sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes.get(size, size) for size in of)


class Cuda:
    """The double, with the calls that tests make most; every call must succeed."""

    def __init__(self, **settings: Any) -> None:
        self.api = Cudart(**settings)
        self.stream = int(self("cudaStreamCreateWithFlags", 1))

    def __call__(self, name: str, *args: Any) -> Any:
        code, *values = getattr(self.api, name)(*args)
        assert code == 0, (name, code, self.api.faults)
        return values[0] if values else None

    def error(self, name: str, *args: Any) -> str:
        return getattr(self.api, name)(*args)[0].name

    def put(self, array: np.ndarray) -> int:
        pointer = self("cudaMalloc", array.nbytes)
        self("cudaMemcpyAsync", pointer, array, array.nbytes, H2D, self.stream)
        return pointer

    def wait(self) -> None:
        self("cudaStreamSynchronize", self.stream)


def world(version: str = "10.3.0", **settings: Any) -> SimpleNamespace:
    """The two doubles, and a logger that keeps errors in said."""
    cuda = Cuda(**settings)
    trt = trt_double.make(version, cuda.api)
    said: list[str] = []

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                said.append(message)

    return SimpleNamespace(cuda=cuda, trt=trt, said=said, logger=Logger())


def network(w: SimpleNamespace, data: bytes, strong: bool = True) -> tuple[Any, Any, Any]:
    """Builder, network and settings; asserts that the graph is parsed."""
    builder, flag, flags = w.trt.Builder(w.logger), w.trt.NetworkDefinitionCreationFlag, 0
    if hasattr(flag, "EXPLICIT_BATCH"):
        flags |= 1 << int(flag.EXPLICIT_BATCH)
    if hasattr(flag, "STRONGLY_TYPED") and strong:
        flags |= 1 << int(flag.STRONGLY_TYPED)
    made = builder.create_network(flags)
    parser = w.trt.OnnxParser(made, w.logger)
    assert parser.parse(data), parser.get_error(0).desc()
    return builder, made, builder.create_builder_config()


def build(
    w: SimpleNamespace, data: bytes = SEGMENT, number: int = 1, profiles: Any = (SIZES,), **changed: Any
) -> Any:
    """A plan under these profiles; changed: least, usual and most of single inputs, None to leave one out."""
    builder, made, config = network(w, data)
    for sizes in profiles:
        profile = builder.create_optimization_profile()
        for name, of in dims(number).items():
            if (shapes := changed.get(name, [shape(of, one) for one in sizes])) is not None:
                profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    if hasattr(w.trt.PreviewFeature, "PROFILE_SHARING_0806") and w.trt.__version__ == "8.6.1":
        config.set_preview_feature(w.trt.PreviewFeature.PROFILE_SHARING_0806, True)
    return builder.build_serialized_network(made, config)


def lent(w: SimpleNamespace, engine: Any, short: int = 0, shift: int = 0) -> Any:
    """A context with scratch memory of ours, `short` bytes too small, or that much off its alignment."""
    if hasattr(w.trt, "ExecutionContextAllocationStrategy"):
        context = engine.create_execution_context(w.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        need = engine.device_memory_size_v2 - short
        context.set_device_memory(w.cuda("cudaMalloc", need + shift) + shift, need)
    else:
        context = engine.create_execution_context_without_device_memory()
        context.device_memory = w.cuda("cudaMalloc", engine.device_memory_size - short + shift) + shift
    return context


def feeds(number: int, batch: int = 2, seq: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    made = {}
    for name, of in dims(number).items():
        size = shape(of, {"batch": batch, "seq": seq})
        made[name] = (
            random.integers(0, 2, size) if number == 0 else random.normal(size=size).astype(np.float32)
        )
    return made


def plainly(data: bytes, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    threads.fit(options)
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, session.run(names, given), strict=True))


class Ready:
    """A context with shapes and addresses set; outputs lie in pinned memory after fetch()."""

    def __init__(self, w: SimpleNamespace, context: Any, number: int = 1, **given: Any) -> None:
        self.w, self.context, self.given = w, context, feeds(number, **given)
        self.pointers: dict[str, int] = {}
        for name, array in self.given.items():
            if context.engine.get_tensor_dtype(name) == w.trt.DataType.INT32:
                array = array.astype(np.int32)
            assert context.set_input_shape(name, array.shape), w.said
            self.place(name, w.cuda.put(array))
        assert context.infer_shapes() == []
        names = [context.engine.get_tensor_name(at) for at in range(context.engine.num_io_tensors)]
        self.outputs = {n: tuple(context.get_tensor_shape(n)) for n in names if n not in self.given}
        for name, size in self.outputs.items():
            self.place(name, w.cuda("cudaMalloc", 4 * int(np.prod(size))))

    def place(self, name: str, pointer: int) -> None:
        self.pointers[name] = pointer
        assert self.context.set_tensor_address(name, pointer)

    def run(self, stream: int | None = None) -> bool:
        return self.context.execute_async_v3(self.w.cuda.stream if stream is None else stream)

    def fetch(self) -> dict[str, np.ndarray]:
        """Enqueue copies to pinned memory and give views of it: poison until somebody waits."""
        found = {}
        for name, size in self.outputs.items():
            nbytes = 4 * int(np.prod(size))
            pinned = self.w.cuda("cudaHostAlloc", nbytes, 0)
            self.w.cuda("cudaMemcpyAsync", pinned, self.pointers[name], nbytes, D2H, self.w.cuda.stream)
            raw = (ctypes.c_uint8 * nbytes).from_address(pinned)
            found[name] = np.ctypeslib.as_array(raw).view(np.float32).reshape(size)
        return found

    def check(self, data: bytes = SEGMENT) -> None:
        found = self.fetch()
        self.w.cuda.wait()
        for name, expected in plainly(data, self.given).items():
            np.testing.assert_allclose(found[name], expected, rtol=1e-6)


def ready(version: str = "10.3.0", **settings: Any) -> Ready:
    w = world(version, **settings)
    w.engine = w.trt.Runtime(w.logger).deserialize_cuda_engine(build(w))
    return Ready(w, lent(w, w.engine))


def onnx_graph(op: str, domain: str, kind: int) -> bytes:
    """A graph of one node from x to y, both of one element type; by hand, since onnx is not installed."""

    def part(number: int, value: bytes | int) -> bytes:
        if isinstance(value, int):
            return bytes([number << 3, value])
        return bytes([number << 3 | 2, len(value)]) + value

    def info(name: bytes) -> bytes:
        size = part(1, part(1, 2))
        return part(1, name) + part(2, part(1, part(1, kind) + part(2, size)))

    node = part(1, b"x") + part(2, b"y") + part(3, b"n") + part(4, op.encode()) + part(7, domain.encode())
    graph = part(1, node) + part(2, b"g") + part(11, info(b"x")) + part(12, info(b"y"))
    opsets = part(8, part(1, b"") + part(2, 17)) + part(8, part(1, b"com.microsoft") + part(2, 1))
    return part(1, 8) + part(7, graph) + opsets
