"""int8 graphs: a token's numbers depend on this token alone, and products are close to those in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from offramp.export.int8 import keep_layer_norms, round_weights, to_token_products
from offramp.runtime.engines.threads import share_global_pool

GENERATOR = np.random.default_rng(0)
WEIGHTS = GENERATOR.standard_normal((32, 8), dtype=np.float32)
BIAS = GENERATOR.standard_normal(8, dtype=np.float32)


def product_graph(operator: str, stored: np.ndarray, rank: int, **facts: float) -> onnx.ModelProto:
    """A graph of one product "blocks.0/product" of x with stored weights, plus a bias where it is a Gemm."""
    inputs = ["x", "w", "b"] if operator == "Gemm" else ["x", "w"]
    node = helper.make_node(operator, inputs, ["y"], name="blocks.0/product", **facts)
    sizes: list[str | int] = [*[f"axis{n}" for n in range(rank - 1)], 32]
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*sizes[:-1], 8])]
    tensors = [numpy_helper.from_array(np.ascontiguousarray(stored), "w"), numpy_helper.from_array(BIAS, "b")]
    graph = helper.make_graph([node], "graph", values, outputs, tensors[: len(inputs) - 1])
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    (y,) = run_all(model, x)
    return y


def run_all(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    share_global_pool(options)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [np.asarray(output) for output in session.run(None, {"x": x})]


def test_weights_are_symmetric_with_a_scale_an_output() -> None:
    integers, scales = round_weights(WEIGHTS, 127)
    assert integers.dtype == np.int8 and (np.abs(integers.astype(int)).max(axis=0) == 127).all()
    assert np.abs(integers * scales - WEIGHTS).max() <= scales.max() / 2 + 1e-7


def test_an_output_without_weights_is_zero() -> None:
    integers, scales = round_weights(np.zeros((3, 2), np.float32), 127)
    assert not integers.any() and np.isfinite(scales).all()


def test_a_product_is_that_of_its_rounded_factors() -> None:
    model = product_graph("MatMul", WEIGHTS, 3)
    to_token_products(model, {"blocks.0/product"}, reduced=False)
    onnx.checker.check_model(model)
    sizes = np.float32([[0.1], [1], [10], [100], [1000]])
    x = GENERATOR.standard_normal((2, 5, 32), dtype=np.float32) * sizes
    integers, scales = round_weights(WEIGHTS, 127)
    steps = np.abs(x).max(axis=-1, keepdims=True) / 127
    expected = (np.rint(x / steps) * steps) @ (integers * scales)
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-4, atol=1e-3 * float(steps.min()))


def test_a_token_of_zeros_gives_zeros() -> None:
    model = product_graph("MatMul", WEIGHTS, 3)
    to_token_products(model, {"blocks.0/product"}, reduced=False)
    x = GENERATOR.standard_normal((1, 3, 32), dtype=np.float32)
    x[0, 1] = 0
    y = run(model, x)
    assert (y[0, 1] == 0).all() and np.isfinite(y).all()


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_keeps_its_bias(transposed: int) -> None:
    model = product_graph("Gemm", WEIGHTS.T if transposed else WEIGHTS, 2, transB=transposed)
    to_token_products(model, {"blocks.0/product"}, reduced=False)
    assert "MatMulIntegerToFloat" in [node.op_type for node in model.graph.node]
    x = GENERATOR.standard_normal((4, 32), dtype=np.float32)
    assert np.abs(run(model, x) - (x @ WEIGHTS + BIAS)).max() < 0.2


def test_what_is_no_plain_product_stays() -> None:
    model = product_graph("Gemm", WEIGHTS, 2, alpha=2.0)
    to_token_products(model, {"blocks.0/product"}, reduced=False)
    assert [node.op_type for node in model.graph.node] == ["Gemm"]
    other = product_graph("MatMul", WEIGHTS, 3)
    to_token_products(other, {"blocks.1/product"}, reduced=False)
    assert [node.op_type for node in other.graph.node] == ["MatMul"]


def test_queries_keys_and_values_are_one_product(exported: Callable[[str], Any]) -> None:
    graph = onnx.load(exported("bert").folder / "segment_00_int8.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulIntegerToFloat") == kinds.count("QuantizeLinear") == 4
    (split,) = [node for node in graph.node if node.op_type == "Split"]
    assert len(split.output) == 3


@pytest.mark.parametrize("biases", [2, 1, 0])
def test_products_of_one_tensor_keep_their_own_numbers(biases: int) -> None:
    other = GENERATOR.standard_normal((32, 5), dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw" if biases else "y"], name="blocks.0/first"),
        helper.make_node("MatMul", ["x", "v"], ["xv" if biases > 1 else "z"], name="blocks.0/second"),
        helper.make_node("Add", ["xw", "b"], ["y"]),
        helper.make_node("Add", ["c", "xv"], ["z"]),
    ][: 2 + biases]
    sizes = ["rows", "tokens"]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [*sizes, size])
        for name, size in (("x", 32), ("y", 8), ("z", 5))
    ]
    shift = GENERATOR.standard_normal(5, dtype=np.float32)
    stored = {"w": WEIGHTS, "v": other, "b": BIAS, "c": shift}
    tensors = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "graph", values[:1], values[1:], tensors),
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 18)],
    )
    to_token_products(model, {"blocks.0/first", "blocks.0/second"}, reduced=False)
    assert [node.op_type for node in model.graph.node].count("MatMulIntegerToFloat") == 1
    x = GENERATOR.standard_normal((2, 3, 32), dtype=np.float32)
    y, z = run_all(model, x)
    assert np.abs(y - (x @ WEIGHTS + BIAS * (biases > 0))).max() < 0.2
    assert np.abs(z - (x @ other + shift * (biases > 1))).max() < 0.2


def test_a_product_that_the_graph_gives_keeps_its_name() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], name="blocks.0/product"),
        helper.make_node("Add", ["p", "b"], ["y"]),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "tokens", size])
        for name, size in (("x", 32), ("p", 8), ("y", 8))
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in (("w", WEIGHTS), ("b", BIAS))]
    model = helper.make_model(
        helper.make_graph(nodes, "graph", values[:1], values[1:], tensors),
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 18)],
    )
    to_token_products(model, {"blocks.0/product"}, reduced=False)
    x = GENERATOR.standard_normal((1, 3, 32), dtype=np.float32)
    product, total = run_all(model, x)
    np.testing.assert_allclose(total, product + BIAS, atol=1e-5)
    assert np.abs(product - x @ WEIGHTS).max() < 0.2


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_a_product_of_gelu_needs_no_magnitudes(size: float) -> None:
    x = np.linspace(-size, size, 32, dtype=np.float32)[None, None]
    kinds = {}
    for name, divided in (("gelu", "x"), ("no gelu", "one")):
        nodes = [
            helper.make_node("Div", [divided, "root"], ["scaled"]),
            helper.make_node("Erf", ["scaled"], ["erf"]),
            helper.make_node("Add", ["erf", "one"], ["share"]),
            helper.make_node("Mul", ["x", "share"], ["twice"]),
            helper.make_node("Mul", ["twice", "half"], ["g"]),
            helper.make_node("MatMul", ["g", "w"], ["y"], name="blocks.0/product"),
        ]
        values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "tokens", 32])]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "tokens", 8])]
        numbers = {"w": WEIGHTS, "root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}
        tensors = [numpy_helper.from_array(np.asarray(array), key) for key, array in numbers.items()]
        model = helper.make_model(
            helper.make_graph(nodes, "graph", values, outputs, tensors),
            ir_version=10,
            opset_imports=[helper.make_opsetid("", 18)],
        )
        expected = run(model, x)
        to_token_products(model, {"blocks.0/product"}, reduced=False)
        kinds[name] = [node.op_type for node in model.graph.node]
        largest = max(np.abs(x).max(), 0.17)
        assert np.abs(run(model, x) - expected).max() < 0.06 * largest
    assert "Abs" not in kinds["gelu"] and "Abs" in kinds["no gelu"]


def block_inputs(rows: int, length: int) -> dict[str, np.ndarray]:
    return {
        "hidden": GENERATOR.standard_normal((rows, length, 32), dtype=np.float32),
        "mask": np.zeros((rows, 1, 1, length), np.float32),
        "pool": np.full((rows, 1, length), 1 / length, np.float32),
    }


def test_a_row_is_the_same_beside_a_larger_one_and_padded(
    exported: Callable[[str], Any], open_graph: Callable[[Path], Any]
) -> None:
    session = open_graph(exported("bert").folder / "segment_01_int8.onnx")
    alone = block_inputs(1, 5)
    among = block_inputs(4, 8)
    among["hidden"] *= 100  # with one scale a tensor the small row would keep two levels
    among["hidden"][2, :5] = alone["hidden"][0]
    among["mask"][2, ..., 5:] = np.finfo(np.float32).min
    among["pool"][2] = 0
    among["pool"][2, :, :5] = alone["pool"][0]
    names = [output.name for output in session.get_outputs()]
    assert "logits" in names
    for name in names:
        (by_itself,), (beside,) = session.run([name], alone), session.run([name], among)
        rows = beside[2:3, :5] if name == "next_hidden" else beside[2:3]
        np.testing.assert_allclose(rows, by_itself, rtol=1e-5, atol=1e-6)


def test_layer_norms_are_not_fused_with_sums(exported: Callable[[str], Any], tmp_path: Path) -> None:
    kinds = {}
    for variant in ("", "_int8"):
        options = onnxruntime.SessionOptions()
        share_global_pool(options)
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 3  # it warns that the file is for this machine
        file = exported("bert").folder / f"segment_00{variant}.onnx"
        onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        graph = onnx.load(tmp_path / "optimized.onnx").graph
        kinds[variant] = [node.op_type for node in graph.node]
    assert "SkipLayerNormalization" in kinds[""]  # else the rewrite is for nothing
    assert kinds["_int8"].count("LayerNormalization") == 2


def test_a_sum_that_no_layer_norm_reads_stays_an_add() -> None:
    nodes = [
        helper.make_node("Add", ["x", "x"], ["s"], name="one"),
        helper.make_node("LayerNormalization", ["s", "g"], ["n"], name="norm"),
        helper.make_node("Add", ["n", "x"], ["y"], name="two"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "graph", [], []))
    keep_layer_norms(model)
    assert [node.op_type for node in model.graph.node] == ["Sum", "LayerNormalization", "Add"]


def test_a_bias_joins_the_sum_that_a_layer_norm_reads() -> None:
    nodes = [
        helper.make_node("Add", ["x", "b"], ["s"]),
        helper.make_node("Add", ["x", "c"], ["kept"]),
        helper.make_node("Add", ["s", "kept"], ["t"]),
        helper.make_node("LayerNormalization", ["t", "g"], ["n"]),
        helper.make_node("Mul", ["n", "kept"], ["y"]),
    ]
    model = helper.make_model(helper.make_graph(nodes, "graph", [], []))
    keep_layer_norms(model)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds == ["Add", "Sum", "LayerNormalization", "Mul"]
    assert list(model.graph.node[1].input) == ["x", "b", "kept"]


def test_keys_are_transposed_inside_their_product(exported: Callable[[str], Any]) -> None:
    graph = onnx.load(exported("bert").folder / "segment_00_int8.onnx").graph
    (product,) = [node for node in graph.node if node.op_type == "FusedMatMul"]
    orders = [list(node.attribute[0].ints) for node in graph.node if node.op_type == "Transpose"]
    assert product.attribute[0].name == "transB" and orders == [[0, 2, 1, 3]] * 4
