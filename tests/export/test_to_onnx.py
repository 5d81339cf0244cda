"""The graph of a segment: right at every size, nodes named, plain ONNX; and exporting prints nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch

from offramp.export.classifier import split_classifier
from offramp.export.segments import Segment
from offramp.export.to_onnx import OPSET, eager_attention, to_onnx
from offramp.runtime.bundle.manifest import NEXT, Macs, Tensor

SIZES = [(1, 1), (1, 16), (3, 7), (2, 64)]


def batch(rows: int, length: int, pad: int) -> dict[str, torch.Tensor]:
    """Random ids; every row but the first is padded at its end."""
    ids = torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, length - row - 1 :] = 0
    types = (torch.arange(length) > 4).long().expand(rows, length)
    return {"input_ids": torch.where(mask > 0, ids, pad), "attention_mask": mask, "token_type_ids": types}


def walk(
    export: Any, open_graph: Callable[[Path], Any], inputs: dict[str, torch.Tensor]
) -> list[dict[str, np.ndarray]]:
    """Outputs of the graphs, segment by segment, on ONNX Runtime alone."""
    values = {name: value.numpy() for name, value in inputs.items()}
    outputs = []
    for segment in export.segments:
        session = open_graph(export.folder / f"{segment.name}.onnx")
        names = [node.name for node in session.get_outputs()]
        out = dict(
            zip(
                names,
                session.run(names, {node.name: values[node.name] for node in session.get_inputs()}),
                strict=True,
            )
        )
        values |= {name.removeprefix(NEXT): value for name, value in out.items()}
        outputs.append(out)
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.with_slow(sorted(tiny.CONFIGS), "bert"))
def test_every_family_answers_as_torch_does_at_every_size(
    family: str, exported: Callable[[str], Any], open_graph: Callable[[Path], Any]
) -> None:
    export = exported(family)
    network, pad = export.checkpoint.network, export.checkpoint.text.pad_id
    for rows, length in SIZES:
        inputs = batch(rows, length, pad)
        with torch.no_grad():
            whole = network(inputs)
        outputs = walk(export, open_graph, inputs)[1:]
        for number, out in enumerate(outputs):
            assert np.abs(out["logits"] - whole.logits[:, number].numpy()).max() < 1e-4
        if whole.gate_logits is not None:
            assert outputs[0]["gate"].shape == (rows,)
            assert np.abs(outputs[0]["gate"] - whole.gate_logits[:, 0].sigmoid().numpy()).max() < 1e-4


@pytest.mark.parametrize("family", tiny.with_slow(tiny.EXPORTED, "bert"))
def test_graphs_are_plain_and_carry_no_notes(family: str, exported: Callable[[str], Any]) -> None:
    export = exported(family)
    for segment in export.segments:
        file = export.folder / f"{segment.name}.onnx"
        model = onnx.load(file)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
        assert not {"If", "Loop", "Scan", "NonZero"} & {node.op_type for node in model.graph.node}
        assert b".py" not in file.read_bytes()
        assert len({node.name for node in model.graph.node}) == len(model.graph.node)


def test_nodes_are_named_by_their_module(exported: Callable[[str], Any]) -> None:
    graph = onnx.load(exported("bert").folder / "segment_00.onnx").graph
    modules = {node.name.rpartition("/")[0] for node in graph.node}
    assert {"blocks.0.attention.self.query", "heads.1.exit", "policy.state.0"} <= modules


def test_a_network_keeps_its_own_attention() -> None:
    network = tiny.network()
    before = network.config._attn_implementation
    with pytest.raises(KeyError), eager_attention(network.blocks):
        assert network.config._attn_implementation == "eager"
        raise KeyError
    assert network.config._attn_implementation == before != "eager"


@pytest.mark.slow
def test_exporting_is_quiet(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        to_onnx(split_classifier(tiny.network("distilbert", policy=None), ()).stem, tmp_path / "stem.onnx")
    printed = capfd.readouterr()
    assert (printed.out, printed.err, caplog.records) == ("", "", [])


class FirstToken(torch.nn.Module):
    """Gives the first token of a hidden state [batch, seq, 4]."""

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(hidden[:, :1] for hidden in tensors)


@pytest.mark.slow
def test_a_graph_that_is_not_the_segment_is_refused(tmp_path: Path) -> None:
    hidden = Tensor("hidden", "float32", ("batch", "seq", 4))
    outputs = (replace(hidden, name="next_hidden"),)  # of all tokens
    segment = Segment("segment_00", FirstToken(), (hidden,), outputs, (1,), Macs(0, 0, 0), 64)
    with pytest.raises(RuntimeError, match="segment_00: exported as"):
        to_onnx(segment, tmp_path / "segment_00.onnx")
    assert not (tmp_path / "segment_00.onnx").exists()
