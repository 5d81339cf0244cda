"""The doubles while something runs: contexts, captures, watched memory, copies that take their time."""

import numpy as np
import pytest
from doubles.cuda_double import POISON, cudaStreamCaptureMode
from doubles.workbench import (
    D2H,
    H2D,
    SIZES,
    Cuda,
    Ready,
    build,
    dims,
    feeds,
    lent,
    network,
    onnx_graph,
    ready,
    shape,
    world,
)

THREAD_LOCAL = cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal


def test_shapes_that_a_context_refuses() -> None:
    run = ready()
    for size in ((5, 8, 16), (2, 8), (2, 8, 15)):
        assert not run.context.set_input_shape("hidden", size) and "profile 0" in run.w.said[-1]
    assert not run.context.set_input_shape("logits", (2, 2)) and "no input" in run.w.said[-1]
    assert run.context.set_input_shape("hidden", (3, 8, 16))
    with pytest.raises(RuntimeError, match="batch is 3"):
        run.context.infer_shapes()
    assert not run.run() and "batch is 3" in run.w.said[-1]
    fresh = lent(run.w, run.w.engine)
    assert sorted(fresh.infer_shapes()) == sorted(dims(1))
    assert tuple(fresh.get_tensor_shape("logits")) == (-1, 2)
    assert not fresh.execute_async_v3(run.w.cuda.stream) and "not specified" in run.w.said[-1]


def test_addresses_that_a_context_refuses() -> None:
    run = ready()
    assert not run.context.set_tensor_address("hidden", 0) and not run.context.set_tensor_address("x", 256)
    fresh = lent(run.w, run.w.engine)
    for name, array in run.given.items():
        assert fresh.set_input_shape(name, array.shape)
    assert not fresh.execute_async_v3(run.w.cuda.stream) and "address is not set" in run.w.said[-1]
    assert fresh.get_tensor_address("hidden") == 0


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0", "11.4.0"])
def test_scratch_memory_must_be_enough_and_aligned(version: str) -> None:
    for off in ({"short": 256}, {"shift": 16}):
        w = world(version)
        engine = w.trt.Runtime(w.logger).deserialize_cuda_engine(build(w))
        run = Ready(w, lent(w, engine, **off))
        if run.run():  # before 10 nobody says how much there is: only the run itself shows it
            assert version == "8.6.1" and "short" in off
            assert w.cuda.error("cudaStreamSynchronize", w.cuda.stream) == "cudaErrorIllegalAddress"
        else:
            assert "device memory" in w.said[-1]


def test_data_in_scratch_memory_does_not_last() -> None:
    run = ready("8.6.1")
    run.place("gate", run.context.device_memory)
    assert run.run()
    gate = run.fetch()["gate"]
    run.w.cuda.wait()
    assert (gate.view(np.uint8) == 0x5A).all()


def test_profiles_have_to_be_chosen() -> None:
    w = world("8.6.1")
    short = [{**one, "seq": 1} for one in SIZES]
    engine = w.trt.Runtime(w.logger).deserialize_cuda_engine(build(w, profiles=(SIZES, short)))
    first, second = lent(w, engine), lent(w, engine)
    assert (first.active_optimization_profile, second.active_optimization_profile) == (0, -1)
    assert not second.set_input_shape("hidden", (2, 1, 16)) and "profile" in w.said[-1]
    assert not second.set_optimization_profile_async(2, w.cuda.stream)
    assert second.set_optimization_profile_async(1, w.cuda.stream)
    assert not second.set_input_shape("hidden", (2, 8, 16)) and second.set_input_shape("hidden", (2, 1, 16))


def test_a_profile_of_8_6_is_not_shared_unless_it_is_asked_for() -> None:
    w = world("8.6.1")
    builder, made, config = network(w, onnx_graph("Abs", "", 1))
    engine = w.trt.Runtime(w.logger).deserialize_cuda_engine(builder.build_serialized_network(made, config))
    first, second = (engine.create_execution_context() for _ in range(2))
    assert second.active_optimization_profile == -1
    assert not second.set_optimization_profile_async(0, w.cuda.stream) and "has been chosen" in w.said[-1]
    del first
    assert second.set_optimization_profile_async(0, w.cuda.stream)


