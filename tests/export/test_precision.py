"""int8 and int4: smaller, close, and exits and policies stay fp32. fp16 has its own file, test_fp16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from offramp.export.precision import (
    needs_reduced_range,
    to_fp16,
    to_int4,
    to_int8,
    to_small_weights,
    write_variant,
)

VNNI, PLAIN = "flags : fpu avx2 avx512f avx512_vnni", "flags : fpu avx2 fma"


def test_products_of_blocks_alone_are_int8(exported: Callable[[str], Any]) -> None:
    graph = onnx.load(exported("bert").folder / "segment_00_int8.onnx").graph
    integer = [node.name for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(integer) == 4 and all(name.startswith("blocks.") for name in integer)
    kinds = {value.name: value.data_type for value in graph.initializer}
    heads = [node for node in graph.node if node.name.startswith(("heads.", "policy"))]
    assert heads and all(kinds.get(name, 1) in (1, 6, 7) for node in heads for name in node.input)


def test_scales_are_per_channel(exported: Callable[[str], Any]) -> None:
    graph = onnx.load(exported("bert").folder / "segment_00_int8.onnx").graph
    scales = [value for value in graph.initializer if value.name.endswith("_scales")]
    assert scales and all(list(value.dims) in ([96], [32], [64]) for value in scales)


@pytest.mark.slow  # MPNet, the second exported family
def test_it_is_smaller_and_its_logits_are_close(
    exported: Callable[[str], Any], open_graph: Callable[[Path], Any], tmp_path: Path
) -> None:
    export = exported("mpnet")
    share = to_int8(export.folder / "segment_01.onnx", tmp_path / "out.onnx")
    assert share < 0.7  # a quarter of the weights; in a block this small, half of the file is not weights
    generator = np.random.default_rng(0)
    inputs = {
        "hidden": generator.standard_normal((2, 9, 32), dtype=np.float32),
        "mask": np.zeros((2, 1, 1, 9), np.float32),
        "pool": np.full((2, 1, 9), 1 / 9, np.float32),
        "position_bias": np.zeros((1, 4, 9, 9), np.float32),
    }
    sessions = [open_graph(file) for file in (export.folder / "segment_01.onnx", tmp_path / "out.onnx")]
    full, small = (session.run(["logits"], inputs)[0] for session in sessions)
    assert 0 < np.abs(full - small).max() < 0.1


def test_nothing_is_left_in_the_current_folder(
    exported: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    to_int8(exported("bert").folder / "segment_00.onnx", tmp_path / "out.onnx")
    assert not list((tmp_path / "cwd").iterdir())


def test_reduced_range_keeps_to_seven_bits(exported: Callable[[str], Any], tmp_path: Path) -> None:
    source = exported("bert").folder / "segment_00.onnx"
    largest = {}
    for reduced in (True, False):
        to_int8(source, tmp_path / "out.onnx", reduce_range=reduced)
        values = [
            onnx.numpy_helper.to_array(value) for value in onnx.load(tmp_path / "out.onnx").graph.initializer
        ]
        largest[reduced] = max(
            int(np.abs(value.astype(int)).max()) for value in values if value.dtype == np.int8
        )
    assert largest[True] <= 64 < largest[False]


@pytest.mark.slow
def test_a_stem_has_nothing_to_quantize(exported: Callable[[str], Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stem\.onnx: it has no product of a block"):
        to_int8(exported("electra").folder / "stem.onnx", tmp_path / "out.onnx")


@pytest.mark.parametrize(
    ("machine", "flags", "reduced"),
    [
        ("x86_64", VNNI, False),
        ("x86_64", "flags : avx_vnni", False),
        ("AMD64", PLAIN, True),
        ("x86_64", "", True),
        ("aarch64", "", False),
    ],
)
def test_machines_that_need_the_reduced_range(machine: str, flags: str, reduced: bool) -> None:
    assert needs_reduced_range(machine, flags) is reduced


def test_int4_is_in_products_of_blocks_alone_and_close(
    exported: Callable[[str], Any], open_graph: Callable[[Path], Any], tmp_path: Path
) -> None:
    export = exported("bert")
    source = export.folder / "segment_01.onnx"
    assert write_variant("int4", source, tmp_path / "out.onnx") < 1
    graph = onnx.load(tmp_path / "out.onnx").graph
    small = [node.name for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(small) == 6 and all("blocks." in name for name in small)
    generator = np.random.default_rng(0)
    inputs = {
        "hidden": generator.standard_normal((2, 9, 32), dtype=np.float32),
        "mask": np.zeros((2, 1, 1, 9), np.float32),
        "pool": np.full((2, 1, 9), 1 / 9, np.float32),
    }
    full, four = (
        open_graph(file).run(["logits"], {k: inputs[k] for k in inputs})[0]
        for file in (source, tmp_path / "out.onnx")
    )
    assert 0 < np.abs(full - four).max() < 0.3


def test_what_is_no_segment_and_no_variant(exported: Callable[[str], Any], tmp_path: Path) -> None:
    for make in (to_fp16, to_int4):
        with pytest.raises(ValueError, match="it has no product of a block"):
            make(exported("bert").folder / "stem.onnx", tmp_path / "out.onnx")
    with pytest.raises(ValueError, match="choose one of fp16, int8, int4"):
        write_variant("fp8", exported("bert").folder / "segment_00.onnx", tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_table_that_stem_and_head_share_is_small_in_the_head(
    name: str, open_graph: Callable[[Path], Any], tmp_path: Path
) -> None:
    # What the exporter writes of a table too large for it to fold its transpose.
    table = np.random.default_rng(0).standard_normal((60, 64), dtype=np.float32)
    parts = [
        onnx.helper.make_node("Gather", ["table", "ids"], ["hidden"], name="stem/Gather"),
        onnx.helper.make_node("Transpose", ["table"], ["turned"], name="head.words/Transpose", perm=[1, 0]),
        onnx.helper.make_node("MatMul", ["hidden", "turned"], ["logits"], name="head.words/MatMul"),
    ]
    ids, logits = (
        onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [1, 5]),
        onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1, 5, 60]),
    )
    graph = onnx.helper.make_graph(
        parts, "whole", [ids], [logits], [onnx.numpy_helper.from_array(table, "table")]
    )
    imports = [onnx.helper.make_opsetid("", 21)]
    onnx.save(onnx.helper.make_model(graph, ir_version=10, opset_imports=imports), tmp_path / "whole.onnx")
    to_small_weights(name, tmp_path / "whole.onnx", tmp_path / "small.onnx")
    graph = onnx.load(tmp_path / "small.onnx").graph
    assert [node.op_type for node in graph.node] == ["Gather", "MatMulNBits"]
    assert {fact.name: fact.i for fact in graph.node[1].attribute}["bits"] == 8  # a head, in either variant
    inputs = {"ids": np.array([[3, 1, 4, 1, 5]])}
    full, few = (open_graph(tmp_path / f"{file}.onnx").run(None, inputs)[0] for file in ("whole", "small"))
    assert 0 < np.abs(full - few).max() < 0.6
    assert (few.argmax(-1) == inputs["ids"]).all()  # a token is most similar to itself
