"""A machine with a GPU, as far as the engines can tell: the doubles in the places of the real modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from doubles import cuda_double, trt_double

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.engines import cuda, graphs, ort_cuda, trt
from offramp.runtime.engines.base import EngineOptions, open_engine

VERSIONS = (*trt_double.VERSIONS, "rtx")


def machine(
    patch: pytest.MonkeyPatch, cache: Path, version: str = "10.3.0", cudart: cuda_double.Cudart | None = None
) -> SimpleNamespace:
    """From here on the process sees a GPU and TensorRT of that version; engines are kept in the folder cache.

    Gives the two doubles as cudart and trt.
    """
    cudart = cudart or cuda_double.Cudart()
    name = "tensorrt_rtx" if version == "rtx" else "tensorrt"
    module = trt_double.make(version, cudart, name=name)
    patch.setenv("OFFRAMP_CACHE", str(cache))
    patch.setattr(cuda, "_load", lambda driver: SimpleNamespace(cuInit=lambda flags: 0))
    patch.setattr(cuda, "import_module", _importing({"cuda.bindings.runtime": cudart}))
    patch.setattr(trt, "find_spec", lambda asked: object() if asked == name else None)
    patch.setattr(trt, "import_module", _importing({name: module}))
    return SimpleNamespace(cudart=cudart, trt=module)


@contextmanager
def opened(kind: str, bundle: Path, cache: Path) -> Iterator[Any]:
    """An open engine in fp32: "ort", or on the doubles "ort-cuda", "trt-VERSION" and "trt-graphs".

    cache: the folder of engines that TensorRT builds. At the end no call of CUDA may have gone wrong.
    """
    with pytest.MonkeyPatch.context() as patch:
        name, _, version = kind.partition("-")
        options, device = EngineOptions(name), None
        if version:
            device = machine(patch, cache, version if version in VERSIONS else "10.3.0")
            options = EngineOptions(name, device="cuda", cuda_graphs=version.endswith("graphs"))
            if name == "ort":
                ort_on_cuda(patch, device.cudart)
        engine = open_engine(open_bundle(bundle), "fp32", options)
        yield engine
        engine.close()
        if device is not None:
            assert device.cudart.faults == [] and device.cudart.default_stream_uses == 0


def ort_on_cuda(patch: pytest.MonkeyPatch, cudart: cuda_double.Cudart) -> None:
    """ONNX Runtime's CUDA provider: its CPU kernels on the double's memory, in the stream's turn."""
    real_runner, real_session = ort_cuda.make_run, graphs.BundleGraphs._session
    streams: dict[int, int] = {}  # by the id of a session
    latest: list[int] = []  # streams of all options; the last is that of a session which no engine opened

    class Options(dict[str, str]):
        """No options for the CPU's provider; stream: the one that the CUDA provider would run on."""

        stream = 0

    def options(device: Any, graphs: bool) -> dict[str, str]:
        empty = Options()
        empty.stream = device.stream
        latest.append(device.stream)
        return empty

    def session(self: Any, facts: Any, data: bytes) -> Any:
        opened = real_session(self, facts, data)
        if isinstance(self._providers[-1][1], Options):
            streams[id(opened)] = self._providers[-1][1].stream
        return opened

    def runner(ort: Any, opened: Any, binding: Any, entries: Any = None) -> Callable[[], None]:
        run = real_runner(ort, opened, binding, entries)
        stream = streams.get(id(opened), latest[-1])
        return lambda: cudart.enqueue(stream, run)

    patch.setattr(graphs.BundleGraphs, "_session", session)
    patch.setattr(ort_cuda, "make_run", runner)
    patch.setattr(ort_cuda, "NAMES", ort_cuda.NAMES | {"cuda": graphs.CPU})
    patch.setattr(ort_cuda, "PLACE", "cpu")
    patch.setattr(ort_cuda, "_cuda_options", options)


def _importing(modules: dict[str, Any]) -> Callable[[str], Any]:
    """import_module that gives these modules and otherwise the real ones."""
    return lambda name: modules[name] if name in modules else import_module(name)
