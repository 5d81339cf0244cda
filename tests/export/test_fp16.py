"""fp16: float16 inside the blocks and nowhere else, as few casts as there are tensors that cross."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from offramp.export import trt_compile
from offramp.export.fp16 import convert_nodes_to_fp16
from offramp.export.precision import in_block
from offramp.models.families.family import additive_mask
from offramp.runtime.bundle.manifest import Tensor, Variant

Values = dict[str, np.ndarray]


def load(folder: Path, name: str) -> onnx.GraphProto:
    return onnx.load(folder / f"{name}.onnx").graph


def random_inputs(graph: onnx.GraphProto, mask: list[list[int]] | None = None) -> Values:
    """Random values for every input; the mask of rows of nine tokens."""
    generator, values = np.random.default_rng(0), {}
    for entry in graph.input:
        dims = entry.type.tensor_type.shape.dim
        shape = [{"batch": 2, "seq": 9}.get(dim.dim_param, dim.dim_value) for dim in dims]
        values[entry.name] = generator.standard_normal(shape, dtype=np.float32)
    if "mask" in values:
        values["mask"] = additive_mask(torch.tensor(mask or [[1] * 9, [1] * 5 + [0] * 4])).numpy()
    if "pool" in values:
        values["pool"] = np.full_like(values["pool"], 1 / values["pool"].shape[-1])
    return values


def evaluated(folder: Path, name: str, values: Values) -> Values:
    """In numpy, which rounds to float16 after every operator; ONNX Runtime's CPU goes on in float32."""
    model = onnx.load(folder / f"{name}.onnx")
    outputs = ReferenceEvaluator(model).run(None, values)
    return {entry.name: value for entry, value in zip(model.graph.output, outputs, strict=True)}


def compiled(file: Path) -> trt_compile.CompiledGraph:
    """By TensorRT-RTX, for rows of 1 to 32 tokens."""
    inputs = tuple(
        Tensor(one.name, "", tuple(d.dim_param or d.dim_value for d in one.type.tensor_type.shape.dim))
        for one in onnx.load(file).graph.input
    )
    graph = Variant(file.name, inputs, ())
    return trt_compile.compile_graph(
        trt_compile.import_compiler(), file.read_bytes(), graph, [((1, 1), (1, 8), (4, 32))], ("8.6",)
    )


def test_weights_are_float16_in_blocks_and_float32_behind_them(exported: Callable[[str], Any]) -> None:
    graph = load(exported("bert").folder, "segment_00_fp16")
    kinds = {value.name: value.data_type for value in graph.initializer}
    read: dict[bool, set[int]] = {True: set(), False: set()}
    for node in graph.node:
        read[in_block(node.name)] |= {kinds[name] for name in node.input if name in kinds}
    assert read[True] <= {TensorProto.FLOAT16, TensorProto.INT64} and TensorProto.FLOAT16 in read[True]
    assert read[False] == {TensorProto.FLOAT, TensorProto.INT64}
    assert {name for node in graph.node for name in node.input} >= set(kinds)  # no weight is there twice


@pytest.mark.slow  # MPNet, the second exported family
def test_it_is_smaller_and_its_interface_is_that_of_fp32(exported: Callable[[str], Any]) -> None:
    folder = exported("mpnet").folder
    for part in ("segment_00", "segment_01"):
        sides = []
        for name in (part, f"{part}_fp16"):
            graph = load(folder, name)
            sides.append([(v.name, v.type.SerializeToString()) for v in (*graph.input, *graph.output)])
        assert sides[0] == sides[1]
        small, full = (folder / f"{part}{end}.onnx" for end in ("_fp16", ""))
        assert small.stat().st_size < 0.75 * full.stat().st_size  # most of a file this small is not weights
    assert {node.domain for node in graph.node} == {""}
    assert [one.version for one in onnx.load(small).opset_import] == [18]