def test_buffers_that_are_freed_or_too_small_break_the_process() -> None:
    for harm in ("freed", "small", "overlap", "gone"):
        run = ready()
        if harm == "freed":
            run.w.cuda("cudaFree", run.pointers["mask"])
        elif harm == "small":
            run.place("hidden", run.w.cuda("cudaMalloc", 2 * 2 * 8 * 16))
        elif harm == "overlap":
            run.place("next_hidden", run.pointers["hidden"])
        assert run.run()
        if harm == "gone":
            run.context = None
        assert run.w.cuda.error("cudaStreamSynchronize", run.w.cuda.stream) == "cudaErrorIllegalAddress"
        assert run.w.cuda.error("cudaMalloc", 8) == "cudaErrorIllegalAddress" and run.w.cuda.api.faults
        assert harm == "gone" or not run.run()


def test_contexts_on_two_streams_may_not_share_scratch_memory() -> None:
    run = ready("8.6.1")
    other = Ready(run.w, run.w.engine.create_execution_context_without_device_memory())
    other.context.device_memory = run.context.device_memory
    assert run.run() and other.run() and run.w.said == []
    assert other.run(int(run.w.cuda("cudaStreamCreateWithFlags", 1))) and "another stream" in run.w.said[-1]
    assert not run.run(3) and "cudaErrorInvalidResourceHandle" in run.w.said[-1]


def test_a_captured_run_is_replayed_at_its_addresses() -> None:
    run = ready()
    cuda = run.w.cuda
    assert run.run()
    cuda("cudaStreamBeginCapture", cuda.stream, THREAD_LOCAL)
    assert run.run()
    graph = cuda("cudaStreamEndCapture", cuda.stream)
    launched = cuda("cudaGraphInstantiate", graph, 0)
    cuda("cudaGraphDestroy", graph)
    run.given = feeds(1, seed=7)
    for name, array in run.given.items():
        cuda("cudaMemcpyAsync", run.pointers[name], array, array.nbytes, H2D, cuda.stream)
    run.context.set_tensor_address("logits", 256)  # the graph does not know of it
    cuda("cudaGraphLaunch", launched, cuda.stream)
    run.check()
    cuda("cudaGraphExecDestroy", launched)
    assert cuda.error("cudaGraphLaunch", launched, cuda.stream) == "cudaErrorInvalidResourceHandle"


def test_a_capture_needs_a_run_before() -> None:
    run = ready()
    cuda = run.w.cuda
    for _ in range(2):
        cuda("cudaStreamBeginCapture", cuda.stream, THREAD_LOCAL)
        assert not run.run() and "capturing" in run.w.said[-1]
        assert cuda.error("cudaStreamEndCapture", cuda.stream) == "cudaErrorStreamCaptureInvalidated"
        assert run.run()
        for name, of in dims(1).items():
            assert run.context.set_input_shape(name, shape(of, {"batch": 1, "seq": 8}))


def test_what_a_capture_forbids() -> None:
    cuda = Cuda()
    for call in (("cudaMalloc", 8), ("cudaFree", 0), ("cudaStreamSynchronize", cuda.stream)):
        cuda("cudaStreamBeginCapture", cuda.stream, THREAD_LOCAL)
        assert cuda.error(*call) == "cudaErrorStreamCaptureUnsupported"
        assert cuda.error("cudaMemsetAsync", 256, 0, 1, cuda.stream) == "cudaErrorStreamCaptureInvalidated"
        assert cuda.error("cudaStreamEndCapture", cuda.stream) == "cudaErrorStreamCaptureInvalidated"
    assert cuda.error("cudaStreamEndCapture", cuda.stream) == "cudaErrorIllegalState"


