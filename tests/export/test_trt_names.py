"""Names of TensorRT and CUDA that are used are in the real bindings: trt_names.json, cuda-bindings."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import tensorrt_rtx
from cuda.bindings import runtime as cudart
from doubles import cuda_double

from offramp.export import trt_compile
from offramp.runtime.bundle import manifest
from offramp.runtime.engines import cuda, trt, trt_build, trt_versions

TABLE: dict[str, list[str]] = json.loads(
    (Path(__file__).parents[1] / "data" / "trt_names.json").read_text(encoding="utf-8")
)
VERSIONS = ["8.6.1", "10.3.0", "10.16.1", "11.4.0"]
# The class behind each variable, by its last name (self._trt is trt); "" is the module.
OBJECTS = {
    "trt": "",
    "_trt": "",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "shapes": "IOptimizationProfile",
    "ranges": "IOptimizationProfile",
    "blob": "IHostMemory",
    "layer": "ILayer",
    "flag": "NetworkDefinitionCreationFlag",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
}
RETURNS = {
    "IBuilderConfig.get_timing_cache": "ITimingCache",
    "OnnxParser.get_error": "ParserError",
    "ILayer.get_output": "ITensor",
}
OURS = ("__init__", "__name__", "__version__")
ONLY_RTX = {
    "ComputeCapability",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "IRuntimeCache",
}


def dotted(node: ast.AST) -> str | None:
    """The name in the table's words that an attribute, or a call of one, stands for; "" is the module."""
    if isinstance(node, ast.Call):
        return RETURNS.get(dotted(node.func) or "")
    if isinstance(node, ast.Name):
        return OBJECTS.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        if owner is None:
            return OBJECTS.get(node.attr) if isinstance(node.value, ast.Name) else None
        return f"{owner}.{node.attr}".lstrip(".")
    return None


def touched(source: str) -> set[str]:
    """All names of TensorRT's that the source reads, sets, or checks with hasattr."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            names.add(dotted(node) or "")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
            thing, name = node.args
            assert isinstance(name, ast.Constant)
            names.add(f"{dotted(thing)}.{name.value}".lstrip("."))
    # trt and others keep such objects as their own attributes: "ICudaEngine" and the like are no names.
    return {name for name in names - {""} if name.rpartition(".")[2] not in OURS}


def source(module: ModuleType) -> str:
    return inspect.getsource(module)


def missing(names: set[str], versions: list[str]) -> list[str]:
    real = {name for name in names if name not in OBJECTS.values()}
    return sorted(name for name in real if not set(versions) <= set(TABLE.get(name, ())))


def test_the_compiler_without_a_gpu_uses_names_of_tensorrt_rtx() -> None:
    """These are its own; the rest is the engine's function, which it calls."""
    names = touched(source(trt_compile))
    assert names <= ONLY_RTX and names
    for name in ONLY_RTX:
        thing = tensorrt_rtx
        for part in name.split("."):
            thing = getattr(thing, part)
    assert missing(names, VERSIONS) == sorted(names), "TensorRT has it now, too"


@pytest.mark.parametrize("module", [trt, trt_build], ids=lambda module: module.__name__)
def test_names_that_the_engine_uses_are_in_every_version(module: ModuleType) -> None:
    assert missing(touched(source(module)), VERSIONS) == []


def test_the_check_recognises_names_that_the_engine_needs() -> None:
    """The check above would pass on a source in which it recognises nothing."""
    names = touched(source(trt_build)) | touched(source(trt))
    assert names >= {
        "Runtime.deserialize_cuda_engine",
        "IExecutionContext.set_tensor_address",
        "IExecutionContext.set_input_shape",
        "IExecutionContext.execute_async_v3",
        "IExecutionContext.set_optimization_profile_async",
        "IOptimizationProfile.set_shape",
        "ITimingCache.serialize",
        "ParserError.desc",
        "BuilderFlag.TF32",
    }


def test_every_dtype_of_a_manifest_has_a_name_in_tensorrt() -> None:
    assert set(trt_build.DTYPES) == set(manifest.DTYPES)
    assert missing({f"DataType.{name}" for name in trt_build.DTYPES.values()}, VERSIONS) == ["DataType.INT64"]


def test_names_of_some_versions_alone_stand_in_one_file() -> None:
    names = touched(source(trt_versions)) - ONLY_RTX
    assert all(TABLE.get(name) for name in names if name not in OBJECTS.values())
    only_some = set(missing(names, VERSIONS))
    assert {"IExecutionContext.set_device_memory", "ICudaEngine.device_memory_size_v2"} <= only_some


@pytest.mark.parametrize(
    ("module", "was", "instead"),
    [
        (trt_build, "build_serialized_network", "build_engine"),
        (trt_build, "set_timing_cache", "use_timing_cache"),
        (trt, "execute_async_v3", "execute_async_v2"),
        (trt, "set_tensor_address", "set_binding_address"),
    ],
)
def test_a_call_by_another_name_is_found(module: ModuleType, was: str, instead: str) -> None:
    text = source(module)
    assert was in text and missing(touched(text) - ONLY_RTX, ["11.4.0"]) == []
    gone = missing(touched(text.replace(was, instead)) - ONLY_RTX, ["11.4.0"])
    assert [name.rpartition(".")[2] for name in gone] == [instead]


def test_the_table_knows_which_version_has_a_name() -> None:
    assert TABLE["IExecutionContext.execute_async_v2"] == ["8.6.1"]
    assert TABLE["IExecutionContext.set_device_memory"] == ["10.3.0", "10.16.1", "11.4.0"]
    assert "11.4.0" not in TABLE["BuilderFlag.FP16"]


def names_of_cuda() -> set[str]:
    return set(re.findall(r"\bcuda[A-Z]\w*", source(cuda)))


def test_names_of_cuda_are_in_the_real_bindings_and_in_the_double() -> None:
    names = names_of_cuda() - {"cudaMemcpyKind", "cudaStreamCaptureMode", "cudaError_t"}
    assert {"cudaMemcpyAsync", "cudaEventSynchronize", "cudaGraphLaunch"} <= names
    double = cuda_double.Cudart()
    owners = (cudart, cudart.cudaMemcpyKind, cudart.cudaStreamCaptureMode, cudart.cudaError_t)
    doubles = (double, double.cudaMemcpyKind, double.cudaStreamCaptureMode, double.cudaError_t)
    for name in sorted(names):
        assert any(hasattr(owner, name) for owner in owners), name
        assert any(hasattr(owner, name) for owner in doubles), name


def test_the_double_of_cuda_takes_as_many_arguments_as_the_real_one() -> None:
    double = cuda_double.Cudart()
    functions = [name for name in names_of_cuda() if callable(getattr(cudart, name, None))]
    for name in (name for name in functions if not isinstance(getattr(cudart, name), type)):
        signature = (getattr(cudart, name).__doc__ or "").splitlines()[0]
        inside = signature[signature.index("(") + 1 : signature.rindex(")")]
        real = len([part for part in inside.split(",") if part.strip()])
        assert len(inspect.signature(getattr(double, name)).parameters) == real, name
