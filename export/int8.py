"""Integer products whose activations have a scale of their own for every token, of operators of ONNX Runtime.

With one scale for a whole tensor, which ONNX Runtime's quantizer writes, the answer to a row depends on the
other rows of its batch and on their padding. Here the largest magnitude of a token is 127 steps, so that a
token's numbers depend on this token alone. The sums of integer products are exact, in any order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

MICROSOFT = "com.microsoft"
LEVELS = {False: 127, True: 63}  # the largest integer of a weight, by `reduced`
STEPS = 127  # the integer of a token's largest magnitude
ZERO = 128  # the unsigned integer that stands for 0: ONNX Runtime multiplies uint8 by int8, 10 times as fast
GELU_DEPTH = 0.17  # GELU is nowhere below -0.16998


def to_token_products(model: onnx.ModelProto, names: Collection[str], *, reduced: bool) -> None:
    """Replace products with weights in a float32 graph by integer products with a scale a token, in place.

    names: nodes MatMul or Gemm that may be replaced; those without constant weights [in, out] stay as they
    are. Weights become int8, symmetric, with a scale an output. reduced: weights have 7 bits; see
    precision.needs_reduced_range. Products that read the same tensor, as queries, keys and values do, become
    one product: each operator costs some microseconds, which is much of the time of a short text.

    A token is what the last axis holds: activations are x / max|x|, in steps of 1 / 127, and the product is
    multiplied by max|x| afterwards. A token of zeros has no quotient, and its product is 0 whatever its
    integers are.
    """
    writer = _Writer(model, reduced)
    groups: dict[str, list[onnx.NodeProto]] = {}  # products by the tensor that they read
    for node in model.graph.node:
        if node.name in names and writer.weights_of(node) is not None:
            groups.setdefault(node.input[0], []).append(node)
    written = set()
    for node in list(model.graph.node):
        if node.output[0] in written:
            continue
        group = groups.get(node.input[0], []) if node.input else []
        if node in group:
            written.update(writer.replace(group))
        else:
            writer.nodes.append(node)
    writer.finish()
    keep_layer_norms(model)
    transpose_in_products(model)


def keep_layer_norms(model: onnx.ModelProto) -> None:
    """Write the sums that layer norms read as Sum instead of Add, in place; a bias joins such a sum.

    ONNX Runtime fuses Add and LayerNormalization to SkipLayerNormalization, which takes 5 to 9 times as long
    on a CPU (1.32; 243 us instead of 27 us for 128 x 384); it does not fuse Sum.
    """
    read = {node.input[0] for node in model.graph.node if node.op_type == "LayerNormalization"}
    sums = {node.output[0]: node for node in model.graph.node if node.op_type == "Add"}
    uses = Counter(name for node in model.graph.node for name in node.input)
    uses.update(output.name for output in model.graph.output)
    for name in read & sums.keys():
        node, terms = sums[name], []
        node.op_type = "Sum"
        for term in node.input:
            if term in sums and uses[term] == 1:
                terms.extend(sums[term].input)
                model.graph.node.remove(sums[term])
            else:
                terms.append(term)
        del node.input[:]
        node.input.extend(terms)


def transpose_in_products(model: onnx.ModelProto) -> None:
    """Let products of attention transpose their keys, in place; see FusedMatMul of ONNX Runtime.

    Keys [batch, tokens, heads, size] are then moved like queries, whole vectors at a time, instead of number
    by number.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    given, moved = {output.name for output in model.graph.output}, set()
    for node in model.graph.node:
        order = [list(fact.ints) for fact in node.attribute if fact.name == "perm"]
        products = readers.get(node.output[0], [])
        if node.op_type != "Transpose" or order != [[0, 2, 3, 1]] or len(products) != 1:
            continue
        if node.output[0] in given:
            continue
        if products[0].op_type == "MatMul" and products[0].input[1] == node.output[0]:
            node.attribute[0].ints[:] = [0, 2, 1, 3]
            products[0].op_type, products[0].domain = "FusedMatMul", MICROSOFT
            products[0].attribute.append(helper.make_attribute("transB", 1))
            moved.add(node.output[0])
    kept = [value for value in model.graph.value_info if value.name not in moved]  # their shapes changed
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)


