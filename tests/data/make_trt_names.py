"""Writes trt_names.json: the names in TensorRT's Python bindings of four versions, on any machine with gcc.

    python3.10 tests/data/make_trt_names.py          # 3.10: the one for which all four have a wheel

The bindings are real wheels; the libraries under them are not available everywhere. Stubs with the few
symbols that the bindings need are enough to import them and list their names. Nothing of TensorRT runs, and
nothing of it is kept but names.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

WHEELS = {
    "8.6.1": "tensorrt-bindings==8.6.1",
    "10.3.0": "tensorrt-cu12-bindings==10.3.0",
    "10.16.1": "tensorrt-cu12-bindings==10.16.1.11",
    "11.4.0": "tensorrt-cu13-bindings==11.4.0.106",
}
# What builds, holds and walks an engine; "" are the module's own names.
CLASSES = [
    *("Builder", "INetworkDefinition", "OnnxParser", "ParserError", "IBuilderConfig", "IOptimizationProfile"),
    *("ITimingCache", "IHostMemory", "ITensor", "ILogger", "ILogger.Severity", "Logger", "Runtime"),
    *("ICudaEngine", "IExecutionContext", "BuilderFlag", "NetworkDefinitionCreationFlag", "MemoryPoolType"),
    *("TensorIOMode", "DataType", "HardwareCompatibilityLevel", "ProfilingVerbosity", "PreviewFeature"),
    *("ILayer", "ExecutionContextAllocationStrategy"),
]
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin", "nvparsers")
SYMBOLS = [
    *(f"create{name}_INTERNAL" for name in ("InferBuilder", "InferRefitter", "InferRuntime")),
    *(f"create{name}_INTERNAL" for name in ("NvOnnxParser", "NvOnnxParserRefitter")),
    *("getBuilderPluginRegistry", "getPluginRegistry", "getNvOnnxParserVersion", "initLibNvInferPlugins"),
    # Of 8.6, which also read formats that are gone.
    "_ZN11nvuffparser15createUffParserEv",
    "_ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi",
    "_ZN14nvcaffeparser117createCaffeParserEv",
    "_ZN14nvcaffeparser123shutdownProtobufLibraryEv",
]
TARGET = Path(__file__).with_name("trt_names.json")


def look(module_file: str) -> None:
    """Print the names as JSON; in a process of its own, since a version is loaded once."""
    loader = importlib.machinery.ExtensionFileLoader("tensorrt", module_file)
    spec = importlib.util.spec_from_file_location("tensorrt", module_file, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    names = {name for name in dir(module) if not name.startswith("_")} & {c.split(".")[0] for c in CLASSES}
    for path in CLASSES:
        owner: Any = module
        for part in path.split("."):
            owner = getattr(owner, part, None)
        if owner is not None:
            names |= {f"{path}.{name}" for name in dir(owner) if not name.startswith("_")}
    print(json.dumps(sorted(names)))
    sys.stdout.flush()
    os._exit(0)  # there is nothing behind the libraries that could be unloaded


def names_of(version: str, wheel: str, work: Path) -> list[str]:
    """The names of one version."""
    folder = work / version
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(folder), wheel], check=True)
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as packed:
        packed.extractall(folder)
    (folder / "stub.c").write_text("\n".join(f"void *{name}(void) {{ return 0; }}" for name in SYMBOLS))
    for library in LIBRARIES:
        name = f"lib{library}.so.{version.split('.')[0]}"
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run(["gcc", *flags, str(folder / "stub.c")], check=True)
    (module,) = folder.rglob("tensorrt.so")
    command = [sys.executable, __file__, str(module)]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    names: list[str] = json.loads(output)
    return names


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        by_version = {version: names_of(version, wheel, Path(scratch)) for version, wheel in WHEELS.items()}
    every = sorted({name for names in by_version.values() for name in names})
    table = {name: [v for v, names in by_version.items() if name in names] for name in every}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(versions)}" for name, versions in table.items())
    TARGET.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    print(f"{TARGET.name}: {len(every)} names")


if __name__ == "__main__":
    look(sys.argv[1]) if len(sys.argv) > 1 else main()
