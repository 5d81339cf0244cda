"""Tests of export.trt_compile: bundles compile with TensorRT-RTX on the CPU, broken graphs do not."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from click.testing import CliRunner
from onnx import helper, numpy_helper

from offramp.export import trt_compile
from offramp.export.describe import build_manifest
from offramp.export.segments import file_name
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import Variant
from offramp.runtime.engines.trt import VARIANTS
from offramp.runtime.engines.trt_build import Profile, build_profiles

TINY = Path(__file__).parents[1] / "data" / "tiny_bundle"
Change = Callable[[onnx.GraphProto], None]


def first_graph() -> Variant:
    return open_bundle(TINY).manifest.segments[0].variants["fp32"]


def compiled(
    change: Change | None = None,
    variant: Variant | None = None,
    known: Sequence[Profile] | None = None,
    targets: Sequence[str] = ("8.6",),
) -> trt_compile.CompiledGraph:
    """The first segment of the tiny bundle, changed."""
    known = build_profiles(open_bundle(TINY).manifest) if known is None else known
    return trt_compile.compile_graph(
        trt_compile.import_compiler(), changed(change), variant or first_graph(), known, targets
    )


def changed(change: Change | None) -> bytes:
    model = onnx.load(TINY / first_graph().file)
    if change is not None:
        change(model.graph)
    return bytes(model.SerializeToString())


def before_the_first_product(graph: onnx.GraphProto, op: str, domain: str = "") -> str:
    """An operator between a product and what it reads; gives the name of what it puts out."""
    number, product = next((n, node) for n, node in enumerate(graph.node) if node.op_type == "MatMul")
    graph.node.insert(number, helper.make_node(op, [product.input[0]], ["between"], domain=domain))
    product.input[0] = "between"
    return "between"


def vendor_op(graph: onnx.GraphProto) -> None:
    before_the_first_product(graph, "FastGelu", "com.microsoft")


def mixed_types(graph: onnx.GraphProto) -> None:
    names = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    weight = next(tensor for tensor in graph.initializer if tensor.name in names)
    half = numpy_helper.to_array(weight).astype(np.float16)
    weight.CopyFrom(numpy_helper.from_array(half, weight.name))


@pytest.mark.slow
def test_every_graph_of_a_bundle_compiles_for_every_target() -> None:
    results = list(trt_compile.compile_bundle(open_bundle(TINY)))
    assert [result.graph for result in results] == ["stem.onnx", *(f"segment_0{n}.onnx" for n in range(3))]
    assert all(r.size is not None and r.size > 1000 and not r.problem for r in results)


@pytest.mark.slow
def test_an_operator_of_a_vendor_is_refused_by_name() -> None:
    assert compiled().size is not None
    result = compiled(vendor_op)
    assert result.size is None and "FastGelu" in result.problem


def test_mixed_types_are_refused() -> None:
    result = compiled(mixed_types)
    assert result.size is None and "cannot" in result.problem


def test_a_profile_that_contradicts_the_graph_is_refused() -> None:
    first, *rest = first_graph().inputs
    crooked = replace(first_graph(), inputs=(replace(first, shape=(*first.shape[:-1], 5)), *rest))
    result = compiled(variant=crooked)
    assert result.size is None and "cannot compile" in result.problem


@pytest.mark.slow
def test_the_command_says_what_is_refused_and_what_is_damaged(tmp_path: Path) -> None:
    whole = CliRunner().invoke(trt_compile.main, [str(TINY), "--trt", "--target", "8.6"])
    assert whole.exit_code == 0, whole.output
    assert "segment_02.onnx: " in whole.output and "bytes" in whole.output
    bundle = tmp_path / "bundle"
    shutil.copytree(TINY, bundle)
    (bundle / first_graph().file).write_bytes(changed(mixed_types))
    damaged = CliRunner().invoke(trt_compile.main, [str(bundle), "--trt", "--target", "8.6"])
    assert damaged.exit_code == 2 and first_graph().file in damaged.output
    # As if it had been exported so.
    data, manifest = (bundle / first_graph().file).read_bytes(), bundle / "manifest.json"
    facts = json.loads(manifest.read_text())
    facts["files"][first_graph().file] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest.write_text(json.dumps(facts))
    refused = CliRunner().invoke(trt_compile.main, [str(bundle), "--trt", "--target", "8.6"])
    assert refused.exit_code == 1 and f"{first_graph().file}: refused" in refused.output


def test_a_profile_with_its_bounds_swapped_is_refused() -> None:
    swapped = [profile[::-1] for profile in build_profiles(open_bundle(TINY).manifest)]
    result = compiled(known=swapped)
    assert result.size is None and "MIN<=OPT<=MAX" in result.problem


def test_a_target_that_there_is_not_is_named() -> None:
    result = CliRunner().invoke(trt_compile.main, [str(TINY), "--trt", "--target", "9.9"])
    assert result.exit_code == 2 and "--target 9.9" in result.output and "8.6" in result.output


def test_one_target_that_cannot_have_it_is_enough_to_refuse() -> None:
    result = compiled(targets=("8.6", "7.5"))
    assert result.size is None and "SM75" in result.problem


# Three targets take three times as long as one.
EVERY = [pytest.param(family, trt_compile.TARGETS, marks=pytest.mark.slow) for family in tiny.EXPORTED]


@pytest.mark.parametrize(("family", "targets"), EVERY)
def test_what_is_exported_compiles(
    family: str, targets: tuple[str, ...], exported: Callable[[str], Any]
) -> None:
    """Every graph that is meant for TensorRT, under the profiles with which it is built on a device."""
    export = exported(family)
    known = build_profiles(build_manifest(export.source, export.split, ("fp32",)))
    for segment in export.segments:
        for name in VARIANTS if segment.blocks else VARIANTS[:1]:
            graph = Variant(file_name(segment.name, name), segment.inputs, segment.outputs)
            data = (export.folder / graph.file).read_bytes()
            result = trt_compile.compile_graph(trt_compile.import_compiler(), data, graph, known, targets)
            assert result.size is not None, result.problem


def test_without_the_compiler_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(trt_compile, "import_module", gone)
    result = CliRunner().invoke(trt_compile.main, [str(TINY), "--trt"])
    assert result.exit_code == 2 and "pip install tensorrt-rtx-cu13" in result.output
