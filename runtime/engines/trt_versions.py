"""Differences between TensorRT 8.6, 10, 11 and TensorRT-RTX.

Names that not every version has are used only in this file, after a check that they exist. Which version
has which names is in tests/data/trt_names.json, generated from the real bindings.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from offramp.runtime.bundle.manifest import Tensor


def network_flags(trt: Any) -> int:
    """Flags for creating a network whose tensors keep the types of the graph."""
    flag, flags = trt.NetworkDefinitionCreationFlag, 0
    if hasattr(flag, "EXPLICIT_BATCH"):  # 8.6 needs it, 10 ignores it, 11 has nothing else
        flags |= 1 << int(flag.EXPLICIT_BATCH)
    if hasattr(flag, "STRONGLY_TYPED"):  # 10 has the choice, 11 nothing else
        flags |= 1 << int(flag.STRONGLY_TYPED)
    return flags


def keep_types(trt: Any, network: Any, config: Any) -> None:
    """Make layers of a weakly typed network (8.6) keep the types of the graph, float16 or float32.

    Exits and gates are float32 in every graph; each layer's type is set so that they stay float32.
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
    """Allow several contexts to use one profile at once: an option of 8.6 and 10, always allowed in 11."""
    if hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806"):
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)


def keeps_timings(trt: Any) -> bool:
    """Whether a build can use timings of earlier builds; TensorRT-RTX has none and deprecates the calls."""
    return not hasattr(trt, "IRuntimeCache")


def create_context(trt: Any, engine: Any) -> Any:
    """Create an execution context without scratch memory; None if TensorRT cannot make one.

    set_scratch_memory() sets its scratch memory.
    """
    if hasattr(trt, "ExecutionContextAllocationStrategy"):
        return engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    return engine.create_execution_context_without_device_memory()


def scratch_bytes(engine: Any) -> int:
    """Bytes of scratch memory that a context of the engine needs while it runs."""
    if hasattr(engine, "device_memory_size_v2"):
        return int(engine.device_memory_size_v2)
    return int(engine.device_memory_size)


def set_scratch_memory(context: Any, pointer: int, size: int) -> None:
    """Set the scratch memory of a context; other contexts may use it while this one does not run."""
    if hasattr(context, "set_device_memory"):
        context.set_device_memory(pointer, size)
    else:
        context.device_memory = pointer


def as_tensorrt_reads(trt: Any, tensor: Tensor) -> Tensor:
    """Describe a graph's input with the dtype in which TensorRT reads it: int32 for int64 in 8.6."""
    if tensor.dtype == "int64" and not hasattr(trt.DataType, "INT64"):
        return dataclasses.replace(tensor, dtype="int32")
    return tensor
