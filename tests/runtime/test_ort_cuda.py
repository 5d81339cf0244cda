"""ONNX Runtime on a GPU: the options of its sessions, and what is refused.

test_engines compares its walk with those of the other engines, on a double of CUDA.
"""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from doubles import gpu

from offramp.runtime import BadSetting, EngineUnavailable, load
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.engines import cuda, graphs, ort_cuda
from offramp.runtime.engines.base import EngineOptions, open_engine

TINY = Path(__file__).parents[1] / "data" / "tiny_bundle"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A GPU, and an onnxruntime that was built for it."""
    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", graphs.CPU]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    return gpu.machine(monkeypatch, tmp_path / "cache")


class Requested(Exception):
    """The providers with which a session was to be opened."""


@pytest.fixture
def requested(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Providers with their options, as a session is opened with them under these engine options."""

    class Session:
        def __init__(self, data: bytes, options: Any, *, providers: Any, enable_fallback: int) -> None:
            assert enable_fallback == 0
            raise Requested(providers)

        get_provider_graph_assignment_info = None

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)

    def providers(**options: Any) -> dict[str, dict[str, str]]:
        with pytest.raises(EngineUnavailable) as error:
            open_engine(open_bundle(TINY), "fp32", EngineOptions(**options))
        problem = error.value.__cause__
        assert isinstance(problem, Requested)
        return dict(problem.args[0])

    return providers


def test_cuda_runs_on_our_stream_in_true_float32(requested: Any) -> None:
    providers = requested(device="cuda")
    assert list(providers) == ["CUDAExecutionProvider"]
    options = providers["CUDAExecutionProvider"]
    assert int(options["user_compute_stream"]) > 0
    assert (options["use_tf32"], options["enable_cuda_graph"]) == ("0", "0")
    assert requested(cuda_graphs=True)["CUDAExecutionProvider"]["enable_cuda_graph"] == "1"


def test_tensorrt_comes_first_and_keeps_its_engines_in_our_cache(requested: Any, tmp_path: Path) -> None:
    providers = requested(provider="tensorrt")
    assert list(providers) == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    options = providers["TensorrtExecutionProvider"]
    assert options["trt_engine_cache_path"] == str(tmp_path / "cache" / "ort")
    assert (tmp_path / "cache" / "ort").stat().st_mode & 0o777 == 0o700
    assert options["trt_fp16_enable"] == "0"
    assert options["user_compute_stream"] == providers["CUDAExecutionProvider"]["user_compute_stream"]


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_another_provider_than_the_requested_one_is_refused(
    provider: str, machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a library of it is missing: ONNX Runtime then opens the session on the CPU, silently."""
    real = onnxruntime.InferenceSession

    def silently(data: bytes, options: Any, *, providers: Any, enable_fallback: int) -> Any:
        return real(data, options, providers=[graphs.CPU], enable_fallback=enable_fallback)

    silently.get_provider_graph_assignment_info = None  # type: ignore[attr-defined]
    monkeypatch.setattr(onnxruntime, "InferenceSession", silently)
    with pytest.raises(
        EngineUnavailable, match=f"{ort_cuda.NAMES[provider]} was requested, but {graphs.CPU} runs"
    ):
        load(TINY, provider=provider)


def left(*operators: str) -> SimpleNamespace:
    """A session with these operators on the CPU and one on the GPU."""
    parts = [(graphs.CPU, operators), ("CUDAExecutionProvider", ["MatMul"])]
    return SimpleNamespace(
        get_provider_graph_assignment_info=lambda: [
            SimpleNamespace(ep_name=name, get_nodes=lambda of=of: [SimpleNamespace(op_type=op) for op in of])
            for name, of in parts
        ]
    )


def test_arithmetic_on_sizes_may_stay_on_the_cpu_and_nothing_else() -> None:
    graphs._check_assignment("stem.onnx", left("Shape", "Concat"), "CUDAExecutionProvider")
    with pytest.raises(EngineUnavailable, match="lacks DynamicQuantizeLinear, Softmax and leaves it"):
        graphs._check_assignment(
            "segment_00.onnx", left("Softmax", "Shape", "DynamicQuantizeLinear"), "CUDAExecutionProvider"
        )


def test_facts_name_the_gpu_and_no_run_waits(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.ort_on_cuda(monkeypatch, machine.cudart)
    inner, entries = ort_cuda.make_run, []

    def runner(ort: Any, session: Any, binding: Any, run_entries: Mapping[str, str]) -> Any:
        entries.append(dict(run_entries))
        return inner(ort, session, binding, run_entries)

    monkeypatch.setattr(ort_cuda, "make_run", runner)
    with load(TINY, cuda_graphs=True, rule="never") as session:
        session("good film")
        facts = session.engine.facts
        assert session.engine.device == "cuda" and facts["gpu"] == "Double GPU, 8.6"
        assert facts["cuda graphs"] == "on" and facts["onnxruntime"] == onnxruntime.__version__
    assert all(entry["disable_synchronize_execution_providers"] == "1" for entry in entries)
    numbers = [entry["gpu_graph_id"] for entry in entries]
    assert len(numbers) == len(set(numbers)) == 4  # the stem and three segments, each a graph of its own


def test_what_onnxruntime_prints_about_libraries_does_not_get_between_answers(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.ort_on_cuda(monkeypatch, machine.cudart)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("no libcudnn"), raising=False)
    load(TINY, device="cuda").close()
    printed = capsys.readouterr()
    assert printed.out == "" and "no libcudnn" in printed.err


def test_a_driver_that_is_missing_is_named(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(cuda, "_load", gone)
    with pytest.raises(EngineUnavailable, match=r"engine ort: no CUDA driver .* or use --device cpu"):
        load(TINY, device="cuda")


def test_a_gpu_that_does_not_answer_is_named(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.cudart.devices = 0
    with pytest.raises(EngineUnavailable, match=r"engine ort: the GPU cannot be used: .*cudaSetDevice"):
        load(TINY, device="cuda")


def test_cuda_python_that_is_missing_is_named(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(cuda, "import_module", gone)
    with pytest.raises(
        EngineUnavailable, match=r"engine ort: cuda-python cannot be imported .* --device cpu"
    ):
        load(TINY, device="cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"provider": "tensorrt", "device": "cpu"}, "provider tensorrt is for device cuda, not cpu"),
        ({"cuda_graphs": True, "device": "cpu"}, "cuda_graphs is for device cuda, not cpu"),
        ({"provider": "openvino"}, "provider 'openvino' is not known; choose one of: cuda, tensorrt"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        load(TINY, **options)


@pytest.mark.filterwarnings("ignore:Duplicate provider")  # the double's is the CPU's twice
def test_tensorrt_through_onnxruntime_walks_in_one_precision(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is set up for weakly typed networks of one precision."""
    gpu.ort_on_cuda(monkeypatch, machine.cudart)
    monkeypatch.setitem(ort_cuda.NAMES, "tensorrt", graphs.CPU)
    monkeypatch.setattr(ort_cuda, "_tensorrt_options", lambda cuda, on, half: {})
    engine = open_engine(open_bundle(TINY), "fp32", EngineOptions(provider="tensorrt"))
    ids = np.array([[2, 5, 3]])
    state = engine.begin({"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0})
    with pytest.raises(BadSetting, match="goes on in int8: provider tensorrt is set up for fp32 alone"):
        engine.step(0, 1, state)
    engine.close()
