"""Every family through the real exporter: graphs of all sizes are the network, in fp32, and run in int8."""

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

from offramp.export.bundle import write_graphs
from offramp.export.classifier import ExportableClassifier
from offramp.export.options import ExportOptions
from offramp.export.samples import SENTENCES
from offramp.export.segments import SplitNetwork, file_name, variants_of
from offramp.export.verify import verify
from offramp.runtime.bundle.manifest import NEXT
from offramp.runtime.engines.threads import share_global_pool
from offramp.runtime.inputs.images import ImageInput
from offramp.training.checkpoint import Checkpoint, TextFacts

VARIANTS = ("fp32", "int8")
TEXT = [*sorted(tiny_families.TEXT), "deberta-v2, convolution", "albert, one group of two layers"]
IMAGES = [*sorted(tiny_families.IMAGES), *tiny_families.IMAGE_FORMS]
SIZES = ((1, 1), (2, 9), (3, 33))  # rows and tokens; graphs are traced at other ones
FAST = ("deberta-v2", "modernbert")  # the two whose context and blocks differ most from BERT's


@dataclass(frozen=True)
class Exported:
    """A checkpoint of two blocks, its segments and the folder of their graphs."""

    checkpoint: Checkpoint
    split: SplitNetwork
    folder: Path


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
        split = ExportableClassifier(checkpoint).split("each")
        for segment in split:
            write_graphs(segment, folder, ExportOptions(VARIANTS), weights_only=False)
        return Exported(checkpoint, split, folder)

    return export


def walk(
    export: Exported, variant: str, inputs: dict[str, torch.Tensor], open_graph: Any
) -> list[np.ndarray]:
    """The logits of every exit, by the graphs of a variant."""
    values = {name: value.numpy() for name, value in inputs.items()}
    logits = []
    for segment in export.split:
        known = variant if variant in variants_of(segment, VARIANTS) else VARIANTS[0]
        session = open_graph(export.folder / file_name(segment.name, known))
        names = [tensor.name for tensor in segment.outputs]
        outputs = dict(
            zip(names, session.run(names, {t.name: values[t.name] for t in segment.inputs}), strict=True)
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
            expected = export.checkpoint.network(inputs).logits
        for variant, most in (("fp32", 1e-4), ("int8", 0.3)):
            for number, logits in enumerate(walk(export, variant, inputs, open_graph)):
                difference = np.abs(logits - expected[:, number].numpy()).max()
                assert difference < most, f"{variant} of {rows} x {tokens}, exit {number}"


@pytest.mark.parametrize("name", tiny.with_slow([*TEXT, *IMAGES], *FAST))
def test_every_seam_holds(name: str, exported: Callable[[str], Exported]) -> None:
    export = exported(name)
    samples = None if name in IMAGES else SENTENCES[::4]
    report = verify(ExportableClassifier(export.checkpoint), export.folder, export.split, VARIANTS, samples)
    assert report.first_bad is None
    assert all(loss.agreement > 0.8 for loss in report.losses)


def test_distances_of_deberta_are_constants(exported: Callable[[str], Exported]) -> None:
    export = exported("deberta-v2")
    graph = onnx.load(export.folder / "segment_01.onnx").graph
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
    file = exported(name).folder / "segment_01.onnx"
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    fused = Counter(node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node)
    assert fused["FastGelu"] == 1 and not fused["Tanh"]
