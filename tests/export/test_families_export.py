"""Every family through the real exporter: graphs are the network at all sizes, run in int8, and compile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import tiny_families
import torch

from offramp.export.bundle import write_bundle
from offramp.export.classifier import ExportableClassifier
from offramp.export.options import ExportOptions
from offramp.export.segments import SplitNetwork, files_of
from offramp.export.trt_compile import compile_bundle
from offramp.export.verify import VerificationReport
from offramp.models import EarlyExitNetwork
from offramp.runtime import load
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import NEXT
from offramp.runtime.engines.threads import share_global_pool
from offramp.runtime.inputs.images import ImageInput
from offramp.training.checkpoint import Checkpoint, TextFacts

VARIANTS = ("fp32", "int8", "fp16")
TEXT = [*sorted(tiny_families.TEXT), "deberta-v2, convolution", "albert, one group of two layers"]
IMAGES = ["deit", "vit", *sorted(tiny_families.IMAGES), *tiny_families.IMAGE_FORMS]  # DINOv2: test_verify
SIZES = ((1, 1), (2, 9), (3, 33))  # rows and tokens; graphs are traced at other ones
FAST: tuple[str, ...] = ()  # each export takes seconds; tests/export exports BERT and others by default


@dataclass(frozen=True)
class Exported:
    """A network of two blocks with an exit after each, its segments, its bundle and its verification."""

    network: EarlyExitNetwork
    split: SplitNetwork
    bundle: Path
    report: VerificationReport


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    @cache
    def export(name: str) -> Exported:
        folder = tmp_path_factory.mktemp("family")
        network = tiny_families.network(name, policy="both", num_hidden_layers=2)
        if network.family.vision is not None:
            facts = ImageInput(16, 16, (16, 16), "bicubic", "RGB", 1 / 255, (0.5,) * 3, (0.5,) * 3)
            checkpoint = Checkpoint(network, facts, None)
        else:
            tokenizer = folder / "tokenizer.json"
            tiny.tokenizer().save(str(tokenizer))
            checkpoint = Checkpoint(network, TextFacts("", network.config.pad_token_id, 64), tokenizer)
        source = ExportableClassifier(checkpoint)
        split = source.split("each")
        _, report = write_bundle(source, split, folder / "bundle", ExportOptions(VARIANTS))
        return Exported(network, split, folder / "bundle", report)

    return export


def walk(
    export: Exported, variant: str, inputs: dict[str, torch.Tensor], open_graph: Any
) -> list[np.ndarray]:
    """The logits of every exit, by the graphs of a variant."""
    values = {name: value.numpy() for name, value in inputs.items()}
    logits = []
    parts = [part for segment in export.split for part in files_of(segment, variant, VARIANTS)]
    for graph, file in parts:
        session = open_graph(export.bundle / file)
        names = [tensor.name for tensor in graph.outputs]
        outputs = dict(
            zip(names, session.run(names, {t.name: values[t.name] for t in graph.inputs}), strict=True)
        )
        values |= {name.removeprefix(NEXT): value for name, value in outputs.items()}
        logits += [outputs["logits"]] if "logits" in outputs else []
    return logits


@pytest.mark.parametrize("name", tiny.with_slow([*TEXT, *IMAGES], *FAST))
def test_graphs_are_the_network_at_every_size(
    name: str, exported: Callable[[str], Exported], open_graph: Callable[[Path], Any]
) -> None:
    export = exported(name)
    for rows, tokens in SIZES:
        if name in IMAGES:
            inputs = tiny.pixel_values(rows)
        elif tokens < 4:
            inputs = {key: value[:rows, :tokens] for key, value in tiny_families.text_inputs(name).items()}
        else:
            inputs = tiny_families.text_inputs(name, rows, tokens)
        with torch.no_grad():
            expected = export.network(inputs).logits
        for variant, allowed in (("fp32", 1e-4), ("int8", 0.3)):
            for number, logits in enumerate(walk(export, variant, inputs, open_graph)):
                difference = np.abs(logits - expected[:, number].numpy()).max()
                assert difference < allowed, f"{variant} of {rows} x {tokens}, exit {number}"


@pytest.mark.parametrize("name", tiny.with_slow([*TEXT, *IMAGES], *FAST))
def test_every_seam_holds(name: str, exported: Callable[[str], Exported]) -> None:
    report = exported(name).report
    assert report.first_bad is None and report.differences
    assert all(loss.agreement > 0.8 for loss in report.losses)


@pytest.mark.parametrize("name", tiny.with_slow([*TEXT, *IMAGES], *FAST))
def test_every_graph_compiles_for_tensorrt(name: str, exported: Callable[[str], Exported]) -> None:
    """With TensorRT-RTX, under the profiles with which engine trt builds; test_trt_compile has the others."""
    bundle = open_bundle(exported(name).bundle)
    segments = bundle.manifest.segments
    graphs = {graph for s in segments for name in ("fp32", "fp16") for graph in s.variants[name].graphs}
    results = list(compile_bundle(bundle))
    assert {result.graph: result.problem for result in results if result.size is None} == {}
    assert {result.graph for result in results} == {"stem.onnx", *(graph.file for graph in graphs)}


def whole_row(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stem's inputs for ids [1, seq] without padding."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


@pytest.mark.parametrize("variant", ["fp32", "int8"])
@pytest.mark.parametrize("name", tiny.with_slow([*TEXT, *IMAGES], *FAST))
def test_rows_that_exit_and_rows_that_stay_get_their_answers(
    name: str, variant: str, exported: Callable[[str], Exported], open_graph: Callable[[Path], Any]
) -> None:
    """In fp32 those of the network, in int8 those of its graphs, run one after another for each row alone."""
    export = exported(name)
    items: list[Any] = [tiny.image(number % 2, seed=number) for number in range(12)]
    if name in TEXT:
        items = [str(row["text"]) for row in tiny.rows(12)]
    with load(export.bundle, variant=variant, rule="never") as session:
        encoded = [session.encode(item) for item in items]
    rows = [{key: torch.from_numpy(value) for key, value in arrays.items()} for arrays in encoded]
    if name in TEXT:
        rows = [whole_row(row["input_ids"]) for row in rows]
    with torch.no_grad():
        logits = torch.cat([export.network(row).logits for row in rows])
    if variant == "int8":
        walks = [np.stack(walk(export, variant, row, open_graph), 1) for row in rows]
        logits = torch.from_numpy(np.concatenate(walks))
    first = logits[:, 0].softmax(-1).amax(-1)  # [rows]
    threshold = float(first.sort().values[5:7].mean())  # between two rows, so that half of them exit
    depths = torch.where(first >= threshold, 1, 2)
    with load(export.bundle, variant=variant, rule="max_probability", threshold=threshold) as session:
        answers = list(session.map(items, batch_size=4))
    assert [answer.depth for answer in answers] == depths.tolist()
    labels = logits[range(len(rows)), depths - 1].argmax(-1)
    assert [answer.label for answer in answers] == [export.network.spec.labels[label] for label in labels]


@pytest.mark.slow  # exports
def test_distances_of_deberta_are_constants(exported: Callable[[str], Exported]) -> None:
    export = exported("deberta-v2")
    graph = onnx.load(export.bundle / "segment_01.onnx").graph
    constants = {value.name for value in graph.initializer}
    computed = [node.name for node in graph.node if node.input and set(node.input) <= constants]
    assert computed == [], "each run would compute the same"
    # Queries, keys and values; scores, two products with distances, weights with values; three more layers;
    # pooling.
    assert Counter(node.op_type for node in graph.node)["MatMul"] == 3 + 4 + 3 + 1


@pytest.mark.parametrize("name", tiny.with_slow(["siglip_vision_model", "albert"]))
def test_the_approximate_gelu_is_fused(
    name: str, exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    share_global_pool(options)
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    file = exported(name).bundle / "segment_01.onnx"
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    fused = Counter(node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node)
    assert fused["FastGelu"] == 1 and not fused["Tanh"]
