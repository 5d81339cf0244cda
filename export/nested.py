"""Join all segments into one graph with exits inside: an If after every exit, with the rest as else branch.

This is the single-file baseline of a walk. It is joined from the segments' own graphs, so it computes what
the walk computes. An If has one condition for all rows, so it takes one row at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from offramp.export.to_onnx import OPSET
from offramp.runtime.bundle.manifest import NEXT, Manifest

LOGITS, GATE, ANSWER, EXIT, THRESHOLD = "logits", "gate", "answer", "exit", "threshold"
MAX_DEPTH = 30  # every If is three messages deeper (node, attribute, graph), and protobuf reads at most 100


def nest_segments(stem: Path, segments: Sequence[Sequence[Path]]) -> onnx.ModelProto:
    """Join the graphs of stem and segments into one model with exits inside.

    Inputs: those of the stem, [1, seq], and threshold []. Outputs: logits [1, classes] or, if segments have
    one, the answer of one row, and exit [1]. stem, segments: fp32 graphs as to_onnx wrote them, in walking
    order, for each segment those that it runs one after another. A row exits at the first exit whose gate is
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
    graph.node.extend(_copies((result.answer, result.exit), (result.name, EXIT)))
    graph.output.extend(_outputs(result.name, EXIT, result.shape))
    onnx.checker.check_model(model, full_check=True)
    return model


@dataclass(frozen=True)
class _Result:
    """The names of a graph's answer, as a segment has it and as it is here, and exit number; its shape."""

    name: str
    answer: str
    exit: str
    shape: list[int | str]


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
    graph: onnx.GraphProto, segments: Sequence[Sequence[Path]], number: int, values: Mapping[str, str]
) -> _Result:
    """Insert segment `number` (0-based) into `graph`, and after it an If with the later ones.

    values: the names of what was computed so far.
    """
    prefix = f"segment_{number:02}."
    *before, last = segments[number]
    for at, file in enumerate(before):
        values = {**values, **_insert(graph, onnx.load(file).graph, f"{prefix}before_{at}.", values)}
    source = onnx.load(last).graph
    given = {output.name: output for output in source.output}
    name = answer_of(given)
    shape = _row_shape(given[name])
    outputs = _insert(graph, source, prefix, values)
    del source, given  # before the recursion: its weights are in `graph` now
    answer, exit = outputs[name], f"{prefix}{EXIT}"
    graph.initializer.append(numpy_helper.from_array(np.array([number + 1], np.int64), exit))
    if number + 1 == len(segments):
        return _Result(name, answer, exit, shape)
    nodes, constants = _exit_test(outputs, prefix)
    graph.node.extend(nodes)
    graph.initializer.extend(constants)
    leave = f"{prefix}leave.{name}", f"{prefix}leave.{EXIT}"
    stay = f"{prefix}stay.{name}", f"{prefix}stay.{EXIT}"
    result = f"{prefix}result.{name}", f"{prefix}result.{EXIT}"
    branch = graph.node.add(op_type="If", name=f"{prefix}If", input=[f"{prefix}leaves"], output=result)
    rest = branch.attribute.add(name="else_branch", type=onnx.AttributeProto.GRAPH).g
    rest.name = f"{prefix}stay"
    later = _add_segments(rest, segments, number + 1, {**values, **outputs})
    rest.node.extend(_copies((later.answer, later.exit), stay))
    rest.output.extend(_outputs(*stay, shape))
    exited = helper.make_graph(_copies((answer, exit), leave), f"{prefix}leave", [], _outputs(*leave, shape))
    branch.attribute.append(helper.make_attribute("then_branch", exited))
    return _Result(name, *result, shape)


def answer_of(outputs: Collection[str]) -> str:
    """The name of the output that holds a row's answer, among the outputs of a segment."""
    return ANSWER if ANSWER in outputs else LOGITS


def can_nest(manifest: Manifest) -> bool:
    """Whether a bundle's segments can be nested: an exit has to give what an If can test."""
    names = {tensor.name for tensor in manifest.segments[0].first_graph.outputs}
    return len(manifest.segments) > 1 and bool({GATE, LOGITS} & names)


def _row_shape(entry: onnx.ValueInfoProto) -> list[int | str]:
    """The shape of an output for one row."""
    rest = entry.type.tensor_type.shape.dim[1:]
    return [1, *(dim.dim_value or dim.dim_param for dim in rest)]


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


def _outputs(answer: str, exit: str, shape: Sequence[int | str]) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(answer, TensorProto.FLOAT, shape),
        helper.make_tensor_value_info(exit, TensorProto.INT64, [1]),
    ]


def _for_one_row(entry: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """An input of the stem with a batch of 1."""
    info = onnx.ValueInfoProto()
    info.CopyFrom(entry)
    info.type.tensor_type.shape.dim[0].Clear()
    info.type.tensor_type.shape.dim[0].dim_value = 1
    return info
