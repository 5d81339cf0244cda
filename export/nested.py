"""Join all segments into one graph with exits inside: an If after every exit, with the rest as else branch.

This is the single-file baseline of a walk. It is joined from the segments' own graphs, so it computes what
the walk computes. An If has one condition for all rows, so it takes one row at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from offramp.export.to_onnx import OPSET
from offramp.runtime.bundle.manifest import NEXT

LOGITS, GATE, EXIT, THRESHOLD = "logits", "gate", "exit", "threshold"
MAX_DEPTH = 30  # every If is three messages deeper (node, attribute, graph), and protobuf reads at most 100


def nest_segments(stem: Path, segments: Sequence[Path]) -> onnx.ModelProto:
    """Join the graphs of stem and segments into one model with exits inside.

    Inputs: those of the stem, [1, seq], and threshold []. Outputs: logits [1, classes] and exit [1]. stem,
    segments: fp32 graphs as to_onnx wrote them, in walking order. A row exits at the first exit whose gate is
    above the threshold or, where segments have no policy, whose top probability reaches it; exit is its
    1-based number. Raises ValueError if nothing computes an input of a segment, and for more than MAX_DEPTH
    segments.
    """
    if len(segments) > MAX_DEPTH:
        raise ValueError(f"{len(segments)} segments cannot be nested, only {MAX_DEPTH}; keep fewer exits")
    model = helper.make_model(
        onnx.GraphProto(name="nested"), opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10
    )
    graph = model.graph  # filled in place: a copy at every level would copy all weights below it each time
    source = onnx.load(stem).graph
    graph.input.extend(_for_one_row(entry) for entry in source.input)
    graph.input.append(helper.make_tensor_value_info(THRESHOLD, TensorProto.FLOAT, []))
    values = _insert(graph, source, "stem.", {entry.name: entry.name for entry in source.input})
    del source  # its weights are in the graph now
    result = _add_segments(graph, segments, 0, values)
    graph.node.extend(_copies((result.logits, result.exit), (LOGITS, EXIT)))
    graph.output.extend(_outputs(LOGITS, EXIT, result.classes))
    onnx.checker.check_model(model, full_check=True)
    return model


@dataclass(frozen=True)
class _Result:
    """The names of a graph's logits and exit number, and the number of classes."""

    logits: str
    exit: str
    classes: int


def _insert(
    graph: onnx.GraphProto, source: onnx.GraphProto, prefix: str, inputs: Mapping[str, str]
) -> dict[str, str]:
    """Move `source` into `graph`, with a prefix on its names, and return the new names of its outputs.

    Its inputs are read under the names in `inputs`. `source` cannot be used afterwards.

    Shapes are kept (with their free sizes): without them ONNX Runtime fuses less in a branch, and the
    baseline would be slower than necessary.
    """
    missing = [entry.name for entry in source.input if entry.name not in inputs]
    if missing:
        raise ValueError(f"{prefix[:-1]}: nothing before it computes its input {missing[0]!r}")
    names = {entry.name: inputs[entry.name] for entry in source.input}

    def renamed(name: str) -> str:
        return names.get(name, prefix + name) if name else ""  # "": an optional input that is left out

    outputs = {entry.name.removeprefix(NEXT): renamed(entry.name) for entry in source.output}
    for node in source.node:
        node.name = (
            prefix + node.name if node.name else ""
        )  # the prefix alone would be the name of many nodes
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
    for entry in (*source.initializer, *source.value_info, *source.output):
        entry.name = renamed(entry.name)
    graph.node.extend(source.node)
    graph.initializer.extend(source.initializer)
    graph.value_info.extend((*source.value_info, *source.output))
    return outputs


def _add_segments(
    graph: onnx.GraphProto, segments: Sequence[Path], number: int, values: Mapping[str, str]
) -> _Result:
    """Insert segment `number` (0-based) into `graph`, and after it an If with the later ones.

    values: the names of what was computed so far.
    """
    prefix = f"segment_{number:02}."
    source = onnx.load(segments[number]).graph
    (entry,) = [output for output in source.output if output.name == LOGITS]
    classes = entry.type.tensor_type.shape.dim[-1].dim_value
    outputs = _insert(graph, source, prefix, values)
    del source, entry  # before the recursion: its weights are in `graph` now
    logits, exit = outputs[LOGITS], f"{prefix}{EXIT}"
    graph.initializer.append(numpy_helper.from_array(np.array([number + 1], np.int64), exit))
    if number + 1 == len(segments):
        return _Result(logits, exit, classes)
    nodes, constants = _exit_test(outputs, prefix)
    graph.node.extend(nodes)
    graph.initializer.extend(constants)
    leave = f"{prefix}leave.{LOGITS}", f"{prefix}leave.{EXIT}"
    stay = f"{prefix}stay.{LOGITS}", f"{prefix}stay.{EXIT}"
    result = f"{prefix}result.{LOGITS}", f"{prefix}result.{EXIT}"
    branch = graph.node.add(op_type="If", name=f"{prefix}If", input=[f"{prefix}leaves"], output=result)
    rest = branch.attribute.add(name="else_branch", type=onnx.AttributeProto.GRAPH).g
    rest.name = f"{prefix}stay"
    later = _add_segments(rest, segments, number + 1, {**values, **outputs})
    rest.node.extend(_copies((later.logits, later.exit), stay))
    rest.output.extend(_outputs(*stay, classes))
    exited = helper.make_graph(
        _copies((logits, exit), leave), f"{prefix}leave", [], _outputs(*leave, classes)
    )
    branch.attribute.append(helper.make_attribute("then_branch", exited))
    return _Result(*result, classes)


def _exit_test(outputs: Mapping[str, str], prefix: str) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """Nodes that compute whether the row exits, and their constants.

    They compute what the runtime's rules gate and max_probability do.
    """
    leaves = f"{prefix}leaves"
    if GATE in outputs:
        return [helper.make_node("Greater", [outputs[GATE], THRESHOLD], [leaves])], []
    axes = numpy_helper.from_array(np.array([-1], np.int64), f"{prefix}axes")
    nodes = [
        helper.make_node("Softmax", [outputs[LOGITS]], [f"{prefix}probabilities"], axis=-1),
        helper.make_node("ReduceMax", [f"{prefix}probabilities", axes.name], [f"{prefix}top"], keepdims=0),
        helper.make_node("GreaterOrEqual", [f"{prefix}top", THRESHOLD], [leaves]),
    ]
    return nodes, [axes]


def _copies(names: Sequence[str], targets: Sequence[str]) -> list[onnx.NodeProto]:
    pairs = zip(names, targets, strict=True)
    return [helper.make_node("Identity", [name], [target]) for name, target in pairs]


def _outputs(logits: str, exit: str, classes: int) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(logits, TensorProto.FLOAT, [1, classes]),
        helper.make_tensor_value_info(exit, TensorProto.INT64, [1]),
    ]


def _for_one_row(entry: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """An input of the stem with a batch of 1."""
    info = onnx.ValueInfoProto()
    info.CopyFrom(entry)
    info.type.tensor_type.shape.dim[0].Clear()
    info.type.tensor_type.shape.dim[0].dim_value = 1
    return info
