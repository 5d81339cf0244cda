"""Graphs with ONNX Runtime's attention compute what their modules and transformers do, in every family."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from click.testing import CliRunner

from offramp.export.cached_attention import reason_against, rotation_facts
from offramp.export.cli import main as split
from offramp.export.decoder import ExportableDecoder, split_decoder
from offramp.export.precision import write_variant
from offramp.export.to_onnx import to_onnx
from offramp.models.decoder import DecoderNetwork
from offramp.runtime.bundle.manifest import APPENDED, IN_PLACE, NEW, PAST
from offramp.runtime.engines.rotation import rotation_tables
from offramp.runtime.engines.threads import share_global_pool

pytestmark = pytest.mark.slow

PLACES = 65  # of the caches: one more than the longest text


class Graphs(NamedTuple):
    """A network in one segment: the model, its split, and sessions of stem, segment and head."""

    model: Any
    split: Any
    sessions: list[Any]
    folder: Path


def open_session(file: Path) -> Any:
    options = onnxruntime.SessionOptions()
    share_global_pool(options)
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module", params=tiny.with_slow(sorted(tiny.DECODERS), "llama", "gemma2"))
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    model, folder = tiny.decoder(request.param, wide=True), tmp_path_factory.mktemp(request.param)
    split = split_decoder(DecoderNetwork(model), "3")
    for segment in split:
        to_onnx(segment, folder / f"{segment.name}.onnx")
    names = ("stem", "segment_00", "head")
    return Graphs(model, split, [open_session(folder / f"{name}.onnx") for name in names], folder)


class Walk:
    """A walk through the graphs, or through their modules, with caches that the caller's arrays hold."""

    def __init__(self, graphs: Graphs, rows: int) -> None:
        self.graphs, segment = graphs, graphs.split.segments[0]
        shapes = {t.name: (rows, t.shape[1], PLACES, t.shape[3]) for t in segment.inputs if len(t.shape) == 4}
        self.values: dict[str, Any] = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        self.values |= rotation_tables(graphs.split.rotations, PLACES)

    def logits(self, ids: torch.Tensor, starts: list[int], *, modules: bool = False) -> Any:
        """Logits of ids [rows, tokens] that follow so many tokens in the cache of each row."""
        count = ids.shape[1]
        last = np.array(starts, np.int32) + np.int32(count - 1)
        positions = np.array(starts)[:, None] + np.arange(count)
        new = {"input_ids": ids.numpy(), "position_ids": positions, "last_positions": last}
        values = self.values | new | {"total_length": np.array(last.max() + 1, np.int32)}
        parts = [self.graphs.split.stem, self.graphs.split.segments[0], self.graphs.split.head]
        for part, session in zip(parts, self.graphs.sessions, strict=True):
            reads = {tensor.name: values[tensor.name] for tensor in part.inputs}
            if modules:
                outputs = [o.numpy() for o in part.module(*(torch.from_numpy(v) for v in reads.values()))]
            else:
                outputs = session.run([tensor.name for tensor in part.outputs], reads)
            for tensor, output in zip(part.outputs, outputs, strict=True):
                values[tensor.name.removeprefix("next_")] = output
        for new_prefix, past_prefix in zip(NEW, PAST, strict=True):
            for name in [name for name in values if name.startswith(new_prefix)]:
                self.values[name.replace(new_prefix, past_prefix)] = values[name]
        return values["logits"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("rows", "pieces"), [(1, (1, 1, 1)), (2, (6, 1, 1)), (1, (5, 3, 1, 4)), (1, (30, 1, 29))]
)
def test_graphs_compute_what_transformers_does(graphs: Graphs, rows: int, pieces: tuple[int, ...]) -> None:
    """Prompts, tokens one by one, and several after a past, also beyond windows."""
    ids = torch.randint(3, 60, (rows, sum(pieces)), generator=torch.Generator().manual_seed(1))
    walk, start, logits = Walk(graphs, rows), 0, []
    for piece in ids.split(pieces, dim=1):
        logits.append(walk.logits(piece, [start] * rows))
        start += piece.shape[1]
    right = graphs.model(ids).logits.numpy()
    np.testing.assert_allclose(np.concatenate(logits, 1), right, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_rows_of_different_lengths_compute_what_each_does_alone(graphs: Graphs) -> None:
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(2))
    lengths, both = [19, 7], Walk(graphs, 2)
    for row, length in enumerate(lengths):
        alone = Walk(graphs, 1)
        alone.logits(ids[row : row + 1, :length], [0])
        for name in [name for name in both.values if name.startswith(PAST)]:
            both.values[name][row] = alone.values[name][0]
    for step in range(4):
        new = torch.stack([ids[row, length + step] for row, length in enumerate(lengths)])[:, None]
        logits = both.logits(new, [length + step for length in lengths])
        for row, length in enumerate(lengths):
            right = graphs.model(ids[row : row + 1, : length + step + 1]).logits[0, -1].numpy()
            np.testing.assert_allclose(logits[row, 0], right, atol=2e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(("rows", "pieces"), [(2, (7, 1)), (1, (20, 3))])
def test_modules_compute_what_their_graphs_do(graphs: Graphs, rows: int, pieces: tuple[int, ...]) -> None:
    ids = torch.randint(3, 60, (rows, sum(pieces)), generator=torch.Generator().manual_seed(3))
    walks, start = [Walk(graphs, rows), Walk(graphs, rows)], 0
    for piece in ids.split(pieces, dim=1):
        by_graphs, by_modules = (
            walk.logits(piece, [start] * rows, modules=bool(number)) for number, walk in enumerate(walks)
        )
        np.testing.assert_allclose(by_graphs, by_modules, atol=2e-4, rtol=1e-3)
        start += piece.shape[1]
    used = slice(None), slice(None), slice(0, start)
    for name in [name for name in walks[0].values if name.startswith(PAST)]:
        np.testing.assert_allclose(walks[0].values[name][used], walks[1].values[name][used], atol=1e-4)


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_small_weights_keep_the_attention(graphs: Graphs, variant: str, tmp_path: Path) -> None:
    file = tmp_path / "small.onnx"
    assert write_variant(variant, graphs.folder / "segment_00.onnx", file, weights_only=True) < 0.9
    nodes = Counter(node.op_type for node in onnx.load(file).graph.node)
    assert nodes["GroupQueryAttention"] == 3 and nodes["MatMulNBits"] >= 12 and not nodes["MatMul"]
    open_session(file)


def test_a_block_has_as_many_operators_as_it_must(graphs: Graphs, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    share_global_pool(options)
    file = graphs.folder / "segment_00.onnx"
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    if graphs.model.config.model_type == "llama":  # without biases and further norms
        assert len(nodes) == 12 * 3
    assert not {"Softmax", "Shape", "Expand", "Tile"} & {node.op_type for node in nodes}


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_attention_that_the_operator_cannot_express_is_portable(family: str) -> None:
    """What ee-split says of it: test_decoder_exits."""
    network = DecoderNetwork(tiny.decoder(family))
    assert reason_against(network) == "block 1 has heads of size 8, which is no multiple of 16"
    assert split_decoder(network, "3").cache == APPENDED
    config = tiny.wide_config("gpt_neox")
    config.rope_parameters = config.rope_parameters | {"partial_rotary_factor": 0.25}
    model = type(tiny.decoder("gpt_neox"))(config)
    reason = reason_against(DecoderNetwork(model))
    assert reason == "block 1 rotates 8 numbers of a head, which is no multiple of 16"


def test_portable_graphs_are_written_if_they_are_asked_for() -> None:
    network = DecoderNetwork(tiny.decoder("llama", wide=True))
    split = split_decoder(network, "3")
    assert split.cache == IN_PLACE and not split.windows
    assert split_decoder(DecoderNetwork(tiny.decoder("gemma2")), "3").windows == (5,)
    assert split_decoder(network, "3", portable=True).cache == APPENDED
    assert ExportableDecoder(network, Path(), portable=True).split("3").cache == APPENDED


def test_tables_are_those_of_the_model() -> None:
    """Cosines of transformers are computed in float32, so the last bit may differ."""
    model = tiny.decoder("llama", wide=True)
    facts = rotation_facts(DecoderNetwork(model))
    assert np.array_equal(
        np.float32(facts["rotation"].frequencies), model.model.rotary_emb.inv_freq.numpy()
    ), "no number may change on its way"
    tables = rotation_tables(facts, 64)
    cosine, sine = model.model.rotary_emb(torch.zeros(1), torch.arange(64)[None])
    for name, right in (("cosine", cosine), ("sine", sine)):
        assert tables[f"rotation_{name}_table"].shape == (64, 8)
        np.testing.assert_allclose(tables[f"rotation_{name}_table"], right[0, :, :8].numpy(), atol=2e-7)


def test_fp16_needs_portable_graphs(tmp_path: Path) -> None:
    tiny.decoder("llama").save_pretrained(tmp_path / "model")
    done = CliRunner().invoke(split, [str(tmp_path / "model"), "--variants", "fp32,fp16"])
    assert done.exit_code == 2 and "fp16 of a language model needs --portable" in done.output
