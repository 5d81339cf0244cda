"""Build a TensorRT engine for this GPU from the bytes of one ONNX graph: profiles, compiling, checking.

A profile is a range of rows and tokens for which an engine is tuned. Single rows, which matter for latency,
and short texts, which are the most frequent, have their own profiles: a single profile for all sizes is tuned
for none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from offramp.runtime.bundle.manifest import Manifest, Tensor, TextInput, Variant
from offramp.runtime.engines import trt_versions
from offramp.runtime.engines.device import Shape, numeric_shape
from offramp.runtime.errors import BadBundle, BadSetting

Size = tuple[int, int]  # rows, tokens
Profile = tuple[Size, Size, Size]  # the smallest size, the size it is tuned for, the largest

MAX_ROWS = 32  # rows of one step at most: the largest batch size
SHORT_TEXT = 64  # tokens at most
# The manifest's names and TensorRT's; 8.6 has no INT64, see trt_versions.as_tensorrt_reads.
DTYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "int64": "INT64",
    "int32": "INT32",
    "int8": "INT8",
    "uint8": "UINT8",
    "bool": "BOOL",
}


def build_profiles(manifest: Manifest) -> tuple[Profile, ...]:
    """The profiles of a bundle: for one row and for several, for short texts and for long texts.

    Images have one length, which is fixed in their graphs.
    """
    reads = manifest.input
    lengths = [(1, 1, 1)]
    if isinstance(reads, TextInput):
        longest = reads.longest
        lengths = [(1, min(SHORT_TEXT // 2, longest), min(SHORT_TEXT, longest))]
        if longest > SHORT_TEXT:
            lengths.append((SHORT_TEXT + 1, min(2 * SHORT_TEXT, longest), longest))
    rows = [(1, 1, 1), (2, MAX_ROWS // 4, MAX_ROWS)]
    return tuple(
        ((count[0], length[0]), (count[1], length[1]), (count[2], length[2]))
        for count in rows
        for length in lengths
    )


def find_profile(known: Sequence[Profile], rows: int, tokens: int) -> int:
    """Index of the profile for this many rows and tokens; raises BadSetting if no profile fits."""
    for number, (low, _, high) in enumerate(known):
        if low[0] <= rows <= high[0] and (high[1] == 1 or low[1] <= tokens <= high[1]):
            return number
    max_rows = max(high[0] for *_, high in known)
    raise BadSetting(
        f"{rows} rows of {tokens} tokens: engines are built for at most {max_rows} rows of "
        f"{max(high[1] for *_, high in known)} tokens; choose a batch size of {max_rows} or less"
    )


def profile_shapes(tensor: Tensor, profile: Profile) -> tuple[Shape, Shape, Shape]:
    """The smallest, usual and largest shape of an input in a profile."""
    low, usual, high = (numeric_shape(tensor, rows, tokens) for rows, tokens in profile)
    return low, usual, high


class ErrorLog:
    """A logger for TensorRT that keeps the last error messages and prints nothing."""

    def __init__(self, trt: Any) -> None:
        self.messages: list[str] = []
        messages, worst = self.messages, trt.ILogger.Severity.ERROR

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= worst:
                    messages.append(message.strip())
                    del messages[:-8]

        self.logger = Logger()

    def take(self) -> str:
        """Return the messages since the last call as one line, and forget them."""
        unique = dict.fromkeys(" ".join(text.split()) for text in self.messages)
        self.messages.clear()
        return "; ".join(unique) or "no reason was given"


def build_engine(
    trt: Any,
    log: ErrorLog,
    data: bytes,
    graph: Variant,
    known: Sequence[Profile],
    timings: bytes = b"",
    adjust: Callable[[Any], None] | None = None,
) -> tuple[bytes, bytes]:
    """Compile a graph for this GPU with these profiles; returns the engine's bytes, and updated timings.

    trt: the module tensorrt. data: the verified bytes of graph.file. timings: TensorRT's timing cache from
    earlier builds on the same GPU and version. adjust: a function that changes the builder's configuration
    further. Raises BadBundle with TensorRT's reason.
    """
    builder = trt.Builder(log.logger)
    network = builder.create_network(trt_versions.network_flags(trt))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(data):
        # The parser reports the problem, the log reports the node.
        log.messages += [parser.get_error(at).desc() for at in range(parser.num_errors)]
        raise BadBundle(f"{graph.file}: TensorRT cannot read it: {log.take()}")
    config = builder.create_builder_config()
    # Full float32, with which a bundle's points were measured. For speed there is the variant fp16.
    config.clear_flag(trt.BuilderFlag.TF32)
    trt_versions.keep_types(trt, network, config)
    trt_versions.share_profiles(trt, config)
    for profile in known:
        ranges = builder.create_optimization_profile()
        for tensor in graph.inputs:
            ranges.set_shape(tensor.name, *profile_shapes(tensor, profile))
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


def check_tensors(trt: Any, engine: Any, graph: Variant) -> None:
    """Raise BadBundle unless the engine's inputs and outputs have the manifest's names, dtypes and sizes."""
    names = [engine.get_tensor_name(at) for at in range(engine.num_io_tensors)]
    inputs = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
    for side, tensors, real_names in (
        ("inputs", graph.inputs, inputs),
        ("outputs", graph.outputs, set(names) - inputs),
    ):
        expected = {tensor.name for tensor in tensors}
        if real_names != expected:
            raise BadBundle(f"{graph.file}: {side} {sorted(real_names)}, the manifest has {sorted(expected)}")
        for tensor in tensors:
            _check_tensor(trt, engine, graph, trt_versions.as_tensorrt_reads(trt, tensor))


def _check_tensor(trt: Any, engine: Any, graph: Variant, tensor: Tensor) -> None:
    dtype = engine.get_tensor_dtype(tensor.name)
    if dtype != getattr(trt.DataType, DTYPES[tensor.dtype], None):
        raise BadBundle(f"{graph.file}: {tensor.name} is {dtype}, the manifest has {tensor.dtype}")
    sizes = list(zip(tuple(engine.get_tensor_shape(tensor.name)), tensor.shape, strict=False))
    if any(isinstance(size, int) and real not in (-1, size) for real, size in sizes):
        raise BadBundle(f"{graph.file}: {tensor.name} is {sizes}, the manifest has {list(tensor.shape)}")
