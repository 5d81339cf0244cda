"""One graph of a network: the answers of its segments. It is really exported in test_cli."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import tiny
import torch

from offramp.benchmarks.decoder_candidates import PLACES, DecoderMonolith
from offramp.export import monolith
from offramp.export.bundle import BadTarget
from offramp.export.classifier import split_classifier, truncate
from offramp.export.decoder import ExportableDecoder
from offramp.export.monolith import join_segments
from offramp.export.options import ExportOptions
from offramp.export.segments import Segment
from offramp.models.decoder import DecoderNetwork
from offramp.models.macs import segment_macs


@pytest.mark.parametrize("family", tiny.with_slow(["bert", "mpnet"], "bert"))
def test_the_module_says_what_the_last_exit_says(family: str) -> None:
    network, inputs = tiny.network(family), tiny.inputs(family)
    whole = join_segments(split_classifier(network, (3,)))
    with torch.no_grad():
        logits = whole.module(*(inputs[tensor.name] for tensor in whole.inputs))[0]
        torch.testing.assert_close(logits, network(inputs).logits[:, -1], atol=1e-5, rtol=0)
    assert [tensor.name for tensor in whole.outputs] == ["logits"] and whole.blocks == (1, 2, 3)


@pytest.mark.parametrize("policy", ["statistics", "state", None])
def test_with_exits_it_says_what_every_exit_says(policy: str | None) -> None:
    network, inputs = tiny.network(policy=policy), tiny.inputs()
    whole = join_segments(split_classifier(network))
    with torch.no_grad():
        outputs = whole.module(*(inputs[tensor.name] for tensor in whole.inputs))
        expected = network(inputs)
    torch.testing.assert_close(outputs[0], expected.logits, atol=1e-5, rtol=0)
    assert [tensor.name for tensor in whole.outputs] == (["logits", "gates"] if policy else ["logits"])
    if policy:
        torch.testing.assert_close(outputs[1], expected.gate_logits.sigmoid(), atol=1e-5, rtol=0)


def test_its_macs_are_those_without_early_exits() -> None:
    network = tiny.network()
    spared = network.hidden_size  # pooling, once a token, at each exit that is not there
    every = sum(cost.token for cost in segment_macs(network))
    assert join_segments(split_classifier(network, (3,))).macs.token == every - 2 * spared


@pytest.mark.parametrize("policy", ["statistics", "state", "both"])
def test_no_policy_in_the_graph_none_in_its_macs(policy: str) -> None:
    network, bare = tiny.network(policy=policy), tiny.network(policy=None)
    whole, bare_whole = (join_segments(split_classifier(n, (3,))) for n in (network, bare))
    assert whole.macs == bare_whole.macs
    for block in network.spec.exits:
        assert join_segments(truncate(network, block)).macs == join_segments(truncate(bare, block)).macs
    assert join_segments(truncate(network, 3)).macs == whole.macs


def test_int8_has_one_scale_a_tensor_as_a_users_own_graph(
    exported: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = exported("bert")

    def copy(segment: Segment, path: Path) -> None:
        shutil.copyfile(export.folder / "segment_01.onnx", path)

    monkeypatch.setattr(monolith, "to_onnx", copy)
    files = monolith.write_monolith(export.source, tmp_path / "one.onnx", ExportOptions(("fp32", "int8")))
    assert files == {"fp32": tmp_path / "one.onnx", "int8": tmp_path / "one_int8.onnx"}
    graph = onnx.load(files["int8"]).graph
    assert len([node for node in graph.node if node.op_type == "MatMulInteger"]) == 6
    assert sorted(tmp_path.iterdir()) == sorted(files.values())


def test_a_graph_and_its_other_forms_take_their_places_at_the_end(
    exported: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = exported("bert")
    (tmp_path / "link.onnx").symlink_to("one.onnx")
    (tmp_path / "one.onnx").write_bytes(b"old")

    def copy(segment: Segment, path: Path) -> None:
        assert (tmp_path / "one.onnx").read_bytes() == b"old"
        shutil.copyfile(export.folder / "segment_01.onnx", path)

    monkeypatch.setattr(monolith, "to_onnx", copy)
    options = ExportOptions(("fp32", "fp16", "int8"))
    monolith.write_monolith(export.source, tmp_path / "link.onnx", options)
    names = ["link.onnx", "link_fp16.onnx", "link_int8.onnx", "one.onnx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert any(node.op_type == "Cast" for node in onnx.load(tmp_path / "link_fp16.onnx").graph.node)
    assert (tmp_path / "link.onnx").is_symlink() and len((tmp_path / "one.onnx").read_bytes()) > 3


def test_what_is_no_file_is_not_replaced(exported: Callable[[str], Any], tmp_path: Path) -> None:
    (tmp_path / "one.onnx").mkdir()
    with pytest.raises(BadTarget, match="no regular file"):
        monolith.write_monolith(exported("bert").source, tmp_path / "one.onnx")


@pytest.mark.parametrize(("family", "portable"), [("llama", True), ("gpt2", True), ("llama", False)])
@pytest.mark.slow
def test_one_graph_of_a_decoder_generates_what_transformers_does(
    family: str, portable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.decoder(family, wide=not portable)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    source = ExportableDecoder(DecoderNetwork(model), tmp_path, portable=portable)
    options = ExportOptions(("fp32", "int8", "fp16"))
    files = monolith.write_monolith(source, tmp_path / "one.onnx", options)
    assert sorted(files) == ["fp32", "int8"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.onnx", "one_int8.onnx"]
    rotations = source.split("3").rotations
    one = DecoderMonolith(files["fp32"], rotations)
    assert one.in_place != portable
    monkeypatch.setattr("offramp.benchmarks.decoder_candidates.PLACES", PLACES // 16)  # it has to grow
    for length in (1, 9, 21):  # the last one reads no past
        ids = torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        with torch.no_grad():
            answer = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, length:]
        assert list(one.generate(ids, 20)) == answer.tolist()
    small = DecoderMonolith(files["int8"], rotations)
    assert len(list(small.generate([5, 9], 6))) == 6
