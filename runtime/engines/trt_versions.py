"""What differs between TensorRT 8.6, 10, 11 and TensorRT-RTX.

A name that not every version has stands in this file alone, behind a check that it is there. Which version
has which names is in tests/data/trt_names.json, generated from the real bindings.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from offramp.runtime.bundle.manifest import Tensor


def network_flags(trt: Any) -> int:
    """Flags of a network whose tensors keep the types that the graph gives them."""
    flag, flags = trt.NetworkDefinitionCreationFlag, 0
    if hasattr(flag, "EXPLICIT_BATCH"):  # 8.6 asks for it, 10 ignores it, 11 has nothing else
        flags |= 1 << int(flag.EXPLICIT_BATCH)
    if hasattr(flag, "STRONGLY_TYPED"):  # 10 has the choice, 11 nothing else
        flags |= 1 << int(flag.STRONGLY_TYPED)
    return flags


def keep_types(trt: Any, network: Any, config: Any) -> None:
    """Where networks are weakly typed (8.6): half precision for what is half in the graph, and nothing more.

    Exits and gates are float32 in every graph; to keep them so, each layer's type is set.
    """
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return
    outputs = [
        (layer, layer.get_output(0).dtype)
        for layer in map(network.get_layer, range(network.num_layers))
        if layer.num_outputs
    ]
    if all(dtype != trt.DataType.HALF for _, dtype in outputs):
        return
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    for layer, dtype in outputs:
        if dtype in (trt.DataType.FLOAT, trt.DataType.HALF):
            layer.precision = dtype
            layer.set_output_type(0, dtype)


def share_profiles(trt: Any, config: Any) -> None:
    """Let several contexts use one profile at once: an option of 8.6 and 10, always so in 11."""
    if hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806"):
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)


def keeps_timings(trt: Any) -> bool:
    """Whether a build can use timings of earlier ones: TensorRT-RTX has none and deprecates the calls."""
    return not hasattr(trt, "IRuntimeCache")


def context(trt: Any, engine: Any) -> Any:
    """A context without scratch memory, which lend() gives it; None where TensorRT cannot make one."""
    if hasattr(trt, "ExecutionContextAllocationStrategy"):
        return engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    return engine.create_execution_context_without_device_memory()


def scratch_bytes(engine: Any) -> int:
    """Scratch memory that any context of the engine needs while it runs."""
    if hasattr(engine, "device_memory_size_v2"):
        return int(engine.device_memory_size_v2)
    return int(engine.device_memory_size)


def lend(context: Any, pointer: int, size: int) -> None:
    """Give a context scratch memory, which other contexts may use while it does not run."""
    if hasattr(context, "set_device_memory"):
        context.set_device_memory(pointer, size)
    else:
        context.device_memory = pointer


def as_read(trt: Any, tensor: Tensor) -> Tensor:
    """A graph's input with the dtype in which TensorRT reads it: 8.6 has no int64 and takes int32."""
    if tensor.dtype == "int64" and not hasattr(trt.DataType, "INT64"):
        return dataclasses.replace(tensor, dtype="int32")
    return tensor
