"""The rival graph: no exits, same answers. Exported for real in test_cli."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import tiny
import torch

from offramp.export import monolith
from offramp.export.split import Segment
from offramp.models.macs import segment_macs


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_the_module_says_what_the_last_exit_says(family: str) -> None:
    network, given = tiny.network(family), tiny.inputs(family)
    whole = monolith.monolith(network)
    with torch.no_grad():
        logits = whole.module(*(given[tensor.name] for tensor in whole.inputs))[0]
        torch.testing.assert_close(logits, network(given).logits[:, -1], atol=1e-5, rtol=0)
    assert [tensor.name for tensor in whole.outputs] == ["logits"] and whole.blocks == (1, 2, 3)


@pytest.mark.parametrize("policy", ["statistics", "state", None])
def test_with_exits_it_says_what_every_exit_says(policy: str | None) -> None:
    network, given = tiny.network(policy=policy), tiny.inputs()
    whole = monolith.monolith(network, exits=True)
    with torch.no_grad():
        made = whole.module(*(given[tensor.name] for tensor in whole.inputs))
        expected = network(given)
    torch.testing.assert_close(made[0], expected.logits, atol=1e-5, rtol=0)
    assert [tensor.name for tensor in whole.outputs] == (["logits", "gates"] if policy else ["logits"])
    if policy:
        torch.testing.assert_close(made[1], expected.gates.sigmoid(), atol=1e-5, rtol=0)


def test_its_macs_are_those_without_early_exits() -> None:
    network = tiny.network()
    spared = network.hidden_size  # pooling, once a token, at each exit that is not there
    every = sum(cost.token for cost in segment_macs(network))
    assert monolith.monolith(network).macs.token == every - 2 * spared


def test_int8_is_made_by_the_segments_quantizer(
    exported: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported("bert")

    def copy(segment: Segment, path: Path) -> None:
        shutil.copyfile(made.folder / "segment_01.onnx", path)

    monkeypatch.setattr(monolith, "to_onnx", copy)
    monolith.write_monolith(made.checkpoint, tmp_path / "one.onnx", "int8")
    integer = [
        node for node in onnx.load(tmp_path / "one.onnx").graph.node if node.op_type == "MatMulInteger"
    ]
    assert len(integer) == 6 and len(list(tmp_path.iterdir())) == 1


def test_an_unknown_variant_is_refused(exported: Callable[[str], Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose one of fp32, int8, int4"):
        monolith.write_monolith(exported("bert").checkpoint, tmp_path / "x.onnx", "fp8")
