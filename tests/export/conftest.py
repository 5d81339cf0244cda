"""Shared by the tests of export: exports are slow, so each family is exported once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import tiny
import torch
from transformers import AutoModel

from offramp.export.bundle import write_graphs
from offramp.export.classifier import ExportableClassifier
from offramp.export.decoder import split_decoder
from offramp.export.options import ExportOptions
from offramp.export.segments import Segment, SplitNetwork
from offramp.export.to_onnx import to_onnx
from offramp.models import EarlyExitNetwork, NetworkSpec
from offramp.models.decoder import DecoderNetwork
from offramp.runtime.engines.threads import share_global_pool
from offramp.runtime.inputs.images import ImageInput
from offramp.training.checkpoint import Checkpoint, TextFacts

# Pooling and policy inputs vary with the family: every kind is exported, but not every combination.
KINDS: dict[str, tuple[str, str | None]] = {
    "bert": ("mean", "both"),
    "electra": ("cls", "statistics"),
    "roberta": ("mean", None),
    "distilbert": ("cls", "state"),
    "mpnet": ("mean", "both"),
    "dinov2": ("mean", "both"),
}


@dataclass(frozen=True)
class Exported:
    """A tiny checkpoint, the split network and the folder of its graphs in fp32, int8 and fp16."""

    checkpoint: Checkpoint
    split: SplitNetwork
    folder: Path

    @property
    def source(self) -> ExportableClassifier:
        return ExportableClassifier(self.checkpoint)

    @property
    def segments(self) -> list[Segment]:
        """The stem and the segments."""
        return list(self.split)


def lively(network: EarlyExitNetwork) -> EarlyExitNetwork:
    """Give every weight its own value: fresh biases are all zero, and a swapped one would not show."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for exit_head in network.exits:
            exit_head.standardize.mean.normal_(0, 0.3, generator=generator)
            exit_head.standardize.variance.uniform_(0.5, 2.0, generator=generator)
    return network.eval()


def tiny_checkpoint(folder: Path, family: str) -> Checkpoint:
    """A checkpoint of two blocks in memory, its tokenizer in the folder."""
    pooling, policy = KINDS[family]
    if family in tiny.VISION:
        torch.manual_seed(0)
        base = AutoModel.from_config(tiny.VISION[family](num_hidden_layers=2))
        seeing = lively(EarlyExitNetwork(base, NetworkSpec(("red", "blue"), (1, 2), pooling, policy)))
        facts = ImageInput(16, 16, (16, 16), "bicubic", "RGB", 1 / 255, (0.5,) * 3, (0.5,) * 3)
        return Checkpoint(seeing, facts, None)
    tiny.tokenizer().save(str(folder / "tokenizer.json"))
    config = tiny.CONFIGS[family]()
    config.num_hidden_layers = 2  # every block costs seconds of exporting
    torch.manual_seed(0)
    spec = NetworkSpec(("negative", "positive"), (1, 2), pooling, policy)
    network = lively(EarlyExitNetwork(AutoModel.from_config(config), spec))
    return Checkpoint(network, TextFacts("", config.pad_token_id, 64), folder / "tokenizer.json")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Torch's workers spin while they wait: on networks this small they only take cores from others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    @cache
    def export(family: str) -> Exported:
        folder = tmp_path_factory.mktemp(family)
        checkpoint = tiny_checkpoint(folder, family)
        split = ExportableClassifier(checkpoint).split("each")
        for segment in split:
            write_graphs(segment, folder, ExportOptions(("fp32", "int8", "fp16")), weights_only=False)
        return Exported(checkpoint, split, folder)

    return export


@pytest.fixture(scope="session")
def portable_decoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any, Path]]:
    """By family: the model, its split (two segments: blocks 1-2 and 3), and the folder of the graphs.

    The graph that drafts is not among them: it is the head with fewer ids, and bundles have it.
    """

    @cache
    def export(family: str) -> tuple[Any, Any, Path]:
        model, folder = tiny.decoder(family), tmp_path_factory.mktemp(family)
        split = split_decoder(DecoderNetwork(model), "2", draft_ids=20, portable=True)
        for segment in split:
            if segment is not split.draft:
                to_onnx(segment, folder / f"{segment.name}.onnx")
        return model, split, folder

    return export


@pytest.fixture(scope="session")
def break_weight() -> Callable[..., None]:
    def change(file: Path, module: str, by: float = 0.5) -> None:
        """Change one weight of the first product of a module."""
        model = onnx.load(file)
        node = next(
            node
            for node in model.graph.node
            if node.name.startswith(module) and node.op_type in ("MatMul", "Gemm")
        )
        weight = next(value for value in model.graph.initializer if value.name in node.input)
        values = onnx.numpy_helper.to_array(weight).copy()
        values[0, 0] += by
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(model, file)

    return change


@pytest.fixture(scope="session")
def open_graph() -> Callable[[Path], Any]:
    def session(file: Path) -> Any:
        options = onnxruntime.SessionOptions()
        share_global_pool(options)  # earlier tests may have created the process's only thread pool
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    return session
