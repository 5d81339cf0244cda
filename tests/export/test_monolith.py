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
from offramp.export.bundle import BadTarget
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


@pytest.mark.parametrize("policy", ["statistics", "state", "both"])
def test_no_policy_in_the_graph_none_in_its_macs(policy: str) -> None:
    network, bare = tiny.network(policy=policy), tiny.network(policy=None)
    assert monolith.monolith(network).macs == monolith.monolith(bare).macs
    for block in network.spec.exits:
        assert monolith.truncated(network, block).macs == monolith.truncated(bare, block).macs
    assert monolith.truncated(network, 3).macs == monolith.monolith(network).macs


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
    with pytest.raises(ValueError, match="choose one of fp32, fp16, int8, int4"):
        monolith.write_monolith(exported("bert").checkpoint, tmp_path / "x.onnx", "fp8")


def test_a_graph_and_its_other_forms_take_their_places_at_the_end(
    exported: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported("bert")
    (tmp_path / "link.onnx").symlink_to("one.onnx")
    (tmp_path / "one.onnx").write_bytes(b"old")

    def copy(segment: Segment, path: Path) -> None:
        assert (tmp_path / "one.onnx").read_bytes() == b"old"
        shutil.copyfile(made.folder / "segment_01.onnx", path)

    monkeypatch.setattr(monolith, "to_onnx", copy)
    monolith.write_monoliths(made.checkpoint, tmp_path / "link.onnx", ("fp32", "fp16", "int8"))
    names = ["link.onnx", "link_fp16.onnx", "link_int8.onnx", "one.onnx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert any(node.op_type == "Cast" for node in onnx.load(tmp_path / "link_fp16.onnx").graph.node)
    assert (tmp_path / "link.onnx").is_symlink() and len((tmp_path / "one.onnx").read_bytes()) > 3


def test_what_is_no_file_is_not_replaced(exported: Callable[[str], Any], tmp_path: Path) -> None:
    (tmp_path / "one.onnx").mkdir()
    with pytest.raises(BadTarget, match="no regular file"):
        monolith.write_monoliths(exported("bert").checkpoint, tmp_path / "one.onnx", ("fp32",))