def test_memory_is_counted_and_poisoned() -> None:
    cuda = Cuda(limit=1000)
    assert cuda.error("cudaMalloc", 1001) == "cudaErrorMemoryAllocation"
    pointer, pinned = cuda("cudaMalloc", 900), cuda("cudaHostAlloc", 2000, 0)
    assert pointer % 256 == 0 and cuda.api.cudaMemGetInfo()[1:] == (100, 1000)
    assert cuda.api.live() == {"device": [900], "pinned": [2000]}
    assert (cuda.api.view(pointer, (900,), np.uint8) == POISON).all()
    for name, wrong in (("cudaFree", pinned), ("cudaFree", pointer + 1), ("cudaFreeHost", pointer)):
        assert cuda.error(name, wrong) == "cudaErrorInvalidValue"
    view = cuda.api.view(pinned, (2000,), np.uint8)
    view[:] = 1
    cuda("cudaFree", pointer), cuda("cudaFreeHost", pinned)
    assert (view == POISON).all() and cuda.api.live() == {}
    assert cuda.error("cudaFree", pointer) == "cudaErrorInvalidValue"
    assert cuda("cudaMalloc", 900) != pointer
    assert cuda.api.calls["cudaMalloc"] == 3


def test_copies_happen_when_somebody_waits() -> None:
    cuda = Cuda()
    pinned, back = cuda("cudaHostAlloc", 16, 0), cuda("cudaHostAlloc", 16, 0)
    source, target = (cuda.api.view(at, (4,), np.float32) for at in (pinned, back))
    pageable, device = np.ones(4, np.float32), cuda("cudaMalloc", 16)
    event = cuda("cudaEventCreateWithFlags", cuda.api.cudaEventDisableTiming)
    cuda("cudaMemcpyAsync", device, pageable, 16, H2D, cuda.stream)
    pageable[:] = 2  # too late: it was read
    cuda("cudaMemcpyAsync", back, device, 16, D2H, cuda.stream)
    cuda("cudaEventRecord", event, cuda.stream)
    cuda("cudaMemcpyAsync", device, pinned, 16, H2D, cuda.stream)
    source[:] = 3  # in time: pinned memory is read when the copy runs
    cuda("cudaMemcpyAsync", back, device, 16, D2H, cuda.stream)
    assert (target.view(np.uint8) == POISON).all()
    cuda("cudaEventSynchronize", event)
    assert (target == 1).all()
    cuda("cudaFree", cuda("cudaMalloc", 1))  # waits for everything
    assert (target == 3).all()
    cuda("cudaMemsetAsync", device, 0, 16, cuda.stream)
    cuda("cudaMemcpyAsync", pageable.ctypes.data, device, 16, D2H, cuda.stream)
    assert (pageable == 0).all()  # pageable memory is written before the call returns
    assert cuda.api.handles() == {"stream": 1, "event": 1}
    cuda("cudaEventDestroy", event), cuda("cudaStreamDestroy", cuda.stream)
    for call in (("cudaStreamSynchronize", cuda.stream), ("cudaEventSynchronize", event)):
        assert cuda.error(*call) == "cudaErrorInvalidResourceHandle"


def test_copies_outside_of_memory_break_the_process() -> None:
    for size, wrong in ((17, 0), (16, 1), (16, 256)):
        cuda = Cuda()
        device, pinned = cuda("cudaMalloc", 16), cuda("cudaHostAlloc", 32, 0)
        cuda("cudaMemcpyAsync", device + wrong, pinned, size, H2D, cuda.stream)
        assert cuda.error("cudaDeviceSynchronize") == "cudaErrorIllegalAddress"
        assert cuda.error("cudaStreamCreateWithFlags", 1) == "cudaErrorIllegalAddress"
        assert cuda("cudaGetErrorName", cuda.api.sticky) == b"cudaErrorIllegalAddress"
