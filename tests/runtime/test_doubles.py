"""The double of TensorRT refuses what the real one refuses, and gives what ONNX Runtime gives."""

import gc

import numpy as np
import pytest
from doubles import trt_double
from doubles.cuda_double import POISON, Cudart
from doubles.workbench import (
    SEGMENT,
    STEM,
    TINY,
    Ready,
    build,
    dims,
    lent,
    network,
    onnx_graph,
    world,
)

ALL = pytest.mark.parametrize("version", [*trt_double.VERSIONS, "rtx"])


@ALL
@pytest.mark.parametrize(("data", "number"), [(STEM, 0), (SEGMENT, 1)])
def test_a_whole_life(version: str, data: bytes, number: int) -> None:
    w = world(version)
    plan = build(w, data, number)
    assert plan.nbytes == len(bytes(plan)) == memoryview(plan).nbytes and w.trt.builds == 1
    engine = w.trt.Runtime(w.logger).deserialize_cuda_engine(bytes(plan))
    names = [engine.get_tensor_name(at) for at in range(engine.num_io_tensors)]
    inputs = [n for n in names if engine.get_tensor_mode(n) == w.trt.TensorIOMode.INPUT]
    assert inputs == list(dims(number))
    assert tuple(engine.get_tensor_shape(inputs[0]))[:2] == (-1, -1)
    assert [one[0] for one in engine.get_tensor_profile_shape(inputs[0], 0)] == [1, 2, 4]
    for context in (engine.create_execution_context(), lent(w, engine)):
        for given in ({}, {"batch": 4, "seq": 5, "seed": 1}, {"batch": 1, "seq": 1}):
            run = Ready(w, context, number, **given)
            assert run.run()
            early = run.fetch()
            assert all((array.view(np.uint8) == POISON).all() for array in early.values())
            run.check(data)
    assert w.said == [] and w.cuda.api.faults == [] and w.cuda.api.default_stream_uses == 0
    assert "tensorrt" in w.cuda.api.live()
    del run, context, engine
    gc.collect()
    assert "tensorrt" not in w.cuda.api.live()


