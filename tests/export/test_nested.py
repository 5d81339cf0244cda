"""The nested graph: the segments' outputs, and the exits of the runtime's rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from onnx import TensorProto, helper

from offramp.export import nested
from offramp.export.classifier import split_classifier
from offramp.export.nested import nest_segments
from offramp.export.to_onnx import to_onnx
from offramp.runtime.bundle.manifest import NEXT
from offramp.runtime.rules import RuleSpec, bind, simulate


def files(export: Any) -> list[Path]:
    return [export.folder / f"{segment.name}.onnx" for segment in export.segments]


def walk(paths: list[Path], open_graph: Callable[[Path], Any], inputs: dict[str, np.ndarray]) -> list[dict]:
    """The outputs of every segment for one row, in fp32 on ONNX Runtime."""
    values, outputs = dict(inputs), []
    for path in paths:
        session = open_graph(path)
        names = [node.name for node in session.get_outputs()]
        arrays = session.run(names, {node.name: values[node.name] for node in session.get_inputs()})
        out = dict(zip(names, arrays, strict=True))
        values |= {name.removeprefix(NEXT): value for name, value in out.items()}
        outputs.append(out)
    return outputs[1:]


def nest(paths: list[Path]) -> onnx.ModelProto:
    """The graphs of stem and segments as one model, each segment of one graph."""
    return nest_segments(paths[0], [[path] for path in paths[1:]])


def rows(family: str, count: int) -> list[dict[str, np.ndarray]]:
    whole = {name: value.numpy() for name, value in tiny.inputs(family, rows=count).items()}
    return [{name: value[at : at + 1] for name, value in whole.items()} for at in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.with_slow(["bert", "mpnet"], "bert"))
def test_rows_exit_where_the_walk_exits_with_its_logits(
    family: str, exported: Callable[[str], Any], open_graph: Callable[[Path], Any], tmp_path: Path
) -> None:
    paths = files(exported(family))
    onnx.save(nest(paths), tmp_path / "nested.onnx")
    session = open_graph(tmp_path / "nested.onnx")
    names = [node.name for node in session.get_inputs()]
    for inputs in rows(family, 4):
        outputs = walk(paths, open_graph, inputs)
        gates = [float(out["gate"][0]) for out in outputs[:-1]]
        # Not the gates themselves: two graphs may differ in a gate's last bit, and on some CPUs do.
        for threshold in (0.0, *(gate + 1e-6 for gate in gates), *(gate - 1e-6 for gate in gates), 2.0):
            feed = {**inputs, "threshold": np.array(threshold, np.float32)}
            logits, exit = session.run(["logits", "exit"], {name: feed[name] for name in names})
            table = np.stack([out["logits"] for out in outputs], 1)
            rule = bind(RuleSpec("gate", {"threshold": float(np.float32(threshold))}), len(outputs))
            expected = simulate(rule, table, np.array([gates], np.float32))[0]
            assert exit.tolist() == [expected + 1]
            np.testing.assert_allclose(logits, outputs[expected]["logits"], atol=1e-6)


@pytest.mark.slow
def test_without_policies_the_top_probability_decides(
    open_graph: Callable[[Path], Any], tmp_path: Path
) -> None:
    paths = []
    for segment in split_classifier(tiny.network(policy=None)):
        paths.append(tmp_path / f"{segment.name}.onnx")
        to_onnx(segment, paths[-1])
    onnx.save(nest(paths), tmp_path / "nested.onnx")
    session = open_graph(tmp_path / "nested.onnx")
    inputs = rows("bert", 1)[0]
    table = np.stack([out["logits"] for out in walk(paths, open_graph, inputs)], 1)
    top = torch.softmax(torch.from_numpy(table), -1).amax(-1)[0].tolist()
    for threshold in (0.0, top[0] - 1e-4, top[0] + 1e-4, 2.0):
        feed = {**inputs, "threshold": np.array(threshold, np.float32)}
        exit = session.run(["exit"], {node.name: feed[node.name] for node in session.get_inputs()})[0]
        rule = bind(RuleSpec("max_probability", {"threshold": threshold}), table.shape[1])
        assert exit[0] == simulate(rule, table, None)[0] + 1


def test_an_input_that_nothing_computes_is_named(exported: Callable[[str], Any], tmp_path: Path) -> None:
    paths = files(exported("bert"))
    model = onnx.load(paths[1])
    model.graph.input.append(helper.make_tensor_value_info("memory", TensorProto.FLOAT, ["batch"]))
    onnx.save(model, tmp_path / "segment_00.onnx")
    with pytest.raises(ValueError, match=r"segment_00.*'memory'"):
        nest_segments(paths[0], [[tmp_path / "segment_00.onnx"], *([path] for path in paths[2:])])


def nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """All nodes of a graph, those inside its branches too."""
    inside = [part for node in graph.node for a in node.attribute if a.HasField("g") for part in nodes(a.g)]
    return [*graph.node, *inside]


def test_nodes_without_a_name_get_none(exported: Callable[[str], Any], tmp_path: Path) -> None:
    paths = []
    for file in files(exported("bert")):
        model = onnx.load(file)
        for node in model.graph.node:
            node.name = ""
        paths.append(tmp_path / file.name)
        onnx.save(model, paths[-1])
    assert {node.name for node in nodes(nest(paths).graph)} == {"", "segment_00.If"}


def test_weights_are_copied_once(exported: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    held = []  # by the graphs that are copied into an attribute or a model
    copied = nested.helper.make_graph

    def make(*parts: Any, **named: Any) -> onnx.GraphProto:
        held.append(copied(*parts, **named))
        return held[-1]

    monkeypatch.setattr(nested.helper, "make_graph", make)
    paths = files(exported("bert"))
    model = nest(paths)
    assert [len(graph.initializer) for graph in held] == [0] * len(held)
    (branch,) = [node for node in model.graph.node if node.op_type == "If"]
    inside = {a.name: len(a.g.initializer) for a in branch.attribute}
    assert inside == {"then_branch": 0, "else_branch": len(onnx.load(paths[2]).graph.initializer) + 1}
