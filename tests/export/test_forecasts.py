"""Forecasts in graphs, and the simulated precisions against the graphs that really have them."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

from offramp.export.classifier import ExportableClassifier, split_classifier
from offramp.export.cli import main as split_command
from offramp.export.describe import build_manifest
from offramp.export.precision import to_int4, to_int8
from offramp.export.segments import SplitNetwork
from offramp.export.to_onnx import to_onnx
from offramp.export.verify import verify
from offramp.models import EarlyExitNetwork
from offramp.models.forecasts import Forecast
from offramp.models.precision import in_precision
from offramp.runtime.bundle.checks import read_manifest
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import FileFact
from offramp.training.checkpoint import save_checkpoint

pytestmark = pytest.mark.slow  # exports and verifies a network with forecasts


def with_forecasts(network: EarlyExitNetwork) -> EarlyExitNetwork:
    """The network with random forecasts for fp32, int6 and int8, of statistics and compact features."""
    torch.manual_seed(3)
    ahead, size = range(len(network.spec.exits) - 1, 0, -1), network.hidden_size
    network.forecasts = torch.nn.ModuleList(Forecast(3, exits, "both", size) for exits in ahead)
    network.spec = dataclasses.replace(
        network.spec, forecast=("fp32", "int6", "int8"), forecast_inputs="both"
    )
    return network.eval()


@pytest.fixture(scope="module")
def split_with_forecasts(
    exported: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """The tiny MPNet with a policy and forecasts, split for fp32 and int8 and exported."""
    source = exported("mpnet")
    checkpoint = dataclasses.replace(source.checkpoint, network=with_forecasts(source.checkpoint.network))
    folder = tmp_path_factory.mktemp("forecasts")
    split = split_classifier(checkpoint.network, variants=("fp32", "int8"))
    for name in ("stem", "segment_01", "segment_01_int8"):  # as they were: a forecast changes nothing there
        shutil.copyfile(source.folder / f"{name}.onnx", folder / f"{name}.onnx")
    to_onnx(split.segments[0], folder / "segment_00.onnx")
    to_int8(folder / "segment_00.onnx", folder / "segment_00_int8.onnx")
    yield ExportableClassifier(checkpoint), split, folder
    checkpoint.network.forecasts = torch.nn.ModuleList()  # the network is shared with other tests
    checkpoint.network.spec = dataclasses.replace(
        checkpoint.network.spec, forecast=(), forecast_inputs="statistics"
    )


def test_graphs_say_what_torch_forecasts(
    split_with_forecasts: tuple[ExportableClassifier, SplitNetwork, Path],
) -> None:
    source, split, folder = split_with_forecasts
    report = verify(source, folder, split, ("fp32", "int8"))
    assert report.first_bad is None
    seams = [seam for seam in report.differences if seam.tensor == "forecast"]
    assert len(seams) == 2 and max(seam.difference for seam in seams) < 1e-5
    shapes = [[t.shape for t in segment.outputs if t.name == "forecast"] for segment in split]
    assert shapes == [[], [("batch", 2 * (1 + 2 * 1))], []]


def test_a_wrong_forecast_is_found(
    split_with_forecasts: tuple[ExportableClassifier, SplitNetwork, Path],
) -> None:
    source, split, folder = split_with_forecasts
    with torch.no_grad():
        source.network.forecasts[0].last.bias[-1] += 0.1  # of int8 to the last exit: kept
        bad = verify(source, folder, split, ("fp32", "int8")).first_bad
        source.network.forecasts[0].last.bias[-1] -= 0.1
    assert bad is not None and bad.tensor == "forecast"


def test_the_manifest_says_what_steps_cost(
    split_with_forecasts: tuple[ExportableClassifier, SplitNetwork, Path],
) -> None:
    source, split, _ = split_with_forecasts
    costs = build_manifest(source, split, ("fp32", "int8")).costs["bops"]
    assert costs.tokens > 0 and list(costs.steps) == ["fp32", "int8"]
    for segment, full, small in zip(split.segments, costs.steps["fp32"], costs.steps["int8"], strict=True):
        assert full == segment.macs.of(costs.tokens) * 1024
        assert full / 16 < small < full / 2
    plain = ExportableClassifier(dataclasses.replace(source.checkpoint, network=tiny.network("bert")))
    plain = build_manifest(plain, plain.split("each"), ("fp32",))
    assert plain.costs == {} and '"costs"' not in plain.to_json()


def test_a_manifest_whose_costs_or_forecasts_do_not_fit_is_refused(
    split_with_forecasts: tuple[Any, Any, Path],
) -> None:
    source, split, _ = split_with_forecasts
    manifest = build_manifest(source, split, ("fp32", "int8"))
    segments = (manifest.stem, *manifest.segments)
    graphs = (graph for segment in segments for graph in segment.variants.values())
    names = ["tokenizer.json", *(graph.file for graph in graphs)]
    whole = dataclasses.replace(manifest, files=dict.fromkeys(names, FileFact("0" * 64, 1)))
    text = whole.to_json()
    assert read_manifest(text, source="good").costs == manifest.costs
    for change, named in [
        (lambda value: value["costs"]["bops"]["steps"].pop("int8"), r"costs\['bops'\]\.steps"),
        (lambda value: value["costs"]["bops"]["steps"]["int8"].pop(), "one a segment"),
        (lambda value: value["costs"]["bops"].update(tokens=0), "tokens"),
        (lambda value: [_set_columns(graph, 7) for graph in _forecasts(value)], "forecast must be"),
    ]:
        value = json.loads(text)
        change(value)
        with pytest.raises(ValueError, match=named):
            read_manifest(json.dumps(value), source="bad")


def _set_columns(tensor: dict[str, Any], columns: int) -> None:
    tensor["shape"][1] = columns


def _forecasts(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Output `forecast` of the first segment in each variant."""
    outputs = (graph["outputs"] for graph in manifest["segments"][0]["variants"].values())
    return [tensor for tensors in outputs for tensor in tensors if tensor["name"] == "forecast"]