@ALL
def test_names_of_other_versions_are_not_there(version: str) -> None:
    w = world(version)
    engine = w.trt.Runtime(w.logger).deserialize_cuda_engine(build(w))
    old, new = version == "8.6.1", version in ("11.4.0", "rtx")
    assert hasattr(w.trt, "ExecutionContextAllocationStrategy") != old
    assert hasattr(engine, "device_memory_size") != new and hasattr(engine, "device_memory_size_v2") != old
    assert hasattr(w.trt.BuilderFlag, "FP16") != new
    assert hasattr(w.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") != old
    assert hasattr(engine.create_execution_context(), "set_device_memory") != old
    with pytest.raises(AttributeError, match="nonsense"):
        engine.nonsense  # noqa: B018
    with pytest.raises(AttributeError, match="nonsense"):
        network(w, SEGMENT)[2].nonsense = 3
    with pytest.raises(trt_double.NotInDouble, match="create_engine_inspector"):
        engine.create_engine_inspector()
    with pytest.raises(TypeError):
        1 << w.trt.BuilderFlag.TF32


def test_integers_of_8_6_are_narrow() -> None:
    kinds = []
    for version in ("8.6.1", "10.3.0"):
        w = world(version)
        tensor = network(w, STEM)[1].get_input(0)
        assert tuple(tensor.shape) == (-1, -1) and tensor.name == "input_ids"
        kinds.append(tensor.dtype.name)
    assert kinds == ["INT32", "INT64"]


def test_without_a_device() -> None:
    cudart, said = Cudart(devices=0), []
    assert cudart.cudaGetDeviceCount() == (cudart.cudaError_t.cudaErrorNoDevice, None)
    assert cudart.cudaFree(0) == (cudart.cudaError_t.cudaErrorNoDevice,)
    for version, error in (("8.6.1", TypeError), ("11.4.0", trt_double.Crash)):
        trt = trt_double.make(version, cudart)
        logger = type("Quiet", (trt.ILogger,), {"log": lambda self, *what: said.append(what)})()
        with pytest.raises(TypeError, match="factory function returned nullptr"):
            trt.Builder(logger)
        with pytest.raises(error):
            trt.Runtime(logger)
    assert len(said) == 4


def test_a_logger_must_be_made() -> None:
    trt = world().trt
    with pytest.raises(TypeError, match="must be called"):
        trt.Builder(type("Bad", (trt.ILogger,), {"__init__": lambda self: None})())
    with pytest.raises(TypeError):
        trt.Builder(None)


def test_what_the_parser_refuses() -> None:
    w = world("8.6.1")
    builder = w.trt.Builder(w.logger)
    for flags, data, reason in (
        (0, SEGMENT, "explicit"),
        (1, b"no graph", "failed to parse"),
        (1, onnx_graph("Gelu", "com.microsoft", 1), "no importer registered for op Gelu"),
    ):
        parser = w.trt.OnnxParser(builder.create_network(flags), w.logger)
        assert not parser.parse(data) and parser.num_errors == 1
        assert reason in parser.get_error(0).desc() and reason in w.said[-1]
    made = network(w, SEGMENT)[1]
    assert not w.trt.OnnxParser(made, w.logger).parse(SEGMENT)
    assert builder.create_network(1 << 9) is None
    assert w.trt.OnnxParser(builder.create_network(1), w.logger).parse_from_file(str(TINY / "stem.onnx"))
    assert not w.trt.OnnxParser(builder.create_network(1), w.logger).parse_from_file("nowhere.onnx")


def test_profiles_that_the_builder_refuses() -> None:
    for changed, reason in (
        ({"hidden": None}, "hidden is missing dimensions"),
        ({"hidden": [(1, 1, 16), (5, 8, 16), (4, 48, 16)]}, "no optimization profile has been defined"),
        ({"hidden": [(1, 1, 16), (2, 8), (4, 48, 16)]}, "no optimization profile has been defined"),
        ({"hidden": [(1, 1), (2, 8), (4, 48)]}, "has 3 dimensions"),
        ({"hidden": [(1, 1, 16), (2, 8, 16), (4, 48, 17)]}, "kMAX of the profile: hidden"),
        (
            {"evidence": [(1, 5), (3, 5), (4, 5)]},
            "kOPT of the profile: evidence (3, 5): dimension batch",
        ),
        ({"profiles": ()}, "no optimization profile has been defined"),
    ):
        w = world()
        assert build(w, **changed) is None
        assert reason in w.said[-1] and w.trt.builds == 0
    w = world()
    w.trt.build_problem = "out of memory"
    assert build(w) is None and "out of memory" in w.said[-1]


def test_half_precision() -> None:
    half = onnx_graph("Abs", "", 10)
    for version, strong, flag, built in (
        ("8.6.1", False, False, False),
        ("8.6.1", False, True, True),
        ("10.3.0", False, False, False),
        ("10.3.0", False, True, True),
        ("10.3.0", True, False, True),
        ("10.3.0", True, True, False),
        ("11.4.0", True, False, True),
    ):
        w = world(version)
        builder, made, config = network(w, half, strong)
        assert made.get_input(0).dtype == w.trt.DataType.HALF
        if flag:
            config.set_flag(w.trt.BuilderFlag.FP16)
            assert config.get_flag(w.trt.BuilderFlag.FP16)
        assert (builder.build_serialized_network(made, config) is not None) == built
        assert built or "fp16" in w.said[-1].lower()


def test_precisions_of_layers() -> None:
    w = world("8.6.1")
    builder, made, config = network(w, onnx_graph("Abs", "", 1))
    layer = made.get_layer(0)
    assert (made.num_layers, layer.name, layer.num_outputs) == (1, "n", 1)
    assert layer.get_output(0).dtype == w.trt.DataType.FLOAT and not layer.precision_is_set
    layer.precision = w.trt.DataType.HALF
    assert builder.build_serialized_network(made, config) is None
    config.set_flag(w.trt.BuilderFlag.FP16)
    assert builder.build_serialized_network(made, config) is not None
    builder, made, config = network(w, onnx_graph("Abs", "", 6))
    made.get_layer(0).precision = w.trt.DataType.FLOAT
    assert builder.build_serialized_network(made, config) is None and "integers" in w.said[-1]
    assert not hasattr(network(world("11.4.0"), SEGMENT)[1].get_layer(0), "precision")


def test_timing_caches() -> None:
    w = world()
    builder, made, config = network(w, onnx_graph("Abs", "", 1))
    cache = config.create_timing_cache(b"")
    assert config.get_timing_cache() is None and config.set_timing_cache(cache, False)
    empty = bytes(cache.serialize())
    assert builder.build_serialized_network(made, config) is not None
    full = bytes(config.get_timing_cache().serialize())
    assert len(full) > len(empty)
    other = config.create_timing_cache(empty)
    assert other.combine(config.create_timing_cache(full), False) and bytes(other.serialize()) == full
    assert config.create_timing_cache(b"garbage") is None and "Serialization" in w.said[-1]
    newer = world("10.16.1")
    assert network(newer, SEGMENT)[2].create_timing_cache(full) is None and newer.said
    newer.trt.empty_cache_for_bad_one = True
    assert network(newer, SEGMENT)[2].create_timing_cache(full) is not None
    away = world(capability=(8, 9))
    config = network(away, SEGMENT)[2]
    cache = config.create_timing_cache(full)
    assert not config.set_timing_cache(cache, False) and config.set_timing_cache(cache, True)


def test_engines_that_the_runtime_refuses() -> None:
    plan = bytes(build(world()))
    for there, data, reason in (
        (world(), plan[:-1], "damaged"),
        (world(), b"", "damaged"),
        (world(), plan.replace(b"\x00", b"\x01", 1), "damaged"),
        (world("10.16.1"), plan, "expecting library version 10.3.0"),
        (world(capability=(8, 9)), plan, "expecting compute 8.6 got compute 8.9"),
        (world(limit=100), plan, "OutOfMemory"),
    ):
        assert there.trt.Runtime(there.logger).deserialize_cuda_engine(data) is None
        assert reason in there.said[-1]
