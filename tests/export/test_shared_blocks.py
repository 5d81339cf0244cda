"""Blocks that share their weights: one graph in the bundle and in memory, equal answers on every engine."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import tiny_families
import torch
from click.testing import CliRunner
from doubles import gpu

from offramp.export import trt_compile
from offramp.export.bundle import write_bundle
from offramp.export.classifier import ExportableClassifier, split_classifier
from offramp.export.nested import nest_segments
from offramp.export.options import ExportOptions
from offramp.export.segments import Segment, Values
from offramp.models.network import EarlyExitNetwork, NetworkSpec
from offramp.models.tasks import TOKENS
from offramp.runtime import load
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import NEXT
from offramp.runtime.engines.base import EngineOptions, open_engine
from offramp.runtime.errors import BadBundle
from offramp.training.checkpoint import Checkpoint, TextFacts

pytestmark = pytest.mark.slow  # exports in every variant

VARIANTS = ("fp32", "int8")
ENDS = (2, 5)  # a segment of two blocks and one of three; all blocks are one module
SESSIONS = 1 + 1 + len(ENDS)  # stem, block, exits
FACTS: dict[str, Any] = {"num_hidden_groups": 1, "num_hidden_layers": ENDS[-1]}


@pytest.fixture(scope="module")
def network() -> EarlyExitNetwork:
    base = tiny_families.backbone("albert", **FACTS)
    spec = NetworkSpec(("negative", "positive"), ENDS, "mean", "both")
    return EarlyExitNetwork(base, spec).eval()


@pytest.fixture(scope="module")
def bundle(network: EarlyExitNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("albert")
    tiny.tokenizer().save(str(folder / "tokenizer.json"))
    source = ExportableClassifier(Checkpoint(network, TextFacts("", 0, 64), folder / "tokenizer.json"))
    write_bundle(source, source.split("each"), folder / "bundle", ExportOptions(VARIANTS))
    return folder / "bundle"


@pytest.fixture
def damaged(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle with one other byte in the block's weights."""
    copy = Path(shutil.copytree(bundle, tmp_path / "damaged"))
    data = bytearray((copy / "block_01.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "block_01.onnx").write_bytes(data)
    return copy


def feeds(rows: int, length: int) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in tiny_families.text_inputs("albert", rows, length).items()}


def expected(network: EarlyExitNetwork, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The network's logits [rows, exits, classes] and gates [rows, exits - 1]."""
    with torch.no_grad():
        outputs = network({name: torch.from_numpy(value) for name, value in inputs.items()})
    assert outputs.gate_logits is not None
    return outputs.logits.numpy(), outputs.gate_logits.sigmoid().numpy()


def test_weights_of_the_block_are_written_once(bundle: Path) -> None:
    files = {path.name for path in bundle.glob("*.onnx")}
    exits = {f"segment_{number:02}.onnx" for number in range(len(ENDS))}
    assert files == {"stem.onnx", "block_01.onnx", "block_01_int8.onnx", *exits}
    weights = Counter(
        value.raw_data
        for name in files - {"block_01_int8.onnx"}
        for value in onnx.load(bundle / name).graph.initializer
        if len(value.raw_data) >= 4 * 32 * 32
    )
    assert len(weights) >= 6 and set(weights.values()) == {1}, "queries, keys, values, output and two more"
    block = (bundle / "block_01.onnx").stat().st_size
    assert all((bundle / name).stat().st_size < block / 3 for name in exits)


def test_manifest_names_the_graphs_of_a_segment_in_order(bundle: Path) -> None:
    segment = open_bundle(bundle).manifest.segments[1]
    for variant, block_file in (("fp32", "block_01.onnx"), ("int8", "block_01_int8.onnx")):
        files = [graph.file for graph in segment.variants[variant].graphs]
        assert files == [*[block_file] * 3, "segment_01.onnx"]
    block, *_, rest = segment.first_graph.graphs
    assert [tensor.name for tensor in block.inputs] == ["hidden", "mask"]
    assert [tensor.name for tensor in rest.inputs] == ["hidden", "pool"]


@pytest.mark.parametrize("kind", ["ort", "ort-cuda", "trt-8.6.1", "trt-10.3.0", "trt-graphs"])
def test_a_walk_is_the_network(kind: str, bundle: Path, network: EarlyExitNetwork, tmp_path: Path) -> None:
    with gpu.opened(kind, bundle, tmp_path) as engine:
        for rows, length in ((1, 16), (3, 16), (1, 16), (1, 16)):  # some a second time, on the same buffers
            inputs = feeds(rows, length)
            logits, gates = expected(network, inputs)
            state = engine.begin(inputs)
            for segment in range(len(ENDS)):
                signals = engine.step(segment, 0, state)
                np.testing.assert_allclose(signals.logits, logits[:, segment], atol=1e-5)
                if segment < len(ENDS) - 1:
                    np.testing.assert_allclose(signals.gate, gates[:, segment], atol=1e-5)
            engine.drop(state)


def test_rows_that_stay_and_skipped_segments_go_on_from_the_newest_state(
    bundle: Path, network: EarlyExitNetwork
) -> None:
    engine = open_engine(open_bundle(bundle), "fp32", EngineOptions())
    inputs, rows = feeds(3, 12), np.array([0, 2])
    logits, _ = expected(network, inputs)
    state = engine.begin(inputs)
    engine.step(0, 0, state)
    fewer = engine.take(state, rows)
    np.testing.assert_allclose(engine.step(1, 0, fewer).logits, logits[rows, 1], atol=1e-5)
    skipping = engine.begin(inputs)
    engine.skip(0, skipping)
    with torch.no_grad():
        hidden, context = network.stem({name: torch.from_numpy(value) for name, value in inputs.items()})
        for block in range(3):
            hidden = network.run_block(block, hidden, context)
        last = network.classify(1, network.pooled(1, hidden, context)).numpy()
    np.testing.assert_allclose(engine.step(1, 0, skipping).logits, last, atol=1e-5)
    engine.close()


def test_int8_walks_near_the_network(bundle: Path, network: EarlyExitNetwork) -> None:
    inputs = feeds(2, 9)
    logits, _ = expected(network, inputs)
    engine = open_engine(open_bundle(bundle), "int8", EngineOptions())
    state = engine.begin(inputs)
    differences = [np.abs(engine.step(n, 1, state).logits - logits[:, n]).max() for n in range(len(ENDS))]
    engine.close()
    assert 0 < max(differences) < 0.3


def test_the_block_is_opened_once(bundle: Path) -> None:
    engine: Any = open_engine(open_bundle(bundle), "fp32", EngineOptions(share=False))
    assert len({id(graph.session) for graphs in engine._open.values() for graph in graphs}) == SESSIONS
    engine.prepare(1, range(len(ENDS)))  # the exits are those of fp32
    assert len({id(graph.session) for graphs in engine._open.values() for graph in graphs}) == SESSIONS + 1
    engine.close()


def test_tensorrt_builds_the_block_once(bundle: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        machine = gpu.machine(patch, tmp_path)
        engine = open_engine(open_bundle(bundle), "fp32", EngineOptions("trt"))
        assert machine.trt.builds == SESSIONS
        assert f"{SESSIONS} built" in engine.facts["engines"] and "0 found" in engine.facts["engines"]
        engine.close()


def test_a_damaged_block_is_refused_by_name(damaged: Path) -> None:
    with pytest.raises(BadBundle, match=r"block_01\.onnx: sha256"):
        load(damaged)
    (damaged / "block_01.onnx").unlink()
    with pytest.raises(FileNotFoundError, match=r"block_01\.onnx: missing"):
        load(damaged)


def test_ee_verify_knows_the_block(bundle: Path, damaged: Path) -> None:
    count = len(open_bundle(bundle).manifest.files)
    whole = CliRunner().invoke(trt_compile.main, [str(bundle)])
    assert whole.exit_code == 0 and f"{count} files" in whole.output
    refused = CliRunner().invoke(trt_compile.main, [str(damaged)])
    assert refused.exit_code == 2 and "block_01.onnx: sha256" in refused.output


def test_ee_verify_compiles_the_block_once(bundle: Path) -> None:
    graphs = [result.graph for result in trt_compile.compile_bundle(open_bundle(bundle), targets=("8.6",))]
    assert graphs == ["stem.onnx", "block_01.onnx", "segment_00.onnx", "segment_01.onnx"]


def test_one_graph_with_exits_inside_answers_as_the_network(
    bundle: Path, network: EarlyExitNetwork, open_graph: Any, tmp_path: Path
) -> None:
    manifest = open_bundle(bundle).manifest
    files = [[bundle / graph.file for graph in segment.first_graph.graphs] for segment in manifest.segments]
    onnx.save(nest_segments(bundle / "stem.onnx", files), tmp_path / "nested.onnx")
    session, inputs = open_graph(tmp_path / "nested.onnx"), feeds(1, 16)
    logits, gates = expected(network, inputs)
    first = float(gates[0, 0])
    for threshold, exit in ((first - 1e-3, 0), (1.0, 1)):
        feed = {**inputs, "threshold": np.array(threshold, np.float32)}
        known = {node.name: feed[node.name] for node in session.get_inputs()}
        answer, number = session.run(["logits", "exit"], known)
        assert number == [exit + 1]
        np.testing.assert_allclose(answer, logits[:, exit], atol=1e-5)


def parts_in_turn(segment: Segment, values: Values) -> Values:
    """What the parts of a segment give, one after another."""
    given: Values = {}
    for part in segment.graphs:
        outputs = part.module(*part.reads(values | {n.removeprefix(NEXT): v for n, v in given.items()}))
        given |= dict(zip([tensor.name for tensor in part.outputs], outputs, strict=True))
    return given


SPECS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "each": ({}, (1, 2, 3, 4)),
    "two and two": ({"policy": "statistics"}, (2, 4)),
    "attention": ({"pooling": "attention", "head": "mlp"}, (1, 4)),
    "forecasts": ({"forecast": ("fp32", "int8"), "forecast_inputs": "both"}, (1, 3, 4)),
    "an ensemble": ({"ensemble": True}, (3, 4)),
    "tokens": ({"task": TOKENS, "pooling": "none", "labels": ("O", "B-x", "I-x")}, (2, 4)),
}


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_the_parts_of_a_segment_are_the_segment(name: str) -> None:
    settings, kept = SPECS[name]
    base = tiny_families.backbone("albert", num_hidden_groups=1, num_hidden_layers=4)
    spec = NetworkSpec(**{"labels": ("negative", "positive"), "exits": (1, 2, 3, 4)} | settings)
    network = EarlyExitNetwork(base, spec).eval()
    split = split_classifier(network, kept)
    inputs = tiny_families.text_inputs("albert")
    values: Values = {**inputs, "word_starts": inputs["attention_mask"]}
    values |= dict(
        zip(
            [tensor.name for tensor in split.stem.outputs],
            split.stem.module(*split.stem.reads(values)),
            strict=True,
        )
    )
    for segment in split.segments:
        whole = segment.module(*segment.reads(values))
        given = parts_in_turn(segment, values)
        assert len(segment.parts) > 1 and segment.parts[-1].name == segment.name
        for tensor, value in zip(segment.outputs, whole, strict=True):
            torch.testing.assert_close(given[tensor.name], value)
            values[tensor.name.removeprefix(NEXT)] = value


def test_an_exit_inside_of_a_segment_ends_its_parts() -> None:
    base = tiny_families.backbone("albert", num_hidden_groups=1, num_hidden_layers=4)
    network = EarlyExitNetwork(base, NetworkSpec(("a", "b"), (2, 4), ensemble=True)).eval()
    (segment,) = split_classifier(network, (4,)).segments
    assert [part.name for part in segment.parts] == ["block_01", "block_01", "segment_00"]
    assert segment.parts[-1].blocks == (3, 4) and not segment.parts[-1].always_first


def test_blocks_with_weights_of_their_own_stay_in_their_segments() -> None:
    network = tiny_families.network("albert", num_hidden_layers=3)  # two groups: 2 blocks and 1 block
    split = split_classifier(network)
    assert [len(segment.parts) for segment in split.segments] == [2, 2, 0]
    for family in ("rembert", "roberta-prelayernorm"):
        segments = split_classifier(tiny_families.network(family)).segments
        assert all(segment.graphs == (segment,) for segment in segments)