def test_variants_without_a_forecast_are_refused(split_with_forecasts: tuple[Any, Any, Path]) -> None:
    for variant in ("fp16", "int4"):
        with pytest.raises(ValueError, match=f"no error forecast for variant {variant}"):
            split_with_forecasts[0].split("each", ("fp32", variant))


@pytest.mark.parametrize(
    ("family", "variant"),
    [("bert", "int8"), ("mpnet", "int8"), ("bert", "int4")],
)
def test_simulated_precisions_are_what_onnx_runtime_computes(
    exported: Callable[[str], Any],
    open_graph: Callable[[Path], Any],
    tmp_path: Path,
    family: str,
    variant: str,
) -> None:
    """Same weights, same input, one row. The arithmetic is the same up to the last digits of float32; where
    these lie on a boundary between two levels, an activation falls to the other one, which shows as a small
    part of what quantizing does at all.
    """
    export = exported(family)
    network, source = export.checkpoint.network, export.folder / "segment_00.onnx"
    target = tmp_path / "out.onnx"
    if variant == "int8":
        to_int8(source, target, reduce_range=False)
    else:
        to_int4(source, target)
    blocks = in_precision(network.blocks, variant)
    session, names = open_graph(target), [tensor.name for tensor in export.segments[1].inputs]
    torch.manual_seed(0)
    far, wrong = [], []
    for length in (3, 7, 12):
        ids = torch.randint(5, 60, (1, length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids * 0}
        with torch.no_grad():
            hidden, context = network.stem(inputs)
            after = network.family.run_block(blocks[0], hidden, context)
            simulated = network.classify(0, network.pooled(0, after, context)).numpy()
            plain = network.family.run_block(network.blocks[0], hidden, context)
            full = network.classify(0, network.pooled(0, plain, context)).numpy()
            made_by_stem = {"hidden": hidden, **context, "evidence": torch.zeros(1, 2)}
        (real,) = session.run(["logits"], {name: made_by_stem[name].numpy() for name in names})
        far.append(np.abs(simulated - real).max())
        wrong.append(np.abs(full - real).max())
    assert max(far) < 2e-3 and max(far) < 0.2 * max(wrong), (far, wrong)


def test_ee_split_measures_points_of_images_with_forecasts(
    exported: Callable[[str], Any], tmp_path: Path
) -> None:
    checkpoint = copy.deepcopy(exported("dinov2").checkpoint)
    with_forecasts(checkpoint.network)
    save_checkpoint(checkpoint, tmp_path / "ckpt")
    tiny.image_folder(tmp_path / "data", train=2, dev=8, test=2)
    words = [str(tmp_path / "ckpt"), "--out", str(tmp_path / "bundle"), "--dev", str(tmp_path / "data/dev")]
    done = CliRunner().invoke(split_command, words)
    assert done.exit_code == 0, done.output
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert set(manifest.costs) == {"bops", "ms"} and "default" in {point.name for point in manifest.points}
