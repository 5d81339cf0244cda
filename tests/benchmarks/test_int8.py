"""Candidates of int8 write graphs that run and are close to fp32; rows that differ are counted."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny

from offramp.benchmarks.int8 import agreement, differences, parsed
from offramp.benchmarks.int8_candidates import CANDIDATES, TODAY, TOKEN, smoothed
from offramp.benchmarks.int8_candidates import open_session as open_graph
from offramp.export.classifier import ExportableClassifier
from offramp.export.to_onnx import to_onnx
from offramp.training.checkpoint import Checkpoint, TextFacts

pytestmark = pytest.mark.slow

FAST = ("one-scale", "one-scale-plain-norms", "token", "token-fused-norms", "token-plain-operators")


@pytest.fixture(scope="module")
def segment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    tiny.tokenizer().save(str(folder / "tokenizer.json"))
    checkpoint = Checkpoint(
        tiny.network("bert", policy=None), TextFacts("", 0, 64), folder / "tokenizer.json"
    )
    split = ExportableClassifier(checkpoint).split("each")
    to_onnx(split.segments[1], folder / "segment.onnx")
    return folder / "segment.onnx"


def inputs() -> dict[str, np.ndarray]:
    return {
        "hidden": np.random.default_rng(0).standard_normal((2, 9, 32), dtype=np.float32),
        "mask": np.zeros((2, 1, 1, 9), np.float32),
        "pool": np.full((2, 1, 9), 1 / 9, np.float32),
    }


@pytest.mark.parametrize("name", FAST)
def test_a_candidate_is_close_to_fp32(name: str, segment: Path, tmp_path: Path) -> None:
    CANDIDATES[name](segment, tmp_path / "small.onnx", [inputs()])
    check_close(segment, tmp_path / "small.onnx")


@pytest.mark.parametrize("name", [name for name in CANDIDATES if name not in FAST])
def test_a_slower_candidate_is_close_to_fp32(name: str, segment: Path, tmp_path: Path) -> None:
    # ONNX Runtime's quantizers open sessions that a process with a global pool, of an earlier test, refuses.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(CANDIDATES[name], segment, tmp_path / "small.onnx", [inputs()]).result()
    check_close(segment, tmp_path / "small.onnx")


def check_close(segment: Path, target: Path) -> None:
    full, small = (open_graph(file).run(["next_hidden"], inputs())[0] for file in (segment, target))
    assert 0 < np.abs(full - small).max() < 0.2


def test_smoothing_alone_changes_nothing(segment: Path) -> None:
    model = onnx.load(segment)
    names = [node.name for node in model.graph.node if node.op_type == "MatMul" and "blocks." in node.name]
    smoothed(model, names, [inputs()])
    assert sum(node.output[0].endswith("_smooth") for node in model.graph.node) == 4
    before, after = (
        open_graph(graph).run(["next_hidden"], inputs())[0] for graph in (segment, model.SerializeToString())
    )
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_rows_that_differ_are_counted() -> None:
    alone = [("a", 1, 0.5), ("b", 2, 0.75), ("a", 3, 0.25)]
    among = [("a", 1, 0.5), ("a", 2, 0.75), ("a", 4, 0.5)]
    counted = differences(alone, among)
    assert counted == {"label": 1, "exit": 1, "score in any bit": 1, "largest change of a score": "0.25"}


def test_agreement_is_with_fp32_and_accuracy_with_the_data() -> None:
    logits = np.zeros((2, 3, 2))
    right = {"label": np.array([0, 1]), "exit": np.array([1, 2]), "logits": logits}
    actual = {"label": np.array([0, 0]), "exit": np.array([1, 3]), "logits": logits + np.array([0, 1])}
    row = agreement("token", actual, right, np.array([1, 0]))
    assert (row["label"], row["exit"], row["label at full depth"]) == (0.5, 0.5, 0.0)
    assert (row["accuracy"], row["accuracy at full depth"], row["mean exit"]) == (0.5, 0.5, 2.0)
    assert row["logit difference"] == 0.5


def test_todays_is_always_a_candidate() -> None:
    assert parsed(TOKEN) == [TODAY, TOKEN]
    with pytest.raises(Exception, match="'nonsense' is not one of"):
        parsed("nonsense")
