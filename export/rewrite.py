"""Rewrite an exported graph so that it has fewer operators.

A tiny operator takes as long to start as to run, and every segment repeats some that a single graph of all
blocks runs once.

All results are ONNX's own operators; the rewrites run on onnxscript's pattern rewriter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from onnxscript import ir
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase, RewriteRuleSet, rewrite


class FixedReshape(RewriteRuleClassBase):
    """Rewrite that gives Reshape a constant shape instead of one that the graph computes.

    It applies where sizes are numbers or keep their axis (0: "as in the input"); one may move to another axis
    (-1: the rest).

    The exporter computes the free sizes from some input of the graph, by Shape and Concat, again in every
    segment.
    """

    def pattern(self, op: Any, data: Any, shape: Any) -> Any:
        """The operators that this rewrite replaces; called by onnxscript's rewriter."""
        return op.Reshape(data, shape, _outputs=["reshaped"])

    def check(self, context: Any, data: ir.Value, shape: ir.Value, reshaped: ir.Value) -> MatchResult:
        """Whether the rewrite applies: the shape is no constant yet, and constant sizes exist."""
        result = MatchResult()
        if shape.const_value is not None:
            return result.fail("a constant already")
        if _sizes(data, reshaped) is None:
            return result.fail("two free sizes move or are unknown")
        return result

    def rewrite(self, op: Any, data: ir.Value, shape: ir.Value, reshaped: ir.Value) -> Any:
        """The Reshape with a constant shape that replaces the pattern."""
        sizes = _sizes(data, reshaped) or []  # check() excluded None
        return op.Reshape(data, op.Constant(value=ir.tensor(sizes, dtype=ir.DataType.INT64)))


class RootQuotient(RewriteRuleClassBase):
    """Rewrite of x * (1 / sqrt(v)) to x / sqrt(v) in RMS norms, for which ONNX Runtime has one operator."""

    def pattern(self, op: Any, x: Any, v: Any) -> Any:
        """The operators that this rewrite replaces; called by onnxscript's rewriter."""
        return op.Mul(x, op.Reciprocal(op.Sqrt(v)))

    def rewrite(self, op: Any, x: ir.Value, v: ir.Value) -> Any:
        """The operators x / sqrt(v) that replace the pattern."""
        return op.Div(x, op.Sqrt(v))


class GeluHalfLast(RewriteRuleClassBase):
    """Rewrite of GELU to (x * (1 + erf(x / sqrt 2))) * 0.5, which ONNX Runtime fuses into one operator.

    PyTorch's decomposition halves the bracket first, x * (0.5 * (1 + erf)), which no ONNX Runtime up to 1.32
    fuses: five operators over the widest tensor of a block.
    """

    def pattern(self, op: Any, x: Any, root: Any, one: Any, half: Any) -> Any:
        """The operators that this rewrite replaces; called by onnxscript's rewriter."""
        bracket = op.Add(op.Erf(op.Div(x, root)), one)
        return op.Mul(x, op.Mul(half, bracket))

    def check(self, context: Any, x: ir.Value, root: ir.Value, one: ir.Value, half: ir.Value) -> MatchResult:
        """Whether the rewrite applies: the constants are those of GELU."""
        result = MatchResult()
        constants = ((root, math.sqrt(2.0)), (one, 1.0), (half, 0.5))
        if not all(_is(value, number) for value, number in constants):
            return result.fail("not the constants of GELU")
        return result

    def rewrite(self, op: Any, x: ir.Value, root: ir.Value, one: ir.Value, half: ir.Value) -> Any:
        """The operators of GELU, in the new order, that replace the pattern."""
        bracket = op.Add(op.Erf(op.Div(x, root)), one)
        return op.Mul(op.Mul(x, bracket), half)


class TanhGeluHalfFirst(RewriteRuleClassBase):
    """Rewrite of approximate GELU to (x * 0.5) * (tanh(...) + 1), which ONNX Runtime fuses into one operator.

    PyTorch's decomposition halves the bracket first, x * (0.5 * (tanh(...) + 1)), which is not fused: eight
    operators over the widest tensor of a block.
    """

    def pattern(self, op: Any, x: Any, inner: Any, one: Any, half: Any) -> Any:
        """The operators that this rewrite replaces; called by onnxscript's rewriter."""
        return op.Mul(x, op.Mul(half, op.Add(op.Tanh(inner), one)))

    def check(self, context: Any, x: ir.Value, inner: ir.Value, one: ir.Value, half: ir.Value) -> MatchResult:
        """Whether the rewrite applies: the constants are those of GELU."""
        result = MatchResult()
        if not (_is(half, 0.5) and _is(one, 1.0)):
            return result.fail("not the constants of GELU")
        return result

    def rewrite(self, op: Any, x: ir.Value, inner: ir.Value, one: ir.Value, half: ir.Value) -> Any:
        """The operators of GELU, in the new order, that replace the pattern."""
        return op.Mul(op.Mul(x, half), op.Add(op.Tanh(inner), one))


