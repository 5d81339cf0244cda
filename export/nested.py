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
from offramp.runtime.manifest import NEXT

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
    graphs = [onnx.load(file).graph for file in (stem, *segments)]
    first = _placed(graphs[0], "stem.", {entry.name: entry.name for entry in graphs[0].input})
    rest = _rest(graphs[1:], 0, first.made)
    inputs = [_row(entry) for entry in graphs[0].input]
    inputs.append(helper.make_tensor_value_info(THRESHOLD, TensorProto.FLOAT, []))
    nodes = [*first.nodes, *rest.nodes]
    nodes += [helper.make_node("Identity", [rest.logits], [LOGITS])]
    nodes += [helper.make_node("Identity", [rest.exit], [EXIT])]
    graph = helper.make_graph(
        nodes,
        "nested",
        inputs,
        _outputs(graphs[1], LOGITS, EXIT),
        [*first.weights, *rest.weights],
        value_info=[*first.shapes, *rest.shapes],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


@dataclass(frozen=True)
class _Placed:
    """A graph's parts under names of their own; made: what it puts out, by the name that readers know.

    shapes are kept (with their free sizes): without them ONNX Runtime fuses less in a branch, and the rival
    would be slower than it has to be.
    """

    nodes: list[onnx.NodeProto]
    weights: list[TensorProto]
    shapes: list[onnx.ValueInfoProto]
    made: dict[str, str]


@dataclass(frozen=True)
class _Rest:
    """Segments from one on, nested: parts, and the names of logits and exit number."""

    nodes: list[onnx.NodeProto]
    weights: list[TensorProto]
    shapes: list[onnx.ValueInfoProto]
    logits: str
    exit: str


def _placed(graph: onnx.GraphProto, prefix: str, given: Mapping[str, str]) -> _Placed:
    """A graph with every name of its own prefixed and its inputs read under the names in `given`."""
    missing = [entry.name for entry in graph.input if entry.name not in given]
    if missing:
        raise ValueError(f"{prefix[:-1]}: nothing before it makes its input {missing[0]!r}")
    names = {entry.name: given[entry.name] for entry in graph.input}

    def named(name: str) -> str:
        return names.get(name, prefix + name) if name else ""  # "": an input that is left out

    nodes, weights, shapes = [], [], []
    for node in graph.node:
        new = onnx.NodeProto()
        new.CopyFrom(node)
        new.name = prefix + node.name
        new.input[:] = [named(name) for name in node.input]
        new.output[:] = [named(name) for name in node.output]
        nodes.append(new)
    for weight in graph.initializer:
        tensor = TensorProto()
        tensor.CopyFrom(weight)
        tensor.name = named(weight.name)
        weights.append(tensor)
    for value in (*graph.value_info, *graph.output):
        info = onnx.ValueInfoProto()
        info.CopyFrom(value)
        info.name = named(value.name)
        shapes.append(info)
    made = {entry.name.removeprefix(NEXT): named(entry.name) for entry in graph.output}
    return _Placed(nodes, weights, shapes, made)


def _rest(graphs: Sequence[onnx.GraphProto], at: int, known: Mapping[str, str]) -> _Rest:
    """Segment number `at` (0-based), and behind an If those after it; known: values by name so far."""
    prefix = f"segment_{at:02}."
    here = _placed(graphs[at], prefix, known)
    logits, number = here.made[LOGITS], f"{prefix}{EXIT}"
    count = numpy_helper.from_array(np.array([at + 1], np.int64), number)
    if at + 1 == len(graphs):
        return _Rest(here.nodes, [*here.weights, count], here.shapes, logits, number)
    rest = _rest(graphs, at + 1, {**known, **here.made})
    asked, constants = _question(here.made, prefix)
    leave = f"{prefix}leave.{LOGITS}", f"{prefix}leave.{EXIT}"
    stay = f"{prefix}stay.{LOGITS}", f"{prefix}stay.{EXIT}"
    found = f"{prefix}found.{LOGITS}", f"{prefix}found.{EXIT}"
    left = helper.make_graph(
        _copies((logits, number), leave), f"{prefix}leave", [], _outputs(graphs[at], *leave)
    )
    stayed = helper.make_graph(
        [*rest.nodes, *_copies((rest.logits, rest.exit), stay)],
        f"{prefix}stay",
        [],
        _outputs(graphs[at], *stay),
        rest.weights,
        value_info=rest.shapes,
    )
    branch = helper.make_node(
        "If", [f"{prefix}leaves"], list(found), name=f"{prefix}If", then_branch=left, else_branch=stayed
    )
    nodes, weights = [*here.nodes, *asked, branch], [*here.weights, count, *constants]
    return _Rest(nodes, weights, here.shapes, *found)


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


def _outputs(graph: onnx.GraphProto, logits: str, number: str) -> list[onnx.ValueInfoProto]:
    (known,) = [entry for entry in graph.output if entry.name == LOGITS]
    classes = known.type.tensor_type.shape.dim[-1].dim_value
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
