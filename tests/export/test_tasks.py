"""Segments of the tasks beside classification are the network, as their monolith is, and they compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_tasks
import torch

from offramp.export.bundle import write_bundle
from offramp.export.classifier import ExportableClassifier, split_classifier
from offramp.export.monolith import join_segments
from offramp.export.options import ExportOptions
from offramp.export.trt_compile import compile_bundle
from offramp.models.tasks import EMBEDDING, MULTI_LABEL, REGRESSION, TOKENS
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import NEXT
from offramp.training.checkpoint import Checkpoint, TextFacts


def inputs(task: str, family: str = "bert") -> dict[str, torch.Tensor]:
    given = tiny.inputs(family)
    if task == TOKENS:
        starts = given["attention_mask"].clone()
        starts[:, 0] = 0
        return given | {"word_starts": starts}
    return given


@torch.no_grad()
def walk(split: Any, values: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """What every segment outputs at full depth."""
    given = []
    for segment in (split.stem, *split.segments):
        outputs = segment.module(*segment.reads(values))
        named = {tensor.name: value for tensor, value in zip(segment.outputs, outputs, strict=True)}
        values = values | {name.removeprefix(NEXT): value for name, value in named.items()}
        given.append(named)
    return given[1:]


@pytest.mark.parametrize(
    ("task", "ensemble"),
    [*((task, False) for task in tiny_tasks.NAMES), (MULTI_LABEL, True), (TOKENS, True)],
)
@torch.no_grad()
def test_the_answers_of_the_segments_are_those_of_the_network(task: str, ensemble: bool) -> None:
    network, values = tiny_tasks.network(task, ensemble=ensemble), inputs(task)
    expected = network(values).logits  # [rows or words, exits, outputs]
    for number, outputs in enumerate(walk(split_classifier(network), dict(values))):
        answer = outputs["answer"]
        if task == TOKENS:
            answer = answer[values["word_starts"].bool()]
        torch.testing.assert_close(answer, expected[:, number], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rules_of_several_labels_read_the_one_next_to_its_threshold() -> None:
    network = tiny_tasks.network(MULTI_LABEL, thresholds=(0.5, 0.3, 0.5))
    outputs = walk(split_classifier(network), inputs(MULTI_LABEL))[0]
    distances = (outputs["answer"] - torch.tensor([0.0, np.log(0.3 / 0.7), 0.0])).abs()
    torch.testing.assert_close(outputs["logits"][:, 0], distances.amin(1), check_dtype=False)
    assert not outputs["logits"][:, 1].any()


@torch.no_grad()
def test_rules_of_tokens_read_the_least_certain_word() -> None:
    network, values = tiny_tasks.network(TOKENS), inputs(TOKENS)
    outputs = walk(split_classifier(network), dict(values))[1]
    for row in range(2):
        words = outputs["answer"][row, values["word_starts"][row].bool()].topk(2, -1).values
        assert float(outputs["logits"][row, 0]) == pytest.approx(
            float((words[:, 0] - words[:, 1]).min()), abs=1e-4
        )


def test_numbers_have_no_logits() -> None:
    for task in (REGRESSION, EMBEDDING):
        names = [tensor.name for tensor in split_classifier(tiny_tasks.network(task)).segments[0].outputs]
        assert names == ["next_hidden", "answer"]


@pytest.mark.parametrize("task", tiny_tasks.NAMES)
@torch.no_grad()
def test_a_graph_with_all_exits_gives_all_answers(task: str) -> None:
    network, values = tiny_tasks.network(task), inputs(task)
    split = split_classifier(network)
    whole = join_segments(split)
    outputs = whole.module(*whole.reads(values))
    answers = dict(zip([tensor.name for tensor in whole.outputs], outputs, strict=True))["answer"]
    expected = torch.stack([outputs["answer"] for outputs in walk(split, dict(values))], 1)
    torch.testing.assert_close(answers, expected)


@pytest.mark.slow  # exports
@pytest.mark.parametrize("task", tiny_tasks.NAMES)
def test_every_graph_compiles_for_tensorrt(task: str, tmp_path: Path) -> None:
    """Exits that read each token, attend to tokens or are a model's own; those with labels, and blocks and
    stems of other families: test_families_export and test_trt_compile.
    """
    tiny.tokenizer().save(str(tmp_path / "tokenizer.json"))
    facts = TextFacts("", tiny.CONFIGS["bert"]().pad_token_id, 64)
    network = tiny_tasks.network(task, blocks=2)
    source = ExportableClassifier(Checkpoint(network, facts, tmp_path / "tokenizer.json"))
    write_bundle(source, source.split("each"), tmp_path / "bundle", ExportOptions(("fp32", "fp16")))
    results = list(compile_bundle(open_bundle(tmp_path / "bundle")))
    assert {result.graph: result.problem for result in results if result.size is None} == {}
    assert len(results) == 1 + 2 * 2, "the stem, and two segments in two precisions"
