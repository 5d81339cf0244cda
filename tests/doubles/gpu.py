"""A machine with a GPU, as far as the engines can tell: the doubles in the places of the real modules."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from doubles import cuda_double, trt_double

from offramp.runtime.engines import cuda, graphs, ort_cuda, trt

VERSIONS = ("8.6.1", "10.3.0", "10.16.1", "11.4.0", "rtx")


def machine(
    patch: pytest.MonkeyPatch, cache: Path, version: str = "10.3.0", cudart: cuda_double.Cudart | None = None
) -> SimpleNamespace:
    """From here on the process sees a GPU and TensorRT of that version; cache: where engines are kept.

    Gives cudart and trt, the doubles.
    """
    cudart = cudart or cuda_double.Cudart()
    name = "tensorrt_rtx" if version == "rtx" else "tensorrt"
    module = trt_double.make(version, cudart, name=name)
    patch.setenv("OFFRAMP_CACHE", str(cache))
    patch.setattr(cuda, "_load", lambda driver: SimpleNamespace(cuInit=lambda flags: 0))
    patch.setattr(cuda, "import_module", only({"cuda.bindings.runtime": cudart}))
    patch.setattr(trt, "find_spec", lambda asked: object() if asked == name else None)
    patch.setattr(trt, "import_module", only({name: module}))
    return SimpleNamespace(cudart=cudart, trt=module)


def ort_on_cuda(patch: pytest.MonkeyPatch, cudart: cuda_double.Cudart) -> None:
    """ONNX Runtime's CUDA provider: its CPU kernels on the double's memory, in the stream's turn."""
    real, plain = ort_cuda.runner, ort_cuda.NAMES | {"cuda": graphs.CPU}

    streams: list[int] = []  # the last is that of the session that is opened next
    by_session: dict[int, int] = {}

    def runner(ort: Any, session: Any, binding: Any, entries: Any = None) -> Callable[[], None]:
        run = real(ort, session, binding, entries)
        stream = by_session.get(id(session), streams[-1])
        return lambda: cudart.enqueue(stream, run)

    class Options(dict[str, str]):
        stream = 0

    def options(cuda: Any, graphs: bool) -> dict[str, str]:
        streams.append(cuda.stream)
        made = Options()
        made.stream = cuda.stream
        return made

    opened = graphs.Graphs._session

    def session(self: Any, facts: Any, data: bytes) -> Any:
        made = opened(self, facts, data)
        if isinstance(self._providers[-1][1], Options):
            by_session[id(made)] = self._providers[-1][1].stream
        return made

    patch.setattr(graphs.Graphs, "_session", session)
    patch.setattr(ort_cuda, "runner", runner)
    patch.setattr(ort_cuda, "NAMES", plain)
    patch.setattr(ort_cuda, "PLACE", "cpu")
    patch.setattr(ort_cuda, "_cuda_options", options)


def only(modules: dict[str, Any]) -> Callable[[str], Any]:
    """import_module that knows these and otherwise the real ones."""
    return lambda name: modules[name] if name in modules else import_module(name)
