"""A Triton server in this process: the names of triton_python_backend_utils that a Python model uses.

Names, arguments and defaults are those that the Python backend documents and binds. A request for another
model runs its real ONNX file, after it was compared with the config.pbtxt beside it as the server does.
Models answer as on a GPU: outputs that were not asked for in the memory of the CPU cannot be read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from offramp.runtime.engines import threads

TRITONSERVER_MEMORY_GPU, TRITONSERVER_MEMORY_CPU = "GPU", "CPU"
DTYPES = {
    DataType.TYPE_BOOL: "bool",
    DataType.TYPE_UINT8: "uint8",
    DataType.TYPE_INT8: "int8",
    DataType.TYPE_INT32: "int32",
    DataType.TYPE_INT64: "int64",
    DataType.TYPE_FP16: "float16",
    DataType.TYPE_FP32: "float32",
    DataType.TYPE_STRING: "object",
}


class TritonModelException(Exception):
    """What the backend raises by itself."""


class TritonError:
    """An error with one of the server's codes."""

    def __init__(self, message: str, code: str = "INTERNAL") -> None:
        if not isinstance(message, str):
            raise TypeError("a message is a text")
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> str:
        return self._code


CODES = "UNKNOWN INTERNAL NOT_FOUND INVALID_ARG UNAVAILABLE UNSUPPORTED ALREADY_EXISTS CANCELLED"
for _name in CODES.split():
    setattr(TritonError, _name, _name)


@dataclass(frozen=True)
class PreferredMemory:
    """Where outputs are wanted."""

    preferred_memory_type: str
    preferred_device_id: int = 0


class Tensor:
    """A named array; the server sends texts as their bytes."""

    def __init__(self, name: str, numpy_array: np.ndarray, /) -> None:
        if not name:
            raise TritonModelException("Tensor name cannot be an empty string.")
        if numpy_array.dtype == object:
            values = [
                value if isinstance(value, bytes) else str(value).encode() for value in numpy_array.flat
            ]
            bytes_of = np.empty(len(values), object)
            bytes_of[:] = values
            numpy_array = bytes_of.reshape(numpy_array.shape)
        self._name, self._array, self._on_cpu = name, np.ascontiguousarray(numpy_array), True

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        if not self._on_cpu:
            raise TritonModelException("Tensor is stored in GPU and cannot be converted to NumPy.")
        return self._array

    def is_cpu(self) -> bool:
        return self._on_cpu

    def shape(self) -> list[int]:
        return list(self._array.shape)


class InferenceResponse:
    """What a model answers."""

    def __init__(
        self,
        output_tensors: Sequence[Tensor] = (),
        error: TritonError | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        self._tensors, self._error, self._parameters = list(output_tensors), error, parameters or {}

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def parameters(self) -> str:
        return json.dumps(self._parameters)


class InferenceRequest:
    """What a model is asked."""

    def __init__(
        self,
        request_id: str = "",
        correlation_id: int | str = 0,
        inputs: Sequence[Tensor] = (),
        requested_output_names: Sequence[str] = (),
        model_name: str = "",
        model_version: int = -1,
        flags: int = 0,
        timeout: int = 0,
        preferred_memory: PreferredMemory | None = None,
        trace: object = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        self._inputs, self._requested, self._model = list(inputs), list(requested_output_names), model_name
        self._memory, self._parameters = preferred_memory, parameters or {}

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def requested_output_names(self) -> list[str]:
        return self._requested

    def parameters(self) -> str:
        return json.dumps(self._parameters)

    def is_cancelled(self) -> bool:
        return False

    def exec(self, decoupled: bool = False) -> InferenceResponse:
        assert SERVER is not None, "a request outside of execute()"
        try:
            outputs = SERVER.run(self._model, {tensor.name(): tensor.as_numpy() for tensor in self._inputs})
            tensors = [Tensor(name, outputs[name]) for name in self._requested if name in outputs]
        except Exception as problem:
            return InferenceResponse(error=TritonError(str(problem)))
        for tensor in tensors:
            tensor._on_cpu = self._memory == PreferredMemory(TRITONSERVER_MEMORY_CPU)
        return InferenceResponse(tensors)


def get_input_tensor_by_name(inference_request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in inference_request.inputs() if tensor.name() == name), None)


def get_output_tensor_by_name(inference_response: InferenceResponse, name: str) -> Tensor | None:
    return next((tensor for tensor in inference_response.output_tensors() if tensor.name() == name), None)


def read_config(model: Path) -> Any:
    """The config.pbtxt of a model's folder, read by the server's own description of it."""
    return text_format.Parse((model / "config.pbtxt").read_text(encoding="utf-8"), ModelConfig())


@dataclass
class Server:
    """Runs the graphs of a model repository.

    calls: (model, rows) of every run. change: called with a model's name and outputs, which it may change, or
    it raises an error.
    """

    repository: Path
    calls: list[tuple[str, int]] = field(default_factory=list)
    change: Callable[[str, dict[str, np.ndarray]], None] | None = None
    _sessions: dict[str, Any] = field(default_factory=dict)

    def run(self, model: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of a model by name."""
        folder = self.repository / model
        if not folder.is_dir():
            raise ValueError(f"Request for unknown model: '{model}' is not found")
        if model not in self._sessions:
            self._sessions[model] = read_config(folder), self._open(folder)
        config, session = self._sessions[model]
        assert config.platform == "onnxruntime_onnx" and config.max_batch_size == 0
        assert {entry.name for entry in config.input} == inputs.keys()
        for entry in config.input:
            check(entry, inputs[entry.name], list(entry.dims))
        self.calls.append((model, len(next(iter(inputs.values())))))
        names = [entry.name for entry in config.output]
        outputs = dict(zip(names, session.run(names, dict(inputs)), strict=True))
        for entry in config.output:
            check(entry, outputs[entry.name], list(entry.dims))
        if self.change is not None:
            self.change(model, outputs)
        return outputs

    def _open(self, folder: Path) -> Any:
        options = onnxruntime.SessionOptions()
        threads.share_global_pool(options)
        file = str(folder / "1" / "model.onnx")
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def check(entry: Any, values: np.ndarray, dims: Sequence[int]) -> None:
    """Raise ValueError unless an array is what a configuration says of a tensor."""
    fits = len(values.shape) == len(dims) and all(
        dim in (-1, size) for dim, size in zip(dims, values.shape, strict=True)
    )
    if values.dtype != np.dtype(DTYPES[entry.data_type]) or not fits:
        raise ValueError(f"{entry.name}: {values.dtype} {values.shape}, the configuration has {dims}")


SERVER: Server | None = None  # of the models that requests name
