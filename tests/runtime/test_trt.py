"""The TensorRT engine names what is missing; it never runs something else in its place."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from offramp.runtime import BadSetting, EngineUnavailable, load
from offramp.runtime.engines import cuda, trt, trt_versions

TINY = Path(__file__).parents[1] / "data" / "tiny_bundle"


class Driver:
    def __init__(self, code: int) -> None:
        self.cuInit = lambda flags: code


def no_driver(name: str) -> Driver:
    raise OSError(name)


def message() -> str:
    with pytest.raises(EngineUnavailable) as error:
        load(TINY, engine="trt")
    return str(error.value)


def installed(patch: pytest.MonkeyPatch, *names: str) -> None:
    patch.setattr(trt, "find_spec", lambda name: object() if name in names else None)


def test_the_driver_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_load", no_driver)
    installed(monkeypatch)
    text = message()
    assert "no CUDA driver on this machine" in text and "tensorrt is not installed either" in text
    assert text.endswith("or use --engine ort")


def test_no_tensorrt_module_is_imported_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_load", lambda name: Driver(100))
    installed(monkeypatch, "tensorrt")
    monkeypatch.setattr(trt, "import_module", lambda name: pytest.fail("imported: it may crash the process"))
    assert "cuInit gives 100" in message()


def test_then_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_load", lambda name: Driver(0))
    installed(monkeypatch)
    assert "pip install 'offramp[trt]'" in message()


def test_a_runtime_that_cannot_build_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_load", lambda name: Driver(0))
    installed(monkeypatch, "tensorrt_dispatch")
    assert "tensorrt_dispatch is installed: it runs engines and cannot build them" in message()


def test_then_whether_it_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise ImportError("libnvinfer.so: cannot open shared object file")

    monkeypatch.setattr(cuda, "_load", lambda name: Driver(0))
    installed(monkeypatch, "tensorrt")
    monkeypatch.setattr(trt, "import_module", broken)
    assert "tensorrt cannot be imported: libnvinfer.so" in message()


def test_then_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> ModuleType:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(cuda, "_load", lambda name: Driver(0))
    installed(monkeypatch, "tensorrt")
    monkeypatch.setattr(trt, "import_module", ModuleType)
    monkeypatch.setattr(cuda, "import_module", gone)
    text = message()
    assert "cuda.bindings.runtime" in text and "pip install cuda-python" in text


def test_no_graph_is_opened_by_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_load", no_driver)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert message().startswith("engine trt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, "engine trt runs on device cuda alone, not cpu"),
        ({"provider": "tensorrt"}, "provider tensorrt is for engine ort"),
        ({"threads": 2}, "threads 2 is for engine ort"),
        ({"variant": "int8"}, "variant int8 is ONNX Runtime's own; engine trt walks fp32 or fp16"),
    ],
)
def test_options_that_contradict_it(options: dict[str, object], message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        load(TINY, engine="trt", **options)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("beside", ["", "import tensorrt_lean, tensorrt_dispatch; "])
def test_the_command_ends_with_2_and_one_line(beside: str) -> None:
    """On this machine as it is; where it has TensorRT's lean and dispatch runtimes, with them loaded."""
    if beside:
        pytest.importorskip("tensorrt_lean")
    if cuda.driver_problem() is None:
        pytest.skip("this machine has a GPU")
    code = f"{beside}from offramp.runtime.cli import main; main()"
    command = [sys.executable, "-c", code, "--engine", "trt", "--bundle", str(TINY), "-"]
    done = subprocess.run(command, input="good film\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("ee-run: engine trt: no CUDA driver") and done.stderr.count("\n") == 1


class Layer:
    """One layer of a weakly typed network, with one output of a dtype."""

    def __init__(self, dtype: str) -> None:
        self.precision, self.output_type, self.num_outputs = "", "", 1
        self.get_output = lambda at: SimpleNamespace(dtype=dtype)

    def set_output_type(self, at: int, dtype: str) -> None:
        self.output_type = dtype


@pytest.mark.parametrize(
    ("dtypes", "flags"), [(["FLOAT", "INT32"], []), (["HALF", "FLOAT", "INT32"], [1, 2])]
)
def test_a_weakly_typed_network_keeps_the_types_of_its_graph(dtypes: list[str], flags: list[int]) -> None:
    """TensorRT 8.6: a type is asked for layer by layer, and only where something is half precision."""
    module = SimpleNamespace(
        NetworkDefinitionCreationFlag=SimpleNamespace(EXPLICIT_BATCH=0),
        DataType=SimpleNamespace(FLOAT="FLOAT", HALF="HALF"),
        BuilderFlag=SimpleNamespace(FP16=1, OBEY_PRECISION_CONSTRAINTS=2),
    )
    layers = [Layer(dtype) for dtype in dtypes]
    network = SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)
    set_flags: list[int] = []
    trt_versions.keep_types(module, network, SimpleNamespace(set_flag=set_flags.append))
    assert set_flags == flags
    for layer, dtype in zip(layers, dtypes, strict=True):
        asked = dtype if flags and dtype != "INT32" else ""
        assert (layer.precision, layer.output_type) == (asked, asked)
