"""The text of config.pbtxt, the configuration that a Triton server reads of each model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from offramp.runtime.triton_model import TEXT

# Triton's name of each of numpy's dtypes.
TRITON_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    TEXT: "TYPE_STRING",
}
KINDS = {"cpu": "KIND_CPU", "cuda": "KIND_GPU"}  # of an instance, by our name of the device
FREE = -1  # a size that differs from request to request


class Symbol(str):
    """A value that is written without quotes: the name of a constant."""


# The fields of a message in their order: texts, numbers, lists of numbers, and fields of messages inside.
Fields = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class ModelTensor:
    """An input or output of a model: its name, numpy's dtype, and its sizes, FREE for those that vary.

    optional: whether a request may leave an input out.
    """

    name: str
    dtype: str
    dims: tuple[int, ...]
    optional: bool = False

    def fields(self) -> Fields:
        """The message that describes it."""
        fields: Fields = (
            ("name", self.name),
            ("data_type", Symbol(TRITON_TYPES[self.dtype])),
            ("dims", list(self.dims)),
        )
        return (*fields, ("optional", True)) if self.optional else fields


def graph_config(
    name: str,
    inputs: Sequence[ModelTensor],
    outputs: Sequence[ModelTensor],
    *,
    device: str | None,
    tensorrt: bool,
    half: bool,
) -> str:
    """The configuration of a model that is an ONNX graph.

    The first axis of its tensors is the batch, which the caller makes: texts have different lengths, so that
    the server cannot join two requests. device: None leaves it to the server. tensorrt: run it with ONNX
    Runtime's TensorRT provider. half: the graph computes in float16.
    """
    fields: Fields = (
        ("name", name),
        ("platform", "onnxruntime_onnx"),
        ("max_batch_size", 0),
        *(("input", tensor.fields()) for tensor in inputs),
        *(("output", tensor.fields()) for tensor in outputs),
    )
    if device is not None:
        fields = (*fields, ("instance_group", (("count", 1), ("kind", Symbol(KINDS[device])))))
    if device == "cuda":
        accelerators = [_accelerator("tensorrt", precision_mode="FP16" if half else "FP32")] * tensorrt
        # Full float32, with which a bundle's points were measured.
        accelerators.append(_accelerator("cuda", use_tf32="0"))
        fields = (*fields, ("optimization", (("execution_accelerators", tuple(accelerators)),)))
    return to_text(fields)


def walker_config(
    name: str,
    inputs: Sequence[ModelTensor],
    outputs: Sequence[ModelTensor],
    *,
    max_batch: int,
    queue_delay: int,
    instances: int,
    parameters: Mapping[str, str],
) -> str:
    """The configuration of the Python model that walks.

    The server adds an axis of rows before the sizes of its tensors. max_batch: most rows of the requests that
    are handed over together. queue_delay: microseconds that a request waits for others. instances: processes.
    """
    fields: Fields = (
        ("name", name),
        ("backend", "python"),
        ("max_batch_size", max_batch),
        *(("input", tensor.fields()) for tensor in inputs),
        *(("output", tensor.fields()) for tensor in outputs),
        ("dynamic_batching", (("max_queue_delay_microseconds", queue_delay),)),
        ("instance_group", (("count", instances), ("kind", Symbol("KIND_CPU")))),
        *(
            ("parameters", (("key", key), ("value", (("string_value", text),))))
            for key, text in parameters.items()
        ),
    )
    return to_text(fields)


def to_text(fields: Fields, depth: int = 0) -> str:
    """A message in the text format of protocol buffers."""
    indent, lines = "  " * depth, list[str]()
    for name, value in fields:
        if isinstance(value, tuple):
            lines.append(f"{indent}{name} {{\n{to_text(value, depth + 1)}{indent}}}")
        else:
            lines.append(f"{indent}{name}: {_scalar(value)}")
    return "\n".join(lines) + "\n"


def _scalar(value: object) -> str:
    if isinstance(value, Symbol):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[ {', '.join(map(str, value))} ]"
    return json.dumps(value, ensure_ascii=False)


def _accelerator(name: str, **parameters: str) -> tuple[str, Fields]:
    keys = (("parameters", (("key", key), ("value", value))) for key, value in parameters.items())
    return "gpu_execution_accelerator", (("name", name), *keys)