class JoinedProducts(RewriteRuleClassBase):
    """Rewrite of several products of the same input that are concatenated, with biases, to one product."""

    def pattern(self, op: Any, first: Any) -> Any:
        """The operator that this rewrite replaces, a Concat; called by onnxscript's rewriter."""
        return op.Concat(first, _allow_other_inputs=True, axis=-1, _outputs=["joined"])

    def check(self, context: Any, first: ir.Value, joined: ir.Value) -> MatchResult:
        """Whether the rewrite applies: all inputs of the Concat are products of one input with weights."""
        result, products = MatchResult(), _products(joined)
        if len(products) < 2:
            return result.fail("not all are products with weights, with or without a bias")
        if len({(id(product.data), product.bias is None) for product in products}) > 1:
            return result.fail("of different inputs, or some with a bias and some without")
        return result

    def rewrite(self, op: Any, first: ir.Value, joined: ir.Value) -> Any:
        """The product, and the sum with the biases if there are any, that replace the pattern."""
        products = _products(joined)
        weights = _concatenated(op, [product.weights for product in products], f"{joined.name}_weights")
        output = op.MatMul(products[0].data, weights)
        biases = [product.bias for product in products if product.bias is not None]
        return op.Add(output, _concatenated(op, biases, f"{joined.name}_biases")) if biases else output


_REWRITES = (FixedReshape, RootQuotient, GeluHalfLast, TanhGeluHalfFirst, JoinedProducts)
RULES = RewriteRuleSet(
    [rewrite_rule.rule() for rewrite_rule in _REWRITES],  # type: ignore[no-untyped-call]
    commute=True,
)


def apply_rewrites(model: ir.Model) -> ir.Model:
    """Apply all rewrites to a model and remove its unused nodes."""
    return rewrite(model, RULES)


def _sizes(data: ir.Value, reshaped: ir.Value) -> list[int] | None:
    """Constant sizes of a Reshape; None if they do not exist.

    A free size is 0 if it is the input's at the same axis, else -1; there can be only one -1.
    """
    if data.shape is None or reshaped.shape is None:
        return None
    sizes: list[int] = []
    for axis, size in enumerate(reshaped.shape):
        if isinstance(size, int):
            sizes.append(size)
        elif size.value is not None and axis < len(data.shape) and data.shape[axis] == size:
            sizes.append(0)
        else:
            sizes.append(-1)
    return sizes if sizes.count(-1) < 2 else None


class _Product(NamedTuple):
    """A product of an input and weights, with a bias or without."""

    data: ir.Value
    weights: np.ndarray
    bias: np.ndarray | None


def _products(joined: ir.Value) -> list[_Product]:
    """The products that a Concat joins; empty unless all of its inputs are products with weights."""
    node = joined.producer()
    values = () if node is None else tuple(node.inputs)
    products = [product for product in map(_product, values) if product is not None]
    return products if len(products) == len(values) else []


def _product(value: ir.Value | None) -> _Product | None:
    node, bias = None if value is None else value.producer(), None
    if node is not None and node.op_type == "Add":
        addends = [(addend, _constant(addend)) for addend in node.inputs]
        biases = [array for _, array in addends if array is not None]
        if len(biases) != 1:
            return None
        product = next(addend for addend, array in addends if array is None)
        bias, node = biases[0], None if product is None else product.producer()
    if node is None or node.op_type != "MatMul":
        return None
    data, weights = node.inputs[0], _constant(node.inputs[1])
    return None if data is None or weights is None else _Product(data, weights, bias)


def _constant(value: ir.Value | None) -> np.ndarray | None:
    constant = None if value is None else value.const_value
    return None if constant is None else constant.numpy()


def _concatenated(op: Any, arrays: Sequence[np.ndarray], name: str) -> Any:
    """A constant of these arrays, concatenated in the last axis."""
    return op.initializer(ir.tensor(np.concatenate(arrays, axis=-1)), name=name)


def _is(value: ir.Value, number: float) -> bool:
    """Whether a value is a constant scalar, equal to a number in float32."""
    constant = value.const_value
    return (
        constant is not None
        and constant.size == 1
        and math.isclose(float(constant.numpy().item()), number, rel_tol=1e-6)
    )
