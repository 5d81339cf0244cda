"""A TensorRT engine's life, on doubles of TensorRT and CUDA: built, kept, walked, out of memory.

The last tests break the engine on purpose: the doubles refuse it as the real ones do, and the user is told.
"""

import dataclasses
import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from doubles import cuda_double, gpu

from offramp.runtime import BadBundle, BadSetting, DeviceFailed, OutOfMemory, load
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.engines import device, trt, trt_build, trt_versions
from offramp.runtime.engines.base import EngineOptions, open_engine
from offramp.runtime.engines.cuda import Cuda

TESTS = Path(__file__).parents[1]
TINY = TESTS / "data" / "tiny_bundle"
GRAPHS = 4  # stem and three segments
TEXT = "the film was good"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    return gpu.machine(monkeypatch, tmp_path / "cache")


def inputs(rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(seed).integers(4, 20, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def opened(**options: Any) -> Any:
    return open_engine(open_bundle(TINY), "fp32", EngineOptions("trt", **options))


def walk(engine: Any, rows: int = 2, length: int = 9) -> np.ndarray:
    """Logits of the last exit."""
    state = engine.begin(inputs(rows, length))
    for segment in range(GRAPHS - 1):
        logits = engine.step(segment, 0, state).logits
    engine.drop(state)
    return logits.copy()


def expected(rows: int = 2, length: int = 9) -> np.ndarray:
    engine = open_engine(open_bundle(TINY), "fp32", EngineOptions())
    try:
        return walk(engine, rows, length)
    finally:
        engine.close()


# Building and keeping.


@pytest.mark.parametrize("version", gpu.VERSIONS)
def test_an_engine_is_built_once(
    version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = gpu.machine(monkeypatch, tmp_path / "cache", version)
    with load(TINY, engine="trt") as session:
        first = session(TEXT)
        assert session.engine.facts["engines"].startswith("4 built in ")
    assert machine.trt.builds == GRAPHS
    assert capsys.readouterr().err.count("engine trt: building ") == GRAPHS
    with load(TINY, engine="trt", share=False) as session:
        again = session(TEXT)
        assert session.engine.facts["engines"].endswith("4 found built")
    assert machine.trt.builds == GRAPHS and capsys.readouterr().err == ""
    assert (first.label, first.exit, first.score) == (again.label, again.exit, again.score)
    with load(TINY) as session:
        plain = session(TEXT)
    assert (first.label, first.exit) == (plain.label, plain.exit) and abs(first.score - plain.score) < 1e-4


def test_facts_name_what_runs(machine: SimpleNamespace) -> None:
    with load(TINY, engine="trt") as session:
        assert (session.engine.name, session.engine.device) == ("trt", "cuda")
        facts = session.engine.facts
    assert facts["tensorrt"] == machine.trt.__version__ and facts["driver"] == "13.0"
    assert facts["gpu"] == "Double GPU, 8.6" and facts["cuda graphs"] == "off"


def test_lazily_a_segment_is_built_when_a_row_gets_there(machine: SimpleNamespace) -> None:
    with load(TINY, engine="trt", lazy=True, rule=RuleSpec("fixed", {"exit": 1.0})) as session:
        assert machine.trt.builds == 1
        session(TEXT)
        assert machine.trt.builds == 2


@pytest.mark.parametrize("change", [{"name": "Another GPU"}, {"capability": (8, 9)}])
def test_on_another_gpu_it_is_built_anew(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu.machine(monkeypatch, tmp_path / "cache")
    opened().close()
    other = gpu.machine(monkeypatch, tmp_path / "cache", cudart=cuda_double.Cudart(**change))
    opened().close()
    assert other.trt.builds == GRAPHS


def test_for_another_version_or_driver_it_is_built_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu.machine(monkeypatch, tmp_path / "cache")
    opened().close()
    newer = gpu.machine(monkeypatch, tmp_path / "cache", "10.16.1")
    opened().close()
    assert newer.trt.builds == GRAPHS
    monkeypatch.setattr(cuda_double.Cudart, "cudaDriverGetVersion", lambda self: (0, 13010))
    after_update = gpu.machine(monkeypatch, tmp_path / "cache", "10.16.1")
    opened().close()
    assert after_update.trt.builds == GRAPHS


def test_other_profiles_are_other_engines(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    opened().close()
    monkeypatch.setattr(trt_build, "MAX_ROWS", 64)
    opened().close()
    assert machine.trt.builds == 2 * GRAPHS


def test_nothing_that_was_tampered_with_is_deserialized(machine: SimpleNamespace, tmp_path: Path) -> None:
    opened().close()
    for file in (tmp_path / "cache" / "trt").glob("*.engine"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    real = machine.trt.Runtime.deserialize_cuda_engine
    deserialized: list[bytes] = []

    def watched(runtime: Any, blob: bytes) -> Any:
        deserialized.append(bytes(blob))
        return real(runtime, blob)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine.trt.Runtime, "deserialize_cuda_engine", watched)
        engine = opened()
    assert machine.trt.builds == 2 * GRAPHS and len(deserialized) == GRAPHS
    np.testing.assert_allclose(walk(engine), expected(), atol=1e-4)
    engine.close()


def test_an_engine_that_tensorrt_does_not_take_any_more_is_built_again(machine: SimpleNamespace) -> None:
    opened().close()
    real, refused = machine.trt.Runtime.deserialize_cuda_engine, []

    def once(runtime: Any, blob: bytes) -> Any:
        if len(refused) < GRAPHS and blob not in refused:
            refused.append(blob)
            return None
        return real(runtime, blob)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine.trt.Runtime, "deserialize_cuda_engine", once)
        opened().close()
    assert machine.trt.builds == 2 * GRAPHS


@pytest.mark.slow
def test_three_processes_build_each_graph_once(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(TESTS)!r})
import pytest
from pathlib import Path
from doubles import gpu
from offramp.runtime import load
with pytest.MonkeyPatch.context() as patch:
    gpu.machine(patch, Path({str(tmp_path / "cache")!r}))
    with load({str(TINY)!r}, engine="trt") as session:
        print(session({TEXT!r}).label)
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=PIPE, stderr=PIPE, text=True) for _ in range(3)
    ]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], outputs
    assert sum(err.count("building") for _, err in outputs) == GRAPHS
    assert len({out for out, _ in outputs}) == 1


