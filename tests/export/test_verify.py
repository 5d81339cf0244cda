"""verify() accepts a right split, and names the first wrong tensor of another one."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from offramp.export.samples import SENTENCES
from offramp.export.verify import GRAPHS, TORCH, NotVerified, verify

BOTH = ("fp32", "int8")


@pytest.fixture
def copy(exported: Callable[[str], Any], tmp_path: Path) -> Any:
    """The BERT export in a folder of its own."""
    export = exported("bert")
    shutil.copytree(export.folder, tmp_path / "copy")
    return dataclasses.replace(export, folder=tmp_path / "copy")


@pytest.mark.parametrize("family", tiny.with_slow(tiny.EXPORTED, "bert"))
def test_every_family_holds_at_every_seam(family: str, exported: Callable[[str], Any]) -> None:
    export = exported(family)
    report = verify(export.source, export.folder, export.split, BOTH)
    assert report.first_bad is None
    named = {(seam.segment, seam.tensor) for seam in report.differences}
    assert named == {(segment.name, tensor.name) for segment in export.segments for tensor in segment.outputs}
    assert [loss.segment for loss in report.losses] == ["segment_00", "segment_01"]
    assert all(loss.agreement > 0.8 and loss.difference < 0.5 for loss in report.losses)


@pytest.mark.parametrize(
    ("segment", "module", "tensor"),
    [
        ("segment_00", "blocks.0.intermediate", "next_hidden"),
        ("segment_00", "heads.1.exit", "next_evidence"),
        ("segment_00", "policy", "gate"),
        ("segment_01", "blocks.0.output", "logits"),
    ],
)
def test_a_seeded_fault_is_named(
    copy: Any, break_weight: Callable[..., None], segment: str, module: str, tensor: str
) -> None:
    break_weight(copy.folder / f"{segment}.onnx", module)
    bad = verify(copy.source, copy.folder, copy.split, ("fp32",), SENTENCES[::6]).first_bad
    assert bad is not None and (bad.segment, bad.tensor) == (segment, tensor)
    assert bad.pair == GRAPHS
    assert f"{segment}, tensor {tensor}, torch whole vs ORT segments: max abs difference" in str(bad)


def test_a_fault_of_the_split_itself_is_told_from_one_of_the_export(copy: Any) -> None:
    split = copy.source.split("each")
    with torch.no_grad():
        split.segments[0].module.heads["1"].exit.bias += 1.0  # type: ignore[union-attr, operator]
    report = verify(copy.source, copy.folder, split, ("fp32",), SENTENCES[::6])
    assert report.first_bad is not None and report.first_bad.pair == TORCH
    with pytest.raises(NotVerified, match=f"segment_00, tensor logits, {TORCH}: .*allowed are 0.0001"):
        report.require_good()


def test_nan_is_no_small_difference(copy: Any, break_weight: Callable[..., None]) -> None:
    break_weight(copy.folder / "segment_01.onnx", "heads.1.exit", float("nan"))
    bad = verify(copy.source, copy.folder, copy.split, ("fp32",), texts=["fine"]).first_bad
    assert bad is not None and (bad.segment, bad.tensor) == ("segment_01", "logits")


def test_int8_is_told_and_not_judged(copy: Any, break_weight: Callable[..., None]) -> None:
    shutil.copyfile(copy.folder / "segment_00.onnx", copy.folder / "segment_00_int8.onnx")
    break_weight(copy.folder / "segment_00_int8.onnx", "heads.1.exit", 50.0)
    report = verify(copy.source, copy.folder, copy.split, BOTH, SENTENCES[::6])
    assert report.first_bad is None and report.losses[0].difference > 1


def test_fp16_is_told_as_int8_is_and_is_nearer(copy: Any) -> None:
    report = verify(copy.source, copy.folder, copy.split, ("fp32", "fp16", "int8"), SENTENCES[::6])
    losses = {(loss.segment, loss.variant): loss for loss in report.losses}
    for segment in ("segment_00", "segment_01"):
        half, eighth = losses[segment, "fp16"], losses[segment, "int8"]
        assert half.agreement == 1 and 0 < half.difference < eighth.difference / 2


def test_no_text_is_refused(copy: Any) -> None:
    with pytest.raises(ValueError, match="no text"):
        verify(copy.source, copy.folder, copy.split, ("fp32",), texts=[])


def test_the_sentences_are_of_many_lengths() -> None:
    words = [len(sentence.split()) for sentence in SENTENCES]
    assert len(SENTENCES) == len(set(SENTENCES)) == 32 and min(words) == 1 and max(words) > 100
    assert any(not sentence.isascii() for sentence in SENTENCES)
