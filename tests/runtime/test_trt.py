"""The TensorRT engine names what is missing; it never runs something else in its place."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from offramp.runtime import EngineUnavailable, load
from offramp.runtime.engines import trt

TINY = Path(__file__).parents[1] / "data" / "tiny_bundle"


class Driver:
    def __init__(self, code: int) -> None:
        self.cuInit = lambda flags: code


def no_driver(name: str) -> Driver:
    raise OSError(name)


def test_the_driver_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt.ctypes, "CDLL", no_driver)
    monkeypatch.setattr(trt, "find_spec", lambda name: None)
    with pytest.raises(EngineUnavailable, match=r"no CUDA driver on this machine .*use --engine ort"):
        load(TINY, engine="trt")


def test_no_tensorrt_module_is_imported_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt.ctypes, "CDLL", lambda name: Driver(100))
    monkeypatch.setattr(trt, "find_spec", lambda name: object())
    monkeypatch.setattr(trt, "import_module", lambda name: pytest.fail("imported: it may crash the process"))
    assert "cuInit gives 100" in str(trt.missing_piece())


def test_then_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt.ctypes, "CDLL", lambda name: Driver(0))
    monkeypatch.setattr(trt, "find_spec", lambda name: None)
    assert "pip install 'offramp[trt]'" in str(trt.missing_piece())


def test_then_whether_it_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise ImportError("libnvinfer.so: cannot open shared object file")

    monkeypatch.setattr(trt.ctypes, "CDLL", lambda name: Driver(0))
    monkeypatch.setattr(trt, "find_spec", lambda name: object())
    monkeypatch.setattr(trt, "import_module", broken)
    assert "tensorrt cannot be imported: libnvinfer.so" in str(trt.missing_piece())


def test_with_everything_there_it_says_that_it_cannot_walk_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt.ctypes, "CDLL", lambda name: Driver(0))
    monkeypatch.setattr(trt, "find_spec", lambda name: object())
    monkeypatch.setattr(trt, "import_module", lambda name: ModuleType(name))
    with pytest.raises(EngineUnavailable, match="cannot walk on it yet: use --engine ort"):
        load(TINY, engine="trt")


def test_no_graph_is_opened_by_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt.ctypes, "CDLL", no_driver)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineUnavailable, match="engine trt"):
        load(TINY, engine="trt")