def test_two_sessions_share_an_engine_and_not_their_memory(machine: SimpleNamespace) -> None:
    one, two = opened(), opened()
    assert machine.trt.builds == GRAPHS and one._opener._engines.keys() == two._opener._engines.keys()
    assert all(one._opener._engines[step] is two._opener._engines[step] for step in one._opener._engines)
    state = one.begin(inputs(2, 9))
    first = one.step(0, 0, state).logits.copy()
    walk(two, rows=3)
    one.close()
    np.testing.assert_allclose(walk(two), expected(), atol=1e-4)
    assert np.isfinite(first).all()
    two.close()


# Walking.


def test_a_step_waits_once_and_brings_only_its_signals(machine: SimpleNamespace) -> None:
    engine, calls = opened(), machine.cudart.calls
    walk(engine)
    before = calls.copy()
    walk(engine)
    now = calls - before
    assert now["cudaEventSynchronize"] == GRAPHS - 1 and now["cudaStreamSynchronize"] == 0
    assert now["cudaMemcpyAsync"] == GRAPHS  # the inputs, and the signals of three exits
    assert now["cudaMalloc"] == now["cudaHostAlloc"] == now["cudaFree"] == 0
    engine.close()


def test_rows_are_gathered_within_the_device(machine: SimpleNamespace) -> None:
    engine, calls = opened(), machine.cudart.calls
    kinds: list[str] = []
    state = engine.begin(inputs(8, 9))
    engine.step(0, 0, state)
    before, real = calls.copy(), machine.cudart.cudaMemcpyAsync

    def watched(target: int, source: int, size: int, kind: Any, stream: Any) -> Any:
        kinds.append(kind.name)
        return real(target, source, size, kind, stream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine.cudart, "cudaMemcpyAsync", watched, raising=False)
        some = engine.take(state, np.array([0, 1, 2, 5]))
        engine.join([some, state])
    assert (calls - before)["cudaEventSynchronize"] == 0
    # hidden, evidence, mask and pool: two stretches of neighbours, then two states as they are
    assert kinds == ["cudaMemcpyDeviceToDevice"] * (4 * 2 + 4 * 2)
    engine.close()


