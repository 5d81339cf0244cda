"""Rewrites of an exported graph that cost nothing and save operators: a tiny one costs as much to start as
to run, and a segment starts again what one graph of all blocks does once.

All results are ONNX's own operators; the rules run on onnxscript's pattern rewriter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from onnxscript import ir
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase, RewriteRuleSet, rewrite


class FixedReshape(RewriteRuleClassBase):
    """Reshape by a constant where sizes are numbers or stay where they were (0: "as in the input"); one may
    move (-1: what is left).

    The exporter reads the free sizes off some input of the graph, by Shape and Concat, in every segment
    anew.
    """

    def pattern(self, op: Any, data: Any, shape: Any) -> Any:
        return op.Reshape(data, shape, _outputs=["reshaped"])

    def check(self, context: Any, data: ir.Value, shape: ir.Value, reshaped: ir.Value) -> MatchResult:
        result = MatchResult()
        if shape.const_value is not None:
            return result.fail("constant already")
        if _sizes(data, reshaped) is None:
            return result.fail("two free sizes move or are not known")
        return result

    def rewrite(self, op: Any, data: ir.Value, shape: ir.Value, reshaped: ir.Value) -> Any:
        sizes = _sizes(data, reshaped) or []  # check() has seen it
        return op.Reshape(data, op.Constant(value=ir.tensor(sizes, dtype=ir.DataType.INT64)))


class Quotient(RewriteRuleClassBase):
    """x / sqrt(v) in RMS norms, the form that ONNX Runtime fuses into one operator, for x * (1 / sqrt(v))."""

    def pattern(self, op: Any, x: Any, v: Any) -> Any:
        return op.Mul(x, op.Reciprocal(op.Sqrt(v)))

    def rewrite(self, op: Any, x: ir.Value, v: ir.Value) -> Any:
        return op.Div(x, op.Sqrt(v))


class HalfLast(RewriteRuleClassBase):
    """GELU as (x * (1 + erf(x / sqrt 2))) * 0.5, the order that ONNX Runtime fuses into one operator.

    PyTorch's decomposition halves the bracket first, x * (0.5 * (1 + erf)), which no version of ONNX Runtime
    up to 1.32 knows: five operators over the widest tensor of a block.
    """

    def pattern(self, op: Any, x: Any, root: Any, one: Any, half: Any) -> Any:
        bracket = op.Add(op.Erf(op.Div(x, root)), one)
        return op.Mul(x, op.Mul(half, bracket))

    def check(self, context: Any, x: ir.Value, root: ir.Value, one: ir.Value, half: ir.Value) -> MatchResult:
        result = MatchResult()
        wanted = ((root, math.sqrt(2.0)), (one, 1.0), (half, 0.5))
        if not all(_is(value, number) for value, number in wanted):
            return result.fail("not the constants of GELU")
        return result

    def rewrite(self, op: Any, x: ir.Value, root: ir.Value, one: ir.Value, half: ir.Value) -> Any:
        bracket = op.Add(op.Erf(op.Div(x, root)), one)
        return op.Mul(op.Mul(x, bracket), half)


class Abreast(RewriteRuleClassBase):
    """One product for products of the same input whose results stand side by side, biases too."""

    def pattern(self, op: Any, first: Any) -> Any:
        return op.Concat(first, _allow_other_inputs=True, axis=-1, _outputs=["joined"])

    def check(self, context: Any, first: ir.Value, joined: ir.Value) -> MatchResult:
        result, parts = MatchResult(), _products(joined)
        if len(parts) < 2:
            return result.fail("not all are products with weights, alone or with a bias")
        if len({(id(part.data), part.bias is None) for part in parts}) > 1:
            return result.fail("of different inputs, or some with a bias and some without")
        return result

    def rewrite(self, op: Any, first: ir.Value, joined: ir.Value) -> Any:
        parts = _products(joined)
        made = op.MatMul(
            parts[0].data, _beside(op, [part.weights for part in parts], f"{joined.name}_weights")
        )
        biases = [part.bias for part in parts if part.bias is not None]
        return op.Add(made, _beside(op, biases, f"{joined.name}_biases")) if biases else made


RULES = RewriteRuleSet(
    [rule.rule() for rule in (FixedReshape, Quotient, HalfLast, Abreast)],  # type: ignore[no-untyped-call]
    commute=True,
)


def shorten(model: ir.Model) -> ir.Model:
    """The model with all rewrites done and everything removed that nothing uses any more."""
    return rewrite(model, RULES)


def _sizes(data: ir.Value, reshaped: ir.Value) -> list[int] | None:
    """Constant sizes of a Reshape: numbers, 0 where a free size is the input's at the same place, and -1 for
    one that is not.
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
    """Of an input and weights, with a bias or without."""

    data: ir.Value
    weights: np.ndarray
    bias: np.ndarray | None


def _products(joined: ir.Value) -> list[_Product]:
    """What a Concat puts side by side, where all of it is products with weights; none where not."""
    node = joined.producer()
    found = [_product(value) for value in (() if node is None else node.inputs)]
    known = [product for product in found if product is not None]
    return known if len(known) == len(found) else []


def _product(value: ir.Value | None) -> _Product | None:
    node, bias = None if value is None else value.producer(), None
    if node is not None and node.op_type == "Add":
        values = [(one, _constant(one)) for one in node.inputs]
        biases = [array for _, array in values if array is not None]
        if len(biases) != 1:
            return None
        product = next(one for one, array in values if array is None)
        bias, node = biases[0], None if product is None else product.producer()
    if node is None or node.op_type != "MatMul":
        return None
    data, weights = node.inputs[0], _constant(node.inputs[1])
    return None if data is None or weights is None else _Product(data, weights, bias)


def _constant(value: ir.Value | None) -> np.ndarray | None:
    constant = None if value is None else value.const_value
    return None if constant is None else constant.numpy()


def _beside(op: Any, arrays: Sequence[np.ndarray], name: str) -> Any:
    """A constant of these, side by side."""
    return op.initializer(ir.tensor(np.concatenate(arrays, axis=-1)), name=name)


def _is(value: ir.Value, number: float) -> bool:
    """Whether a value is a constant scalar of that number in float32."""
    constant = value.const_value
    return (
        constant is not None
        and constant.size == 1
        and math.isclose(float(constant.numpy().item()), number, rel_tol=1e-6)
    )
