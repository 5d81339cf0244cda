"""A decoder's portable graphs compute what the network does, at every number of tokens and of places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch

from offramp.export.decoder import split_decoder
from offramp.export.precision import write_variant
from offramp.models.decoder import DecoderNetwork
from offramp.runtime.bundle.manifest import PAST
from offramp.runtime.engines.threads import share_global_pool

# Answers of their bundle are a default test: test_generation.
pytestmark = pytest.mark.slow


def open_session(file: Path) -> Any:
    options = onnxruntime.SessionOptions()
    share_global_pool(options)
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module", params=tiny.with_slow(sorted(tiny.DECODERS), "llama"))
def exported(request: pytest.FixtureRequest, portable_decoder: Callable[[str], Any]) -> Any:
    """The model, its split (two segments: blocks 1-2 and 3), and the folder of the graphs."""
    return portable_decoder(request.param)


def test_cuts_are_where_they_were_asked_for(exported: Any) -> None:
    _, split, _ = exported
    names = ["stem", "segment_00", "segment_01", "fill_01", "head", "draft"]
    assert [segment.name for segment in split] == names
    order = ["stem", "segment_00", "fill_01", "segment_01", "head", "draft"]
    assert [segment.name for segment in split.in_walking_order()] == order
    assert [segment.blocks for segment in split] == [(), (1, 2), (3,), (3,), (), ()]
    assert [tensor.name for tensor in split.cache_fills[0].outputs] == ["new_k_3", "new_v_3"]
    assert split.draft.outputs[0].shape == ("batch", "seq", 20)
    outputs = [tensor.name for tensor in split.segments[0].outputs]
    assert outputs == ["next_hidden", "new_k_1", "new_v_1", "new_k_2", "new_v_2"]
    for segment in split.segments:
        assert len(segment.blocks) == sum("past_k_" in tensor.name for tensor in segment.inputs)


@torch.no_grad()
@pytest.mark.parametrize(("rows", "pieces", "places"), [(1, (1, 1, 1), 8), (2, (6, 1, 4), 20), (3, (11,), 1)])
def test_graphs_compute_what_transformers_does(
    exported: Any, rows: int, pieces: tuple[int, ...], places: int
) -> None:
    model, split, folder = exported
    segments = (split.stem, *split.segments, split.head)
    sessions = [open_session(folder / f"{segment.name}.onnx") for segment in segments]
    ids = torch.randint(3, 60, (rows, sum(pieces)))
    cache = {
        tensor.name: np.full(
            [rows if n == "batch" else places if n == "past" else n for n in tensor.shape], 9.0, "f4"
        )
        for segment in segments
        for tensor in segment.inputs
        if tensor.name.startswith(PAST)
    }
    valid, held, logits = np.zeros((rows, places), np.int64), 0, []
    for piece in ids.split(pieces, dim=1):
        count = piece.shape[1]
        positions = np.tile(np.arange(held, held + count), (rows, 1))
        tensors = {"input_ids": piece.numpy(), "position_ids": positions, "past_valid": valid, **cache}
        for session in sessions:
            names = [node.name for node in session.get_outputs()]
            outputs = session.run(names, {node.name: tensors[node.name] for node in session.get_inputs()})
            tensors |= {name.removeprefix("next_"): value for name, value in zip(names, outputs, strict=True)}
        logits.append(tensors["logits"])
        for name, kept in cache.items():
            new = tensors[name.replace("past", "new")]
            at = (
                (..., slice(held, held + count))
                if "_k_" in name
                else (..., slice(held, held + count), slice(None))
            )
            if held + count <= places:
                kept[at] = new
        valid[:, held : held + count], held = 1, held + count
    np.testing.assert_allclose(np.concatenate(logits, 1), model(ids).logits.numpy(), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("variant", ["int8", "int4", "fp16"])
def test_blocks_take_every_precision(exported: Any, variant: str, tmp_path: Path) -> None:
    _, split, folder = exported
    file = tmp_path / "small.onnx"
    share = write_variant(variant, folder / "segment_00.onnx", file)
    assert share < 0.9
    inputs = [node.name for node in onnx.load(file).graph.input]
    assert inputs == [tensor.name for tensor in split.segments[0].inputs]
    open_session(file)


def test_weights_that_are_not_float32_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.float16.*network.float\(\)"):
        split_decoder(DecoderNetwork(tiny.decoder("llama").half()), "each")