def round_weights(weights: NDArray[np.float32], levels: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round weights [in, out] to integers up to +-levels; gives the integers and the scales [out]."""
    scales = np.maximum(np.abs(weights).max(axis=0), np.float32(1e-12)) / np.float32(levels)
    return np.rint(weights / scales).clip(-levels, levels).astype(np.int8), scales.astype(np.float32)


class _Writer:
    """The nodes and initializers of a graph while its products are replaced."""

    def __init__(self, model: onnx.ModelProto, reduced: bool) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._model, self._levels = model, LEVELS[reduced]
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._given = {output.name for output in model.graph.output}
        self._makers: dict[str, onnx.NodeProto] = {}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            self._makers.update(dict.fromkeys(node.output, node))
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._quantized: dict[str, tuple[str, str]] = {}  # tensor -> its integers, and its scales a token

    def weights_of(self, node: onnx.NodeProto) -> NDArray[np.float32] | None:
        """The weights [in, out] of a product; None if it has no constant ones, or is no plain product."""
        facts = {fact.name: helper.get_attribute_value(fact) for fact in node.attribute}
        plain = not facts.get("transA") and facts.get("alpha", 1.0) == facts.get("beta", 1.0) == 1.0
        stored = self._stored.get(node.input[1])
        if stored is None or not plain or len(stored.dims) != 2:
            return None
        weights = numpy_helper.to_array(stored)
        weights = weights.T if facts.get("transB") else weights
        if len(node.input) > 2 and self._bias(node.input[2], weights.shape[1]) is None:
            return None
        return weights

    def replace(self, group: Sequence[onnx.NodeProto]) -> set[str]:
        """Append the nodes that compute what a group of products of one tensor computes, with integers.

        Biases that are added to all of them are added to the one product. Gives the outputs of the nodes that
        are replaced: the products and the sums with these biases.
        """
        first = group[0]
        weights = [array for node in group if (array := self.weights_of(node)) is not None]
        rounded = [round_weights(array, self._levels) for array in weights]
        activations, magnitudes = self._quantize(first.input[0])
        inputs = [
            activations,
            self._constant(f"{first.name}_weights", np.concatenate([part[0] for part in rounded], 1)),
            self._constant("int8_one", np.float32(1)),
            self._constant(
                f"{first.name}_scales", np.concatenate([part[1] for part in rounded]) / np.float32(STEPS)
            ),
            self._constant("int8_zero", np.uint8(ZERO)),
        ]
        product, scaled = f"{first.name}_product", f"{first.name}_scaled"
        self._append("MatMulIntegerToFloat", inputs, product, first.name, domain=MICROSOFT)
        self._append("Mul", [product, magnitudes], scaled, f"{first.name}_scale")
        sums = [self._sum_with_bias(node, array.shape[1]) for node, array in zip(group, weights, strict=True)]
        biases = [bias for bias, _ in sums if bias is not None]
        outputs = [node.output[0] for node in group]
        if len(biases) == len(group):
            bias = self._constant(f"{first.name}_bias", np.concatenate(biases))
            self._append("Add", [scaled, bias], f"{first.name}_sum", f"{first.name}_bias")
            scaled, outputs = f"{first.name}_sum", [node.output[0] for _, node in sums]
        if len(group) == 1:
            self.nodes[-1].output[0] = outputs[0]
        else:
            sizes = np.array([array.shape[1] for array in weights], np.int64)
            inputs = [scaled, self._constant(f"{first.name}_sizes", sizes)]
            self.nodes.append(helper.make_node("Split", inputs, outputs, name=f"{first.name}_split", axis=-1))
        return set(outputs) | {node.output[0] for node in group}

    def finish(self) -> None:
        """Put the nodes into the graph, and remove initializers that no node reads."""
        graph = self._model.graph
        del graph.node[:]
        graph.node.extend(self.nodes)
        read = {name for node in graph.node for name in node.input}
        kept = [tensor for name, tensor in self._stored.items() if name in read]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        if MICROSOFT not in {entry.domain for entry in self._model.opset_import}:
            self._model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))

    def _bias(self, name: str, outputs: int) -> NDArray[np.float32] | None:
        """The stored bias [out] of this name; None if there is none of this size."""
        stored = self._stored.get(name)
        return None if stored is None or list(stored.dims) != [outputs] else numpy_helper.to_array(stored)

    def _sum_with_bias(
        self, product: onnx.NodeProto, outputs: int
    ) -> tuple[NDArray[np.float32] | None, onnx.NodeProto]:
        """The bias [out] that is added to a product, if any, and the node that gives the sum."""
        if len(product.input) > 2:  # a Gemm
            return self._bias(product.input[2], outputs), product
        readers = self._readers.get(product.output[0], [])
        is_read_alone = len(readers) == 1 and product.output[0] not in self._given
        if is_read_alone and readers[0].op_type == "Add":
            for name in readers[0].input:
                bias = self._bias(name, outputs)
                if bias is not None:
                    return bias, readers[0]
        return None, product

    def _quantize(self, tensor: str) -> tuple[str, str]:
        """Names of the integers of a tensor, and of each token's largest magnitude [..., 1]."""
        if tensor not in self._quantized:
            sizes, largest, share, integers = (
                f"{tensor}_{word}" for word in ("magnitudes", "largest", "share", "integers")
            )
            step = self._constant("int8_step", np.float32(1 / STEPS))
            zero = self._constant("int8_zero", np.uint8(ZERO))
            last = self._constant("int8_axis", np.array([-1], np.int64))
            if self._is_gelu(tensor):  # widest tensor of a block: a small operator instead of a pass over it
                lowest = self._constant("int8_gelu_depth", np.float32(GELU_DEPTH))
                self._append("ReduceMax", [tensor, last], sizes)
                self._append("Max", [sizes, lowest], largest)
            else:
                self._append("Abs", [tensor], sizes)
                self._append("ReduceMax", [sizes, last], largest)
            self._append("Div", [tensor, largest], share)
            self._append("QuantizeLinear", [share, step, zero], integers)
            self._quantized[tensor] = integers, largest
        return self._quantized[tensor]

    def _is_gelu(self, tensor: str) -> bool:
        """Whether a tensor is (x * (1 + erf(x / sqrt 2))) * 0.5, as rewrite.GeluHalfLast writes it."""
        nodes = []
        for kind, at in (("Mul", 0), ("Mul", 1), ("Add", 0), ("Erf", 0), ("Div", 0)):
            node = self._makers.get(tensor)
            if node is None or node.op_type != kind:
                return False
            nodes.append(node)
            tensor = node.input[at]
        return bool(tensor == nodes[1].input[0])

    def _append(
        self, operator: str, inputs: Sequence[str], output: str, name: str | None = None, domain: str = ""
    ) -> None:
        self.nodes.append(helper.make_node(operator, inputs, [output], name or output, domain=domain))

    def _constant(self, name: str, value: NDArray[np.generic] | np.generic) -> str:
        if name not in self._stored:
            self._stored[name] = numpy_helper.from_array(
                np.ascontiguousarray(value).reshape(value.shape), name
            )
        return name