def test_lengths_are_rounded_so_that_few_shapes_are_met(machine: SimpleNamespace) -> None:
    engine = opened()
    states = [engine.begin(inputs(1, length)) for length in (1, 15, 16, 17, 47, 48)]
    assert [state.length for state in states] == [16, 16, 16, 32, 48, 48]
    engine.close()


def test_more_rows_than_engines_are_built_for(machine: SimpleNamespace) -> None:
    with pytest.raises(BadSetting, match="batch size 33: engine trt walks at most 32 rows together"):
        load(TINY, engine="trt", batch_size=33)
    with (
        load(TINY, engine="trt", rule="never") as session,
        pytest.raises(BadSetting, match=r"33 rows of .* choose a batch size of 32 or less"),
    ):
        list(session.map([TEXT] * 33, batch_size=33))


def test_a_rule_that_goes_on_in_int8_is_refused(machine: SimpleNamespace) -> None:
    engine = opened()
    state = engine.begin(inputs(1, 4))
    with pytest.raises(BadSetting, match="goes on in int8, which is ONNX Runtime's own"):
        engine.step(0, 1, state)
    engine.close()


@pytest.mark.slow
def test_a_step_becomes_one_cuda_graph_at_the_second_run_of_a_shape(machine: SimpleNamespace) -> None:
    engine, calls = opened(cuda_graphs=True), machine.cudart.calls
    for _ in range(3):
        np.testing.assert_allclose(walk(engine), expected(), atol=1e-4)
    # The last two of three steps were launched; the stem's launches are without a copy of its own.
    assert calls["cudaGraphInstantiate"] == GRAPHS and calls["cudaGraphLaunch"] == 2 * GRAPHS
    np.testing.assert_allclose(walk(engine, 1, 20), expected(1, 20), atol=1e-4)
    np.testing.assert_allclose(walk(engine), expected(), atol=1e-4)
    engine.close()
    gc.collect()
    assert machine.cudart.handles() == {}


# Memory.


@pytest.mark.slow
def test_everything_is_given_back(machine: SimpleNamespace) -> None:
    engine = opened()
    for rows in (1, 2, 5):
        walk(engine, rows)
    assert machine.cudart.live()
    engine.close()
    del engine
    gc.collect()
    assert machine.cudart.live() == {} and machine.cudart.handles() == {}


def test_all_segments_use_one_piece_of_scratch_memory(machine: SimpleNamespace) -> None:
    engine = opened()
    walk(engine)
    needs = [trt_versions.scratch_bytes(held.engine) for held in engine._opener._engines.values()]
    assert len(engine._opener._scratch) == 1 and engine._opener._scratch[0].bytes == max(needs)
    engine.close()