@pytest.mark.parametrize("family", tiny.with_slow(tiny.EXPORTED, "bert"))
def test_every_tensor_that_crosses_is_cast_once(family: str, exported: Callable[[str], Any]) -> None:
    folder = exported(family).folder
    for name in ("segment_00", "segment_01"):
        graph, full = load(folder, f"{name}_fp16"), load(folder, name)
        casts = [node for node in graph.node if node.op_type == "Cast"]
        inputs = {entry.name for entry in graph.input}
        into = [node.input[0] for node in casts if node.attribute[0].i == TensorProto.FLOAT16]
        assert sorted(into) == sorted(inputs & {"hidden", "mask", "position_bias"})
        (back,) = (node.output[0] for node in casts if node.attribute[0].i == TensorProto.FLOAT)
        assert back == "next_hidden" or name == "segment_01"
        # What pools and what is handed on is one and the same.
        readers, before = (
            [node.name for node in one.node if back in node.input and not in_block(node.name)]
            for one in (graph, full)
        )
        assert readers == before and len(readers) == 1
        assert len(graph.node) == len(full.node) + len(casts)


@pytest.mark.parametrize("family", tiny.with_slow(tiny.EXPORTED, "bert"))
def test_what_it_says_is_near_fp32(family: str, exported: Callable[[str], Any]) -> None:
    folder = exported(family).folder
    values = random_inputs(load(folder, "segment_00"))
    full, half = (evaluated(folder, name, values) for name in ("segment_00", "segment_00_fp16"))
    assert all(half[name].dtype == np.float32 for name in full)
    assert 0 < np.abs(full["next_hidden"] - half["next_hidden"])[0].max() < 0.02
    assert 0 < np.abs(full["logits"] - half["logits"]).max() < 0.005


@pytest.mark.slow  # MPNet, the second exported family
def test_a_fully_padded_row_is_finite(exported: Callable[[str], Any]) -> None:
    folder = exported("mpnet").folder
    values = random_inputs(load(folder, "segment_00"), [[1] * 9, [0] * 9])
    values["position_bias"] = np.full_like(
        values["position_bias"], -40
    )  # so low are scores of large networks
    half = evaluated(folder, "segment_00_fp16", values)
    assert all(np.isfinite(value).all() for value in half.values())


def test_a_float32_among_float16_is_refused(exported: Callable[[str], Any], tmp_path: Path) -> None:
    model = onnx.load(exported("bert").folder / "segment_00_fp16.onnx")
    bias = next(one for one in model.graph.initializer if "query.bias" in one.name)
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias).astype(np.float32), bias.name))
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "mixed.onnx")
    result = compiled(tmp_path / "mixed.onnx")
    assert result.size is None and result.problem


def test_constants_casts_and_shared_weights_of_a_block() -> None:
    """Float32's least number stays finite, and a weight that is read outside, too, stays float32 there."""
    least = numpy_helper.from_array(np.array(np.finfo(np.float32).min), "constant")
    nodes = [
        helper.make_node("Constant", [], ["least"], "blocks.0/Constant_0", value=least),
        helper.make_node("Cast", ["number"], ["float"], "blocks.0/Cast_1", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "shared"], ["scaled"], "blocks.0/Mul_2"),
        helper.make_node("Max", ["scaled", "least"], ["most"], "blocks.0/Max_3"),
        helper.make_node("Mul", ["most", "shared"], ["out"], "exit/Mul_4"),
    ]
    entry = helper.make_tensor_value_info("number", TensorProto.INT64, ["batch"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch"])
    shared = numpy_helper.from_array(np.array([0.1], np.float32), "shared")
    graph = helper.make_graph(nodes, "block", [entry], [out], [shared])
    model = onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    )
    halved = convert_nodes_to_fp16(model, in_block)
    onnx.checker.check_model(halved, full_check=True)
    assert {one.name: one.data_type for one in halved.graph.initializer} == {
        "shared": TensorProto.FLOAT,
        "shared_half": TensorProto.FLOAT16,
    }
    constant = numpy_helper.to_array(halved.graph.node[0].attribute[0].t)
    assert constant.dtype == np.float16 and constant == -65504
    (output,) = ReferenceEvaluator(halved).run(None, {"number": np.array([3, -4])})
    assert np.allclose(output, [0.03, -0.04], rtol=1e-3)
