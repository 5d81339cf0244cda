"""Convert some nodes of a graph to float16, with one Cast for each tensor that crosses to or from float32.

convert_float_to_float16 of ONNX Runtime rounds the weights of every node, and surrounds each node that is to
stay in float32 with casts: seventy in a segment, in an order that no engine fuses.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnxscript import ir

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def convert_nodes_to_fp16(model: onnx.ModelProto, inside: Callable[[str], bool]) -> onnx.ModelProto:
    """Convert the nodes for whose name `inside` is true to float16, with casts around them.

    The model's inputs and outputs keep their types.

    Tensors need the types that shape inference adds: one without a type is not treated as a float.
    """
    converted = ir.from_proto(model)
    graph = converted.graph
    nodes = {node: None for node in graph if inside(node.name or "")}  # a set that keeps its order
    halves: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        for number, value in enumerate(node.inputs):
            if value is None or value.dtype != FLOAT or value.producer() in nodes:
                continue
            if value not in halves:
                halves[value] = _narrow(graph, value, node)
            node.replace_input_with(number, halves[value])
    for value in halves:
        if value.is_initializer() and not value.uses():
            del graph.initializers[str(value.name)]
    for node in nodes:
        _halve_attributes(node)
        for value in node.outputs:
            if value.dtype == FLOAT:
                value.dtype = HALF
                _widen(graph, value, nodes)
    return ir.to_proto(converted)


def _narrow(graph: ir.Graph, value: ir.Value, reader: ir.Node) -> ir.Value:
    """The float16 form of a value from outside: a rounded weight, or a Cast before the first reader."""
    name = f"{value.name}_half"
    if value.is_initializer() and value.const_value is not None:
        rounded = _rounded(value.const_value, name)
        weight = ir.Value(name=name, type=ir.TensorType(HALF), shape=value.shape, const_value=rounded)
        graph.register_initializer(weight)
        return weight
    cast = _cast(value, name, HALF)
    graph.insert_before(reader, cast)
    return cast.outputs[0]


def _widen(graph: ir.Graph, value: ir.Value, nodes: dict[ir.Node, None]) -> None:
    """Insert a Cast back for readers outside and for the graph's output; it has the value's former name."""
    readers = [use for use in value.uses() if use.node not in nodes]
    if not readers and value not in graph.outputs:
        return
    producer, name = value.producer(), str(value.name)
    assert producer is not None
    value.name = f"{name}_half"
    cast = _cast(value, name, FLOAT)
    graph.insert_after(producer, cast)
    for use in readers:
        use.node.replace_input_with(use.idx, cast.outputs[0])
    for number, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[number] = cast.outputs[0]


def _cast(value: ir.Value, name: str, to: ir.DataType) -> ir.Node:
    output = ir.Value(name=name, type=ir.TensorType(to), shape=value.shape)
    return ir.Node("", "Cast", [value], [ir.AttrInt64("to", to)], outputs=[output], name=f"Cast_{name}")


def _halve_attributes(node: ir.Node) -> None:
    """Convert the types in a node's attributes: constants, and casts to float32."""
    for attribute in list(node.attributes.values()):
        if node.op_type == "Cast" and attribute.name == "to" and attribute.as_int() == FLOAT:
            node.attributes.add(ir.AttrInt64("to", HALF))
        elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == FLOAT:
            node.attributes.add(ir.AttrTensor(attribute.name, _rounded(attribute.as_tensor())))


def _rounded(tensor: ir.TensorProtocol, name: str | None = None) -> ir.TensorProtocol:
    """Round a tensor to float16 and keep it finite: if a mask is float32's least number, -inf makes NaN."""
    largest = np.float32(np.finfo(np.float16).max)
    return ir.tensor(tensor.numpy().clip(-largest, largest).astype(np.float16), name=name)