def test_scratch_memory_grows_when_a_larger_segment_is_opened(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a lazy session; runs that were bound before use the new memory."""
    needs: list[Any] = []  # engines in the order in which they are opened

    def larger(engine: Any) -> int:
        if engine not in needs:
            needs.append(engine)
        return 2**20 << needs.index(engine)

    monkeypatch.setattr(trt_versions, "scratch_bytes", larger)
    engine = opened(lazy=True)
    for _ in range(2):
        np.testing.assert_allclose(walk(engine), expected(), atol=1e-4)
    assert [memory.bytes for memory in engine._opener._scratch] == [2**20 << (GRAPHS - 1)]
    engine.close()


def test_out_of_memory_says_so_and_the_session_stays_usable(machine: SimpleNamespace) -> None:
    with load(TINY, engine="trt", rule="never") as session:
        before = session(TEXT)
        used = sum(sum(sizes) for kind, sizes in machine.cudart.live().items() if kind != "pinned")
        machine.cudart.limit = used + 4096
        with pytest.raises(OutOfMemory, match=r"MiB wanted, .* MiB free; choose a smaller batch size"):
            list(session.map([TEXT] * 32, batch_size=32))
        after = session(TEXT)
        assert (after.label, after.score) == (before.label, before.score)


def test_idle_memory_is_given_up_before_it_runs_out(machine: SimpleNamespace) -> None:
    engine = opened()
    walk(engine, 4, 48)
    used = sum(sum(sizes) for kind, sizes in machine.cudart.live().items() if kind != "pinned")
    machine.cudart.limit = used + 4096
    np.testing.assert_allclose(walk(engine, 3, 48), expected(3, 48), atol=1e-4)
    engine.close()


def test_no_memory_for_the_engines_themselves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu.machine(monkeypatch, tmp_path / "cache", cudart=cuda_double.Cudart(limit=2000))
    with pytest.raises(OutOfMemory):
        engine = opened()
        walk(engine)


# Broken on purpose: each of these is what a mistake in the engine would do.


@pytest.fixture
def broken(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    yield monkeypatch


def test_an_address_that_is_not_set(broken: pytest.MonkeyPatch) -> None:
    real = trt._set_tensors

    def forgetful(context: Any, graph: Any, places: Any, log: Any) -> None:
        setter = type(context).set_tensor_address
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(context), "set_tensor_address", lambda c, n, a: n == "mask" or setter(c, n, a))
            real(context, graph, places, log)

    broken.setattr(trt, "_set_tensors", forgetful)
    with pytest.raises(DeviceFailed, match="mask"):
        walk(opened())


def test_a_profile_whose_bounds_are_swapped(broken: pytest.MonkeyPatch) -> None:
    real = trt_build.profile_shapes
    broken.setattr(trt_build, "profile_shapes", lambda tensor, profile: real(tensor, profile)[::-1])
    with pytest.raises(BadBundle, match=r"stem\.onnx: TensorRT cannot compile it"):
        opened()


def test_a_shape_outside_of_the_profile(broken: pytest.MonkeyPatch) -> None:
    broken.setattr(trt, "find_profile", lambda known, rows, length: 0)
    with pytest.raises(DeviceFailed, match="TensorRT refuses"):
        walk(opened(), rows=2)


def test_reading_before_waiting(broken: pytest.MonkeyPatch) -> None:
    broken.setattr(Cuda, "wait", lambda self: None)
    engine = opened()
    assert not np.allclose(walk(engine), expected(), atol=1e-4)


def test_memory_that_was_freed(broken: pytest.MonkeyPatch, machine: SimpleNamespace) -> None:
    engine = opened()
    state = engine.begin(inputs(1, 4))
    machine.cudart.cudaFree(state.buffers._memory.pointer)
    with pytest.raises(DeviceFailed, match="illegal memory access"):
        engine.step(0, 0, state)


def test_a_tensor_of_another_type(broken: pytest.MonkeyPatch) -> None:
    """Half of the bytes that TensorRT writes: the places behind it would be overwritten."""
    real, half = device.Layout.from_manifest, dataclasses.replace

    def small(*args: Any) -> Any:
        layout = real(*args)
        return half(layout, pairs=tuple(half(tensor, dtype="float16") for tensor in layout.pairs))

    broken.setattr(device.Layout, "from_manifest", small)
    engine = opened()
    try:
        wrong = not np.allclose(walk(engine, 32, 48), expected(32, 48), atol=1e-4)
    except DeviceFailed:
        wrong = True
    assert wrong


def test_an_input_of_another_type_than_the_manifest_says(broken: pytest.MonkeyPatch) -> None:
    broken.setattr(
        trt_versions, "as_tensorrt_reads", lambda trt, tensor: dataclasses.replace(tensor, dtype="float32")
    )
    with pytest.raises(BadBundle, match="the manifest has float32"):
        opened()


def test_scratch_memory_that_is_not_aligned(broken: pytest.MonkeyPatch) -> None:
    real = trt_versions.set_scratch_memory
    broken.setattr(
        trt_versions, "set_scratch_memory", lambda context, at, size: real(context, at + 8, size - 8)
    )
    with pytest.raises(DeviceFailed):
        walk(opened())


def test_scratch_memory_that_is_never_lent(broken: pytest.MonkeyPatch) -> None:
    broken.setattr(trt_versions, "set_scratch_memory", lambda context, at, size: None)
    with pytest.raises(DeviceFailed):
        walk(opened())


def test_a_graph_with_an_operator_of_a_vendor(broken: pytest.MonkeyPatch) -> None:
    real = trt.build_engine

    def fused(trt: Any, log: Any, data: bytes, *others: Any) -> Any:
        return real(trt, log, data + b"\x3a\x0dcom.microsoft", *others)

    broken.setattr(trt, "build_engine", fused)
    with pytest.raises(BadBundle, match=r"stem\.onnx: TensorRT cannot read it"):
        opened()
