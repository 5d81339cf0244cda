"""Rewrites save operators in every family, and leave patterns alone that only look like theirs.

That outputs stay the same is tested in test_to_onnx and test_verify.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
from onnx import TensorProto, helper, numpy_helper
from onnxscript import ir

from offramp.export.rewrite import apply_rewrites
from offramp.runtime.engines import threads


@pytest.mark.parametrize("family", tiny.with_slow(tiny.EXPORTED, "bert"))
def test_segments_compute_no_shapes_and_fuse_gelu(
    family: str, exported: Callable[[str], Any], tmp_path: Path
) -> None:
    export = exported(family)
    for segment in export.segments[1:]:
        file = export.folder / f"{segment.name}.onnx"
        assert "Shape" not in {node.op_type for node in onnx.load(file).graph.node}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        threads.share_global_pool(options)
        options.optimized_model_filepath = str(tmp_path / "fused.onnx")
        onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        fused = Counter(node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node)
        # (a policy that reads the state has a GELU of its own)
        assert fused["BiasGelu"] + fused["Gelu"] >= len(segment.blocks) and not fused["Erf"]


def graph(
    nodes: list[onnx.NodeProto], input_shape: list[Any], output_shape: list[Any], **constants: Any
) -> onnx.ModelProto:
    values = [numpy_helper.from_array(np.array(value), name) for name, value in constants.items()]
    entry = helper.make_tensor_value_info("x", TensorProto.FLOAT, input_shape)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, output_shape)
    return helper.make_model(
        helper.make_graph(nodes, "g", [entry], [out], values),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in ir.to_proto(apply_rewrites(ir.from_proto(model))).graph.node]


def answer(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    threads.share_global_pool(options)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    output: np.ndarray = session.run(None, {"x": x})[0]
    return output


def test_a_reshape_that_moves_a_free_size_keeps_its_shape() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "order"], ["turned"]),
        helper.make_node("Reshape", ["x", "turned"], ["y"]),
    ]
    swapped = graph(nodes, ["batch", "seq"], ["seq", "batch"], order=np.array([1, 0]))
    assert operators(swapped) == ["Shape", "Gather", "Reshape"]
    kept = graph(nodes, ["batch", "seq"], ["batch", "seq"], order=np.array([0, 1]))
    assert operators(kept) == ["Constant", "Reshape"]
    nodes[1] = helper.make_node("Concat", ["four", "sizes"], ["turned"], axis=0)
    nodes[0] = helper.make_node("Shape", ["x"], ["sizes"], start=1, end=2)
    moved = graph(nodes, [4, "seq", 2], [8, "seq"], four=np.array([8]))
    assert operators(moved) == ["Constant", "Reshape"]


def test_a_norm_divides() -> None:
    nodes = [
        helper.make_node("Sqrt", ["x"], ["root"]),
        helper.make_node("Reciprocal", ["root"], ["share"]),
        helper.make_node("Mul", ["x", "share"], ["y"]),
    ]
    assert operators(graph(nodes, ["batch"], ["batch"])) == ["Sqrt", "Div"]


@pytest.mark.parametrize("family", tiny.with_slow(["llama", "qwen3"]))
def test_segments_of_decoders_compute_no_shapes_and_fuse_norms(
    family: str, portable_decoder: Callable[[str], Any], tmp_path: Path
) -> None:
    _, split, folder = portable_decoder(family)
    segment, file = split.segments[0], folder / "segment_00.onnx"
    plain = Counter(node.op_type for node in onnx.load(file).graph.node)
    # The lengths of past and new, by which attention weights are split: once for all blocks.
    assert plain["Shape"] == 2 and plain["Tile"] == 1 and not plain["Gather"]
    # A block has one product for queries, keys and values, one for the two halves of its MLP, two after them,
    # and four of attention.
    assert plain["MatMul"] == 8 * len(segment.blocks)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 3
    threads.share_global_pool(options)
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    fused = Counter(node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node)
    norms = fused["SimplifiedLayerNormalization"] + fused["SkipSimplifiedLayerNormalization"]
    assert norms >= 2 * len(segment.blocks) and not fused["Sqrt"]


def test_products_of_one_input_that_stand_side_by_side_become_one() -> None:
    rng = np.random.default_rng(0)
    nodes, names = [], ["a", "b", "c"]
    for name in names:
        nodes.append(helper.make_node("MatMul", ["x", f"{name}_weight"], [f"{name}_product"]))
        nodes.append(helper.make_node("Add", [f"{name}_product", f"{name}_bias"], [name]))
    nodes.append(helper.make_node("Concat", names, ["y"], axis=-1))
    sizes = dict(zip(names, (3, 1, 2), strict=True))
    numbers = {f"{n}_weight": rng.normal(size=(4, k)).astype(np.float32) for n, k in sizes.items()}
    numbers |= {f"{n}_bias": rng.normal(size=k).astype(np.float32) for n, k in sizes.items()}
    model = graph(nodes, ["n", 4], ["n", 6], **numbers)
    after = ir.to_proto(apply_rewrites(ir.from_proto(model)))
    assert [node.op_type for node in after.graph.node] == ["MatMul", "Add"]
    x = rng.normal(size=(5, 4)).astype(np.float32)
    np.testing.assert_allclose(answer(model, x), answer(after, x), atol=1e-6)


@pytest.mark.parametrize("spoiled", ["another input", "one without a bias", "not a product", "not a weight"])
def test_what_only_stands_side_by_side_stays(spoiled: str) -> None:
    nodes = [
        helper.make_node("Neg", ["x"], ["z"]),
        helper.make_node("MatMul", ["x", "w"], ["a_product"]),
        helper.make_node("Add", ["a_product", "bias"], ["a"]),
        helper.make_node("MatMul", ["z" if spoiled == "another input" else "x", "v"], ["b_product"]),
        helper.make_node("Add", ["b_product", "bias"], ["b"]),
    ]
    side = {"one without a bias": "b_product", "not a product": "z"}.get(spoiled, "b")
    if spoiled == "not a weight":
        nodes[3] = helper.make_node("MatMul", ["x", "z"], ["b_product"])
    nodes.append(helper.make_node("Concat", ["a", side], ["y"], axis=-1))
    square = {name: np.eye(4, dtype=np.float32) for name in ("w", "v")}
    model = graph(nodes, [4, 4], [4, 8], **square, bias=np.ones(4, np.float32))
    assert operators(model).count("Concat") == 1


@pytest.mark.parametrize(("one", "changes"), [(1.0, True), (2.0, False)])
def test_only_the_constants_of_gelu_make_a_gelu(one: float, changes: bool) -> None:
    nodes = [
        helper.make_node("Div", ["x", "root"], ["a"]),
        helper.make_node("Erf", ["a"], ["b"]),
        helper.make_node("Add", ["b", "one"], ["c"]),
        helper.make_node("Mul", ["half", "c"], ["d"]),
        helper.make_node("Mul", ["x", "d"], ["y"]),
    ]
    numbers = {"root": np.float32(2**0.5), "one": np.float32(one), "half": np.float32(0.5)}
    model = graph(nodes, ["n"], ["n"], **numbers)
    after = ir.to_proto(apply_rewrites(ir.from_proto(model)))
    assert ("half" in after.graph.node[-1].input) == changes
    x = np.linspace(-3, 3, 7, dtype=np.float32)
    np.testing.assert_allclose(answer(model, x), answer(after, x), atol=1e-6)
