"""From the bytes of one ONNX graph to a TensorRT engine for this GPU, and back from bytes to an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from offramp.runtime.bundle.manifest import Tensor, Variant
from offramp.runtime.engines import trt_versions
from offramp.runtime.engines.profiles import Profile, shapes
from offramp.runtime.errors import BadBundle

# The manifest's names and TensorRT's; 8.6 has no INT64, see trt_versions.as_read.
DTYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "int64": "INT64",
    "int32": "INT32",
    "int8": "INT8",
    "uint8": "UINT8",
    "bool": "BOOL",
}


class Log:
    """Keeps what TensorRT complains about, for the error that follows; itself silent."""

    def __init__(self, trt: Any) -> None:
        self.said: list[str] = []
        said, worst = self.said, trt.ILogger.Severity.ERROR

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= worst:
                    said.append(message.strip())
                    del said[:-8]

        self.logger = Logger()

    def take(self) -> str:
        """What was said since the last time, as one line."""
        told = "; ".join(dict.fromkeys(" ".join(text.split()) for text in self.said)) or "no reason was given"
        self.said.clear()
        return told


def build(
    trt: Any,
    log: Log,
    data: bytes,
    graph: Variant,
    known: Sequence[Profile],
    timings: bytes = b"",
    adjust: Callable[[Any], None] | None = None,
) -> tuple[bytes, bytes]:
    """Compile a graph for this GPU under these profiles; gives the engine and the timings, longer by its own.

    data: the verified bytes of graph.file. timings: of earlier builds on the same GPU and version. adjust:
    what else is to be set in the builder's configuration. Raises BadBundle with what TensorRT said.
    """
    builder = trt.Builder(log.logger)
    network = builder.create_network(trt_versions.network_flags(trt))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(data):
        # The parser says what is wrong, the log in which node.
        log.said += [parser.get_error(at).desc() for at in range(parser.num_errors)]
        raise BadBundle(f"{graph.file}: TensorRT cannot read it: {log.take()}")
    config = builder.create_builder_config()
    # float32 is float32: a bundle's points were measured so. For speed there is the variant fp16.
    config.clear_flag(trt.BuilderFlag.TF32)
    trt_versions.keep_types(trt, network, config)
    trt_versions.share_profiles(trt, config)
    for profile in known:
        ranges = builder.create_optimization_profile()
        for tensor in graph.inputs:
            ranges.set_shape(tensor.name, *shapes(tensor, profile))
        config.add_optimization_profile(ranges)
    if trt_versions.keeps_timings(trt):
        cache = config.create_timing_cache(timings) or config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    if adjust is not None:
        adjust(config)
    blob = builder.build_serialized_network(network, config)
    if blob is None:
        raise BadBundle(f"{graph.file}: TensorRT cannot compile it: {log.take()}")
    if trt_versions.keeps_timings(trt):
        timings = bytes(config.get_timing_cache().serialize())
    return bytes(blob), timings


def hold(trt: Any, engine: Any, graph: Variant) -> None:
    """The engine's inputs and outputs must be the manifest's: names, sides, dtypes; BadBundle otherwise."""
    names = [engine.get_tensor_name(at) for at in range(engine.num_io_tensors)]
    inputs = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
    for side, tensors, found in (
        ("inputs", graph.inputs, inputs),
        ("outputs", graph.outputs, set(names) - inputs),
    ):
        if found != {tensor.name for tensor in tensors}:
            raise BadBundle(
                f"{graph.file}: {side} {sorted(found)}, the manifest says {sorted(t.name for t in tensors)}"
            )
        for tensor in tensors:
            _hold_tensor(trt, engine, graph, trt_versions.as_read(trt, tensor))


def _hold_tensor(trt: Any, engine: Any, graph: Variant, tensor: Tensor) -> None:
    dtype = engine.get_tensor_dtype(tensor.name)
    if dtype != getattr(trt.DataType, DTYPES[tensor.dtype], None):
        raise BadBundle(f"{graph.file}: {tensor.name} is {dtype}, the manifest says {tensor.dtype}")
    sizes = list(zip(tuple(engine.get_tensor_shape(tensor.name)), tensor.shape, strict=False))
    if any(isinstance(said, int) and found not in (-1, said) for found, said in sizes):
        raise BadBundle(f"{graph.file}: {tensor.name} is {sizes}, the manifest says {list(tensor.shape)}")
