"""All segments in one graph with exits inside: an If after every exit, whose other branch is the rest.

The honest single-file rival of a walk. It is put together from the segments' own graphs, so that it computes
what the walk computes; an If has one condition for all rows, so it takes one row at a time.
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
DEEPEST = 30  # every If is three messages deeper (node, attribute, graph), and protobuf reads 100 at most


def nest(stem: Path, segments: Sequence[Path]) -> onnx.ModelProto:
    """One model: inputs as the stem's, [1, seq], and threshold []; outputs logits [1, classes], exit [1].

    stem, segments: fp32 graphs as to_onnx wrote them, in walking order. A row leaves at the first exit whose
    gate is above the threshold or, where segments have no policy, whose top probability reaches it; exit is
    its 1-based number. Raises ValueError where an input of a segment comes from nowhere, and for more than
    DEEPEST segments.
    """
    if len(segments) > DEEPEST:
        raise ValueError(f"{len(segments)} segments cannot be nested, only {DEEPEST}; keep fewer exits")
    model = helper.make_model(
        onnx.GraphProto(name="nested"), opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10
    )
    graph = model.graph  # filled where it stands: a copy a level would copy all weights behind it each time
    source = onnx.load(stem).graph
    graph.input.extend(_row(entry) for entry in source.input)
    graph.input.append(helper.make_tensor_value_info(THRESHOLD, TensorProto.FLOAT, []))
    made = _place(graph, source, "stem.", {entry.name: entry.name for entry in source.input})
    del source  # its weights are in the graph by now
    found = _fill(graph, segments, 0, made)
    graph.node.extend(_copies((found.logits, found.exit), (LOGITS, EXIT)))
    graph.output.extend(_outputs(LOGITS, EXIT, found.classes))
    onnx.checker.check_model(model, full_check=True)
    return model


@dataclass(frozen=True)
class _Found:
    """What a graph knows at its end: the names of logits and exit number, and how many classes there are."""

    logits: str
    exit: str
    classes: int


def _place(
    graph: onnx.GraphProto, source: onnx.GraphProto, prefix: str, given: Mapping[str, str]
) -> dict[str, str]:
    """Put the parts of `source` into `graph`, every name of its own prefixed, its inputs read under the names
    in `given`; gives what it puts out, by the name that readers know. `source` is renamed and of no more use.

    Shapes are kept (with their free sizes): without them ONNX Runtime fuses less in a branch, and the rival
    would be slower than it has to be.
    """
    missing = [entry.name for entry in source.input if entry.name not in given]
    if missing:
        raise ValueError(f"{prefix[:-1]}: nothing before it makes its input {missing[0]!r}")
    names = {entry.name: given[entry.name] for entry in source.input}

    def named(name: str) -> str:
        return names.get(name, prefix + name) if name else ""  # "": an input that is left out

    made = {entry.name.removeprefix(NEXT): named(entry.name) for entry in source.output}
    for node in source.node:
        node.name = prefix + node.name if node.name else ""  # a bare prefix would name many nodes alike
        node.input[:] = [named(name) for name in node.input]
        node.output[:] = [named(name) for name in node.output]
    for part in (*source.initializer, *source.value_info, *source.output):
        part.name = named(part.name)
    graph.node.extend(source.node)
    graph.initializer.extend(source.initializer)
    graph.value_info.extend((*source.value_info, *source.output))
    return made


def _fill(graph: onnx.GraphProto, segments: Sequence[Path], at: int, known: Mapping[str, str]) -> _Found:
    """Put segment number `at` (0-based), and behind an If those after it, into `graph`; known: values by name
    so far.
    """
    prefix = f"segment_{at:02}."
    source = onnx.load(segments[at]).graph
    (said,) = [entry for entry in source.output if entry.name == LOGITS]
    classes = said.type.tensor_type.shape.dim[-1].dim_value
    made = _place(graph, source, prefix, known)
    del source, said  # not kept until all behind it is there: its weights are in `graph` by now
    logits, number = made[LOGITS], f"{prefix}{EXIT}"
    graph.initializer.append(numpy_helper.from_array(np.array([at + 1], np.int64), number))
    if at + 1 == len(segments):
        return _Found(logits, number, classes)
    nodes, constants = _question(made, prefix)
    graph.node.extend(nodes)
    graph.initializer.extend(constants)
    leave = f"{prefix}leave.{LOGITS}", f"{prefix}leave.{EXIT}"
    stay = f"{prefix}stay.{LOGITS}", f"{prefix}stay.{EXIT}"
    found = f"{prefix}found.{LOGITS}", f"{prefix}found.{EXIT}"
    branch = graph.node.add(op_type="If", name=f"{prefix}If", input=[f"{prefix}leaves"], output=found)
    behind = branch.attribute.add(name="else_branch", type=onnx.AttributeProto.GRAPH).g
    behind.name = f"{prefix}stay"
    rest = _fill(behind, segments, at + 1, {**known, **made})
    behind.node.extend(_copies((rest.logits, rest.exit), stay))
    behind.output.extend(_outputs(*stay, classes))
    left = helper.make_graph(
        _copies((logits, number), leave), f"{prefix}leave", [], _outputs(*leave, classes)
    )
    branch.attribute.append(helper.make_attribute("then_branch", left))
    return _Found(*found, classes)


def _question(made: Mapping[str, str], prefix: str) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """Nodes that say whether the row leaves, and their constants: the runtime's rules gate and
    max_probability.
    """
    answer = f"{prefix}leaves"
    if GATE in made:
        return [helper.make_node("Greater", [made[GATE], THRESHOLD], [answer])], []
    axes = numpy_helper.from_array(np.array([-1], np.int64), f"{prefix}axes")
    nodes = [
        helper.make_node("Softmax", [made[LOGITS]], [f"{prefix}probabilities"], axis=-1),
        helper.make_node("ReduceMax", [f"{prefix}probabilities", axes.name], [f"{prefix}top"], keepdims=0),
        helper.make_node("GreaterOrEqual", [f"{prefix}top", THRESHOLD], [answer]),
    ]
    return nodes, [axes]


def _copies(names: Sequence[str], ends: Sequence[str]) -> list[onnx.NodeProto]:
    return [helper.make_node("Identity", [name], [end]) for name, end in zip(names, ends, strict=True)]


def _outputs(logits: str, number: str, classes: int) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(logits, TensorProto.FLOAT, [1, classes]),
        helper.make_tensor_value_info(number, TensorProto.INT64, [1]),
    ]


def _row(entry: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """An input of the stem for one row alone."""
    info = onnx.ValueInfoProto()
    info.CopyFrom(entry)
    info.type.tensor_type.shape.dim[0].Clear()
    info.type.tensor_type.shape.dim[0].dim_value = 1
    return info
