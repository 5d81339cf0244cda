"""Some nodes of a graph from float32 into float16, with one Cast a tensor where float32 meets them.

convert_float_to_float16 of ONNX Runtime rounds the weights of every node, and puts those that are to stay in
float32 between casts of their own: seventy in a segment, in an order that no engine reads.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnxscript import ir

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def halve(model: onnx.ModelProto, inside: Callable[[str], bool]) -> onnx.ModelProto:
    """The model with the nodes whose name is `inside` in float16; its inputs and outputs stay as they are.

    Tensors need types, as shape inference gives them: what has none is taken for no float.
    """
    made = ir.from_proto(model)
    graph = made.graph
    nodes = {node: None for node in graph if inside(node.name or "")}  # a set that keeps its order
    halves: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        for at, value in enumerate(node.inputs):
            if value is None or value.dtype != FLOAT or value.producer() in nodes:
                continue
            if value not in halves:
                halves[value] = _narrow(graph, value, node)
            node.replace_input_with(at, halves[value])
    for value in halves:
        if value.is_initializer() and not value.uses():
            del graph.initializers[str(value.name)]
    for node in nodes:
        _halve_attributes(node)
        for value in node.outputs:
            if value.dtype == FLOAT:
                value.dtype = HALF
                _widen(graph, value, nodes)
    return ir.to_proto(made)


def _narrow(graph: ir.Graph, value: ir.Value, reader: ir.Node) -> ir.Value:
    """The float16 form of what comes from outside: a rounded weight, or a Cast before the first reader."""
    name = f"{value.name}_half"
    if value.is_initializer() and value.const_value is not None:
        held = _rounded(value.const_value, name)
        made = ir.Value(name=name, type=ir.TensorType(HALF), shape=value.shape, const_value=held)
        graph.register_initializer(made)
        return made
    cast = _cast(value, name, HALF)
    graph.insert_before(reader, cast)
    return cast.outputs[0]


def _widen(graph: ir.Graph, value: ir.Value, nodes: dict[ir.Node, None]) -> None:
    """A Cast back for readers outside and for the graph's output, under the name that they know."""
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
    for at, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[at] = cast.outputs[0]


def _cast(value: ir.Value, name: str, to: ir.DataType) -> ir.Node:
    out = ir.Value(name=name, type=ir.TensorType(to), shape=value.shape)
    return ir.Node("", "Cast", [value], [ir.AttrInt64("to", to)], outputs=[out], name=f"Cast_{name}")


def _halve_attributes(node: ir.Node) -> None:
    """What a node says of types itself: constants, and casts to float32."""
    for attribute in list(node.attributes.values()):
        if node.op_type == "Cast" and attribute.name == "to" and attribute.as_int() == FLOAT:
            node.attributes.add(ir.AttrInt64("to", HALF))
        elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == FLOAT:
            node.attributes.add(ir.AttrTensor(attribute.name, _rounded(attribute.as_tensor())))


def _rounded(held: ir.TensorProtocol, name: str | None = None) -> ir.TensorProtocol:
    """In float16, and nothing infinite: where float32's least number masks, -inf would make softmax NaN."""
    most = np.float32(np.finfo(np.float16).max)
    return ir.tensor(held.numpy().clip(-most, most).astype(np.float16), name=name)
